"""Outer: the block of a weight, kept as the inputs that it saw and the cotangents that came back.

Two formulas serve every product of two such blocks. *By pairs* never forms a row: <g (x) a, h (x) b> = (a.b)(g.h), summed over pairs of
positions. *By rows* forms the rows of a few samples at a time. The cheaper in multiplications is taken, tiles keep both within `CHUNK` bytes.
Such products of float16 and bfloat16 factors are computed and returned in float32, since their squares overflow and their sums
cancel; rows and J v, J^T u keep the dtype of the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeGuard, final

import torch

from ._blocks import Block
from ._gather import Gather, cat, in_chunks, rows_at, widest
from ._typing import Shape, Tensor

Layout: TypeAlias = Literal["oi", "io"]
Join: TypeAlias = Callable[[Tensor, Tensor], Tensor]

LONG = 4096
"""From here on vector_norm, which sums without pairing, loses digits that `sum` keeps."""


@final
@dataclass(frozen=True, eq=False)
class Outer(Block):
    """J[n, c] = sum_t g[n, c, t] (x) a[n, t], in each group of a weight that is stored as (G, O, I), "oi", or as (G, I, O), "io"."""

    a: Tensor
    """(N, T, G, I): what the weight was multiplied with."""
    g: Tensor
    """(N, C, T, G, O): the cotangents of the products, in the dtype of `a`."""
    shape: Shape
    layout: Layout = "oi"

    @property
    def rows(self) -> tuple[int, int]:
        return self.g.shape[0], self.g.shape[1]

    def dense(self) -> Tensor:
        return self._formed().reshape(*self.rows, *self.shape)

    def write(self, out: Tensor, *, add: bool = False) -> None:
        target = out.view(*self.rows, *self._stored)  # (N, C, G, O, I) or (N, C, G, I, O)
        if self.a.shape[1] == 1 and out.dtype == self.g.dtype and not _tracked(self.a, self.g, out):
            left, right = self._sides()
            target.addcmul_(left, right) if add else torch.mul(left, right, out=target)
            return
        for s in in_chunks(len(out), self._row_bytes * self.rows[1], self.g, cached=True):
            rows = self._at(s)._formed()
            target[s].add_(rows) if add else target[s].copy_(rows)

    def matmul(self, v: Tensor) -> Tensor:
        (n, c), (t, groups, o, i), k = self.rows, self._sizes, v.shape[-1]
        v = v.to(self.g.dtype)
        if c * i * (t + k) < t * k * (i + c) and self._row_bytes * c <= CHUNK:
            flat = v.reshape(-1, k)
            return cat([self._at(s)._formed().flatten(2) @ flat for s in self._row_chunks()])
        v = v.reshape(*self._stored, k)
        columns = in_chunks(k, n * t * groups * o * self.g.element_size(), self.g)
        return cat([self._applied(v[..., s]) for s in columns], -1)

    def rmatmul(self, u: Tensor) -> Tensor:
        (n, c), (t, groups, o, i), k = self.rows, self._sizes, u.shape[-1]
        u = u.to(self.g.dtype)
        if c * i * (t + k) < t * k * (i + c) and self._row_bytes * c <= CHUNK:
            ...
        columns = in_chunks(k, n * t * groups * o * self.g.element_size(), self.g)
        return cat([self._pulled(u[..., s]) for s in columns], -1).reshape(*self.shape, k)
