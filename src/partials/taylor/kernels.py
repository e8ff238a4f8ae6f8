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
from typing import Any

import torch

from .._typing import Tensor
from .frame import Frame, Table

Series = Callable[[Tensor, int], list[Tensor]]
"""(x, n) -> [phi(x), phi'(x), ..., phi^(n)(x) / n!]; shorter where the remaining coefficients are zero."""
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
        return _compose(series(f[0], frame.order), f, frame)
    return _Compose.apply(*f, frame, series)  # type: ignore[no-untyped-call]


def derivative(series: Series) -> Series:
    """The series of phi'."""

    def of(x: Tensor, n: int) -> list[Tensor]:
        return [c if k == 0 else (k + 1) * c for k, c in enumerate(series(x, n + 1)[1:])]

    return of


def _plain() -> bool:
    """Whether no graph is wanted: then no node is made, which also lets a reverse pass run under vmap."""
    return not torch.is_grad_enabled()


def _compose(c: Sequence[Tensor], f: Parts, frame: Frame) -> Tensor:
    rest = f[1]
    h = torch.empty((1 + frame.rest, *rest.shape[1:]), dtype=torch.promote_types(c[0].dtype, rest.dtype), device=rest.device)
    h[0] = c[0]
    if len(c) < 2:
        h[1:] = 0
        return h
    torch.mul(rest, c[1], out=h[1:])
    power = dict(enumerate(rest))
    for k, coefficient in enumerate(c[2 : frame.order + 1], start=2):
        power = _power(rest, power, frame.square if k == 2 else frame.powers[k - 2])
        for slot, entry in power.items():
            h[1 + slot].addcmul_(coefficient, entry)
    return h


def _power(left: Tensor, right: dict[int, Tensor], table: Table) -> dict[int, Tensor]:
    """v * v^(k-1), by slot."""
    found: dict[int, Tensor] = {}
    for slot, pairs in table:
        first, *others = pairs
        total = left[first.left] * right[first.right]
        if first.weight != 1:
            total *= first.weight
        for i, j, weight in others:
            total.addcmul_(left[i], right[j], value=weight)
        found[slot] = total
    return found


def _multiply(f: Parts, g: Parts, frame: Frame) -> Parts:
    rest = f[1] * g[0]
    rest.addcmul_(f[0], g[1])
    for slot, pairs in frame.table:
        for i, j, weight in pairs:
            rest[slot].addcmul_(f[1][i], g[1][j], value=weight)
    return f[0] * g[0], rest


def _transposed(p: Parts, h: Parts, frame: Frame) -> Parts:
    rest = p[0] * h[1]
    for slot, pairs in frame.table:
        for i, j, weight in pairs:
            rest[j].addcmul_(p[1][i], h[1][slot], value=weight)
    value = p[0] * h[0]
    for slot in range(frame.rest):
        value.addcmul_(p[1][slot], h[1][slot])
    return value, rest


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
        ctx.save_for_backward(value, rest)
        ctx.frame, ctx.series = frame, series
        return _compose(series(value, frame.order), (value, rest), frame)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        slope = compose(derivative(ctx.series), ctx.saved_tensors, ctx.frame)
        slopes, cotangents = slope.split((1, ctx.frame.rest)), h.split((1, ctx.frame.rest))
        value, rest = transposed(_conjugate((slopes[0][0], slopes[1])), (cotangents[0][0], cotangents[1]), ctx.frame)
        return value, rest, None, None
