"""A job: a quantity of the rows of some data, cut into blocks, and where it goes; and one worker's share of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import torch

from .._errors import InputError
from .._typing import Tensor
from ..checks.precision import Watch
from ..checks.tolerance import Tolerance, coarsest, distance, size, typical
from ..store.data import Data, Inputs
from ..store.fingerprint import demand_same_values
from ..store.format import Array
from ..store.produce import Progress, finish, produce
from ..store.reader import Store
from ..store.work import Work, identity
from ..store.writer import Writer
from .ranks import Place

CPU = torch.device("cpu")
RECOMPUTED, USUAL = 2, 16
"""Rows that are computed once more, alone, when a run ends; rows whose norms say what is usual."""


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
    dtype: torch.dtype = torch.float64
    """The coarsest that the function computes in: what two computations of the same number may differ by follows from it."""
    device: torch.device = CPU
    drawn: bool = False
    """Whether the function draws random numbers, so that a sample alone is another than in its block."""

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

    def progress(self, numbers: Sequence[int]) -> Progress:
        """Of a run that has these blocks to do."""
        return Progress(len(numbers), sum(stop - start for start, stop in map(self.rows, numbers)))

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
    drawn: bool = False,
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
    with Watch(torch.float64) as watch:
        J = jacobian(first)
    together = work.together(J, first)
    per = block or work.block_rows(J, data.length, together, most)
    if not hasattr(J, "leaves"):
        raise InputError("a run is of rows with respect to parameters", got="wrt of inputs only", expected="parameters")
    dtype = coarsest(watch.dtype, J.values.dtype, *(t.dtype for t in J.leaves.values() if t.is_floating_point()))
    if work.kind == "gram":
        together = data.length  # (every part meets all others, each of which is computed again for it)
    named = {**(state or {}), **J.leaves}
    found = Job(
        Path(path),
        work,
        data,
        per,
        together,
        work.arrays(J, data.length, per),
        identity(named, what, data.digest(), data.length, per, together, options),
        dict(config),
        torch.float16 if dtype == torch.float32 and J.device.type == "cuda" and torch.backends.cudnn.allow_tf32 else dtype,
        J.device,
        drawn,
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
        demand_same_function(job, writer)
        numbers = [n for n in range(job.blocks) if n % place.world == place.rank and n not in writer.done]
        progress = job.progress(numbers)
        produce(writer, job.work, ((n, job.rows(n), job.inputs(n)) for n in numbers), progress, tell, stopping)
        finish(writer)
    finally:
        writer.close()
    return progress


def demand_same_function(job: Job, writer: Writer) -> None:
    """Where a run goes on: one sample that the store has is computed once more, since a fingerprint knows no code.

    Raises
    ------
    StoreError
        where f's values come out otherwise.
    """
    if not writer.done or job.drawn:
        return
    n, stop = job.rows(min(writer.done))
    found = job.work.jacobian(job.data.take(n, n + 1)).values
    demand_same_values(Store(job.path).rows_of_values(slice(n, min(stop, n + USUAL))), found, job.dtype, f"{job.path}", n)


def recompute(job: Job, rows: int, seed: int = 0) -> list[tuple[int, float, float]]:
    """(sample, error over its row's norm or the usual one, tolerance) of random rows of a store, computed once more as batches of one.

    Of a Gram matrix, the entries of these rows with each other. None of a reduction, or where random numbers are drawn for a batch.
    """
    store = Store(job.path)
    if store.main.name == "parts" or job.drawn:
        return []
    ranges = [entry.rows for _, entry in sorted(store.entries.items())]
    random = Random(seed)
    chosen = _some(ranges, rows, random)
    work = job.work
    if work.kind == "gram":
        work = replace(work, others=lambda: ((n, n + 1, job.data.take(n, n + 1)) for n in chosen))
    usual = size(_finite(_entries(store, _some(ranges, USUAL, random), chosen)), samples=True)
    found = []
    for n in chosen:
        values, _ = work.compute([job.data.take(n, n + 1)])
        expected, kept = torch.from_numpy(values[store.main.name]), _entries(store, [n], chosen)
        scale = float(typical(torch.cat([size(_finite(expected.reshape(1, -1)), samples=True), usual]))[0])
        error = float(distance(kept.reshape(expected.shape), expected))
        found.append((n, error / scale if error else 0.0, Tolerance(coarsest(job.dtype, store.dtype)).value))
    return found


def _entries(store: Store, samples: list[int], columns: list[int]) -> Tensor:
    """Rows of a store; of a Gram matrix their entries with the samples `columns`."""
    rows = store[samples]
    c = store.values_width
    return rows.reshape(len(samples), c, len(store), c)[:, :, columns] if store.main.name == "gram" else rows


def _some(ranges: list[tuple[int, int]], count: int, random: Random) -> list[int]:
    """Up to `count` different numbers within the ranges, in order."""
    ends = [0, *accumulate(stop - start for start, stop in ranges)]
    places = sorted(random.sample(range(ends[-1]), min(count, ends[-1])))
    which = [bisect_right(ends, place) - 1 for place in places]
    return [ranges[i][0] + place - ends[i] for i, place in zip(which, places, strict=True)]


def _finite(t: Tensor) -> Tensor:
    return t.nan_to_num(0, 0, 0)
