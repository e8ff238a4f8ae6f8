"""Linear maps by weights, products of two jets, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..._typing import Tensor
from ..jets import Jet, NoRule, bilinear, by_features, lengthened, linear, plus, stacked
from ..table import enter, jet_rule
from .structure import batchwise


@jet_rule(F.linear)
def linear_(input: Any, weight: Any, bias: Any = None) -> Jet:
    made = matmul(input, linear(weight, lambda t: t.mT)) if isinstance(weight, Jet) else by_features(input, lambda t: F.linear(t, weight))
    return made if bias is None else plus(made, bias)


@jet_rule("matmul", "mm", "bmm", "mv", "__matmul__")
def matmul(f: Any, g: Any) -> Jet:
    if isinstance(f, Jet) and isinstance(g, Jet):
        return bilinear(f, g, torch.matmul)
    if isinstance(f, Jet):
        if f.ndim == 1 and g.ndim > 2:
            raise NoRule("a vector times a batch of matrices")
        if g.ndim == 2:
            return by_features(f, lambda t: t @ g)
        return stacked(lengthened(f, g.ndim), lambda t: t @ g)
    if g.ndim == 1:
        if f.ndim > 2:
            raise NoRule("a batch of matrices times a vector")
        return stacked(g, lambda t: t @ f.mT) if f.ndim == 2 else stacked(g, lambda t: t @ f)
    g = lengthened(g, f.ndim) if f.ndim > 2 else g
    return stacked(g, lambda t: f @ t)


@jet_rule("__rmatmul__")
def rmatmul(f: Any, g: Any) -> Jet:
    return matmul(g, f)


@jet_rule("dot")
def dot(f: Any, g: Any) -> Jet:
    return matmul(f, g)


@jet_rule("addmm", "baddbmm", "addmv")
def addmm(f: Any, one: Any, other: Any, *, beta: Any = 1, alpha: Any = 1) -> Jet:
    product = matmul(one, other) if isinstance(one, Jet) or isinstance(other, Jet) else one @ other
    scaled_f = f if beta == 1 else linear(f, lambda t: t * beta) if isinstance(f, Jet) else f * beta
    return plus(scaled_f, product, alpha)


@jet_rule("outer", "ger")
def outer(f: Any, g: Any) -> Jet:
    return einsum("i,j->ij", f, g)


@jet_rule("einsum")
def einsum(equation: Any, *operands: Any) -> Jet:
    if not isinstance(equation, str):
        raise NoRule("einsum by lists of numbers")
    if len(operands) == 1 and type(operands[0]) in (tuple, list):
        operands = tuple(operands[0])
    jets = [place for place, operand in enumerate(operands) if isinstance(operand, Jet)]
    if len(jets) > 2:
        raise NoRule("einsum of more than two tensors that depend on the coordinates")
    if len(jets) == 1:
        return stacked(operands[jets[0]], lambda t: torch.einsum(_with_slots(equation, jets[0], len(operands)), *_put(operands, jets, t)))
    f, g = (operands[place] for place in jets)
    return bilinear(f, g, lambda one, other: torch.einsum(equation, *_put(operands, jets, one, other)))


def _put(operands: tuple[Any, ...], places: list[int], *tensors: Tensor) -> list[Tensor]:
    found = list(operands)
    for place, tensor in zip(places, tensors, strict=True):
        found[place] = tensor
    return found


def _with_slots(equation: str, place: int, count: int) -> str:
    """The equation with a letter for the slots on one operand and on the result."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    letter = next(chr(code) for code in (*range(97, 123), *range(65, 91)) if chr(code) not in equation)
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(one for one in set(letters) if letters.count(one) == 1))
    if len(inputs) != count:
        raise NoRule("einsum with an unusual equation")
    inputs[place] = letter + inputs[place]
    return f"{','.join(inputs)}->{letter}{right}"


@jet_rule("bilinear")
def bilinear_(f: Any, g: Any, weight: Any, bias: Any = None) -> Jet:
    made = einsum("...i,oij,...j->...o", f, weight, g)
    return made if bias is None else plus(made, bias)


def _convolution(function: Any, dims: int) -> Callable[..., Jet]:
    def rule(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Jet:
        if not isinstance(input, Jet) or isinstance(weight, Jet):
            raise NoRule("a convolution whose weight depends on the coordinates")
        made = batchwise(input, lambda t: function(t, weight, None, *args, **kwargs), dims + 2)
        return made if bias is None else plus(made, bias.reshape(-1, *(1,) * dims))

    return rule


for _dims in (1, 2, 3):
    for _name in (f"conv{_dims}d", f"conv_transpose{_dims}d"):
        enter(_convolution(getattr(F, _name), _dims), getattr(F, _name), getattr(torch, _name))
