"""Is a store what it says? Sizes, checksums, indices, journals; nothing in it is run, and nothing is mended unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from . import checksum, durable, journal
from .lock import Locks
from .metadata import array_of, within
from .reader import Store

CHUNK = 2**24


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which block (None where in none), and a sentence."""

    block: int | None
    what: str


@dataclass
class Verified:
    """What `partials verify` found."""

    store: Store
    blocks: int
    findings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    recomputed: int = 0

    @property
    def passed(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        return {
            "store": str(self.store.path),
            "passed": self.passed,
            "blocks": self.blocks,
            "missing": self.store.missing,
            "findings": [vars(finding) for finding in self.findings],
            "remarks": self.remarks,
            "recomputed": self.recomputed,
        }

    def __str__(self) -> str:
        lines = [repr(self.store), *(f"  note: {remark}" for remark in self.remarks)]
        lines += [f"  wrong: {finding.what}" for finding in self.findings]
        again = f", {self.recomputed} rows recomputed" if self.recomputed else ""
        return "\n".join([*lines, f"{self.blocks} blocks checked{again}: {'all right' if self.passed else f'{len(self.findings)} wrong'}"])


def verify(path: str | Path, tell: Callable[[str], None] = lambda _: None) -> Verified:
    """Read every shard of a store and compare it with its journal line."""
    store = Store(path)
    found = Verified(store, len(store.entries), remarks=list(store.remarks))
    for number, (block, entry) in enumerate(sorted(store.entries.items()), 1):
        tell(f"block {number} of {len(store.entries)}")
        for key, (size, kind, check) in entry.files.items():
            wrong = _wrong(within(store.path, key), size, kind, check)
            found.findings += [Finding(block, f"block {block}: {key} {wrong}")] if wrong else []
    if found.passed:
        found.findings += _result(store)
    found.remarks += [
        f"{p.relative_to(store.path)} was left by a run that was interrupted" for p in store.path.rglob(f"*{durable.PARTIAL}")
    ]
    return found


def forget(found: Verified) -> int:
    """Take damaged blocks out of the count, so that a resumed run computes them again; how many.

    Raises
    ------
    StoreError
        while a run is writing to the store.
    """
    blocks = sorted({finding.block for finding in found.findings if finding.block is not None})
    locks = Locks(found.store.path, 0, 1)
    try:
        record = journal.Journal(found.store.path, "verify")
        for block in blocks:
            entry = found.store.entries[block]
            record.append(journal.Entry(block, entry.rows, forget=(entry.id,)))
    finally:
        locks.release()
    return len(blocks)


def _result(store: Store) -> list[Finding]:
    """A reduction's result is no block's: it is compared with the parts that it is the sum of."""
    path = store.path / store.what
    if store.main.name != "parts" or not store.complete or not (path / "zarr.json").exists():
        return []
    a, expected = array_of(store.path, store.what), store.result().numpy()
    shard = within(store.path, a.key(0))
    if a.shape != expected.shape or a.dtype != store.main.dtype or not shard.is_file() or shard.stat().st_size != a.shard_bytes(a.shape[0]):
        return [Finding(None, f"the result {store.what!r} is not whole; `partials run ... --resume` puts it together again")]
    kept = numpy.fromfile(shard, a.dtype, expected.size).reshape(expected.shape)
    if numpy.array_equal(kept, expected, equal_nan=True):
        return []
    return [Finding(None, f"the result {store.what!r} is not the sum of its parts; `partials run ... --resume` puts it together again")]


def _wrong(path: Path, size: int, kind: str, check: int) -> str:
    if not path.is_file() or path.is_symlink():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, not {size}"
    with path.open("rb") as file:
        total = checksum.of_pieces(iter(lambda: file.read(CHUNK), b""), kind)
    if total == -1:
        return f"cannot be checked here: its checksum is {kind} (pip install 'partials[zarr]')"
    return "" if total == check else f"has another checksum: {total:08x}, not {check:08x}"
