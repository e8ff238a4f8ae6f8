"""Journals: one line for each committed block, each worker in a file of its own, so that no file has two writers.

A line is JSON: {"crc32": ..., "entry": {...}}. A last line that is torn was never committed; any other damage is an error.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._errors import StoreError
from . import durable

FOLDER = "journal"


@dataclass(frozen=True)
class Entry:
    """What one line says: a block is in the store, or (with `forget`) no longer counts."""

    block: int
    rows: tuple[int, int]
    files: dict[str, tuple[int, str, int]] = field(default_factory=dict)
    """Path below the store -> (bytes, kind of checksum, checksum)."""
    forget: bool = False
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
    lines: list[Entry] = []
    remarks: list[str] = []
    for path in sorted((store / FOLDER).glob("*.jsonl")):
        found, torn = _lines(path)
        lines += found
        if torn:
            remarks.append(f"{FOLDER}/{path.name} ends in a torn line: its block was not committed")
    return _standing(lines), remarks


def _standing(lines: list[Entry]) -> dict[int, Entry]:
    """Each block's entry; a block that was forgotten (order within all journals: `info["time"]`) may be committed again."""
    entries: dict[int, Entry] = {}
    for entry in sorted(lines, key=lambda e: float(e.info.get("time", 0))):
        if entry.forget:
            entries.pop(entry.block, None)
        elif entry.block in entries:
            raise StoreError(
                f"block {entry.block} was committed twice",
                got=f"rows {entry.rows[0]} to {entry.rows[1]} in two lines of the journals",
                expected="one line",
                hint="partials verify",
            )
        else:
            entries[entry.block] = entry
    return entries


def _lines(path: Path) -> tuple[list[Entry], bool]:
    raw = path.read_bytes()
    *whole, rest = raw.split(b"\n")
    entries = []
    for number, line in enumerate(whole, 1):
        entry = _entry(line)
        if entry is None:
            raise StoreError(
                f"line {number} of {FOLDER}/{path.name} is damaged",
                got=line[:60].decode("utf-8", "replace"),
                expected="a line as it was written",
                hint="remove that line: its block is then computed again",
            )
        entries.append(entry)
    return entries, bool(rest)


def _entry(line: bytes) -> Entry | None:
    try:
        record = json.loads(line)
        entry = record["entry"]
        if zlib.crc32(_dump(entry).encode()) != record["crc32"]:
            return None
        files = {str(key): (int(size), str(kind), int(check)) for key, (size, kind, check) in entry["files"].items()}
        start, stop = entry["rows"]
        return Entry(int(entry["block"]), (int(start), int(stop)), files, bool(entry["forget"]), dict(entry["info"]))
    except (ValueError, KeyError, TypeError):
        return None


def _cut_torn_line(path: Path) -> None:
    raw = path.read_bytes()
    if raw and not raw.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(raw.rfind(b"\n") + 1)
            os.fsync(file.fileno())


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def escaped(name: str) -> str:
    """A name as one part of a path: letters, digits, `-`, `_` as they are, anything else as %XX."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda m: "".join(f"%{byte:02X}" for byte in m.group().encode()), name) or "%"
