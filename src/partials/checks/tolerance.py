"""How far two computations of the same number may be apart: a multiple of the dtype's precision, and the reason for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt

import torch

from .._typing import Tensor

FACTOR = 64
"""In units of eps, over the scale of a whole row. Healthy functions stay an order of magnitude below (docs/checks.md)."""
WORST = {"independence": 8, "values": 8, "backward": 12, "product": 18, "alone": 18}
"""Eps of float32 within which healthy networks stay, where nothing cancels (docs/checks.md): slow tests look for seeds that do not."""

PIECE, PART, SMALL, LARGE = 2**18, 4096, 1e-12, 1e15
"""Entries of a piece, and of a part, whose norm is taken in float32; and between what norms it can be: beyond, squares lose digits
or overflow."""

ROWS = 1024
"""Rows from which a sum that is not right to this many rows' tolerance is judged in parts."""
PER_ROOT = 4
"""A sum of K random terms, added up one after the other, is off by about eps sqrt(K / 2) of its size: allowed is eps times this sqrt(K)."""


@dataclass(frozen=True)
class Tolerance:
    """`factor` eps of `dtype`, or what the rounding of a sum of `terms` rows needs."""

    dtype: torch.dtype
    factor: float = FACTOR
    terms: int = 1

    def summing(self, terms: int) -> Tolerance:
        """The tolerance of a sum of so many rows."""
        return replace(self, factor=max(self.factor, PER_ROOT * sqrt(terms)), terms=terms)

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    @property
    def value(self) -> float:
        return self.factor * self.eps

    def reason(self, check: str) -> str:
        words = f"{self.factor:.3g} eps of {name_of(self.dtype)}"
        if self.factor > FACTOR:
            return f"{words}: {PER_ROOT} sqrt({self.terms}), since a sum of {self.terms} rows rounds by about sqrt({self.terms} / 2)"
        worst = WORST.get(check)
        return words if worst is None else f"{words}: healthy networks stay within {worst} eps"


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """The least precise of some floating dtypes."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def size(t: Tensor, *, samples: bool = False) -> Tensor:
    """The Euclidean norm in float64: of everything, or of each sample's part, (N, ...) -> (N,).

    Of float32 in parts of `PART` entries, each in float32, which is many times as quick; rows whose squares could leave its range in
    float64 throughout.
    """
    if not samples and t.numel() <= PART and t.dtype is torch.float32:
        quick = torch.linalg.vector_norm(t)
        if SMALL < float(quick) < LARGE:
            return quick.double()
    rows = t.reshape(len(t), t[0].numel() if len(t) else 0) if samples else t.reshape(1, -1)
    if rows.dtype is torch.float32 and rows.numel():
        found = _by_parts(rows)
        if (odd := ~((found > SMALL) & (found < LARGE))).any():
            found[odd] = torch.linalg.vector_norm(rows[odd], dim=1, dtype=torch.float64)
    else:
        found = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return found if samples else found[0]


def _by_parts(rows: Tensor) -> Tensor:
    whole = rows.shape[1] // PART * PART
    if not whole:
        return torch.linalg.vector_norm(rows, dim=1).double()
    parts = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, PART)), dim=2)
    if whole < rows.shape[1]:
        parts = torch.cat([parts, torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)], 1)
    return torch.linalg.vector_norm(parts, dim=1, dtype=torch.float64)


def apart(left: Tensor, right: Tensor) -> Tensor:
    """left - right, zero where both are the same infinity or both are NaN, and infinite where only one is."""
    wide = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(wide), right.to(wide)
    difference = left - right
    if bool(difference.isfinite().all()):
        return difference
    alike = (left == right) | (left.isnan() & right.isnan())
    return torch.where(alike, 0, difference).nan_to_num(torch.inf, torch.inf, -torch.inf)


def distance(left: Tensor, right: Tensor, *, samples: bool = False) -> Tensor:
    """The size of left - right, of everything or of each sample's part, where equal infinities and NaN are no difference."""
    if samples or left.shape != right.shape or left.numel() <= PIECE:
        found = size(left - right, samples=samples)
    else:
        found = torch.stack([size(x - y) for x, y in _pieces(left, right)]).norm()
    return found if bool(found.isfinite().all()) else size(apart(left, right), samples=samples)


def dot(left: Tensor, right: Tensor) -> Tensor:
    """The inner product of two tensors in float64; of float32 by pieces, each summed pairwise."""
    wide = torch.promote_types(left.dtype, right.dtype)
    within = None if wide is torch.float32 and left.numel() > PART else torch.float64
    if left.numel() <= PIECE:
        return (left * right).sum(dtype=within).double()
    return torch.stack([(x * y).sum(dtype=within).double() for x, y in _pieces(left, right)]).sum()


def _pieces(left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in pieces that a cache holds, so that what is computed from them needs no fresh memory."""
    if left.is_contiguous() and right.is_contiguous():
        return zip(left.reshape(-1).split(PIECE), right.reshape(-1).split(PIECE), strict=True)
    step = max(1, PIECE * len(left) // left.numel())
    return zip(left.split(step), right.split(step), strict=True)


def over(error: Tensor, scale: Tensor) -> Tensor:
    """error / scale, zero where the error is zero and infinite where only the scale is."""
    return torch.where(error == 0, 0, error / scale)


def typical(scale: Tensor) -> Tensor:
    """The larger of each sample's scale and the median sample's, (N,): a row that happens to cancel is judged beside its peers."""
    finite = scale[scale.isfinite()]
    return scale.clamp_min(float(finite.median()) if len(finite) else 0.0)
