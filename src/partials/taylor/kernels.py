"""Products of jets, by Leibniz, each as one node of the autograd graph.

A jet is a value (*shape) and the rest of its slots (R, *shape). Two maps, and each one's derivative is made of both, so that results can
be differentiated any number of times:

    multiply    h = f g
    transposed  f-bar[j] = sum over (k, i) of w p[i] h-bar[k]: the adjoint of f -> p f

(Griewank & Walther, Evaluating Derivatives, 2nd ed., chapter 13.)
"""

from __future__ import annotations

from typing import Any

import torch

from .._typing import Tensor
from .frame import Frame

Parts = tuple[Tensor, Tensor]


def multiply(f: Parts, g: Parts, frame: Frame) -> Parts:
    """The product of two jets of one shape."""
    if plain():
        return multiplied_parts(f, g, frame)
    return _Multiply.apply(*f, *g, frame)  # type: ignore[no-untyped-call]


def transposed(p: Parts, h: Parts, frame: Frame) -> Parts:
    """What a cotangent h of the product p f is as a cotangent of f."""
    if plain():
        return transposed_parts(p, h, frame)
    return _Transposed.apply(*p, *h, frame)  # type: ignore[no-untyped-call]


def plain() -> bool:
    """Whether no graph is wanted: then no node is made, which also lets a reverse pass run under vmap."""
    return not torch.is_grad_enabled()


def multiplied_parts(f: Parts, g: Parts, frame: Frame) -> Parts:
    rest = f[1] * g[0]
    rest.addcmul_(f[0], g[1])
    for slot, pairs in frame.table:
        for i, j, weight in pairs:
            rest[slot].addcmul_(f[1][i], g[1][j], value=weight)
    return f[0] * g[0], rest


def transposed_parts(p: Parts, h: Parts, frame: Frame) -> Parts:
    value, rest = p[0] * h[0], p[0] * h[1]
    transposed_into(value, rest, p[1], h[1], frame)
    return value, rest


def transposed_into(value: Tensor, rest: Tensor, p: Tensor, h: Tensor, frame: Frame) -> None:
    """Adds all but the products with p's value."""
    for slot, pairs in frame.table:
        for i, j, weight in pairs:
            rest[j].addcmul_(p[i], h[slot], value=weight)
    for slot in range(frame.rest):
        value.addcmul_(p[slot], h[slot])


def conjugate(f: Parts) -> Parts:
    return (f[0].conj().resolve_conj(), f[1].conj().resolve_conj()) if f[0].is_complex() else f


def parts_of(stack: Tensor) -> Parts:
    first, rest = stack.split((1, stack.shape[0] - 1))
    return first[0], rest


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f0: Tensor, f: Tensor, g0: Tensor, g: Tensor, frame: Frame) -> Parts:
        ctx.save_for_backward(f0, f, g0, g)
        ctx.frame = frame
        return multiplied_parts((f0, f), (g0, g), frame)

    @staticmethod
    def backward(ctx: Any, h0: Tensor, h: Tensor) -> Any:
        f0, f, g0, g = ctx.saved_tensors
        of_f = transposed(conjugate((g0, g)), (h0, h), ctx.frame) if any(ctx.needs_input_grad[:2]) else (None, None)
        of_g = transposed(conjugate((f0, f)), (h0, h), ctx.frame) if any(ctx.needs_input_grad[2:4]) else (None, None)
        return *of_f, *of_g, None


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p0: Tensor, p: Tensor, h0: Tensor, h: Tensor, frame: Frame) -> Parts:
        ctx.save_for_backward(p0, p, h0, h)
        ctx.frame = frame
        return transposed_parts((p0, p), (h0, h), frame)

    @staticmethod
    def backward(ctx: Any, f0: Tensor, f: Tensor) -> Any:
        p0, p, h0, h = ctx.saved_tensors
        of_p = transposed((f0, f), conjugate((h0, h)), ctx.frame) if any(ctx.needs_input_grad[:2]) else (None, None)
        of_h = multiply(conjugate((p0, p)), (f0, f), ctx.frame) if any(ctx.needs_input_grad[2:4]) else (None, None)
        return *of_p, *of_h, None
