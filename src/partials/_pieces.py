"""Pieces: a Jacobian as row blocks that are had one after the other, and how each quantity is put together from them.

A quantity is written once, for a Jacobian that is there whole. A decorator says what it is of the rows: `joined`, one part under the
other, or `added`, in the order of the pieces, so that the sum does not depend on who computed what. Where a Jacobian has pieces,
the quantity of each piece is taken and put in its place; where it has none, the decorator does nothing.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ._machine import trim
from ._sinks import Added, Both, Joined, PerSample, Place, Sink, Spread, Square, Written, known
from ._typing import Tensor

if TYPE_CHECKING:
    from ._rows import AbstractJacobian
    from .checks.report import Report


Quantity = TypeVar("Quantity", bound=Callable[..., Any])


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

    def through(self, view: Callable[[Any], Any], least: torch.dtype | None = None) -> Pieces:
        """The same pieces, each seen through `view`, which makes their rows `least` or wider where it is given."""
        return Seen(self, view, least)


@dataclass(frozen=True)
class Seen(Pieces):
    inner: Pieces
    view: Callable[[Any], Any]
    least: torch.dtype | None = None

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
        found = self.inner.dtype()
        return found if self.least is None else torch.promote_types(found, self.least)

    def select(self, index: Tensor) -> Pieces:
        return Seen(self.inner.select(index), self.view, self.least)

    def check(self, level: str) -> Report:
        return self.inner.check(level)


# --- quantities ----------------------------------------------------------------------------------------------------


def joined(*cut: str, outputs: bool = True) -> Callable[[Quantity], Quantity]:
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


def added(*cut: str, outputs: bool = False, together: str = "") -> Callable[[Quantity], Quantity]:
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
            index: list[Any] = [int(i) for i in torch.unravel_index(torch.tensor(c, device="cpu"), J.out)] if J.out else []
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


def clipped_sum(J: Any, max_norm: float | Mapping[str, float], per: str, epsilon: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(sum, {name: norms (N,)}); each piece is met once."""
    names = J.names if per == "parameter" else J.names[:1]
    total, norms = Added(J._flat), {name: Joined(J) for name in names}

    def one(place: Place) -> tuple[Any, ...]:
        part, its = J.pieces.at(place).clipped_sum(max_norm, per, True, epsilon=epsilon)
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
