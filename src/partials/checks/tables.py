"""Tables: J^T u of an embedding is compared at the rows that were looked up, and an ordinary gradient must be zero at all others.

Nothing of the size of the table is formed: only the ordinary gradient is, and it is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .._blocks import Block
from .._gather import Gather
from .._typing import Tensor

FEW = 4
"""The rows of a table, over the rows that were looked up, from which the latter are few."""


def looked_up(group: Sequence[Block]) -> tuple[Tensor, tuple[Block, ...]] | None:
    """The rows of a large table that were looked up (K,), and blocks of a table that has no others; None for any other parameter."""
    tables = [block for block in group if isinstance(block, Gather)]
    if not tables or len(tables) < len(group) or FEW * sum(block.index.numel() for block in tables) > tables[0].shape[0]:
        return None
    rows = torch.unique(torch.cat([block.index.flatten() for block in tables]))
    rows = rows[rows >= 0]
    return rows, tuple(_within(block, rows) for block in tables)


def _within(block: Gather, rows: Tensor) -> Gather:
    index = torch.searchsorted(rows, block.index.contiguous())
    return replace(block, index=torch.where(block.index < 0, -1, index), shape=(len(rows), *block.shape[1:]))


def others_zero(gradient: Tensor, rows: Tensor) -> bool:
    """Whether all rows of a table's gradient are zero but these."""
    sizes = torch.linalg.vector_norm(gradient, dim=1)  # (many times as quick as the largest entry)
    return not bool(sizes.index_fill(0, rows, 0).any())
