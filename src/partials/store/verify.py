"""Is a store what it says? Sizes, checksums, indices, journals; nothing in it is run, and nothing is mended unless asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import checksum, durable, journal
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
        if block >= store.arrays["values"].blocks or entry.rows != store.arrays["values"].rows(block):
            found.findings.append(Finding(block, f"block {block} says rows {entry.rows}, which the arrays do not have"))
            continue
        expected = {a.key(block): a for a in store.arrays.values()}
        if set(expected) != set(entry.files):
            found.findings.append(Finding(block, f"block {block} lists other files than the arrays have"))
            continue
        for key, (size, kind, check) in entry.files.items():
            wrong = _wrong(store.path / key, size, kind, check)
            found.findings += [Finding(block, f"block {block}: {key} {wrong}")] if wrong else []
    found.remarks += [
        f"{p.relative_to(store.path)} was left by a run that was interrupted" for p in store.path.rglob(f"*{durable.PARTIAL}")
    ]
    return found


def forget(found: Verified) -> int:
    """Take damaged blocks out of the count, so that a resumed run computes them again; how many."""
    blocks = sorted({finding.block for finding in found.findings if finding.block is not None})
    record = journal.Journal(found.store.path, "verify")
    for block in blocks:
        record.append(journal.Entry(block, found.store.entries[block].rows, forget=True, info={"time": time.time()}))
    return len(blocks)


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
