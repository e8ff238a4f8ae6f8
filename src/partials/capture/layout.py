"""Layouts: which positions of a tensor belong to which sample, measured in the native run.

A layout says that dimension `dim` has size outer * N * inner, sample-major between: position i of it belongs to sample
(i // inner) % N. It is measured, never guessed from sizes: the reverse pass runs with Gaussian seeds U and with w_n U,
w_n = 1 + n / N; a layout is right where the second cotangent is w_n times the first at every position that it gives to n.

Where no regular layout fits, the ratio of the two names the sample of each position by itself: samples in another order, or of
different lengths (packed sequences).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from math import log
from typing import Any

import torch

from .._typing import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of the largest cotangent. Rounding is 1e-6 of it in float32; a wrong layout is off by the spread of w, about 0.3."""

CHANCE = 1e-6
"""Below which the ratios of all positions are no accident."""


@dataclass(frozen=True)
class Layout:
    """Where the samples are: see the module's text. `dim` counts the operation's own dimensions; -1 says that all of it is one sample."""

    dim: int
    outer: int = 1
    inner: int = 1
    owned: Tensor | None = field(default=None, compare=False)
    """(N, K): the positions of each sample where they follow no rule, -1 where it has fewer than K."""

    def samples_first(self, t: Tensor, n: int, lead: int = 0) -> Tensor:
        """(*lead, ..., outer * N * inner, ...) -> (N, *lead, ..., outer * inner, ...): all other dimensions keep their order."""
        if self.dim < 0:
            return t.unsqueeze(0)
        at = lead + self.dim
        if self.owned is not None:
            rows = t.index_select(at, self.owned.clamp_min(0).flatten()).unflatten(at, tuple(self.owned.shape)).movedim(at, 0)
            absent = (self.owned < 0).reshape(n, *(1,) * at, -1, *(1,) * (t.ndim - 1 - at))
            return rows.masked_fill(absent, 0)
        if self.outer == self.inner == 1:
            return (t.transpose(0, at) if at < 2 else t.movedim(at, 0)).unsqueeze(at + 1)
        parts = t.unflatten(at, (self.outer, n, self.inner)).movedim(at + 1, 0)
        return parts.flatten(at + 1, at + 2)

    def __str__(self) -> str:
        if self.dim < 0:
            return "one sample"
        if self.owned is not None:
            return f"dim {self.dim} (any order)"
        folds = {(False, False): "", (True, False): "k*N", (False, True): "N*k", (True, True): "k*N*j"}[self.outer > 1, self.inner > 1]
        return f"dim {self.dim}" + (f" ({folds})" if folds else "")


FIRST = Layout(0)
"""Dimension 0 is the samples, and nothing else."""


def candidates(shape: tuple[int, ...], n: int) -> list[Layout]:
    """Every layout that the sizes allow, the usual ones first: whole dimensions, then folds of two, then of three."""
    if n == 1:
        return [Layout(-1)]
    fits = [(d, size // n) for d, size in enumerate(shape) if n and size and size % n == 0]
    whole = [Layout(d) if d else FIRST for d, k in fits if k == 1]
    folds = [layout for d, k in fits if k > 1 for layout in (Layout(d, 1, k), Layout(d, k, 1))]
    both = [Layout(d, o, k // o) for d, k in fits for o in range(2, min(k, 64)) if k % o == 0 and k // o > 1]
    return whole + folds + both


def tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """Of a run through tensors of these types: a float64 model may normalise in float32."""
    return max((TOLERANCE.get(dtype, 3e-2) for dtype in dtypes if dtype.is_floating_point or dtype.is_complex), default=0.0)


def fits(layout: Layout, first: Tensor, second: Tensor, weights: Tensor, within: float) -> bool:
    """Whether `second` is w_n times `first` wherever the layout says sample n."""
    n = len(weights)
    one, two = (layout.samples_first(t, n).reshape(n, -1).to(weights.dtype) for t in (first, second))
    scale = two.abs().max()
    return bool((two - weights[:, None] * one).abs().max() <= within * scale)


def strangers(layout: Layout, first: Tensor, second: Tensor, weights: Tensor, within: float) -> int:
    """Entries that do not fit by their own size: they decide where the largest cotangent hides all others (samples of very different
    weight)."""
    n = len(weights)
    one, two = (layout.samples_first(t, n).reshape(n, -1).to(weights.dtype) for t in (first, second))
    return int(((two - weights[:, None] * one).abs() > max(within, 1e-2 / n) * two.abs()).sum())


def find(first: Tensor, second: Tensor, weights: Tensor, features: Collection[int] = (), within: float = 0.0) -> tuple[Layout | None, bool]:
    """The layout of one edge's cotangents, and whether it is proved: zeros fit every layout, and what fits two proves neither.

    `features`: dimensions that hold features of the operation, so no samples. `within`: see `tolerance`.
    """
    n, within = len(weights), max(within, tolerance([first.dtype]))
    possible = [layout for layout in candidates(tuple(first.shape), n) if layout.dim not in features]
    if not bool((first != 0).any()):
        return (possible[0] if possible else None), False
    fitting = [layout for layout in possible if fits(layout, first, second, weights, within)]
    if len(fitting) > 1:
        return min(fitting, key=lambda layout: strangers(layout, first, second, weights, within)), False
    if fitting:
        return fitting[0], n > 1
    return owners(first, second, weights, features, within), False


def owners(first: Tensor, second: Tensor, weights: Tensor, features: Collection[int], within: float) -> Layout | None:
    """The layout that gives each position along one dimension to the sample that its own ratio names; None where a ratio names none."""
    n, one, two = len(weights), first.to(weights.dtype), second.to(weights.dtype)
    within = min(within, 0.1 / n)
    for dim, size in enumerate(first.shape):
        if dim in features:
            continue
        a, b = (t.movedim(dim, 0).reshape(size, -1) for t in (one, two))
        length = a.square().sum(1)
        here = length > 0
        sample = (((a * b).sum(1) / length.masked_fill(~here, 1) - 1) * n).round().long()
        if not bool(((sample >= 0) & (sample < n))[here].all()):
            continue
        misfit = (b - weights[sample.clamp(0, n - 1)][:, None] * a).square().sum(1)
        by_chance = int(here.sum()) * log(2 * n) + int((a != 0).sum()) * log(within)  # (its logarithm, were the ratios random)
        if bool((misfit > within**2 * length).any()) or by_chance > log(CHANCE):
            continue
        positions = [(here & (sample == i)).nonzero().flatten() for i in range(n)]
        return Layout(dim, owned=torch.nn.utils.rnn.pad_sequence(positions, batch_first=True, padding_value=-1))
    return None


def spilt(g: Tensor, layout: Layout) -> bool:
    """Whether positions that `layout.owned` leaves out have cotangents (C, ...) all the same: measured as zero, they must be."""
    assert layout.owned is not None
    left = torch.ones(g.shape[1 + layout.dim], dtype=torch.bool, device=g.device)
    left[layout.owned[layout.owned >= 0]] = False
    return bool(left.any()) and bool(g.detach().movedim(1 + layout.dim, 0)[left].any())


def pattern(layout: Layout) -> tuple[int, str] | tuple[int, int, int]:
    """A layout without its sizes, so that it carries over to other N and T; with them where a fold has two sides."""
    if layout.outer > 1 and layout.inner > 1:
        return layout.dim, layout.outer, layout.inner
    return layout.dim, "outer" if layout.outer > 1 else "inner" if layout.inner > 1 else "whole"


@lru_cache(maxsize=4096)
def resolve(known: Any, shape: tuple[int, ...], n: int) -> Layout | None:
    """The layout that a pattern means for a shape, None where the sizes no longer allow it."""
    dim = known[0]
    if dim >= len(shape) or not n or shape[dim] % n:
        return None
    k = shape[dim] // n
    if len(known) == 3:
        return Layout(*known) if known[1] * known[2] == k else None
    if known[1] == "whole":
        return (Layout(dim) if dim else FIRST) if k == 1 else None
    return Layout(dim, 1, k) if known[1] == "inner" else Layout(dim, k, 1)
