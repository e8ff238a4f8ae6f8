"""The loop over blocks: compute one while the one before is written; stop between blocks when asked to."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

from .._errors import InputError, StoreError
from . import fingerprint, journal
from .data import Inputs, samples_in
from .format import Array
from .reader import Store
from .work import Work
from .writer import Writer

BUFFERS = 3
"""One that is computed into, one that waits, one that is written: kept, since fresh memory costs more than the arithmetic."""


@dataclass
class Progress:
    """How far a run is: what a progress line and the closing summary say."""

    total: int | None
    """Blocks that this worker is to do."""
    done: int = 0
    rows: int = 0
    bytes: int = 0
    nonfinite: int = 0
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def __str__(self) -> str:
        rate = self.rows / max(self.seconds, 1e-9)
        left = "" if not self.total or not self.done else f", {self.seconds / self.done * (self.total - self.done):.0f} s left"
        of = f" of {self.total}" if self.total is not None else ""
        return f"{self.done}{of} blocks, {self.rows} samples, {rate:.1f} samples/s{left}"


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
        where `stopping()` says so between two blocks.
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
                    progress.done, progress.rows = progress.done + 1, progress.rows + rows[1] - rows[0]
                    progress.bytes += sum(part.nbytes for part in values.values())
                    progress.nonfinite += info["nonfinite"]
                    tell(progress)
            except BaseException as error:
                faults.append(error)
            buffers.put(buffer)

    thread = threading.Thread(target=commit, name="partials-writer")
    thread.start()
    try:
        for number, rows, parts in blocks:
            if stopping() or faults:
                break
            buffer = buffers.get()
            values, info = work.compute(parts, buffer)
            waiting.put((number, rows, values, info, buffer))
    finally:
        waiting.put(None)
        thread.join()
    if faults:
        raise faults[0]
    if stopping():
        raise Stopped


def finish(writer: Writer) -> None:
    """Where all blocks of a reduction have been committed, by whomever: its result as an array of its own, added up in block order."""
    main = next(iter(writer.arrays.values()))
    if main.name != "parts" or len(journal.read(writer.path)[0]) < main.blocks:
        return
    total = Store(writer.path).result().numpy()
    shape = total.shape
    writer.add(Array(main.attributes["what"], shape, main.dtype, max(1, shape[0]), max(1, shape[0])), total)


def write_batches(
    path: Path,
    work: Work,
    batches: Iterable[Inputs],
    identity: Callable[[int], Mapping[str, Any]],
    config: Mapping[str, Any],
    tell: Callable[[Progress], None] = lambda _: None,
) -> Writer:
    """A store whose blocks are the batches of an iterable, whose length need not be known; goes on with one that exists.

    Batches that are there already are not computed again; that they are the same is seen by the digest of their inputs.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise InputError("there is no batch to store", got="an empty iterable", expected="at least one batch")
    J = work.jacobian(first)
    block = len(J)
    writer = Writer(path, work.arrays(J, block, block), identity(block), config)
    try:
        produce(writer, work, _missing_of(writer, chain([first], batches), block), Progress(None), tell)
        finish(writer)
    finally:
        writer.close()
    return writer


def _missing_of(writer: Writer, batches: Iterable[Inputs], block: int) -> Iterator[tuple[int, tuple[int, int], list[Inputs]]]:
    """The batches that are not in the store, numbered."""
    start, short = 0, False
    for number, inputs in enumerate(batches):
        rows = samples_in(inputs)
        if rows > block or short:
            raise StoreError(
                "the batches are not of one size",
                got=f"{rows} samples in batch {number}" if rows > block else f"fewer than {block} samples before batch {number}",
                expected=f"{block}, as in the first; fewer only in the last",
                hint="one batch_size, drop_last or not",
            )
        short = rows < block
        kept = writer.done.get(number)
        if kept is None:
            yield number, (start, start + rows), [inputs]
        elif kept.info["inputs"] != (found := fingerprint.of_inputs([*inputs[0], *inputs[1].values()])):
            raise StoreError(
                f"{writer.path} belongs to other data: batch {number} differs",
                got=f"inputs with digest {found}",
                expected=str(kept.info["inputs"]),
                hint="another folder for this run; nothing was overwritten",
            )
        start += rows


def _buffers(a: Array) -> queue.Queue[Any]:
    pool: queue.Queue[Any] = queue.Queue()
    for _ in range(BUFFERS):
        pool.put(numpy.empty((a.block, *a.shape[1:]), a.dtype) if a.name == "jacobian" else None)
    return pool
