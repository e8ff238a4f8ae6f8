"""Gather: the block of an embedding table, kept as the rows that were looked up and the cotangents that came back.

Every product with another block, of whatever class, comes down to that block's rows at the indices of this one (`rows_at`), so that nothing
of the size of the table is formed outside `dense` and `write`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce, singledispatch
from typing import final

import torch
from torch.nn.functional import embedding

from ._blocks import Block
from ._typing import Shape, Tensor


@final
@dataclass(frozen=True, eq=False)
class Gather(Block):
    """J[n, c][index[n, t]] = sum_t g[n, c, t], a table's rows; entries with a negative index are ignored."""

    index: Tensor
    """(N, T), int64."""
    g: Tensor
    """(N, C, T, E)."""
    shape: Shape
    """(V, E)."""

    @property
    def rows(self) -> tuple[int, int]:
        return self.g.shape[0], self.g.shape[1]

    def select(self, index: Tensor) -> Block:
        return replace(self, index=self.index.index_select(0, index), g=self.g.index_select(0, index))

    def nbytes(self) -> int:
        return nbytes(self.index) + nbytes(self.g)

    def dense(self) -> Tensor:
        (n, c), (size, _) = self.rows, self.shape
        index, g = self._kept()
        row = torch.arange(n * c, device=index.device).view(n, c, 1) * size + index.unsqueeze(1)  # (N, C, T)
        return _summed(g, row, n * c * size).view(n, c, *self.shape)

    def write(self, out: Tensor, *, add: bool = False) -> None:
        index, g = self._kept()
        target = (out if add else out.zero_()).view(*self.rows, *self.shape)
        target.scatter_add_(2, index[:, None, :, None].expand_as(g), g.to(out.dtype))

    def matmul(self, v: Tensor) -> Tensor:
        index, g = self._kept()
        seen = embedding(index, v.to(g.dtype).flatten(1)).unflatten(-1, v.shape[1:])  # (N, T, E, k)
        return torch.einsum("ncte,ntek->nck", g, seen)

    def rmatmul(self, u: Tensor) -> Tensor:
        index, g = self._kept()
        folded = torch.einsum("ncte,nck->ntek", g, u.to(g.dtype)).flatten(2)
        return _summed(folded, index, self.shape[0]).view(*self.shape, u.shape[-1])

    def squared_norms(self) -> Tensor:
        parts = [self._at(s)._slots()[1].square().sum((2, 3)) for s in self._chunks(1)]
        return cat(parts)

    def inner(self, other: Block) -> Tensor:
        ...
