"""What a rule yields: for one parameter argument of one operation, how the cotangent of the output becomes a block.

z is the operation's output and g its cotangent. A rule names tensors only; layouts, seeds and views are not its business.
Letters: n sample, c output, t position, i input feature, o output feature.

A part is made for one use and belongs to it: what it reads is detached in place, and cleared when its block no longer needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from .._signature import rebuild, tensors_in
from .._typing import Tensor


@dataclass(slots=True, eq=False)
class OuterPart:
    """J = sum_t g[t, o] (x) a[t, i], features last in both; `order` says how the parameter stores (o, i)."""

    parameter: Tensor
    a: Tensor
    order: str = "oi"
    transposed: bool = False
    """z and a hold their features in the last dimension but one."""
    groups: int = 0
    """Dimensions of the parameter before its last two: a matrix for each index, shared by all samples."""
    scale: float = 1.0
    batched = False


@dataclass(slots=True, eq=False)
class SumPart:
    """J = sum over positions of g * times, reduced to the parameter's shape as broadcasting would."""

    parameter: Tensor
    times: Callable[..., Tensor] | None = None
    saved: tuple[Tensor, ...] = ()
    """What `times` is called with when the block is made."""
    channel: int = 0
    """Where not 0: the parameter lies along this (negative) dimension of z and is 1-D."""
    scale: float = 1.0

    @property
    def batched(self) -> bool:
        """Whether `times` wants the operation's own batch dimension in front."""
        return self.times is not None and self.channel != 0


@dataclass(slots=True, eq=False)
class GatherPart:
    """J adds g[t] to row index[t]; a negative index adds nothing.

    With `scale`, t is a bag of rows: J adds scale[t, k] * g[t] to row index[t, k] for each k. The scale's last dimension is 1, or the
    features of a row where each of them has its own.
    """

    parameter: Tensor
    index: Tensor
    scale: Tensor | None = None
    batched = False


@dataclass(slots=True, eq=False)
class ConvPart:
    """J = correlation of the input's patches with g: a convolution's weight; of g's patches with the input where it is transposed."""

    parameter: Tensor
    a: Tensor
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False

    @property
    def batched(self) -> bool:
        """Whether the operation has a batch dimension of its own."""
        return self.a.ndim == len(self.stride) + 2


@dataclass(slots=True, eq=False)
class ExpandedPart:
    """The parameter was expanded to one value for each position before the operation: J is the expanded tensor's cotangent, summed."""

    parameter: Tensor
    expanded: Tensor = field(repr=False)
    batched = False


@dataclass(slots=True, eq=False)
class Declined:
    """The rule does not know this use of the parameter; the operation is expanded or another method runs."""

    parameter: Tensor
    reason: str
    batched = False


Part = OuterPart | SumPart | GatherPart | ConvPart | ExpandedPart | Declined


def with_data(part: Part, function: Callable[..., Tensor], *more: Any) -> Part:
    """The part, with `function` applied to each of its data tensors (and `more`)."""
    for name in data_of(type(part)):  # type: ignore[arg-type]
        value = getattr(part, name)
        if isinstance(value, Tensor):
            setattr(part, name, function(value, *more))
        elif value:
            setattr(part, name, rebuild(value, iter([function(t, *more) for t in tensors_in((value,))])))
    return part


def keep(part: Part, *, attached: bool) -> list[tuple[Tensor, int]]:
    """The part's data tensors with their versions; cut from the graph in place, unless `attached`: memory and versions are shared."""
    found: list[tuple[Tensor, int]] = []
    for name in data_of(type(part)):  # type: ignore[arg-type]
        value = getattr(part, name)
        if isinstance(value, Tensor):
            if not attached and value.requires_grad:
                value = value.detach()
                setattr(part, name, value)
            found.append((value, value._version))
        elif value:
            tensors = tensors_in(value)
            if not attached and any(t.requires_grad for t in tensors):
                value = rebuild(value, iter([t.detach() for t in tensors]))
                setattr(part, name, value)
                tensors = tensors_in(value)
            found += [(t, t._version) for t in tensors]
    return found


@cache
def data_of(kind: type) -> tuple[str, ...]:
    """Names of the fields that hold tensors of the run, of a class of parts: neither the parameter nor functions."""
    names = [f.name for f in fields(kind) if "Tensor" in str(f.type) and "Callable" not in str(f.type)]
    return tuple(name for name in names if name not in ("parameter", "expanded"))


class NoRule(Exception):
    """A rule declines: these arguments are not of the form that it knows. Where they must not be expanded either, it says so."""

    def __init__(self, reason: str, *, expandable: bool = True) -> None:
        super().__init__(reason)
        self.expandable = expandable
