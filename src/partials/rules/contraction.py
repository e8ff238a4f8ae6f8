"""Contractions of several tensors (einsum and its kin), rewritten as products of two, each of which has a rule."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F

from .. import _compat
from .._typing import Tensor
from ._parts import NoRule
from ._table import Run, rule

Labels = tuple[Hashable, ...]


@rule(torch.einsum, composite=True)
def einsum(run: Run, equation: Any, *operands: Any) -> Tensor:
    """Operands are taken in their order: what is left over of the earlier ones, times the next one."""
    if not isinstance(equation, str):
        equation, operands = _lettered((equation, *operands))
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    labels, output = _parsed(equation, operands)
    return _contracted(run, [_Labelled(t, of) for t, of in zip(operands, labels, strict=True)], output)


@rule(torch.tensordot, composite=True)
def tensordot(run: Run, a: Tensor, b: Tensor, dims: Any = 2, out: Any = None) -> Tensor:
    if out is not None:
        raise NoRule("a result written into out=")
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = (range(a.ndim - dims, a.ndim), range(dims))
    left, right = ([d % t.ndim for d in ([side] if isinstance(side, int) else side)] for t, side in zip((a, b), dims, strict=True))
    of_a = [("a", d) for d in range(a.ndim)]
    of_b: list[Hashable] = [("b", d) for d in range(b.ndim)]
    for i, j in zip(left, right, strict=True):
        of_b[j] = of_a[i]
    output = tuple(n for d, n in enumerate(of_a) if d not in left) + tuple(n for d, n in enumerate(of_b) if d not in right)
    return _contracted(run, [_Labelled(a, tuple(of_a)), _Labelled(b, tuple(of_b))], output)


@rule(torch.inner, torch.Tensor.inner, composite=True)
def inner(run: Run, input: Tensor, other: Tensor) -> Tensor:
    return input * other if input.ndim == 0 or other.ndim == 0 else tensordot(run, input, other, ([-1], [-1]))


@rule(torch.outer, torch.Tensor.outer, torch.ger, torch.Tensor.ger, composite=True)
def outer(run: Run, input: Tensor, vec2: Tensor) -> Tensor:
    return input.unsqueeze(-1) * vec2


@rule(torch.addmv, torch.Tensor.addmv, composite=True)
def addmv(run: Run, input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * input + alpha * (mat @ vec)


@rule(torch.linalg.multi_dot, torch.chain_matmul, composite=True)
def multi_dot(run: Run, *tensors: Any) -> Tensor:
    return reduce(torch.matmul, tensors[0] if isinstance(tensors[0], tuple | list) else tensors)


def linear_cross_entropy(run: Run, input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """All logits at once: chunks save memory within one call, by a fused derivative that shows no use."""
    if options.get("options") is not None and options.get("reduction", "mean") == "mean":
        why = "a fused mean, whose derivative is not a plain mean's where all targets are ignored, and which asks what requires grad"
        raise NoRule(why, expandable=False)
    return _compat.body_of(F.linear_cross_entropy)(input, linear_weight, target, **{**options, "options": None})


if hasattr(F, "linear_cross_entropy"):  # torch 2.11 has none
    rule(F.linear_cross_entropy, composite=True)(linear_cross_entropy)


@dataclass(frozen=True)
class _Labelled:
    """A tensor and a label for each of its dimensions, no label twice."""

    tensor: Tensor
    labels: Labels

    def arranged(self, order: Iterable[Hashable]) -> Tensor:
        """Dimensions in the given order."""
        places = [self.labels.index(label) for label in order]
        return self.tensor if places == list(range(self.tensor.ndim)) else self.tensor.permute(places)

    def summed(self, keep: set[Hashable]) -> _Labelled:
        """Without the dimensions that nobody else knows."""
        gone = [d for d, label in enumerate(self.labels) if label not in keep]
        if not gone:
            return self
        return _Labelled(self.tensor.sum(gone), tuple(label for label in self.labels if label in keep))


def _contracted(run: Run, operands: list[_Labelled], output: Labels) -> Tensor:
    sizes: dict[Hashable, int] = {}
    for operand in operands:
        for label, size in zip(operand.labels, operand.tensor.shape, strict=True):
            if sizes.setdefault(label, size) != size:
                raise NoRule("a contraction in which a dimension of size one is repeated")
    found = operands[0]
    for at, operand in enumerate(operands[1:], 1):
        keep = set(output).union(*(later.labels for later in operands[at + 1 :]))
        found = _product(run, found.summed(keep | set(operand.labels)), operand.summed(keep | set(found.labels)), keep)
    return found.summed(set(output)).arranged(output)


def _product(run: Run, a: _Labelled, b: _Labelled, keep: set[Hashable]) -> _Labelled:
    """Two tensors times each other: `a @ b` with batches, or entry by entry where nothing is summed."""
    if run.of_samples(b.tensor) and not run.of_samples(a.tensor):
        a, b = b, a
    both = [label for label in b.labels if label in a.labels]
    batch, summed = [n for n in both if n in keep], [n for n in both if n not in keep]
    left, right = [n for n in a.labels if n not in both], [n for n in b.labels if n not in both]
    if not summed:
        wide = a.arranged([*left, *batch])
        return _Labelled(wide.reshape((*wide.shape, *(1,) * len(right))) * b.arranged([*batch, *right]), (*left, *batch, *right))
    w = b.arranged([*batch, *summed, *right])
    shape = w.shape
    w = _folded(_folded(w, len(batch) + len(summed), len(right)), len(batch), len(summed))
    if not batch:  # positions keep their dimensions, so that samples are found where they are
        z = _folded(a.arranged([*left, *summed]), len(left), len(summed)) @ w
        lead: Sequence[int] = z.shape[:-1]
    else:
        x = a.arranged([*batch, *left, *summed])
        lead = x.shape[: len(batch) + len(left)]
        z = _folded(_folded(x, len(batch) + len(left), len(summed)), len(batch), len(left)) @ w
    return _Labelled(z.reshape((*lead, *shape[len(batch) + len(summed) :])), (*batch, *left, *right))


def _folded(t: Tensor, start: int, count: int) -> Tensor:
    """`count` dimensions from `start` as one."""
    if count == 1:
        return t
    return t.flatten(start, start + count - 1) if count else t.unsqueeze(start)


def _lettered(arguments: tuple[Any, ...]) -> tuple[str, tuple[Tensor, ...]]:
    """`einsum(a, [0, 1], b, [1, 2], [0, 2])` as an equation."""

    def word(labels: Any) -> str:
        return "".join("..." if n is Ellipsis else chr(ord("A") + n if n < 26 else ord("a") + n - 26) for n in labels)

    pairs = len(arguments) // 2
    left = ",".join(word(arguments[2 * i + 1]) for i in range(pairs))
    tail = f"->{word(arguments[-1])}" if len(arguments) % 2 else ""
    return left + tail, tuple(arguments[2 * i] for i in range(pairs))


def _parsed(equation: str, operands: Sequence[Tensor]) -> tuple[list[Labels], Labels]:
    """Labels of each operand, an ellipsis as numbers counted from its end, and of the output."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    words = left.split(",")
    if len(words) != len(operands):
        raise NoRule("an equation that does not fit its operands")
    dots = [t.ndim - len(word.replace("...", "")) if "..." in word else 0 for word, t in zip(words, operands, strict=True)]
    labels = [_labelled(word, count) for word, count in zip(words, dots, strict=True)]
    if any(len(set(of)) != len(of) for of in labels):
        raise NoRule("a contraction that takes a diagonal")
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        right = "..." + "".join(sorted(n for n in set(letters) if letters.count(n) == 1))
    return labels, _labelled(right, max(dots, default=0))


def _labelled(word: str, dots: int) -> Labels:
    before, dotted, after = word.partition("...")
    return (*before, *(range(-dots, 0) if dotted else ()), *after)
