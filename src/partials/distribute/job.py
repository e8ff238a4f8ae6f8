"""A job: a quantity of the rows of some data, cut into blocks, and where it goes; and one worker's share of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._errors import InputError
from .._typing import Tensor
from ..store.data import Data, Inputs
from ..store.format import Array
from ..store.produce import Progress, finish, produce
from ..store.reader import Store
from ..store.work import Work, identity
from ..store.writer import Writer
from .ranks import Place

RECOMPUTED = 2
"""Rows that are computed once more, alone, when a run ends."""


@dataclass
class Job:
    """What has to be computed, for every worker the same."""

    path: Path
    work: Work
    data: Data
    block: int
    together: int
    """Samples of a block that are computed at once."""
    arrays: list[Array]
    identity: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return -(-self.data.length // self.block)

    def rows(self, number: int) -> tuple[int, int]:
        return number * self.block, min((number + 1) * self.block, self.data.length)

    def inputs(self, number: int) -> Iterator[Inputs]:
        """The inputs of a block, in parts that are computed one after the other, each read when it is reached."""
        first, stop = self.rows(number)
        return (self.data.take(start, min(start + self.together, stop)) for start in range(first, stop, self.together))

    def writer(self, place: Place, resume: bool) -> Writer:
        return Writer(self.path, self.arrays, self.identity, self.config, rank=place.rank, world=place.world, resume=resume)

    def bytes(self) -> int:
        """Of all shards."""
        ranges = [self.rows(number) for number in range(self.blocks)]
        return sum(a.shard_bytes(1 if a.name == "parts" else stop - start) for a in self.arrays for start, stop in ranges)


def job(
    path: str | Path,
    what: str,
    jacobian: Callable[[Inputs], Any],
    data: Data,
    state: Mapping[str, Tensor] | None,
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    block: int | None = None,
    most: int | None = None,
) -> Job:
    """The job, with its form found from the Jacobian of the first sample; `state` is what the function's results depend on.

    Raises
    ------
    InputError
        where there is no sample.
    """
    if not data.length:
        raise InputError("there is no sample to compute", got="data of length 0", expected="at least one sample")
    work = Work(what, jacobian)
    first = data.take(0, 1)
    J = jacobian(first)
    together = work.together(J, first)
    size = block or work.block_rows(J, data.length, together, most)
    if work.kind == "gram":
        together = data.length  # (every part meets all others, each of which is computed again for it)
    named = {**(state or {}), **J.leaves}
    found = Job(
        Path(path),
        work,
        data,
        size,
        together,
        work.arrays(J, data.length, size),
        identity(named, what, data.digest(), data.length, size, together, options),
        dict(config),
    )
    if work.kind == "gram":
        found.work = Work(what, jacobian, lambda: ((*found.rows(n), data.take(*found.rows(n))) for n in range(found.blocks)))
    return found


def local(
    job: Job,
    place: Place,
    *,
    resume: bool,
    tell: Callable[[Progress], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Progress:
    """Do this worker's blocks that are not there yet: every `world`-th, from `rank` on."""
    writer = job.writer(place, resume)
    try:
        numbers = [n for n in range(job.blocks) if n % place.world == place.rank and n not in writer.done]
        progress = Progress(len(numbers))
        produce(writer, job.work, ((n, job.rows(n), job.inputs(n)) for n in numbers), progress, tell, stopping)
        finish(writer)
    finally:
        writer.close()
    return progress


def recompute(job: Job, rows: int, seed: int = 0) -> list[tuple[int, float, float]]:
    """(sample, error over its row's norm, tolerance) of random rows of a store, computed once more as a batch of one."""
    store = Store(job.path)
    if store.main.name == "parts":
        return []
    there = [n for start, stop in (entry.rows for entry in store.entries.values()) for n in range(start, stop)]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(there), generator=generator)[:rows].tolist() if there else []
    found = []
    for n in sorted(there[i] for i in chosen):
        values, _ = job.work.compute([job.data.take(n, n + 1)])
        expected, kept = torch.from_numpy(values[store.main.name]).double(), store[n : n + 1].double()
        error = (kept.reshape(expected.shape) - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
        found.append((n, float(error), 64 * torch.finfo(store.dtype).eps))
    return found
