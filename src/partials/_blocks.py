"""Blocks: one parameter's part of the per-sample Jacobian, and the algebra that the Jacobian is written against.

Shapes: `N` samples, `C` flattened outputs, `*shape` the parameter's, `k` columns. A block never holds the user's output
shape; `Jacobian` folds `C` back into it. Several blocks of one parameter add up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeAlias

import torch

from . import _room
from ._products import rows_by_rows
from ._typing import Shape, Tensor

Index: TypeAlias = Tensor | slice


class Block(ABC):
    """One parameter's part of the Jacobian, J of shape (N, C, *shape), in whatever form costs least."""

    shape: Shape
    """The parameter's shape."""

    @property
    @abstractmethod
    def rows(self) -> tuple[int, int]:
        """(N, C)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of dense rows."""
        return self.select(slice(0, 0)).dense().dtype

    @abstractmethod
    def dense(self) -> Tensor:
        """(N, C, *shape)."""

    @abstractmethod
    def select(self, index: Index) -> Block:
        """The block of the samples in `index`: int64, (M,), or a range of them, whose tensors are then views."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the block's tensors hold."""

    def keeps(self, rows: Tensor) -> bool:
        """Whether dense rows are the block's own memory: who writes to them would change it."""
        return False

    def write(self, out: Tensor, *, add: bool = False) -> None:
        """Write (or add) the dense rows into `out`, (N, C, p), which may be a strided view."""
        flat = self._flat()
        out.add_(flat) if add else out.copy_(flat)

    def matmul(self, v: Tensor) -> Tensor:
        """J v: (*shape, k) -> (N, C, k)."""
        flat = self._flat()
        v = v.reshape(size_of(self.shape), v.shape[-1]).to(flat.dtype)
        if not flat.is_contiguous() and (turned := flat.transpose(0, 1)).is_contiguous():  # (as one product, not one for each sample)
            return (turned @ v).transpose(0, 1)
        return flat @ v

    def rmatmul(self, u: Tensor) -> Tensor:
        """J^T u: (N, C, k) -> (*shape, k)."""
        flat, u = self._flat(), u.to(self.dtype)
        if not flat.is_contiguous() and flat.transpose(0, 1).is_contiguous():  # (rows in the order in which they lie)
            flat, u = flat.transpose(0, 1), u.transpose(0, 1)
        return (flat.flatten(0, 1).T @ u.flatten(0, 1)).reshape(*self.shape, u.shape[-1])

    def rmatmul_into(self, out: Tensor, u: Tensor) -> None:
        """Write J^T u into `out`, (*shape, k)."""
        out.copy_(self.rmatmul(u))

    def squared_norms(self) -> Tensor:
        """|J[n, c]|^2: (N, C)."""
        return self._by_samples(lambda block: block._flat().square().sum(-1))

    def inner(self, other: Block) -> Tensor:
        """<J[n, c], K[n, c]> for another block of the same parameter and samples: (N, C)."""
        return self._by_samples(lambda block, its: (block._flat() * its._flat()).sum(-1), other)

    def gram(self, other: Block) -> Tensor:
        """<J[n, c], K[m, d]> for a block of the same parameter, other samples allowed: (N, C, M, D)."""
        m, step = other.rows[0], other._samples_at_once()
        pieces = (other if m <= step else other.select(piece) for piece in ranges(m, step))
        return torch.cat([self._gram_with(piece, piece._flat().flatten(0, 1)) for piece in pieces], 2)

    def _gram_with(self, other: Block, rows: Tensor) -> Tensor:
        """The same with the formed rows of `other`, (M D, p)."""

        def product(block: Block) -> Tensor:
            mine, its = alike(block._flat(), rows)
            return (mine @ its.T).unflatten(-1, other.rows)

        return self._by_samples(product)

    def own_gram(self, other: Block) -> Tensor:
        """<J[n, c], K[n, d]>: each sample's own (C, C) block, (N, C, C)."""

        def product(block: Block, its: Block) -> Tensor:
            left, right = alike(block._flat(), its._flat())
            return left @ right.mT

        return self._by_samples(product, other)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """sum_n w[n] J[n, c]: (N,) -> (C, *shape)."""
        found = self._summed(lambda block, w: torch.tensordot(w.to(block._flat().dtype), block._flat(), 1), weights)
        return found.reshape(self.rows[1], *self.shape)

    def products(self, other: Block, weights: Tensor) -> Tensor:
        """sum_n w[n] J[n, c] * K[n, c], entry by entry: (C, *shape)."""
        found = self._summed(lambda block, w, its: (block._flat() * its._flat() * w[:, None, None]).sum(0), weights, other)
        return found.reshape(self.rows[1], *self.shape)

    def scatter(self, mean: Tensor) -> Tensor:
        """sum_n (J[n, c] - mean[c])^2, shifted before it is squared so that nothing cancels: (C, *shape)."""
        flat = mean.reshape(self.rows[1], -1)
        found = self._summed(lambda block, _: (block._flat() - flat).square().sum(0), flat.new_zeros(self.rows[0]))
        return found.reshape(self.rows[1], *self.shape)

    def scaled(self, weights: Tensor) -> Block:
        """The block of w[n, c] J[n, c]."""
        return Dense(self.dense() * weights.reshape(*self.rows, *(1,) * len(self.shape)))

    def mixed(self, matrix: Tensor) -> Block:
        """The block of sum_d H[n, c, d] J[n, d], for H of shape (N, C', C)."""
        matrix, rows = alike(matrix, self._flat())
        return Dense((matrix @ rows).reshape(*matrix.shape[:2], *self.shape))

    def _flat(self) -> Tensor:
        """(N, C, p)."""
        return self.dense().reshape(*self.rows, size_of(self.shape))

    def _summed(self, function: Callable[..., Tensor], weights: Tensor, *others: Block) -> Tensor:
        """The sum over samples of `function`, of a few samples at a time; `weights` are cut along."""
        n = self.rows[0]
        step = self._samples_at_once()
        if n <= step:
            return function(self, weights, *others)
        parts = (function(self.select(p), weights[p], *(other.select(p) for other in others)) for p in ranges(n, step))
        return reduce(torch.add, parts)

    def _samples_at_once(self) -> int:
        return max(1, _room.rows() // max(1, 8 * self.rows[1] * size_of(self.shape)))

    def _by_samples(self, function: Callable[..., Tensor], *others: Block) -> Tensor:
        """`function` of the blocks of a few samples at a time, so that formed rows stay within their room."""
        n, step = self.rows[0], self._samples_at_once()
        if n <= step:
            return function(self, *others)
        return torch.cat([function(self.select(piece), *(other.select(piece) for other in others)) for piece in ranges(n, step)])


class Factored(Block):
    """A block whose rows are linear in a cotangent, (N, C, *features): other blocks may keep the same one (a weight and its bias do)."""

    @property
    @abstractmethod
    def cotangent(self) -> Tensor:
        """(N, C, *features)."""

    def keeps(self, rows: Tensor) -> bool:
        return self.cotangent.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()

    @abstractmethod
    def through(self, k: int) -> bool:
        """Do J v and J^T u with k columns go through it as it is?"""

    @abstractmethod
    def met(self, v: Tensor, besides: Tensor | None = None) -> Tensor:
        """What the cotangent meets in J v: (*shape, k) -> (N or 1, *features, k); added to what it meets `besides`, of the same shape."""

    @abstractmethod
    def pulled(self, folded: Tensor) -> Tensor:
        """J^T u, of the cotangent into which u is folded: (N, *features, k) -> (*shape, k)."""

    @property
    @abstractmethod
    def once(self) -> Tensor | Literal[1] | None:
        """Where a row is cotangent (x) a: a, (N, I), or 1 where it is the cotangent; None where it is a sum of such."""

    def pulled_into(self, out: Tensor, folded: Tensor) -> None:
        """The same, into `out`."""
        out.copy_(self.pulled(folded))


@dataclass(frozen=True)
class Dense(Factored):
    """The rows themselves: `values` of shape (N, C, *shape)."""

    values: Tensor

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return tuple(self.values.shape[2:])

    @property
    def rows(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def dense(self) -> Tensor:
        return self.values

    @property
    def cotangent(self) -> Tensor:
        return self.values

    def through(self, k: int) -> bool:
        return True

    def met(self, v: Tensor, besides: Tensor | None = None) -> Tensor:
        v = v.to(self.dtype).unsqueeze(0)
        return v if besides is None else v + besides

    def pulled(self, folded: Tensor) -> Tensor:
        return folded.sum(0)

    @property
    def once(self) -> Literal[1]:
        return 1

    def gram(self, other: Block) -> Tensor:
        if not isinstance(other, Dense):
            return super().gram(other)
        left, right = alike(*(block._flat().flatten(0, 1) for block in (self, other)))
        return rows_by_rows(left, right).reshape(*self.rows, *other.rows)

    def select(self, index: Index) -> Block:
        return Dense(chosen(self.values, index))

    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()


def alike(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype of the two: parameters of one Jacobian may differ in it, and matrix products refuse that."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


def chosen(rows: Tensor, index: Index) -> Tensor:
    """The rows of some samples, dimension 0: a view where they are a range. (Indices may come from another device.)"""
    return rows[index] if isinstance(index, slice) else rows.index_select(0, index.to(rows.device))


def ranges(count: int, step: int) -> Iterator[slice]:
    """Slices of `step` of `count` things; one empty slice of none."""
    return (slice(start, min(start + step, count)) for start in range(0, max(1, count), step))


def size_of(shape: Shape) -> int:
    return int(torch.Size(shape).numel())
