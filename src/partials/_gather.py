"""Gather: the block of an embedding table, kept as the indices that were looked up and the cotangents that came back.

A product with any other block comes down to that block's parameter rows at the indices of this one (`lookup`), so that nothing of the
size of the table is formed, except in `dense` and `write`. The functions at the end bound the temporaries of every factored block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce, singledispatch
from itertools import pairwise
from math import isqrt
from typing import final

import torch
from torch.nn.functional import pad

from . import _room
from ._blocks import Block, Dense, Index, chosen, ranges, size_of
from ._products import PLAIN, rows_by_rows
from ._typing import Shape, Tensor

VISIT, CALL = 32, 5_000_000
"""What it costs to look an entry up, and to make a round in Python, in multiplications of a matrix product."""


@final
@dataclass(frozen=True, eq=False)
class Gather(Block):
    """J[n, c][index[n, t]] = sum_t g[n, c, t], rows of a table; entries with a negative index are ignored.

    Norms, inner products and Grams of half-precision cotangents are computed and returned in float32; the rest keeps their dtype.
    """

    index: Tensor
    """(N, T), int64."""
    g: Tensor
    """(N, C, T, E)."""
    shape: Shape
    """(V, E)."""

    @property
    def rows(self) -> tuple[int, int]:
        return self.g.shape[0], self.g.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.g.dtype

    def select(self, index: Index) -> Gather:
        return replace(self, index=chosen(self.index, index), g=chosen(self.g, index))

    def nbytes(self) -> int:
        return self.index.nbytes + self.g.nbytes

    def dense(self) -> Tensor:
        index, g = self._kept()
        return _summed_apart(g, index, self.shape[0])

    def write(self, out: Tensor, *, add: bool = False) -> None:
        index, g = self._kept()
        target = (out if add else out.zero_()).view(*self.rows, *self.shape)
        target.scatter_add_(2, index[:, None, :, None].expand_as(g), g.to(out.dtype))

    def matmul(self, v: Tensor) -> Tensor:
        (index, g), table = self._kept(), v.to(self.g.dtype).flatten(1)
        chunks = in_chunks(len(g), index.shape[1] * table[:1].nbytes, g)
        parts = (_cut(chunk, index, g) for chunk in chunks)
        return cat([contracted(h, table.index_select(0, its.flatten()).view(*its.shape, *v.shape[1:])) for its, h in parts])

    def rmatmul(self, u: Tensor) -> Tensor:
        (index, g), u = self._kept(), u.to(self.g.dtype)
        chunks = in_chunks(u.shape[-1], g[:, :1].nbytes, g)
        parts = (folded(g, u[..., columns]) for columns in chunks)  # (N, T, E, k)
        return cat([_summed(part.flatten(2), index, self.shape[0]).view(*self.shape, part.shape[-1]) for part in parts], -1)

    def rmatmul_into(self, out: Tensor, u: Tensor) -> None:
        if u.shape[-1] != 1 or out.dtype != self.g.dtype or not out.is_contiguous():
            super().rmatmul_into(out, u)
            return
        index, g = self._kept()
        rows = folded(g, u.to(g.dtype)).reshape(-1, self.shape[1])
        out.zero_().view(self.shape).index_add_(0, index.reshape(-1), rows)

    def squared_norms(self) -> Tensor:
        chunks = in_chunks(len(self.g), 2 * self.g[:1].nbytes, self.g)
        return cat([self._at(s)._sums()[1].square().sum((2, 3)) for s in chunks])

    def inner(self, other: Block) -> Tensor:
        index, g = self._kept()
        return each(*widest(g, lookup(other)(index)))

    def own_gram(self, other: Block) -> Tensor:
        index, g = self._kept()
        return own(g, lookup(other)(index))

    def gram(self, other: Block) -> Tensor:
        (n, c), (m, d), (v, e), t = self.rows, other.rows, self.shape, self.index.shape[1]
        alone = n * (CALL + t * (VISIT + c) * m * d * e)  # for each sample the rows that it looked up, of `other` too
        together = min(v, n * t) * (VISIT + n * c) * m * d * e  # once for all samples
        if isinstance(other, Gather) and n * c * t * m * d * other.index.shape[1] * (8 + e) < min(alone, together):
            return _gram_by_pairs(self, other)
        return _gram_by_rows(self, other, 1 if alone < together else n)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        (index, g), (c, v) = self._kept(), (self.rows[1], self.shape[0])
        place = torch.arange(c, device=g.device).view(c, 1) * v + index.unsqueeze(1)  # (N, C, T), in C tables one after the other
        return _summed(g * weights.to(g.dtype)[:, None, None, None], place, c * v).view(c, *self.shape)

    def products(self, other: Block, weights: Tensor) -> Tensor:
        keys, sums = self._sums()
        index = keys[:, :-1]
        return replace(self, index=index, g=sums[:, :, :-1] * lookup(other)(index)).weighted_sum(weights)

    def scaled(self, weights: Tensor) -> Gather:
        return replace(self, g=self.g * weights.to(self.g.dtype)[:, :, None, None])

    def mixed(self, matrix: Tensor) -> Gather:
        return replace(self, g=mix(matrix, self.g))

    def _at(self, samples: slice) -> Gather:
        return replace(self, index=self.index[samples], g=self.g[samples])

    def _kept(self) -> tuple[Tensor, Tensor]:
        """Index and cotangents in which the ignored entries are zeros for row 0."""
        if self._whole:
            return self.index, self.g
        return self.index.clamp_min(0), self.g.masked_fill((self.index < 0)[:, None, :, None], 0)

    @cached_property
    def _whole(self) -> bool:
        """Whether no entry is known to be ignored."""
        return self.index.device.type == "cpu" and not (self.index < 0).any()

    def _sums(self) -> tuple[Tensor, Tensor]:
        """The indices of each sample in order, (N, T + 1), and at the first place of each the sum of its cotangents, (N, C, T + 1, E).

        The last index is one that no table has, with zeros.
        """
        index, g = self._kept()
        keys = pad(index.contiguous().sort(-1).values, (0, 1), value=2.0**62)
        return keys, _summed_apart(widest(g)[0], torch.searchsorted(keys, index.contiguous()), keys.shape[1])


@singledispatch
def lookup(block: Block) -> Callable[[Tensor], Tensor]:
    """From indices of parameter rows, (N, S), each sample's own, to the block's rows J[n, c][index[n, s]], (N, C, S, E)."""

    def rows_at(index: Tensor) -> Tensor:
        n, c = block.rows
        chunks = in_chunks(n, 8 * c * size_of(block.shape), index)
        parts = ((block.select(s).dense(), index[s]) for s in chunks)
        return cat([_picked(rows, its) for rows, its in parts])

    return rows_at


@lookup.register
def _(block: Dense) -> Callable[[Tensor], Tensor]:
    return lambda index: _picked(block.values, index)


@lookup.register
def _(block: Gather) -> Callable[[Tensor], Tensor]:
    keys, sums = block._sums()
    n, c, slots, e = sums.shape

    def rows_at(index: Tensor) -> Tensor:
        place = torch.searchsorted(keys, index.contiguous())
        place = torch.where(keys.gather(1, place) == index, place, slots - 1)  # (N, S)
        rows = sums.view(-1, e).index_select(0, _apart(place, c, slots).flatten())
        return rows.view(n, c, index.shape[1], e)

    return rows_at


def _picked(rows: Tensor, index: Tensor) -> Tensor:
    """(N, C, V, E) at (N, S): (N, C, S, E)."""
    return rows.gather(2, index[:, None, :, None].expand(*rows.shape[:2], -1, rows.shape[3]))


def _gram_by_pairs(left: Gather, right: Gather) -> Tensor:
    """sum_{t,s} [index_t = index_s] g_t.g_s."""
    (i, g), (j, h) = left._kept(), right._kept()
    g, h = widest(g, h)

    def tile(n: slice, m: slice) -> Tensor:
        same = (i[n, None, :, None, None, None] == j[m, None, :]).to(g.dtype)  # (n, 1, t, m, 1, s)
        return (torch.einsum("ncte,mdse->nctmds", g[n], h[m]) * same).sum((2, 5))

    (n, c, t, _), (m, d, s, _) = g.shape, h.shape
    return in_tiles(tile, n, m, 2 * c * t * d * s * g.element_size(), g)


def _gram_by_rows(left: Gather, right: Block, strip: int) -> Tensor:
    """For every `strip` samples of `left`: the rows that they looked up, of both blocks, and a matrix product."""
    (n, c), (m, d), e, size = left.rows, right.rows, left.shape[1], left.g.element_size()
    few = 2 * max(e, 2048) * size  # bytes of as many rows as make a matrix product worth its sum
    strips = [left._at(s) for s in in_chunks(n, c * few, left.g, strip)]
    mine = [(len(block.g), torch.unique(block._kept()[0]), lookup(block)) for block in strips]
    columns = []
    for s in in_chunks(m, d * few, left.g):
        theirs = lookup(right.select(s))
        column = []
        for count, values, ours in mine:
            pieces = in_chunks(len(values), (count * c + (s.stop - s.start) * d) * e * size, left.g)
            products = (across(ours(values[w].expand(count, -1)), theirs(values[w].expand(s.stop - s.start, -1))) for w in pieces)
            column.append(reduce(torch.add, products))
        columns.append(cat(column))
    return cat(columns, 2)


def _summed(values: Tensor, place: Tensor, size: int) -> Tensor:
    """Sums of the `values` (..., E) that share a `place` (...): (size, E)."""
    values = values.flatten(0, -2)
    nothing = values.new_zeros(()).expand(size, values.shape[-1])  # index_add writes its copy: no zeros of that size besides
    return nothing.index_add(0, place.reshape(-1), values)


def _summed_apart(g: Tensor, place: Tensor, size: int) -> Tensor:
    """The same for each (n, c) apart: (N, C, T, E) at (N, T) to (N, C, size, E)."""
    n, c, _, e = g.shape
    return _summed(g, _apart(place, c, size), n * c * size).view(n, c, size, e)


def _apart(place: Tensor, c: int, size: int) -> Tensor:
    """Places (N, T) below `size`, in each of N x C tables that lie one after the other: (N, C, T)."""
    n = place.shape[0]
    return torch.arange(n * c, device=place.device).view(n, c, 1) * size + place.unsqueeze(1)


# What every factored block needs: bounded temporaries, and a dtype to sum in.


def in_chunks(count: int, each: int, like: Tensor, most: int | None = None) -> Iterator[slice]:
    """Slices of `count` things of `each` bytes, as many at a time as a `tile` holds, one at the least; one empty slice of none."""
    step = max(1, min(_room.tile(like) // max(1, each), count if most is None else most))
    return ranges(count, step)


def _cut(samples: slice, *tensors: Tensor) -> tuple[Tensor, ...]:
    """These samples of each; itself where they are all."""
    return tuple([t if samples == slice(0, len(t)) else t[samples] for t in tensors])


def in_tiles(one: Callable[[slice, slice], Tensor], n: int, m: int, each: int, like: Tensor, same: bool = False) -> Tensor:
    """(N, C, M, D) from its tiles (n, C, m, D), where a pair of samples takes `each` bytes; with the `same` on both sides half of them."""
    side = max(1, isqrt(_room.tile(like) // max(1, each)))
    strips = in_chunks(n, each * min(m, side), like)
    if not same:
        return cat([cat([one(s, r) for r in in_chunks(m, each * (s.stop - s.start), like)], 2) for s in strips])
    tiles: list[list[Tensor]] = []
    for i, s in enumerate(places := list(strips)):
        tiles.append([tiles[j][i].permute(2, 3, 0, 1) if j < i else one(s, r) for j, r in enumerate(places)])
    return cat([cat(row, 2) for row in tiles])


def cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def each(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows (N, C, ...) with rows (N, C, ...): (N, C)."""
    product = left * right
    return product.sum(tuple(range(2, product.ndim)))


def own(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows (N, C, ...) with rows (N, D, ...) of the same sample: (N, C, D)."""
    if left.shape[1] == right.shape[1] == 1:  # a matrix product of 1 x p and p x 1 is slow, and it sums without pairing
        return each(left, right).unsqueeze(-1)
    left, right = widest(left, right)
    return left.flatten(2) @ right.flatten(2).mT


def across(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows (N, C, ...) with rows (M, D, ...) of all samples: (N, C, M, D)."""
    left, right = widest(left, right)
    products = rows_by_rows(left.flatten(2).flatten(0, 1), right.flatten(2).flatten(0, 1))
    return products.view(*left.shape[:2], *right.shape[:2])


def contracted(g: Tensor, seen: Tensor) -> Tensor:
    """(N, C, ...) with (N, ..., k) to (N, C, k)."""
    c, k = g.shape[1], seen.shape[-1]
    if c * k == 1 and g.shape[2:].numel() > PLAIN:
        seen = seen.squeeze(-1).unsqueeze(1)
        return cat([each(g[s], seen[s]) for s in in_chunks(len(g), g[:1].nbytes, g)]).unsqueeze(-1)
    few = k == 1 or c >= 3 * k  # batches of a few rows times a matrix run at the speed of memory, of a matrix times a few columns do not
    views = _in_views(g)
    met = (seen,) if len(views) == 1 else seen.unbind(1)
    return reduce(torch.add, (_met(mine, its.flatten(1, -2), few) for mine, its in zip(views, met, strict=True)))


def _met(g: Tensor, seen: Tensor, few: bool) -> Tensor:
    return torch.bmm(seen.mT, g.mT).mT if few else torch.bmm(g, seen)


def folded(g: Tensor, u: Tensor) -> Tensor:
    """(N, C, ...) with (N, C, k) to (N, ..., k)."""
    if g.shape[1] * u.shape[-1] == 1:
        return (g * u.reshape(u.shape[:2] + (1,) * (g.dim() - 2))).squeeze(1).unsqueeze(-1)
    return cat([torch.bmm(u.mT, mine) for mine in _in_views(g)], 2).mT.unflatten(1, g.shape[2:])


def _in_views(g: Tensor) -> list[Tensor]:
    """(N, C, all features), where they are flattened without a copy, or those of one position after the other."""
    places = [(size, stride) for size, stride in zip(g.shape[2:], g.stride()[2:], strict=True) if size != 1]
    if not g.numel() or all(stride == after[0] * after[1] for (_, stride), after in pairwise(places)):
        return [g.flatten(2)]
    return [mine.flatten(2) for mine in g.unbind(2)]


def mix(matrix: Tensor, g: Tensor) -> Tensor:
    """(N, C', C) with (N, C, ...) to (N, C', ...)."""
    return (matrix.to(g.dtype) @ g.flatten(2)).view(matrix.shape[:2] + g.shape[2:])


def widest(*tensors: Tensor) -> list[Tensor]:
    """All in one dtype, float32 or wider: squares of float16 overflow, sums in bfloat16 lose their digits."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]
