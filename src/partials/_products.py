"""Inner products of all rows with all rows; where both sides are the same rows, a part is mirrored, not computed."""

from __future__ import annotations

import torch

from ._typing import Tensor

WHOLE = 128
"""Rows below which a product with itself is computed whole."""


def rows_by_rows(left: Tensor, right: Tensor) -> Tensor:
    """(R, K), (S, K) -> (R, S)."""
    same = all(of(left) == of(right) for of in (torch.Tensor.data_ptr, torch.Tensor.size, torch.Tensor.stride))
    if same and len(left) > WHOLE and not (left.requires_grad or right.requires_grad):
        return _symmetric(left)
    return left @ right.T


def _symmetric(rows: Tensor) -> Tensor:
    """rows @ rows.T, three quarters of it computed and the rest mirrored."""
    half = len(rows) // 2
    found = rows.new_empty(len(rows), len(rows))
    torch.mm(rows[:half], rows.T, out=found[:half])
    torch.mm(rows[half:], rows[half:].T, out=found[half:, half:])
    found[half:, :half] = found[:half, half:].T
    return found
