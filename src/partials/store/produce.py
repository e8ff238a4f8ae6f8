"""The loop over blocks: compute one while the one before is written; stop between blocks when asked to."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch

from .._errors import InputError, StoreError
from ..checks.precision import Watch
from ..checks.tolerance import coarsest
from . import fingerprint, journal
from .data import Inputs
from .format import Array
from .reader import Store
from .work import Work
from .writer import Writer

Part = TypeVar("Part")
BUFFERS = 3
"""One that is computed into, one that waits, one that is written: kept, since fresh memory costs more than the arithmetic."""
FEW = 16
"""Samples whose values say what is usual."""


@dataclass
class Progress:
    """How far a run is: what a progress line and the closing summary say."""

    total: int | None
    """Blocks that this worker is to do."""
    samples: int | None = None
    """Samples in them."""
    done: int = 0
    rows: int = 0
    bytes: int = 0
    nonfinite: int = 0
    begun: int = 0
    """Samples that have been computed, those of blocks that are not committed yet among them."""
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def committed(self, rows: tuple[int, int], size: int, nonfinite: int) -> None:
        """One block more is in the store."""
        self.done, self.rows = self.done + 1, self.rows + rows[1] - rows[0]
        self.bytes, self.nonfinite = self.bytes + size, self.nonfinite + nonfinite
        self.begun = max(self.begun, self.rows)

    def __str__(self) -> str:
        count, seconds = self.begun, max(self.seconds, 1e-9)
        left = "" if not self.samples or not count else f", {seconds / count * max(self.samples - count, 0):.0f} s left"
        of, all_ = (f" of {total}" if total is not None else "" for total in (self.total, self.samples))
        return f"{self.done}{of} blocks, {count}{all_} samples, {count / seconds:.1f} samples/s{left}"


class Stopped(Exception):
    """The run was asked to stop, and has: what is finished is committed."""


def produce(
    writer: Writer,
    work: Work,
    blocks: Iterable[tuple[int, tuple[int, int], Iterable[Inputs]]],
    progress: Progress,
    tell: Callable[[Progress], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Compute and commit the blocks (number, rows, inputs in parts).

    Raises
    ------
    Stopped
        where `stopping()` says so: what has been computed whole is committed, a block of which parts are lacking is dropped.
    """
    buffers = _buffers(next(iter(writer.arrays.values())))
    waiting: queue.Queue[Any] = queue.Queue(maxsize=1)
    faults: list[BaseException] = []

    def commit() -> None:
        while (item := waiting.get()) is not None:
            number, rows, values, info, buffer = item
            try:
                if not faults:
                    writer.write(number, rows, values, info)
                    progress.committed(rows, sum(part.nbytes for part in values.values()), info["nonfinite"])
                    tell(progress)
            except BaseException as error:
                faults.append(error)
            buffers.put(buffer)

    def asked() -> bool:
        return stopping() or bool(faults)

    def told(count: int) -> None:
        progress.begun += count
        tell(progress)

    if work.others is not None:
        others = work.others
        work = replace(work, others=lambda: _stoppable(others(), asked))
    thread = threading.Thread(target=commit, name="partials-writer")
    thread.start()
    try:
        for number, rows, parts in blocks:
            if stopping() or faults:
                break
            buffer = buffers.get()
            values, info = work.compute(_stoppable(parts, asked), buffer, told)
            if count := len(values["values"]):
                waiting.put((number, (rows[0], rows[0] + count), values, info, buffer))
            else:
                buffers.put(buffer)  # (a batch without samples, of a stream)
    except Stopped:
        pass
    finally:
        waiting.put(None)
        thread.join()
    if faults:
        raise faults[0]
    if stopping():
        raise Stopped


def _stoppable(parts: Iterable[Part], stopping: Callable[[], bool]) -> Iterator[Part]:
    """The parts of a block; Stopped between two of them where that is asked for."""
    for i, part in enumerate(parts):
        if i and stopping():
            raise Stopped
        yield part


def finish(writer: Writer) -> None:
    """Where all blocks have been committed, by whomever: a reduction's result as an array of its own, added up in block order."""
    main = next(iter(writer.arrays.values()))
    if len(journal.read(writer.path)[0]) < main.blocks:
        return
    if main.name == "parts":
        total = Store(writer.path).result().numpy()
        shape = total.shape
        writer.add(Array(main.attributes["what"], shape, main.dtype, max(1, shape[0]), max(1, shape[0])), total)
    writer.sweep()


def write_batches(
    path: Path,
    work: Work,
    batches: Iterable[Inputs],
    identity: Callable[[int], Mapping[str, Any]],
    config: Mapping[str, Any],
    tell: Callable[[Progress], None] = lambda _: None,
    *,
    drawn: bool = False,
) -> Writer:
    """A store whose blocks are the batches of an iterable, whose length need not be known; goes on with one that exists.

    Batches that are there already are not computed again; that they are the same is seen by the digest of their inputs, and by the values
    of the first, unless they are `drawn`.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise InputError("there is no batch to store", got="an empty iterable", expected="at least one batch")
    with Watch(torch.float64) as watch:
        J = work.jacobian(first)
    block, values, dtype = len(J), J.values, coarsest(watch.dtype, J.values.dtype)
    if not block:
        raise InputError("the first batch holds no samples, so the size of a block is not known", got="0 samples", expected="at least one")
    writer = Writer(path, work.arrays(J, block, block), identity(block), config)
    del J
    sizes: list[int] = []

    def counted(inputs: Inputs) -> Any:
        J = work.jacobian(inputs)
        if len(J) > block:
            raise _of_several_sizes(f"{len(J)} samples in batch {len(sizes)} of those to be computed", block)
        sizes.append(len(J))
        return J

    try:
        if 0 in writer.done and not drawn:
            kept = Store(path).rows_of_values(slice(0, min(block, FEW)))
            fingerprint.demand_same_values(kept, values, dtype, str(path), 0)
        missing = _missing_of(writer, chain([first], batches), block, sizes)
        produce(writer, replace(work, jacobian=counted), missing, Progress(None), tell)
        finish(writer)
    finally:
        writer.close()
    return writer


def _missing_of(
    writer: Writer, batches: Iterable[Inputs], block: int, sizes: list[int]
) -> Iterator[tuple[int, tuple[int, int], list[Inputs]]]:
    """The batches that are not in the store, numbered; `sizes` gets the number of samples of each that has been computed."""
    size = block
    for number, inputs in enumerate(batches):
        if size != block:
            raise _of_several_sizes(f"{size} samples in batch {number - 1}, and another after it", block)
        kept = writer.done.get(number)
        if kept is None:
            yield number, (number * block, (number + 1) * block), [inputs]
            size = sizes[-1]
        elif kept.info["inputs"] != (found := fingerprint.of_inputs([*inputs[0], *inputs[1].values()])):
            raise StoreError(
                f"{writer.path} belongs to other data: batch {number} differs",
                got=f"inputs with digest {found}",
                expected=str(kept.info["inputs"]),
                hint="another folder for this run; nothing was overwritten",
            )
        else:
            size = kept.rows[1] - kept.rows[0]


def _of_several_sizes(got: str, block: int) -> StoreError:
    return StoreError(
        "the batches are not of one size",
        got=got,
        expected=f"{block}, as in the first; fewer only in the last",
        hint="one batch_size, drop_last or not",
    )


def _buffers(a: Array) -> queue.Queue[Any]:
    pool: queue.Queue[Any] = queue.Queue()
    for _ in range(BUFFERS):
        pool.put(numpy.empty((a.block, *a.shape[1:]), a.dtype) if a.name == "jacobian" else None)
    return pool
