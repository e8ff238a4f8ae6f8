"""Functions of one variable applied to jets, entry by entry, by Faa di Bruno: each as one node of the autograd graph.

    h = phi(f) = sum over k of c[k] v^k, with c[k] = phi^(k)(value) / k! and v = f - value, which is nilpotent;
    f-bar = the adjoint of multiplication by phi'(f), another composition.

One jet is kept for the reverse pass: the one that went in, or the one that came out where phi' is a polynomial of phi (`slopes`).

The jet that goes in may be affine in the coordinates: its slots of order two and more are zero and are not looked at, and its rest is of
size 1 along dimensions in which it does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._compat import traced
from .._typing import Tensor
from . import slopes
from .frame import Frame, Table
from .kernels import Parts, conjugate, parts_of, plain, transposed, transposed_into


class Scaled(NamedTuple):
    """A coefficient with a number apart, which costs no pass over memory."""

    tensor: Tensor
    factor: float


Series = Callable[..., Sequence[Tensor | Scaled]]
"""(x, n, value) -> [phi(x), phi'(x), ..., phi^(n)(x) / n!]; shorter where the remaining coefficients are zero. `value` is phi(x) where it
is known already, else None."""


def compose(series: Series, f: Parts, frame: Frame, affine: bool = False) -> Tensor:
    """phi(f) for a function phi of one variable, applied entry by entry: the whole stack, (1 + R, *shape)."""
    if plain():
        return _compose(series, f, frame, affine=affine)
    return _Compose.apply(*f, frame, series, affine)  # type: ignore[no-untyped-call]


def compose_stack(series: Series, stack: Tensor, shift: Tensor | None, frame: Frame) -> Tensor:
    """The same for a stack whose value is still to be shifted by a constant (a bias): one buffer each way."""
    if plain():
        return _compose(series, _apart(stack, shift), frame)
    return _ComposeStack.apply(stack, shift, frame, series)  # type: ignore[no-untyped-call]


def _apart(stack: Tensor, shift: Tensor | None) -> Parts:
    return stack[0] if shift is None else stack[0] + shift, stack[1:]


def derivative(series: Series) -> Series:
    """The series of phi', of which `value` is still phi(x)."""

    def of(x: Tensor, n: int, value: Tensor | None = None) -> list[Scaled]:
        coefficients = [scaled(c) for c in series(x, n + 1, value)[1:]]
        return [Scaled(c, (k + 1) * factor) for k, (c, factor) in enumerate(coefficients)]

    return of


def scaled(c: Tensor | Scaled) -> Scaled:
    return c if isinstance(c, Scaled) else Scaled(c, 1.0)


def multiplied(c: Tensor | Scaled) -> Tensor:
    return c if not isinstance(c, Scaled) else c.tensor if c.factor == 1 else c.tensor * c.factor


def _compose(series: Series, f: Parts, frame: Frame, value: Tensor | None = None, affine: bool = False) -> Tensor:
    """The stack of phi(f); `value` is phi of the value where that is known."""
    rest = f[1]
    h = torch.empty((1 + frame.rest, *f[0].shape), dtype=torch.promote_types(f[0].dtype, rest.dtype), device=rest.device)
    _compose_into(h, series(f[0], frame.order, value), rest[: frame.firsts] if affine else rest, frame)
    return h


def _compose_into(h: Tensor, c: Sequence[Tensor | Scaled], rest: Tensor, frame: Frame) -> None:
    """`rest` holds all slots, or those of the first order, where the others are zero."""
    held = 1 + rest.shape[0] if len(c) > 1 else 1
    h[0] = multiplied(c[0])
    h[held:] = 0
    if held == 1:
        return
    if traced():  # what `out=` writes cannot be differentiated once it is in a graph of operations
        h[1:held] = rest * multiplied(c[1])
    else:
        torch.mul(rest, multiplied(c[1]), out=h[1:held])
    power = {slot: Scaled(entry, 1.0) for slot, entry in enumerate(rest.unbind(0))}
    for k, coefficient in enumerate(c[2 : frame.order + 1], start=2):
        power = _power(rest, power, frame.square if k == 2 else frame.powers[k - 2])
        tensor, factor = scaled(coefficient)
        for slot, entry in power.items():
            h[1 + slot].addcmul_(tensor, entry.tensor, value=factor * entry.factor)


def _power(left: Tensor, right: dict[int, Scaled], table: Table) -> dict[int, Scaled]:
    """v * v^(k-1), by slot; slots that are not there are zero."""
    found: dict[int, Scaled] = {}
    for slot, pairs in table:
        there = [pair for pair in pairs if pair.left < len(left) and pair.right in right]
        if not there:
            continue
        first, *others = there
        scale = first.weight * right[first.right].factor
        total = left[first.left] * right[first.right].tensor
        for i, j, weight in others:
            total.addcmul_(left[i], right[j].tensor, value=weight * right[j].factor / scale)
        found[slot] = Scaled(total, scale)
    return found


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rest: Tensor, frame: Frame, series: Series, affine: bool) -> Tensor:
        ctx.frame, ctx.series, ctx.affine, ctx.shape = frame, series, affine, rest.shape
        h = _compose(series, (value, rest), frame, affine=affine)
        ctx.save_for_backward(h, *(() if slopes.slope_of(series) is not None else (value, rest)))
        return h

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        result, *given = ctx.saved_tensors
        if (slope := slopes.slope_of(ctx.series)) is not None:
            value, rest = slopes.pulled(slope, result, h, ctx.frame, ctx.shape if ctx.affine else None)
            return value, rest.sum_to_size(ctx.shape), None, None, None
        value, rest = given
        if plain():
            p = _compose(derivative(ctx.series), (value, rest), ctx.frame, result[0], ctx.affine)
        else:
            p = compose(derivative(ctx.series), (value, rest), ctx.frame, ctx.affine)
        value, rest = transposed(conjugate(parts_of(p)), parts_of(h), ctx.frame)
        return value, rest.sum_to_size(ctx.shape), None, None, None


class _ComposeStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stack: Tensor, shift: Tensor | None, frame: Frame, series: Series) -> Tensor:
        ctx.frame, ctx.series = frame, series
        h = _compose(series, _apart(stack, shift), frame)
        ctx.save_for_backward(h, *(() if slopes.slope_of(series) is not None else (stack, shift)))
        ctx.shift = None if shift is None else shift.shape
        return h

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        result, *given = ctx.saved_tensors
        if (slope := slopes.slope_of(ctx.series)) is not None:
            out = slopes.pulled_stack(slope, result, h, ctx.frame)
        elif plain():
            stack, shift = given
            p = _compose(derivative(ctx.series), _apart(stack, shift), ctx.frame, result[0])
            out = p[0].conj() * h if p.is_complex() else p[0] * h
            transposed_into(out[0], out[1:], p[1:].conj() if p.is_complex() else p[1:], h[1:], ctx.frame)
        else:
            stack, shift = given
            p = compose_stack(derivative(ctx.series), stack, shift, ctx.frame)
            value, rest = transposed(conjugate(parts_of(p)), parts_of(h), ctx.frame)
            out = torch.cat([value.unsqueeze(0), rest])
        return out, None if ctx.shift is None else out[0].sum_to_size(ctx.shift), None, None
