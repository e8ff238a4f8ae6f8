"""Layouts: which positions of a tensor belong to which sample, measured in the native run.

A layout says that dimension `dim` has size outer * N * inner, sample-major between: position i of it belongs to sample
(i // inner) % N. It is measured, never guessed from sizes: the reverse pass runs with Gaussian seeds U and with w_n U,
w_n = 1 + n / N; a layout is right where the second cotangent is w_n times the first at every position that it gives to n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .._typing import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the largest cotangent. Rounding is 1e-6 of it in float32; a wrong layout is off by the spread of w, about 0.3."""


@dataclass(frozen=True)
class Layout:
    """Where the samples are: see the module's text. `dim` counts the operation's own dimensions; -1 says that all of it is one sample."""

    dim: int
    outer: int = 1
    inner: int = 1

    def samples_first(self, t: Tensor, n: int, lead: int = 0) -> Tensor:
        """(*lead, ..., outer * N * inner, ...) -> (N, *lead, ..., outer * inner, ...): all other dimensions keep their order."""
        if self.dim < 0:
            return t.unsqueeze(0)
        at = lead + self.dim
        if self.outer == self.inner == 1:
            return (t.transpose(0, at) if at < 2 else t.movedim(at, 0)).unsqueeze(at + 1)
        parts = t.unflatten(at, (self.outer, n, self.inner)).movedim(at + 1, 0)
        return parts.flatten(at + 1, at + 2)

    def __str__(self) -> str:
        if self.dim < 0:
            return "one sample"
        folds = {(False, False): "", (True, False): "k*N", (False, True): "N*k", (True, True): "k*N*j"}[self.outer > 1, self.inner > 1]
        return f"dim {self.dim}" + (f" ({folds})" if folds else "")


def candidates(shape: tuple[int, ...], n: int) -> list[Layout]:
    """Every layout that the sizes allow, the usual ones first: whole dimensions, then folds of two, then of three."""
    if n == 1:
        return [Layout(-1)]
    fits = [(d, size // n) for d, size in enumerate(shape) if n and size and size % n == 0]
    whole = [Layout(d) for d, k in fits if k == 1]
    folds = [layout for d, k in fits if k > 1 for layout in (Layout(d, 1, k), Layout(d, k, 1))]
    both = [Layout(d, o, k // o) for d, k in fits for o in range(2, min(k, 64)) if k % o == 0 and k // o > 1]
    return whole + folds + both


def fits(layout: Layout, first: Tensor, second: Tensor, weights: Tensor) -> bool:
    """Whether `second` is w_n times `first` wherever the layout says sample n."""
    n = len(weights)
    one, two = (layout.samples_first(t, n).reshape(n, -1).to(weights.dtype) for t in (first, second))
    scale = two.abs().max()
    return bool((two - weights[:, None] * one).abs().max() <= TOLERANCE.get(first.dtype, 3e-2) * scale)


def find(first: Tensor, second: Tensor, weights: Tensor) -> tuple[Layout | None, bool]:
    """The layout of one edge's cotangents, and whether it is proved: zero cotangents fit every layout and prove none."""
    n = len(weights)
    possible = candidates(tuple(first.shape), n)
    informative = bool((first != 0).any())
    for layout in possible:
        if not informative or fits(layout, first, second, weights):
            return layout, informative and n > 1
    return None, False


def pattern(layout: Layout) -> tuple[int, str] | tuple[int, int, int]:
    """A layout without its sizes, so that it carries over to other N and T; with them where a fold has two sides."""
    if layout.outer > 1 and layout.inner > 1:
        return layout.dim, layout.outer, layout.inner
    return layout.dim, "outer" if layout.outer > 1 else "inner" if layout.inner > 1 else "whole"


def resolve(known: Any, shape: tuple[int, ...], n: int) -> Layout | None:
    """The layout that a pattern means for a shape, None where the sizes no longer allow it."""
    dim = known[0]
    if dim >= len(shape) or not n or shape[dim] % n:
        return None
    k = shape[dim] // n
    if len(known) == 3:
        return Layout(*known) if known[1] * known[2] == k else None
    if known[1] == "whole":
        return Layout(dim) if k == 1 else None
    return Layout(dim, 1, k) if known[1] == "inner" else Layout(dim, k, 1)
