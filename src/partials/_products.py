"""Inner products of rows: each with its own, and all with all, of which a part is mirrored where both sides are the same."""

from __future__ import annotations

import torch

from ._typing import Tensor

WHOLE = 128
"""Rows below which a product with itself is computed whole."""
MANY = 1024
"""Rows from which on it pays to compute five eighths of it instead of three quarters."""
PLAIN = 4096
"""Entries that may be summed in plain order; of more, the rounding errors want pairwise sums."""


def rows_by_rows(left: Tensor, right: Tensor) -> Tensor:
    """(R, K), (S, K) -> (R, S)."""
    same = all(of(left) == of(right) for of in (torch.Tensor.data_ptr, torch.Tensor.size, torch.Tensor.stride))
    if same and len(left) > WHOLE and not (left.requires_grad or right.requires_grad):
        return _symmetric(left)
    return left @ right.T


def strip_of(count: int) -> int:
    """The rows of one of the strips of a product of `count` rows with themselves, each a product of its own: those of few rows are slow."""
    return max(1, count if count <= WHOLE else -(-count // (2 if count < MANY else 4)))


def _symmetric(rows: Tensor) -> Tensor:
    """rows @ rows.T by strips, from the diagonal on; what lies before it is mirrored."""
    found = rows.new_empty(len(rows), len(rows))
    step = strip_of(len(rows))
    for start in range(0, len(rows), step):
        strip = slice(start, start + step)
        torch.mm(rows[strip], rows[start:].T, out=found[strip, start:])
        found[strip, :start] = found[:start, strip].T
    return found


def dots(left: Tensor, right: Tensor) -> Tensor:
    """Over the last dimension; |x|^2 in one pass where no gradient is wanted and few enough are summed for its plain order."""
    if left is right and left.shape[-1] <= PLAIN and not tracked(left):
        norms: Tensor = torch.linalg.vector_norm(left, dim=-1)
        return norms.square()
    return (left * right).sum(-1)


def tracked(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
