"""Sums, differences and products with broadcasting: the derivative is known, so that no expanded copy of the parameter is followed.

Written in place, these operations overwrite what the rule would read: they are left to the list in `elementwise.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._typing import Tensor
from ._parts import Part, SumPart
from ._table import rule


@rule(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
def mul(input: Tensor, other: Tensor) -> Iterator[Part]:
    """z = input * other."""
    yield SumPart(input, itself, (other,))
    yield SumPart(other, itself, (input,))


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(input: Tensor, other: Tensor, *, alpha: float = 1) -> Iterator[Part]:
    """z = input + alpha other."""
    yield SumPart(input)
    yield SumPart(other, scale=alpha)


@rule(torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__)
def sub(input: Tensor, other: Tensor, *, alpha: float = 1) -> Iterator[Part]:
    """z = input - alpha other."""
    yield SumPart(input)
    yield SumPart(other, scale=-alpha)


@rule(torch.rsub, Tensor.__rsub__)
def rsub(input: Tensor, other: Tensor, *, alpha: float = 1) -> Iterator[Part]:
    """z = other - alpha input."""
    yield SumPart(input, scale=-alpha)
    yield SumPart(other)


def itself(t: Tensor) -> Tensor:
    return t
