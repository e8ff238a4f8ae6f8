"""Functions whose derivative is a polynomial of themselves, phi' = a + b phi + c phi^2: tanh, sigmoid, exp, tan, the reciprocal.

Their reverse pass needs the jet that came out and no other: the jet of phi'(f) is a + b h + c h h, whose slots are made one at a time, used
and forgotten. Cotangents that are zero at every point (of slots that nothing later reads) are passed over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from .._compat import inside_transform, traced
from .._typing import Shape, Tensor
from .frame import Frame
from .kernels import Parts, conjugate, multiply, parts_of, plain, transposed, transposed_parts


class Slope(NamedTuple):
    """phi' = constant + linear * phi + square * phi^2."""

    constant: float
    linear: float
    square: float


S = TypeVar("S", bound=Callable[..., Any])


def sloped(constant: float, linear: float, square: float) -> Callable[[S], S]:
    """Mark a series as that of such a function."""

    def mark(series: S) -> S:
        series.slope = Slope(constant, linear, square)  # type: ignore[attr-defined]
        return series

    return mark


def slope_of(series: Callable[..., Any]) -> Slope | None:
    found: Slope | None = getattr(series, "slope", None)
    return found


def pulled(slope: Slope, result: Tensor, cotangent: Tensor, frame: Frame, affine: Shape | None) -> Parts:
    """The cotangent of f, from that of h = phi(f) and from h. Of an affine f: the shape of its rest, to which first slots are summed."""
    if not plain() or traced():
        return _differentiable(slope, result, cotangent, frame)
    if affine is None:
        return parts_of(pulled_stack(slope, result, cotangent, frame))
    rest = result.new_zeros(affine)

    def add(j: int, p: Tensor, h: Tensor, weight: float) -> None:
        if j < frame.firsts:  # the others are zero whatever the parameters are
            rest[j].add_((p * h).sum_to_size(affine[1:]), alpha=weight)

    return _pull(slope, result, cotangent, frame, add), rest


def pulled_stack(slope: Slope, result: Tensor, cotangent: Tensor, frame: Frame) -> Tensor:
    """The same as one stack."""
    if not plain() or traced():
        value, rest = _differentiable(slope, result, cotangent, frame)
        return torch.cat([value.unsqueeze(0), rest])
    out = torch.empty_like(result)
    written: set[int] = set()

    def add(j: int, p: Tensor, h: Tensor, weight: float) -> None:
        if j in written:
            out[1 + j].addcmul_(p, h, value=weight)
        else:
            torch.mul(p, h, out=out[1 + j])
            if weight != 1:
                out[1 + j].mul_(weight)
        written.add(j)

    out[0] = _pull(slope, result, cotangent, frame, add)
    for j in set(range(frame.rest)) - written:
        out[1 + j] = 0
    return out


def _pull(slope: Slope, result: Tensor, cotangent: Tensor, frame: Frame, add: Callable[[int, Tensor, Tensor, float], Any]) -> Tensor:
    """Calls `add(j, p, h, weight)` for every product that the cotangent of slot j is a sum of; returns that of the value."""
    (x, rest), (h0, h) = conjugate(parts_of(result)), parts_of(cotangent)
    first = slope.constant + x * (slope.linear + slope.square * x) if slope.square else slope.constant + slope.linear * x
    second = slope.linear + (2 * slope.square) * x if slope.square else None
    live = _live(h)
    value = first * h0
    for j in live:
        add(j, first, h[j], 1.0)
    into: defaultdict[int, list[tuple[int, int, float]]] = defaultdict(list)
    for k, pairs in frame.table:
        for i, j, weight in pairs if k in live else ():
            into[i].append((j, k, weight))
    squares = dict(frame.square)
    for i in sorted({*live, *into}):
        if second is None:
            p, factor = rest[i], slope.linear
        else:
            p, factor = rest[i] * second, 1.0
            for left, right, weight in squares.get(i, ()):
                p.addcmul_(rest[left], rest[right], value=slope.square * weight)
        if i in live:
            value.addcmul_(p, h[i], value=factor)
        for j, k, weight in into[i]:
            add(j, p, h[k], weight * factor)
    return value


def _differentiable(slope: Slope, result: Tensor, cotangent: Tensor, frame: Frame) -> Parts:
    h = parts_of(result)
    square = multiply(h, h, frame) if slope.square else (torch.zeros_like(h[0]), torch.zeros_like(h[1]))
    value = slope.constant + slope.linear * h[0] + slope.square * square[0]
    p = conjugate((value, slope.linear * h[1] + slope.square * square[1]))
    return (transposed_parts if plain() else transposed)(p, parts_of(cotangent), frame)


def _live(h: Tensor) -> list[int]:
    """The slots whose cotangents are not zero everywhere, by reading those that begin with zeros; all, where reading costs or cannot be."""
    slots = list(range(h.shape[0]))
    if h.device.type != "cpu" or not h.numel() or h.is_complex() or inside_transform():
        return slots
    ends = h.detach().flatten(1)[:, :: max(h[0].numel() // 16, 1)].any(1).tolist()
    return [slot for slot in slots if ends[slot] or bool(h[slot].count_nonzero())]
