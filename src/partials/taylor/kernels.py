"""Arithmetic of jets: the products and compositions of Leibniz and Faa di Bruno, each as one node of the autograd graph.

A jet is a value (*shape) and the rest of its slots (R, *shape). Three maps are enough, and each one's derivative is made of the others,
so that results can be differentiated any number of times:

    multiply    h = f g
    transposed  f-bar[j] = sum over (k, i) of w p[i] h-bar[k]: the adjoint of f -> p f
    compose     h = phi(f) = sum over k of c[k] v^k, with c[k] = phi^(k)(value) / k! and v = f - value, which is nilpotent;
                its derivative is multiplication by phi'(f), another composition.

Only the jet that went in is kept for the reverse pass. (Griewank & Walther, Evaluating Derivatives, 2nd ed., chapter 13.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._compat import traced
from .._typing import Tensor
from .frame import Frame, Table


class Scaled(NamedTuple):
    """A coefficient with a number apart, which costs no pass over memory."""

    tensor: Tensor
    factor: float


Series = Callable[..., Sequence[Tensor | Scaled]]
"""(x, n, value) -> [phi(x), phi'(x), ..., phi^(n)(x) / n!]; shorter where the remaining coefficients are zero. `value` is phi(x) where it
is known already, else None."""
Parts = tuple[Tensor, Tensor]


def multiply(f: Parts, g: Parts, frame: Frame) -> Parts:
    """The product of two jets of one shape."""
    if _plain():
        return _multiply(f, g, frame)
    return _Multiply.apply(*f, *g, frame)  # type: ignore[no-untyped-call]


def transposed(p: Parts, h: Parts, frame: Frame) -> Parts:
    """What a cotangent h of the product p f is as a cotangent of f."""
    if _plain():
        return _transposed(p, h, frame)
    return _Transposed.apply(*p, *h, frame)  # type: ignore[no-untyped-call]


def compose(series: Series, f: Parts, frame: Frame) -> Tensor:
    """phi(f) for a function phi of one variable, applied entry by entry: the whole stack, (1 + R, *shape)."""
    if _plain():
        return _compose(series, f, frame)
    return _Compose.apply(*f, frame, series)  # type: ignore[no-untyped-call]


def compose_stack(series: Series, stack: Tensor, shift: Tensor | None, frame: Frame) -> Tensor:
    """The same for a stack whose value is still to be shifted by a constant (a bias): one buffer each way."""
    if _plain():
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


def _plain() -> bool:
    """Whether no graph is wanted: then no node is made, which also lets a reverse pass run under vmap."""
    return not torch.is_grad_enabled()


def _compose(series: Series, f: Parts, frame: Frame, value: Tensor | None = None) -> Tensor:
    """The stack of phi(f); `value` is phi of the value where that is known."""
    rest = f[1]
    h = torch.empty((1 + frame.rest, *rest.shape[1:]), dtype=torch.promote_types(f[0].dtype, rest.dtype), device=rest.device)
    _compose_into(h, series(f[0], frame.order, value), rest, frame)
    return h


def _compose_into(h: Tensor, c: Sequence[Tensor | Scaled], rest: Tensor, frame: Frame) -> None:
    h[0] = multiplied(c[0])
    if len(c) < 2:
        h[1:] = 0
        return
    if traced():  # what `out=` writes cannot be differentiated once it is in a graph of operations
        h[1:] = rest * multiplied(c[1])
    else:
        torch.mul(rest, multiplied(c[1]), out=h[1:])
    power = {slot: Scaled(entry, 1.0) for slot, entry in enumerate(rest.unbind(0))}
    for k, coefficient in enumerate(c[2 : frame.order + 1], start=2):
        power = _power(rest, power, frame.square if k == 2 else frame.powers[k - 2])
        tensor, factor = scaled(coefficient)
        for slot, entry in power.items():
            h[1 + slot].addcmul_(tensor, entry.tensor, value=factor * entry.factor)


def _power(left: Tensor, right: dict[int, Scaled], table: Table) -> dict[int, Scaled]:
    """v * v^(k-1), by slot."""
    found: dict[int, Scaled] = {}
    for slot, pairs in table:
        first, *others = pairs
        scale = first.weight * right[first.right].factor
        total = left[first.left] * right[first.right].tensor
        for i, j, weight in others:
            total.addcmul_(left[i], right[j].tensor, value=weight * right[j].factor / scale)
        found[slot] = Scaled(total, scale)
    return found


def _multiply(f: Parts, g: Parts, frame: Frame) -> Parts:
    rest = f[1] * g[0]
    rest.addcmul_(f[0], g[1])
    for slot, pairs in frame.table:
        for i, j, weight in pairs:
            rest[slot].addcmul_(f[1][i], g[1][j], value=weight)
    return f[0] * g[0], rest


def _transposed(p: Parts, h: Parts, frame: Frame) -> Parts:
    value, rest = p[0] * h[0], p[0] * h[1]
    _transposed_into(value, rest, p[1], h[1], frame)
    return value, rest


def _transposed_into(value: Tensor, rest: Tensor, p: Tensor, h: Tensor, frame: Frame) -> None:
    """Adds all but the products with p's value."""
    for slot, pairs in frame.table:
        for i, j, weight in pairs:
            rest[j].addcmul_(p[i], h[slot], value=weight)
    for slot in range(frame.rest):
        value.addcmul_(p[slot], h[slot])


def _conjugate(f: Parts) -> Parts:
    return (f[0].conj().resolve_conj(), f[1].conj().resolve_conj()) if f[0].is_complex() else f


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f0: Tensor, f: Tensor, g0: Tensor, g: Tensor, frame: Frame) -> Parts:
        ctx.save_for_backward(f0, f, g0, g)
        ctx.frame = frame
        return _multiply((f0, f), (g0, g), frame)

    @staticmethod
    def backward(ctx: Any, h0: Tensor, h: Tensor) -> Any:
        f0, f, g0, g = ctx.saved_tensors
        of_f = transposed(_conjugate((g0, g)), (h0, h), ctx.frame) if any(ctx.needs_input_grad[:2]) else (None, None)
        of_g = transposed(_conjugate((f0, f)), (h0, h), ctx.frame) if any(ctx.needs_input_grad[2:4]) else (None, None)
        return *of_f, *of_g, None


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p0: Tensor, p: Tensor, h0: Tensor, h: Tensor, frame: Frame) -> Parts:
        ctx.save_for_backward(p0, p, h0, h)
        ctx.frame = frame
        return _transposed((p0, p), (h0, h), frame)

    @staticmethod
    def backward(ctx: Any, f0: Tensor, f: Tensor) -> Any:
        p0, p, h0, h = ctx.saved_tensors
        of_p = transposed((f0, f), _conjugate((h0, h)), ctx.frame) if any(ctx.needs_input_grad[:2]) else (None, None)
        of_h = multiply(_conjugate((p0, p)), (f0, f), ctx.frame) if any(ctx.needs_input_grad[2:4]) else (None, None)
        return *of_p, *of_h, None


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rest: Tensor, frame: Frame, series: Series) -> Tensor:
        ctx.frame, ctx.series = frame, series
        h = _compose(series, (value, rest), frame)
        ctx.save_for_backward(value, rest, h)
        return h

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        value, rest, result = ctx.saved_tensors
        if _plain():
            slope = _compose(derivative(ctx.series), (value, rest), ctx.frame, result[0])
        else:
            slope = compose(derivative(ctx.series), (value, rest), ctx.frame)
        slopes, cotangents = slope.split((1, ctx.frame.rest)), h.split((1, ctx.frame.rest))
        value, rest = transposed(_conjugate((slopes[0][0], slopes[1])), (cotangents[0][0], cotangents[1]), ctx.frame)
        return value, rest, None, None


class _ComposeStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stack: Tensor, shift: Tensor | None, frame: Frame, series: Series) -> Tensor:
        ctx.frame, ctx.series = frame, series
        h = _compose(series, _apart(stack, shift), frame)
        ctx.save_for_backward(stack, shift, h)
        return h

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        stack, shift, result = ctx.saved_tensors
        slope = derivative(ctx.series)
        if _plain():
            p = _compose(slope, _apart(stack, shift), ctx.frame, result[0])
            out = p[0].conj() * h if p.is_complex() else p[0] * h
            _transposed_into(out[0], out[1:], p[1:].conj() if p.is_complex() else p[1:], h[1:], ctx.frame)
        else:
            p = compose_stack(slope, stack, shift, ctx.frame)
            value, rest = transposed(_conjugate((p[0], p[1:])), (h[0], h[1:]), ctx.frame)
            out = torch.cat([value.unsqueeze(0), rest])
        return out, None if shift is None else out[0].sum_to_size(shift.shape), None, None
