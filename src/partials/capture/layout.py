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
    places: Tensor | None = None
    """Where positions of `dim` belong to samples in no order: those of each sample, (N, most), filled up with -1."""

    def samples_first(self, t: Tensor, n: int, lead: int = 0) -> Tensor:
        """(*lead, ..., outer * N * inner, ...) -> (N, *lead, ..., outer * inner, ...): all other dimensions keep their order."""
        if self.dim < 0:
            return t.unsqueeze(0)
        at = lead + self.dim
        if self.places is not None:
            taken = t.index_select(at, self.places.clamp_min(0).flatten()).unflatten(at, self.places.shape)
            filled = (self.places < 0).reshape(*(1,) * at, *self.places.shape, *(1,) * (taken.ndim - at - 2))
            return taken.masked_fill(filled, 0).movedim(at, 0)
        if self.outer == self.inner == 1:
            return (t.transpose(0, at) if at < 2 else t.movedim(at, 0)).unsqueeze(at + 1)
        parts = t.unflatten(at, (self.outer, n, self.inner)).movedim(at + 1, 0)
        return parts.flatten(at + 1, at + 2)

    def __str__(self) -> str:
        if self.dim < 0:
            return "one sample"
        if self.places is not None:
            return f"dim {self.dim} (any order)"
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
    return scattered(first, second, weights), False


def scattered(first: Tensor, second: Tensor, weights: Tensor) -> Layout | None:
    """A dimension whose positions each belong to one sample, in any order and number: rows picked by a mask, packed or sorted sequences.

    Each position's own ratio must name its sample beyond doubt. A position whose cotangents are zero belongs to nobody.
    """
    n = len(weights)
    for dim in range(first.ndim):
        one, two = (t.movedim(dim, 0).reshape(t.shape[dim], -1).to(weights.dtype) for t in (first, second))
        square = one.square().sum(1)
        ratio = (one * two).sum(1) / square
        owner = ((ratio - 1) * n).round()
        known = square > 0
        sure = ((ratio - 1) * n - owner).abs() < 0.1
        if not bool((~known | (sure & (owner >= 0) & (owner < n))).all()) or not bool(known.any()):
            continue
        owner = owner.where(known, owner.new_zeros(())).long()
        apart = (two - weights[owner][:, None] * one).abs().max()
        if bool(apart <= TOLERANCE.get(first.dtype, 3e-2) * two.abs().max()):
            return Layout(dim, places=_places(owner, known, n))
    return None


def spilt(g: Tensor, layout: Layout) -> bool:
    """Whether positions that `layout.places` leaves out have cotangents (C, ...) all the same: measured as zero, they must be."""
    assert layout.places is not None
    left = torch.ones(g.shape[1 + layout.dim], dtype=torch.bool, device=g.device)
    left[layout.places[layout.places >= 0]] = False
    return bool(left.any()) and bool(g.detach().movedim(1 + layout.dim, 0)[left].any())


def _places(owner: Tensor, known: Tensor, n: int) -> Tensor:
    """(N, most): the positions of each sample in their order, then -1."""
    positions = known.nonzero().flatten()
    owner = owner[positions]
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=n)
    rank = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
    places = owner.new_full((n, int(counts.max())), -1)
    places[owner[order], rank] = positions[order]
    return places


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
