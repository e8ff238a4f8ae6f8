"""Writing a store: its metadata once, then block after block, in any order and by any number of workers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from .._errors import StoreError
from . import checksum, durable, fingerprint, journal
from .format import LARGEST_HEADER, Array, group
from .lock import FOLDER as LOCKS
from .lock import Locks
from .metadata import CONFIG, VERSION, array_of, config_of, within


class Writer:
    """A store that is being written by worker `rank` of `world`.

    `arrays` are its arrays; `identity` is the fingerprint that a resumed run must have; `config` is kept beside the results.
    """

    def __init__(
        self,
        path: Path,
        arrays: Sequence[Array],
        identity: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        rank: int = 0,
        world: int = 1,
        resume: bool = True,
    ) -> None:
        self.path, self.arrays = path, {a.name: a for a in arrays}
        try:
            self._open(identity, config, rank, world, resume)
        except OSError as error:
            raise durable.refused(path, error) from error

    def _open(self, identity: Mapping[str, Any], config: Mapping[str, Any], rank: int, world: int, resume: bool) -> None:
        path = self.path
        if _existing(path) and not resume:
            raise StoreError(
                f"{path} holds a store already", got="a run into it", expected="a new folder", hint="--resume to go on with it"
            )
        if not _existing(path):
            _demand_empty(path, self.arrays)
        path.mkdir(parents=True, exist_ok=True)
        for name in (LOCKS, journal.FOLDER):
            within(path, name)
        self.locks = Locks(path, rank, world, lambda: durable.sweep(path))
        try:
            with self.locks.alone():  # (workers that come at the same moment: one makes the store, the others find it)
                if not _existing(path):
                    self._create(identity, config)
            self._demand_same(identity)
            self.done, self.remarks = journal.read(path)
            self.remarks += self.locks.remarks
            self.demand_whole()
            self.journal = journal.Journal(path, f"worker-{rank}-of-{world}")
        except BaseException:
            self.locks.release()
            raise

    def write(self, block: int, rows: tuple[int, int], values: Mapping[str, numpy.ndarray], info: Mapping[str, Any]) -> None:
        """Commit one block: its shards, then its line."""
        files = self.shards(block, values)
        if rows[1] > self.arrays["values"].shape[0]:
            self._grow(rows[1], block + 1)
        self.commit(block, rows, files, info)

    def shards(self, block: int, values: Mapping[str, numpy.ndarray]) -> dict[str, tuple[int, str, int]]:
        """Write a block's shards; what its line will say of each. A worker without a journal of its own stops here."""
        return {self.arrays[name].key(block): write_shard(self.path, self.arrays[name], block, part) for name, part in values.items()}

    def commit(self, block: int, rows: tuple[int, int], files: dict[str, tuple[int, str, int]], info: Mapping[str, Any]) -> None:
        """The line that makes a block count."""
        entry = journal.Entry(block, rows, files, info={**info, "time": time.time()})
        self.journal.append(entry)
        self.done[block] = entry

    def add(self, a: Array, values: numpy.ndarray) -> None:
        """A further array of one block: a reduction's result."""
        with self.locks.alone():
            write_shard(self.path, a, 0, values)
            durable.write(self.path / a.name / "zarr.json", [a.metadata().encode()])

    def sweep(self) -> None:
        """Remove what killed processes have left aside: when all blocks are committed, whoever still writes one has been given up."""
        if self.locks.sure:
            with self.locks.alone():
                durable.sweep(self.path)

    def demand_whole(self) -> None:
        """
        Raises
        ------
        StoreError
            where a committed block is none of the arrays', or a file of it is gone or has another size.
        """
        demand_known(self.path, self.arrays, self.done)
        for block, entry in self.done.items():
            for key, (size, _, _) in entry.files.items():
                place = within(self.path, key)
                found = place.stat().st_size if place.is_file() else None
                if found != size:
                    raise damaged(block, key, "no such file" if found is None else f"{found} bytes", f"{size} bytes", self.path)

    def close(self) -> None:
        self.locks.release()

    def _create(self, identity: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        record = {"version": VERSION, "fingerprint": dict(identity), "arrays": list(self.arrays), "config": dict(config)}
        texts = {f"{a.name}/zarr.json": a.metadata() for a in self.arrays.values()}
        texts[CONFIG] = json.dumps(record, indent=2, default=str, allow_nan=False)
        texts["zarr.json"] = group({"partials": VERSION})  # last: with it the store exists
        for key, text in texts.items():
            if len(text.encode()) > LARGEST_HEADER:
                raise StoreError(
                    f"the description of {key} is too large",
                    got=f"{len(text.encode())} bytes",
                    expected=f"at most {LARGEST_HEADER}",
                    hint="fewer parameters at once (wrt=)",
                )
            durable.write(within(self.path, key), [text.encode()])

    def _grow(self, samples: int, blocks: int) -> None:
        """Make the arrays longer, where the number of samples was not known beforehand."""
        for name, a in self.arrays.items():
            self.arrays[name] = grown = replace(a, shape=(blocks if a.name == "parts" else samples, *a.shape[1:]))
            durable.write(self.path / name / "zarr.json", [grown.metadata().encode()])

    def _demand_same(self, identity: Mapping[str, Any]) -> None:
        record = config_of(self.path)
        fingerprint.demand_same(record["fingerprint"], json.loads(json.dumps(dict(identity))), str(self.path))
        for name, a in self.arrays.items():
            kept = array_of(self.path, name)
            if (kept.shape[1:], kept.dtype, kept.block, kept.inner) != (a.shape[1:], a.dtype, a.block, a.inner):
                raise StoreError(
                    f"the array {name!r} of {self.path} has another form",
                    got=f"{a.shape} {a.dtype} in blocks of {a.block}",
                    expected=f"{kept.shape} {kept.dtype} in blocks of {kept.block}",
                    hint="another folder for this run; nothing was overwritten",
                )
            self.arrays[name] = kept if kept.shape[0] > a.shape[0] else a


def write_shard(path: Path, a: Array, block: int, values: numpy.ndarray) -> tuple[int, str, int]:
    """One shard, durably; (bytes, kind of checksum, checksum)."""
    if values.shape[1:] != a.shape[1:] or len(values) > a.block:
        raise StoreError(
            f"block {block} has another shape than the array {a.name!r}",
            got=f"{values.shape[1:]} for each of {len(values)} rows",
            expected=f"{a.shape[1:]} for each of at most {a.block}, as the first sample's",
            hint="outputs and parameters of one shape for all samples",
        )
    pieces = a.shard(values.astype(a.dtype, copy=False))
    kind, begun = checksum.kind(), threading.Event()
    with ThreadPoolExecutor(1) as beside:  # (the system copies and syncs while another core counts)
        check = beside.submit(_counted, pieces, kind, begun)
        try:
            durable.write(within(path, a.key(block)), _announced(pieces, begun))
        finally:
            begun.set()
    return sum(len(p) for p in pieces), kind, check.result()


def _announced(pieces: Iterable[Any], begun: threading.Event) -> Iterator[Any]:
    begun.set()
    yield from pieces


def _counted(pieces: Iterable[Any], kind: str, begun: threading.Event) -> int:
    """The checksum of the pieces, once they are being written: it keeps Python's lock, without which the writing cannot begin."""
    begun.wait()
    return checksum.of_pieces(pieces, kind)


def demand_known(path: Path, arrays: Mapping[str, Array], entries: Mapping[int, journal.Entry]) -> None:
    """
    Raises
    ------
    StoreError
        where a journal speaks of blocks, rows or files that the arrays do not have.
    """
    values = arrays["values"]
    for block, entry in entries.items():
        if block >= values.blocks or entry.rows != values.rows(block) or set(entry.files) != {a.key(block) for a in arrays.values()}:
            raise StoreError(
                f"the journal of {path} speaks of what the arrays do not have",
                got=f"block {block}, rows {entry.rows}, in {', '.join(map(repr, entry.files))}"[:200],
                expected=f"one of {values.blocks} blocks of {values.block} rows, in the arrays' own files",
                hint=f"remove the line of block {block} from its journal",
            )


def damaged(block: int, key: str, got: str, expected: str, path: Path) -> StoreError:
    return StoreError(
        f"block {block} of {path} is damaged: {key}",
        got=got,
        expected=expected,
        hint=f"partials verify {path} --forget, which lets a resumed run compute damaged blocks again",
    )


def _existing(path: Path) -> bool:
    return (path / "zarr.json").exists()


def _demand_empty(path: Path, arrays: Iterable[str]) -> None:
    """A run that was killed while it made the store leaves only its own beginnings; anything else is somebody's."""
    ours = {CONFIG, journal.FOLDER, LOCKS, *arrays}
    strange = sorted(p.name for p in path.iterdir() if p.name not in ours and not p.name.endswith(durable.PARTIAL)) if path.is_dir() else []
    if strange or path.is_file():
        raise StoreError(
            f"{path} is not empty and no store",
            got=f"it holds {', '.join(strange[:3])}" if strange else "a file",
            expected="a new or empty folder",
            hint="another folder",
        )
