"""Journals: one line for each committed block, each worker in a file of its own, so that no file has two writers.

A line is JSON: {"crc32": ..., "entry": {...}}. A last line that is torn was never committed; any other damage is an error.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._errors import StoreError
from . import durable
from .metadata import loads

FOLDER, LONGEST_LINE = "journal", 2**20


@dataclass(frozen=True)
class Entry:
    """What one line says: a block is in the store, or (with `forget`) that other lines no longer count."""

    block: int
    rows: tuple[int, int]
    files: dict[str, tuple[int, str, int]] = field(default_factory=dict)
    """Path below the store -> (bytes, kind of checksum, checksum)."""
    forget: tuple[str, ...] = ()
    """The ids of lines that no longer count; then there are no files."""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    info: dict[str, Any] = field(default_factory=dict)
    """Seconds, method, threads, versions, rows that are not finite, the digest of the inputs."""


class Journal:
    """One worker's file, for appending."""

    def __init__(self, store: Path, worker: str) -> None:
        self.path = store / FOLDER / f"{escaped(worker)}.jsonl"
        if self.path.exists():
            _cut_torn_line(self.path)

    def append(self, entry: Entry) -> None:
        text = _dump(asdict(entry))
        durable.append(self.path, (_dump({"crc32": zlib.crc32(text.encode()), "entry": json.loads(text)}) + "\n").encode())


def read(store: Path) -> tuple[dict[int, Entry], list[str]]:
    """(the entry that holds for each block, remarks about torn lines).

    Raises
    ------
    StoreError
        where a line is damaged, or two workers committed the same block.
    """
    lines: list[tuple[Entry, str]] = []
    remarks: list[str] = []
    for path in sorted((store / FOLDER).glob("*.jsonl")):
        found, torn = _lines(path)
        lines += [(entry, path.name) for entry in found]
        if torn:
            remarks.append(f"{FOLDER}/{path.name} ends in a torn line: its block was not committed")
    return _standing(lines), remarks


def _standing(lines: list[tuple[Entry, str]]) -> dict[int, Entry]:
    """Each block's entry: of the lines that have not been forgotten. (Lines are named by their ids: clocks may differ.)"""
    forgotten = {id for entry, _ in lines for id in entry.forget}
    entries: dict[int, tuple[Entry, str]] = {}
    for entry, file in lines:
        if entry.forget or entry.id in forgotten:
            continue
        if entry.block in entries:
            raise StoreError(
                f"block {entry.block} was committed twice",
                got=f"a line in {FOLDER}/{entries[entry.block][1]} and one in {FOLDER}/{file}",
                expected="one line",
                hint="remove one of the two lines, then partials verify",
            )
        entries[entry.block] = entry, file
    return {block: entry for block, (entry, _) in entries.items()}


def _lines(path: Path) -> tuple[list[Entry], bool]:
    """(entries, whether the last line is torn), a line in memory at a time."""
    if path.is_symlink() or not path.is_file():
        raise StoreError(f"{path} cannot be read", got="a link, or no file", expected="a journal")
    entries: list[Entry] = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                return entries, True
            entry = _entry(line)
            if entry is None:
                raise StoreError(
                    f"line {number} of {FOLDER}/{path.name} is damaged",
                    got=line[:60].decode("utf-8", "replace"),
                    expected="a line as it was written",
                    hint="remove that line: its block is then computed again",
                )
            entries.append(entry)
    return entries, False


def _entry(line: bytes) -> Entry | None:
    try:
        record = loads(line)
        entry = record["entry"]
        if zlib.crc32(_dump(entry).encode()) != record["crc32"]:
            return None
        block, rows, files, info = entry["block"], entry["rows"], entry["files"], entry["info"]
        numbers = [block, *rows, *(n for size, _, check in files.values() for n in (size, check))]
        words = [entry["id"], *entry["forget"], *(kind for _, kind, _ in files.values())]
        sane = all(type(n) is int and 0 <= n < 2**63 for n in numbers) and all(isinstance(word, str) for word in words)
        if not sane or len(rows) != 2 or not isinstance(info, dict):
            return None
        named = {str(key): (size, kind, check) for key, (size, kind, check) in files.items()}
        return Entry(block, (rows[0], rows[1]), named, tuple(entry["forget"]), entry["id"], info)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _cut_torn_line(path: Path) -> None:
    """Take off what a killed process has begun."""
    with path.open("r+b") as file:
        size = whole = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LONGEST_LINE))
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            whole = size - len(tail) + tail.rfind(b"\n") + 1
            file.truncate(whole)
            os.fsync(file.fileno())


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def escaped(name: str) -> str:
    """A name as one part of a path: letters, digits, `-`, `_` as they are, anything else as %XX."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda m: "".join(f"%{byte:02X}" for byte in m.group().encode()), name) or "%"
