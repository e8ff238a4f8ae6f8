"""Pieces whose sizes are measured, not guessed: what a piece may take follows from the bytes that those before it held."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import isqrt
from typing import Any

from . import _room
from ._compat import meter
from ._errors import MemoryBudgetError
from ._machine import out_of_memory, trim
from ._pieces import Pieces
from ._plan import TooLarge, human_bytes
from ._sinks import Place, Sink
from ._typing import Tensor

SAFE, GROWTH, TILES, OVERHEAD = 0.45, 4, 16, 3 * 2**20
"""Share of the room that measured bytes may take (the C library's heap was seen to take twice what is held, kernels have buffers of
their own); growth of pieces; temporaries are a sixteenth of the budget each; bytes that a call takes beside tensors (2.6 MB were seen),
as far as they are not more than half of the room."""


class Measured(Pieces):
    """Pieces whose sizes follow from what the ones before took."""

    budget: int
    kept: tuple[Tensor, ...] = ()
    """f's values, (N, *out), once they are known."""
    whole_batch = False
    """The samples stay together: f draws random numbers for all of them, or does not run on one."""
    cuts_outputs = True

    def sweep(self, work: Callable[[Place], Any], sink: Sink, *, outputs: bool = True) -> None:
        n, c = self.rows
        total, at = (c if self.whole_batch else n * c), 0
        if not total:
            sink.put(work(Place(slice(0, n), slice(0, c))), Place(slice(0, n), slice(0, c)))
            return
        least = 1 if outputs and self.cuts_outputs else c
        sizes = Sizes(self.budget, sum(t.nbytes for t in self.kept), least, least if self.whole_batch else c)
        while at < total:
            place = self._place(at, sizes.next)
            count = place.rows[1] if self.whole_batch else place.rows[0] * place.rows[1]
            with self.room():
                part, peak, failed = _tried(work, place, sizes.measuring)
            if failed:
                sizes.failed(count, failed)
                continue
            sizes.saw(count, peak, sink.size(part, place))
            sink.put(part, place)
            del part
            trim()
            at += count

    def room(self) -> AbstractContextManager[None]:
        return _room.limited(max(self.budget // TILES, 2**12))

    def _place(self, at: int, count: int) -> Place:
        n, c = self.rows
        if self.whole_batch:
            return Place(slice(0, n), slice(at, min(c, at + count)))
        sample, output = divmod(at, c)
        if output or count < c:
            return Place(slice(sample, sample + 1), slice(output, min(c, output + count)))
        left, fit = n - sample, prime(count // c)
        return Place(slice(sample, sample + (fit if fit <= left else min(left, max(1, fit // 3)))), slice(0, c))


def _tried(work: Callable[[Place], Any], place: Place, measuring: bool) -> tuple[Any, int | None, str]:
    """(part, bytes held at once where they were measured, "") or (None, None, the failure of an allocation)."""
    failed = ""
    try:
        if not measuring:
            return work(place), None, ""
        with meter() as seen:
            part = work(place)
        return part, seen.peak, ""
    except Exception as error:
        if not (isinstance(error, TooLarge) or out_of_memory(error)):
            raise
        failed = str(error).partition("\n")[0] or type(error).__name__
    return None, None, failed


class Sizes:
    """How many rows the next piece takes: `next`, from what the pieces before it took."""

    def __init__(self, budget: int, kept: int, least: int, first: int) -> None:
        self.budget, self.kept, self.least, self.next = budget, kept, least, first
        self.seen: list[tuple[int, int]] = []
        self.measuring, self.most = True, 0

    def saw(self, count: int, peak: int | None, result: int) -> None:
        """A piece of `count` rows took `peak` bytes, of a result of `result` bytes."""
        if peak is None:
            return
        result += self.kept
        room = self.budget - result
        room -= min(OVERHEAD, room // 2)
        if room <= 0:
            raise too_small(self.budget, result, "the result alone, and f's values")
        if peak > room:
            if count <= self.least:
                raise too_small(self.budget, result + peak, "the result and one piece of the smallest size")
            self.next = self.most = max(self.least, int(count * SAFE * room / peak))
            self.seen.clear()
            return
        (before, its) = self.seen[-1] if self.seen and self.seen[-1][0] != count else (0, 0)
        slope = max((peak - its) / (count - before), peak / count / 8) if count > before else peak / count
        self.seen.append((count, peak))
        fits = count + max(0, int((SAFE * room - peak) / max(slope, 1e-9)))
        wanted = max(self.least, min(GROWTH * count, fits, self.most or fits))
        self.measuring = wanted > count
        self.next = max(wanted, count) if peak <= room * SAFE else wanted

    def failed(self, count: int, why: str) -> None:
        """An allocation failed: half as many rows, and never more than that again."""
        if count <= self.least:
            raise MemoryBudgetError(
                "one piece of the smallest size does not fit in memory", got=why, hint="fewer parameters at once, or a larger machine"
            )
        self.next = self.most = max(self.least, count // 2)


def prime(count: int) -> int:
    """The largest prime up to `count` (or 1), a number of samples that seldom divides other sizes: where the samples lie in a tensor
    is then seen from its shape, and need not be measured again in a large piece. (What is left at the end goes in thirds for that.)"""
    return next((p for p in range(count, 1, -1) if all(p % d for d in range(2, isqrt(p) + 1))), 1)


def too_small(budget: int, needed: float, what: str) -> MemoryBudgetError:
    return MemoryBudgetError(
        "the result does not fit within max_memory",
        got=f"max_memory of {human_bytes(budget)}",
        expected=f"at least {human_bytes(needed)} for {what}",
        hint="fewer samples or parameters at once, out= where a quantity takes it, or a larger max_memory",
    )
