"""Products with a matrix: linear, mm, matmul, addmm, mv, bmm, baddbmm; and with two vectors: bilinear."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .._typing import Tensor
from ._parts import Declined, OuterPart, Part, SumPart
from ._table import ALIKE, rule


@rule(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Part]:
    """z[t,o] = sum_i input[t,i] weight[o,i] + bias[o]; a weight without o is a vector."""
    yield OuterPart(weight, input, "oi" if weight.ndim == 2 else "i")
    if bias is not None:
        yield SumPart(bias)


@rule(F.bilinear, torch.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Part]:
    """z[t,o] = sum_ij input1[t,i] weight[o,i,j] input2[t,j] + bias[o]: linear in the products of the inputs' entries."""
    yield OuterPart(weight, (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2))
    if bias is not None:
        yield SumPart(bias)


@rule(
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.linalg.matmul,
    torch.mm,
    torch.Tensor.mm,
    torch.bmm,
    torch.Tensor.bmm,
    torch.mv,
    torch.Tensor.mv,
)
def matmul(input: Tensor, other: Tensor) -> Iterator[Part]:
    """z[t,o] = sum_i a[t,i] w[i,o], or with the parameter on the left z[o,t] = sum_i w[o,i] a[i,t]."""
    yield from _right(input, other)
    yield from _left(input, other)


@rule(torch.Tensor.__rmatmul__)
def rmatmul(input: Tensor, other: Tensor) -> Iterator[Part]:
    yield from matmul(other, input)


@rule(torch.addmm, torch.Tensor.addmm, torch.baddbmm, torch.Tensor.baddbmm)
def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Iterator[Part]:
    """z = beta input + alpha (mat1 @ mat2)."""
    yield SumPart(input, scale=beta)
    yield from _right(mat1, mat2, alpha)
    yield from _left(mat1, mat2, alpha)


def _right(a: Tensor, w: Tensor, scale: float = 1) -> Iterator[Part]:
    if w.ndim <= 2:
        yield OuterPart(w, a, "io" if w.ndim == 2 else "i", scale=scale)
    elif a.ndim >= w.ndim and a.shape[a.ndim - w.ndim : -2] == w.shape[:-2]:
        yield OuterPart(w, a, "io", groups=w.ndim - 2, scale=scale)
    else:
        yield Declined(w, "a batch of parameter matrices that broadcasts")


def _left(w: Tensor, a: Tensor, scale: float = 1) -> Iterator[Part]:
    if w.ndim == 2 and a.ndim == 1:
        yield OuterPart(w, a, "oi", scale=scale)
    elif w.ndim < 2 or a.ndim < 2 or (w.ndim > 2 and w.shape[:-2] != a.shape[max(a.ndim - w.ndim, 0) : -2]):
        yield Declined(w, "a vector parameter on the left, or a batch of parameter matrices that broadcasts")
    else:
        yield OuterPart(w, a, "oi", transposed=True, groups=w.ndim - 2, scale=scale)


ALIKE.add(F.linear)
