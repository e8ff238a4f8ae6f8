"""Proof that the value at a point does not depend on other points, by two probes on the first call of each function.

The points are cut into two random halves. Seeds on the values of one half must leave no gradient at the points of the other; and putting
other coordinates at the points of one half must leave the values of the other alone (which finds mixing that is detached from the graph as
well). What is proved is remembered by code, not by object.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import nn

from .._errors import InputError, MixingError, listed
from .._mixing import Culprit, first_difference
from .._typing import Tensor
from .coordinates import Coordinates
from .nested import Seeds
from .points import Points
from .rehearsal import parts, rehearse, stands_for_its_type
from .transforms import largest

_KNOWN: WeakKeyDictionary[Any, dict[Hashable, Known]] = WeakKeyDictionary()
_REMEMBERED = 256
"""Proofs for one code; functions that close over ever new objects would have ever more."""
_TOLERANCE = 64
"""In units of the dtype's eps, over the largest entry."""


@dataclass
class Known:
    """What earlier calls of a function have shown."""

    proved: bool = False
    """That points do not mix."""
    refused: str = ""
    """Why it cannot run in Taylor mode."""
    width: int = 1
    """Entries of one point's output."""
    attached: bool = True
    """Whether results carry a graph where gradients are enabled."""
    checked: set[Hashable] = field(default_factory=set)
    """The derivatives that were compared with another computation."""

    @classmethod
    def of(cls, coordinates: Coordinates, points: Points, asked: tuple[str, ...]) -> Known:
        anchor, key = _signature(coordinates, points, asked)
        known = _KNOWN.setdefault(anchor, {})
        if len(known) >= _REMEMBERED and key not in known:
            known.clear()
        return known.setdefault(key, cls())


@dataclass
class Proof:
    """The probes of one function."""

    coordinates: Coordinates
    points: Points
    asked: tuple[str, ...]
    halves: tuple[np.ndarray, np.ndarray]
    given: Any = None
    moved: list[Any] = field(default_factory=list)
    informative: bool = False

    @classmethod
    def needed(cls, coordinates: Coordinates, points: Points, asked: tuple[str, ...], known: Known) -> Proof | None:
        """A proof to make, or None where it was made before or there are no two points to tell apart."""
        if known.proved or points.count < 2 or points.tensors[asked[0]].is_meta:
            return None
        half = np.random.default_rng(0).permutation(points.count) < points.count // 2
        return cls(coordinates, points, asked, (half, ~half))

    def rehearse(self) -> None:
        """Run the function with its inputs as given, if that can be done; and with no point, or either half, moved onto other points."""
        if self.points.expanded:
            with suppress(Exception):  # then only the expanded call has a meaning
                self.given = rehearse(self.coordinates.call, {})
        generator, everywhere = np.random.default_rng(1), np.arange(self.points.count)
        for kept in (everywhere >= 0, *self.halves):
            source = np.where(kept, everywhere, generator.choice(np.flatnonzero(kept), self.points.count))
            moved = {name: self._rows(self.points.tensors[name], source) for name in self.asked}
            self.moved.append(rehearse(self.coordinates.call, {**self.points.tensors, **moved}))

    def gradients(self, columns: list[Tensor], pull: Callable[[Seeds], Sequence[Tensor]]) -> None:
        """Seed either half with Gaussian numbers; the other half must read zeros."""
        generator = np.random.default_rng(2)
        for half in self.halves:
            seeds = {place: self._over(half * generator.standard_normal(self.points.count), column) for place, column in enumerate(columns)}
            for name, gradient in zip(self.asked, pull(seeds), strict=True):
                sizes = gradient.detach().reshape(self.points.count, -1).abs().nan_to_num(0.0, 0.0)
                own, cross = largest(sizes), largest(_of(~half, sizes))
                self.informative |= own > 0
                if cross > _TOLERANCE * torch.finfo(gradient.dtype).eps * own:
                    raise self._mixing(f"values at half of the points have derivatives by {name!r} at the other half")

    def values(self, value: Tensor) -> None:
        """Compare the value with the rehearsals."""
        eps = torch.finfo(value.dtype).eps
        if isinstance(self.given, Tensor) and not _close(self.given, value, eps**0.5):
            raise InputError(
                "the function gives another value when its coordinates are expanded against each other",
                got=f"output {tuple(self.given.shape)} as given, {tuple(value.shape)} expanded",
                expected="one sample for every entry of a coordinate",
                hint='coords=("x",) to name only the coordinates, vectors=("r",) for an input that is one vector',
            )
        still, *moved = (rehearsed.reshape(self.points.count, -1) for rehearsed in self.moved)
        for kept, rows in zip(self.halves, moved, strict=True):
            if not _close(_of(kept, rows), _of(kept, still), _TOLERANCE * eps):
                raise self._mixing("values at half of the points change when the other half moves")

    def _rows(self, tensor: Tensor, source: np.ndarray) -> Tensor:
        """The tensor with the coordinates of the points `source` in place of its own."""
        return tensor.detach().reshape(self.points.count, -1)[torch.from_numpy(source).to(tensor.device)].reshape(tensor.shape)

    def _over(self, numbers: np.ndarray, column: Tensor) -> Tensor:
        return torch.from_numpy(numbers).to(column.device, column.dtype).reshape(self.points.shape)

    def _mixing(self, evidence: str) -> MixingError:
        names: dict[nn.Module, str] = {}
        for part in parts(self.coordinates.call.function):
            for name, layer in part.named_modules() if isinstance(part, nn.Module) else ():
                names.setdefault(layer, name or type(layer).__name__)
        layers = [name for layer, name in names.items() if layer.training and isinstance(layer, _BATCH_NORMS)]
        culprit = self._culprit()
        error = MixingError(
            "the value at one point depends on other points, so there are no derivatives point by point",
            got=evidence + (f"; first in {culprit}" if culprit else ""),
            expected="every point's value computed from its own coordinates",
            hint=f"module.eval(): batch statistics in {listed(layers)}" if layers else _VECTORS,
        )
        error.culprit = culprit
        return error

    def _culprit(self) -> Culprit | None:
        """The operation that mixes points, told from one of them: the mean over points may be what it is for the one in the middle."""
        count, call, tensors = self.points.count, self.coordinates.call, self.points.tensors

        def alike(point: int) -> Callable[[], Any]:
            moved = {name: self._rows(tensors[name], np.full(count, point)) for name in self.asked}
            return partial(rehearse, call, {**tensors, **moved}, watched=True)

        found = (first_difference(partial(rehearse, call, tensors, watched=True), alike(n), count, n) for n in (count // 2, count - 1))
        return next((culprit for culprit in found if culprit is not None), None)


_VECTORS = 'vectors=("r",) if the last dimension of an input is one vector'
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _of(half: np.ndarray, rows: Tensor) -> Tensor:
    """The rows with zeros outside of one half."""
    return rows * torch.from_numpy(half).to(rows.device)[:, None]


def _close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    if left.shape != right.shape:
        return False
    scale = largest(right.detach().abs().nan_to_num(0.0, 0.0, 0.0))
    return largest((left - right).detach().abs().nan_to_num(0.0)) <= tolerance * scale


def _signature(coordinates: Coordinates, points: Points, asked: tuple[str, ...]) -> tuple[Any, Hashable]:
    """What a proof holds for: code, module types, switches (train flags too), ranks and dtypes of the inputs; sizes are left out."""
    call = coordinates.call
    pieces: list[Hashable] = [asked, points.expanded, tuple((name, tensor.dim(), tensor.dtype) for name, tensor in call.tensors.items())]
    pieces += [(name, value) for name, value in call.arguments.items() if isinstance(value, bool)]
    codes: list[CodeType] = []
    for part in parts(call.function):
        if isinstance(part, CodeType):
            codes.append(part)
        pieces.append(part if isinstance(part, bool) else _kind(part))
    return codes[0] if codes else type(call.function), tuple(pieces)


def _kind(part: object) -> Hashable:
    """An instance stands for its type, since new ones are proved by old ones; all else for itself, held weakly where that can be."""
    thing = type(part) if stands_for_its_type(part) else part
    try:
        return ref(thing)
    except TypeError:
        return id(thing)
