"""Pieces: a Jacobian as row blocks that are had one after the other, and how each quantity is put together from them.

A quantity is written once, for a Jacobian that is there whole. A decorator says what it is of the rows: `joined`, one part under the
other, or `added`, in the order of the pieces, so that the sum does not depend on who computed what. Where a Jacobian has pieces,
the quantity of each piece is taken and put in its place; where it has none, the decorator does nothing.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ._machine import trim
from ._typing import Tensor

if TYPE_CHECKING:
    from ._rows import AbstractJacobian
    from .checks.report import Report


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


class Pieces(ABC):
    """Row blocks of a Jacobian of (N, C) rows, each a Jacobian of its own."""

    rows: tuple[int, int]
    """(N, C)."""

    @abstractmethod
    def at(self, place: Place) -> Any:
        """The Jacobian of these rows."""

    @abstractmethod
    def sweep(self, work: Callable[[Place], Any], sink: Sink, *, outputs: bool = True) -> None:
        """`work` of places that together are all rows, into the sink; `outputs=False` keeps a sample's outputs together."""

    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of dense rows."""

    @abstractmethod
    def select(self, index: Tensor) -> Pieces:
        """Those of the chosen samples, int64."""

    @abstractmethod
    def check(self, level: str) -> Report:
        """Every piece compared with independent computations, in one report."""

    def room(self) -> AbstractContextManager[None]:
        """Temporaries inside are kept to what pieces may take."""
        return nullcontext()

    def through(self, view: Callable[[Any], Any]) -> Pieces:
        """The same pieces, each seen through `view`."""
        return Seen(self, view)


@dataclass(frozen=True)
class Seen(Pieces):
    inner: Pieces
    view: Callable[[Any], Any]

    @property
    def rows(self) -> tuple[int, int]:  # type: ignore[override]
        return self.inner.rows

    def at(self, place: Place) -> Any:
        return self.view(self.inner.at(place))

    def sweep(self, work: Callable[[Place], Any], sink: Sink, *, outputs: bool = True) -> None:
        self.inner.sweep(work, sink, outputs=outputs)

    def room(self) -> AbstractContextManager[None]:
        return self.inner.room()

    def dtype(self) -> torch.dtype:
        return self.inner.dtype()

    def select(self, index: Tensor) -> Pieces:
        return Seen(self.inner.select(index), self.view)

    def check(self, level: str) -> Report:
        return self.inner.check(level)


# --- sinks ---------------------------------------------------------------------------------------------------------


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


# --- quantities ----------------------------------------------------------------------------------------------------


def joined(*cut: str, outputs: bool = True) -> Callable[[Any], Any]:
    """The quantity of a Jacobian with pieces is that of each, in its rows.

    `cut` names arguments that have rows themselves; `outputs=False` says that a sample's outputs meet in the quantity.
    """

    def wrap(method: Any) -> Any:
        @functools.wraps(method)
        def quantity(J: AbstractJacobian, *args: Any, **kwargs: Any) -> Tensor:
            if J.pieces is None:
                found: Tensor = method(J, *args, **kwargs)
                return found
            sink = Joined(J)
            J.pieces.sweep(_parts(J, method, cut, args, kwargs), sink, outputs=outputs)
            return J._fold(known(sink.found))

        return quantity

    return wrap


def added(*cut: str, outputs: bool = False, together: str = "") -> Callable[[Any], Any]:
    """The quantity of a Jacobian with pieces is the sum of that of each: (P, ...), or with `outputs` (*out, P).

    In the argument that `together` names, where it is given, a sample's outputs meet.
    """

    def wrap(method: Any) -> Any:
        @functools.wraps(method)
        def quantity(J: AbstractJacobian, *args: Any, **kwargs: Any) -> Tensor:
            if J.pieces is None:
                found: Tensor = method(J, *args, **kwargs)
                return found
            sink = Added(J._flat, outputs)
            apart = not together or _named(method, args, kwargs).get(together) is None
            J.pieces.sweep(_parts(J, method, cut, args, kwargs), sink, outputs=apart)
            total = known(sink.found)
            return total.reshape(*J.out, *total.shape[1:]) if outputs else total

        return quantity

    return wrap


def known(found: Any) -> Any:
    """What a sweep has put together."""
    assert found is not None
    return found


def _named(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(list(inspect.signature(method).parameters)[1:], args, strict=False)) | kwargs


def _parts(J: Any, method: Any, cut: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Place], Any]:
    asked = _named(method, args, kwargs)

    def part(place: Place) -> Any:
        piece = J.pieces.at(place)
        return method(piece, **{name: cut_to(J, piece, v, place) if name in cut else v for name, v in asked.items()})

    return part


def cut_to(J: Any, piece: Any, value: Tensor | None, place: Place) -> Tensor | None:
    """The part of an argument (N, ...) or (N, *out, ...) that belongs to the rows of a piece."""
    lead = J._lead
    if value is None or tuple(value.shape[: len(lead)]) != lead:
        return None if value is None else value[place.samples]
    rest = value.shape[len(lead) :]
    return value.reshape(*J._flat, *rest)[place.samples, place.outputs].reshape(*piece._lead, *rest)


def gram(J: Any, other: Any) -> Tensor:
    """All pairs of pieces; of one Jacobian with itself, each pair once."""
    if other is J:
        whole = Square(J._flat)

        def own(place: Place) -> Tensor:
            mine = J.pieces.at(place)
            found: Tensor = mine.gram() if place.rows == J._flat else mine.gram(J.pieces.at(place))
            return found

        J.pieces.sweep(own, whole)
        for i, left in enumerate(whole.places):
            mine = None if left is whole.places[-1] else J.pieces.at(left)
            for right in whole.places[i + 1 :]:
                with J.pieces.room():
                    whole.pair(known(mine).gram(J.pieces.at(right)), left, right)
                trim()
        return known(whole.found).reshape(*J._lead, *J._lead)
    if J.pieces is None:  # so `other` has pieces
        ours, theirs = len(J._lead), len(other._lead)
        return gram(other, J).permute(*range(theirs, theirs + ours), *range(theirs))
    sink = Joined(J)
    J.pieces.sweep(lambda place: J.pieces.at(place).gram(other), sink)
    return known(sink.found).reshape(*J._lead, *other._lead)


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


def dense(J: Any, out: Tensor) -> Tensor:
    """Every piece written straight into its rows of `out`, (N, *out, P)."""
    flat = out.view(*J._flat, J.columns.width) if out.is_contiguous() else None

    def write(place: Place) -> None:
        piece = J.pieces.at(place)
        rows = None if flat is None else flat[place.samples, place.outputs]
        if rows is not None and rows.is_contiguous():
            piece.dense(out=rows.view(piece.shape))
            return
        for c, row in enumerate(piece.dense().reshape(*place.rows, -1).unbind(1), place.outputs.start):
            index: list[Any] = [int(i) for i in torch.unravel_index(torch.tensor(c), J.out)] if J.out else []
            where: Any = (place.samples, *index) if J.batched else tuple(index)
            out[where] = row if J.batched else row[0]

    J.pieces.sweep(write, Written())
    return out


def variance(J: Any, correction: int) -> Tensor:
    """Means and squares of the pieces, merged."""
    sink = Spread(J._flat)

    def one(place: Place) -> tuple[Tensor, Tensor]:
        piece = J.pieces.at(place)
        return piece.mean(), piece.variance(0) * len(piece)

    J.pieces.sweep(one, sink)
    return known(sink.found).reshape(*J.out, -1) / max(len(J) - correction, 0)


def clipped_sum(J: Any, max_norm: float, per: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(sum, {name: norms (N,)}); each piece is met once."""
    names = J.names if per == "parameter" else J.names[:1]
    total, norms = Added(J._flat), {name: Joined(J) for name in names}

    def one(place: Place) -> tuple[Any, ...]:
        part, its = J.pieces.at(place).clipped_sum(max_norm, per, return_norms=True)
        return (part, *((its,) if per == "all" else its.values()))

    J.pieces.sweep(one, Both((total, *norms.values())))
    return known(total.found), {name: J._fold(known(sink.found)).reshape(-1) for name, sink in norms.items()}


def per_sample(J: Any, u: Tensor) -> Tensor:
    """J^T u of inputs, (N, P): a sample's outputs are added."""
    width, total = J.columns.width, PerSample(J._flat)

    def one(place: Place) -> Tensor:
        piece = J.pieces.at(place)
        found: Tensor = piece.T @ known(cut_to(J, piece, u, place))
        return found.reshape(-1, width)

    J.pieces.sweep(one, total)
    return known(total.found).reshape(*J._lead[: J.batched], width)


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
