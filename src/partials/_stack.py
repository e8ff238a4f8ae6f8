"""`Stack`: Jacobians of different samples, one under the other, each in its own form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from ._errors import MethodError
from ._pieces import Pieces
from ._sinks import Place, Sink
from ._typing import Tensor

if TYPE_CHECKING:
    from ._jacobian import Jacobian
    from .checks.report import Report


@dataclass(frozen=True)
class Stack(Pieces):
    """The parts, each with the number that multiplies its rows."""

    parts: tuple[tuple[Jacobian, float], ...]

    @property
    def sizes(self) -> list[int]:
        return [len(J) for J, _ in self.parts]

    @property
    def rows(self) -> tuple[int, int]:  # type: ignore[override]
        return sum(self.sizes), self.parts[0][0]._flat[1]

    def at(self, place: Place) -> Jacobian:
        """The rows of a place that a sweep has given: it lies within one part."""
        start = 0
        for J, weight in self.parts:
            if place.samples.start < start + len(J):
                samples = slice(place.samples.start - start, place.samples.stop - start)
                return scaled(J if J.pieces is None else J.pieces.at(Place(samples, place.outputs)), weight)
            start += len(J)
        return scaled(*self.parts[0])  # (a stack of no samples)

    def sweep(self, work: Callable[[Place], Any], sink: Sink, *, outputs: bool = True) -> None:
        start, whole = 0, slice(0, self.rows[1])
        for J, _ in self.parts:
            if J.pieces is not None:
                J.pieces.sweep(_moved(work, start), _Moved(sink, start), outputs=outputs)
            elif len(J) or not self.rows[0]:
                place = Place(slice(start, start + len(J)), whole)
                sink.put(work(place), place)
            start += len(J)

    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, [J._dtype_of_rows() for J, _ in self.parts])

    def select(self, index: Tensor) -> Stack:
        """Consecutive indices of one part stay together, in the order asked for."""
        starts = torch.tensor([0, *self.sizes], device="cpu").cumsum(0)
        owner = torch.bucketize(index.cpu(), starts[1:], right=True)
        cuts = (owner.diff() != 0).nonzero().flatten() + 1
        found = []
        for piece, owners in zip(index.cpu().tensor_split(cuts), owner.tensor_split(cuts), strict=True):
            which = int(owners[0]) if len(owners) else 0
            J, weight = self.parts[which]
            found.append((J[piece - starts[which]], weight))
        return Stack(tuple(found))

    def check(self, level: str) -> Report:
        raise MethodError("joined Jacobians have no one function to be checked against", hint="check the Jacobians they came from")


def scaled(J: Jacobian, weight: float) -> Jacobian:
    """weight times J."""
    if weight == 1:
        return J
    weights = J.values.new_full(J._flat, weight)
    blocks = {name: tuple(block.scaled(weights) for block in group) for name, group in J.blocks.items()}
    return replace(J, values=J.values * weight, blocks=blocks)


def _moved(work: Callable[[Place], Any], start: int) -> Callable[[Place], Any]:
    return lambda place: work(_at(place, start))


def _at(place: Place, start: int) -> Place:
    return Place(slice(place.samples.start + start, place.samples.stop + start), place.outputs)


@dataclass
class _Moved(Sink):
    """A sink whose samples begin at `start`."""

    sink: Sink
    start: int

    def size(self, part: Any, place: Place) -> int:
        return self.sink.size(part, _at(place, self.start))

    def put(self, part: Any, place: Place) -> None:
        self.sink.put(part, _at(place, self.start))
