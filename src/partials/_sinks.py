"""Where the parts of a quantity go: places, and what puts the parts of all places together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._typing import Tensor

if TYPE_CHECKING:
    from ._rows import AbstractJacobian


@dataclass(frozen=True)
class Place:
    """Rows: consecutive samples, and consecutive entries of each one's flattened output."""

    samples: slice
    outputs: slice

    @property
    def rows(self) -> tuple[int, int]:
        return self.samples.stop - self.samples.start, self.outputs.stop - self.outputs.start


class Sink(ABC):
    """Where the parts of a quantity go."""

    found: Any = None

    @abstractmethod
    def size(self, part: Tensor, place: Place) -> int:
        """Bytes of the whole result, told from one part; 0 where they are the caller's."""

    @abstractmethod
    def put(self, part: Any, place: Place) -> None:
        """Put the part of these rows in its place."""


class Joined(Sink):
    """(N, C, ...): each part, (m, *out, ...), in its rows."""

    def __init__(self, J: AbstractJacobian) -> None:
        self.rows, self.lead, self.batched = J._flat, len(J._lead), J.batched
        self.found: Tensor | None = None

    def size(self, part: Tensor, place: Place) -> int:
        n, c = place.rows
        return part.nbytes // max(1, n * c) * self.rows[0] * self.rows[1]

    def put(self, part: Tensor, place: Place) -> None:
        rest = part.shape[self.lead if place.rows[1] == self.rows[1] else 1 + self.batched :]
        part = part.reshape(*place.rows, *rest)
        if place.rows == self.rows:
            self.found = part
            return
        if self.found is None:
            self.found = part.new_empty(*self.rows, *rest)
        self.found[place.samples, place.outputs] = part


@dataclass
class Added(Sink):
    """Parts of one shape, added in their order; with `outputs`, each part has a row for each output, (c, ...) of (C, ...)."""

    rows: tuple[int, int]
    outputs: bool = False
    found: Tensor | None = None

    def size(self, part: Tensor, place: Place) -> int:
        return part.nbytes * (self.rows[1] // max(1, place.rows[1]) if self.outputs else 1)

    def put(self, part: Tensor, place: Place) -> None:
        if self.outputs:
            part = part.reshape(place.rows[1], -1)
            if self.found is None and place.rows[1] < self.rows[1]:
                self.found = part.new_zeros(self.rows[1], part.shape[1])
            if place.rows[1] < self.rows[1]:
                assert self.found is not None
                self.found[place.outputs] += part
                return
        self.found = part if self.found is None else self.found.add_(part) if not self.found.requires_grad else self.found + part


@dataclass
class Both(Sink):
    """A sink for each entry of a tuple."""

    sinks: tuple[Sink, ...]

    def size(self, part: Any, place: Place) -> int:
        return sum(sink.size(its, place) for sink, its in zip(self.sinks, part, strict=True))

    def put(self, part: Any, place: Place) -> None:
        for sink, its in zip(self.sinks, part, strict=True):
            sink.put(its, place)


@dataclass
class Written(Sink):
    """Parts that `work` has written where they belong, into memory of the caller's."""

    def size(self, part: Any, place: Place) -> int:
        return 0

    def put(self, part: Any, place: Place) -> None:
        pass


@dataclass
class Spread(Sink):
    """Sums of squared distances from the mean, merged piece by piece (Chan, Golub, LeVeque 1983, eq. 2.1)."""

    rows: tuple[int, int]
    counts: dict[tuple[int, int], int] = field(default_factory=dict)
    mean: Tensor | None = None
    found: Tensor | None = None

    def size(self, part: Any, place: Place) -> int:
        return 2 * part[0].nbytes * (self.rows[1] // max(1, place.rows[1]))

    def put(self, part: Any, place: Place) -> None:
        (m, c), key = place.rows, (place.outputs.start, place.outputs.stop)
        mean, squares = (t.reshape(c, -1) for t in part)
        if self.mean is None or self.found is None:
            self.mean, self.found = (mean.new_zeros(self.rows[1], mean.shape[1]) for _ in range(2))
        n = self.counts.get(key, 0)
        self.counts[key] = n + m
        old, gap = self.mean[place.outputs], mean - self.mean[place.outputs]
        self.found[place.outputs] += squares + gap.square() * (n * m / (n + m))
        old += gap * (m / (n + m))


@dataclass
class Square(Sink):
    """(N, C, N, C): the rows of one place with those of another."""

    rows: tuple[int, int]
    places: list[Place] = field(default_factory=list)
    found: Tensor | None = None

    def size(self, part: Tensor, place: Place) -> int:
        n, c = self.rows
        return n * c * n * c * part.element_size()

    def put(self, part: Tensor, place: Place) -> None:
        self.places.append(place)
        self.pair(part, place, place)

    def pair(self, part: Tensor, left: Place, right: Place) -> None:
        part = part.reshape(*left.rows, *right.rows)
        if self.found is None:
            self.found = part if left.rows == self.rows else part.new_empty(*self.rows, *self.rows)
        self.found[left.samples, left.outputs, right.samples, right.outputs] = part
        if left is not right:
            self.found[right.samples, right.outputs, left.samples, left.outputs] = part.permute(2, 3, 0, 1)


@dataclass
class PerSample(Sink):
    """(N, P): what the outputs of a sample add to its row."""

    rows: tuple[int, int]
    found: Tensor | None = None

    def size(self, part: Tensor, place: Place) -> int:
        return part.nbytes // max(1, place.rows[0]) * self.rows[0]

    def put(self, part: Tensor, place: Place) -> None:
        if self.found is None:
            self.found = part.new_zeros(self.rows[0], part.shape[1])
        self.found[place.samples] += part


def known(found: Any) -> Any:
    """What a sweep has put together."""
    assert found is not None
    return found
