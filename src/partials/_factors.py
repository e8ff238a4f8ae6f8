"""Outer: the block of a weight matrix, kept as the inputs that it met and the cotangents that came back.

Two formulas serve every product of two such blocks. *By pairs* forms no row: <g (x) a, h (x) b> = (a.b)(g.h), summed over pairs of
positions. *By rows* forms the rows of a few samples at a time. The one with fewer multiplications is taken; both keep to a `tile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Literal, TypeAlias, TypeGuard, final

import torch

from . import _formulas, _room
from ._blocks import Block, Factored, Index, chosen
from ._gather import Gather, across, cat, contracted, each, folded, in_chunks, in_tiles, lookup, mix, own, widest
from ._products import dots, rows_by_rows, tracked
from ._typing import Shape, Tensor

Layout: TypeAlias = Literal["oi", "io"]
Join: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True, eq=False)
class Outer(Factored):
    """J[n, c] = sum_t g[n, c, t] (x) a[n, t], in each of G groups, of a weight stored as (G, O, I), "oi", or as (G, I, O), "io".

    Norms, inner products and Grams of half-precision factors are computed and returned in float32; the rest keeps their dtype.
    """

    a: Tensor
    """(N, T, G, I)."""
    g: Tensor
    """(N, C, T, G, O), in the dtype of `a`."""
    shape: Shape
    """The weight's, whose entries in order are those of (G, O, I) or (G, I, O)."""
    layout: Layout = "oi"

    @property
    def rows(self) -> tuple[int, int]:
        return self.g.shape[0], self.g.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.g.dtype

    def select(self, index: Index) -> Outer:
        return replace(self, a=chosen(self.a, index), g=chosen(self.g, index))

    def nbytes(self) -> int:
        return self.a.nbytes + self.g.nbytes

    def dense(self) -> Tensor:
        return self._formed().reshape(*self.rows, *self.shape)

    def write(self, out: Tensor, *, add: bool = False) -> None:
        target = out.view(*self.rows, *self._stored)
        if self.a.shape[1] == 1 and out.dtype == self.g.dtype and not tracked(self.a, self.g, out):
            left, right = self._sides()
            target.addcmul_(left, right) if add else torch.mul(left, right, out=target)
            return
        for s, rows in self._formed_in_turn() if self._plain(out) else ((s, self._at(s)._formed()) for s in self._chunks(2)):
            target[s].add_(rows.view(target[s].shape)) if add else target[s].copy_(rows.view(target[s].shape))

    def matmul(self, v: Tensor) -> Tensor:
        k, v = v.shape[-1], v.to(self.g.dtype)
        if self._forms_for(k):
            return cat([rows.flatten(2) @ v.reshape(prod(self._stored), k) for _, rows in self._formed_in_chunks()])
        block = self._narrow()
        return cat([contracted(block.g, block.met(v[..., columns])) for columns in block._columns(k)], -1)

    def rmatmul(self, u: Tensor) -> Tensor:
        k, u = u.shape[-1], u.to(self.g.dtype)
        if self._forms_for(k):
            parts = (rows.flatten(2).flatten(0, 1).T @ u[s].flatten(0, 1) for s, rows in self._formed_in_chunks())
            return reduce(torch.add, parts).view(*self.shape, k)
        block = self._narrow()
        return cat([block.pulled(folded(block.g, u[..., columns])) for columns in block._columns(k)], -1)

    def rmatmul_into(self, out: Tensor, u: Tensor) -> None:
        if u.shape[-1] != 1 or self._forms_for(1):
            super().rmatmul_into(out, u)
            return
        block = self._narrow()
        block.pulled_into(out, folded(block.g, u.to(self.dtype)))

    @property
    def cotangent(self) -> Tensor:
        return self.g

    def through(self, k: int) -> bool:
        return self._narrow() is self and not self._forms_for(k)

    def met(self, v: Tensor, besides: Tensor | None = None) -> Tensor:
        (n, t, groups, _), o, k = self.a.shape, self.g.shape[4], v.shape[-1]
        v = v.to(self.dtype).reshape(*self._stored, k)
        if groups > 1:
            found = torch.einsum(f"ntgi,g{self.layout}k->ntgok", self.a, v)
            return found if besides is None else found + besides
        late, matrix = _positions_first(self.a), v.squeeze(0)
        matrix = (matrix if self.layout == "io" else matrix.transpose(0, 1)).flatten(1)
        rows = _lined(self.a.flatten(2), late)
        if besides is not None and t == 1:
            return torch.addmm(besides.reshape(-1, o * k), rows, matrix).view(n, t, 1, o, k)
        found = rows @ matrix
        found = found.view(t, n, 1, o, k).transpose(0, 1) if late else found.view(n, t, 1, o, k)
        return found if besides is None else found + besides

    def pulled(self, folded: Tensor) -> Tensor:
        k = folded.shape[-1]
        if self.a.shape[2] * k == 1:
            left, right = self._lined_with(folded)
            return (left.T @ right).reshape(*self.shape, 1)
        return torch.einsum(f"ntgok,ntgi->g{self.layout}k", folded, self.a).reshape(*self.shape, k)

    def pulled_into(self, out: Tensor, folded: Tensor) -> None:
        if self.a.shape[2] * folded.shape[-1] != 1 or out.dtype != self.dtype or not out.is_contiguous():
            super().pulled_into(out, folded)
            return
        left, right = self._lined_with(folded)
        torch.mm(left.T, right, out=out.view(left.shape[1], right.shape[1]))

    @property
    def once(self) -> Tensor | None:
        return self.a[:, 0, 0] if self.a.shape[1] == self.a.shape[2] == 1 else None

    def squared_norms(self) -> Tensor:
        return self.inner(self)

    def inner(self, other: Block) -> Tensor:
        if isinstance(other, Gather):
            return other.inner(self)
        if not self._fits(other):
            return super().inner(other)
        left, right = _widened(self, other)
        if left.a.shape[1] == right.a.shape[1] == 1:
            alike = dots(left.a, right.a)  # (N, 1, G)
            return (alike * dots(left.g, right.g).squeeze(2)).sum(-1)
        return _joined(left, right, each, left.rows[1])

    def own_gram(self, other: Block) -> Tensor:
        if isinstance(other, Gather):
            return other.own_gram(self).mT
        if not self._fits(other):
            return super().own_gram(other)
        left, right = _widened(self, other)
        return _joined(left, right, own, left.rows[1] * right.rows[1])

    def gram(self, other: Block) -> Tensor:
        if isinstance(other, Gather):
            return other.gram(self).permute(2, 3, 0, 1)
        if not self._fits(other):
            return super().gram(other)
        left, right = _widened(self, other)
        (t, groups, _), s = left.a.shape[1:], right.a.shape[1]
        if t * s * groups == 1:
            return across(left.g, right.g) * rows_by_rows(left.a[:, 0, 0], right.a[:, 0, 0])[:, None, :, None]
        return _gram(left, right)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        a = self.a * weights.to(self.a.dtype)[:, None, None, None]
        return torch.einsum(f"nctgo,ntgi->cg{self.layout}", self.g, a).reshape(self.rows[1], *self.shape)

    def products(self, other: Block, weights: Tensor) -> Tensor:
        if isinstance(other, Gather):
            return other.products(self, weights)
        if not self._fits(other):
            return super().products(other, weights)
        left, right = _widened(self, other)
        if 1 in (left.a.shape[1], right.a.shape[1]):  # (g (x) a) * (h (x) b) = (g * h) (x) (a * b)
            return replace(left, a=left.a * right.a, g=left.g * right.g).weighted_sum(weights)
        weights = weights.to(left.g.dtype)[:, None, None, None, None]
        chunks = in_chunks(len(left.g), 3 * left._sample_bytes, left.g)
        parts = ((left._at(s)._formed() * right._at(s)._formed() * weights[s]).sum(0) for s in chunks)
        return reduce(torch.add, parts).reshape(left.rows[1], *self.shape)

    def scaled(self, weights: Tensor) -> Outer:
        return replace(self, g=self.g * weights.to(self.g.dtype)[:, :, None, None, None])

    def mixed(self, matrix: Tensor) -> Outer:
        return replace(self, g=mix(matrix, self.g))

    @property
    def _stored(self) -> Shape:
        groups, i, o = self.a.shape[2], self.a.shape[3], self.g.shape[4]
        return (groups, o, i) if self.layout == "oi" else (groups, i, o)

    @property
    def _sample_bytes(self) -> int:
        """Of one sample's rows."""
        return self.rows[1] * prod(self._stored) * self.g.element_size()

    def _fits(self, other: Block) -> TypeGuard[Outer]:
        return isinstance(other, Outer) and other.layout == self.layout and other._stored == self._stored

    def _at(self, samples: slice) -> Outer:
        return replace(self, a=self.a[samples], g=self.g[samples])

    def _features(self, outputs: slice) -> Outer:
        """A part of the output features: for `_formed` only, the shape is still the whole weight's."""
        return replace(self, g=self.g[..., outputs])

    def _sides(self) -> tuple[Tensor, Tensor]:
        """T = 1: two tensors whose product is `_formed`."""
        row, column = (-1, -2) if self.layout == "oi" else (-2, -1)
        return self.g[:, :, 0].unsqueeze(row), self.a.unsqueeze(column)

    def _formed(self) -> Tensor:
        """The rows as they are stored: (N, C, G, O, I) or (N, C, G, I, O)."""
        if self.a.shape[1] == 1:
            left, right = self._sides()
            return left * right
        return torch.einsum(f"nctgo,ntgi->ncg{self.layout}", self.g, self.a)

    def _formed_in_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        return ((s, self._at(s)._formed()) for s in self._chunks(1))

    def _plain(self, out: Tensor) -> bool:
        """Are rows one matrix product for each sample, without a graph?"""
        return self.rows[1] == self.a.shape[2] == 1 and not tracked(self.a, self.g, out)

    def _formed_in_turn(self) -> Iterator[tuple[slice, Tensor]]:
        """With one output and group: the rows of a few samples, all in the same memory, which a cache holds."""
        g, a = self.g[:, 0, :, 0], self.a[:, :, 0]
        left, right = (g, a) if self.layout == "oi" else (a, g)
        room: Tensor | None = None
        for s in self._chunks(4):
            if room is None:
                room = g.new_empty(s.stop - s.start, left.shape[2], right.shape[2])
            yield s, torch.bmm(left[s].mT, right[s], out=room[: s.stop - s.start])

    def _chunks(self, share: int) -> Iterator[slice]:
        """Samples whose rows take one part in `share` of a temporary's room."""
        return in_chunks(len(self.g), share * self._sample_bytes, self.g)

    def _forms_for(self, k: int) -> bool:
        """Are rows cheaper for a product with k columns?"""
        (t, groups, i), (n, c), o = self.a.shape[1:], self.rows, self.g.shape[4]
        if self._sample_bytes > _room.tile(self.g):
            return False
        return _formulas.choice("products", _formulas.products((n, c), t, (groups, i, o), k)) == "rows"

    def _columns(self, k: int) -> Iterator[slice]:
        n, _, t, groups, o = self.g.shape
        return in_chunks(k, n * t * groups * o * self.g.element_size(), self.g)

    def _narrow(self) -> Outer:
        """The same block; with one output the two sides play the same part, and the wider one is to be the one that is met first."""
        if self.rows[1] > 1 or self.a.shape[3] >= self.g.shape[4]:
            return self
        return Outer(self.g[:, 0], self.a.unsqueeze(1), self.shape, "io" if self.layout == "oi" else "oi")

    def _lined_with(self, folded: Tensor) -> tuple[Tensor, Tensor]:
        """T x N rows of folded cotangents (N, T, 1, O, 1) and of inputs, in the order in which the more of them lie; as they are stored."""
        g, a = folded.flatten(2), self.a.flatten(2)
        late = _positions_first(g if g.numel() > a.numel() else a)
        left, right = _lined(g, late), _lined(a, late)
        return (left, right) if self.layout == "oi" else (right, left)

    def _met(self, a: Tensor) -> Tensor:
        """Each sample's J applied to inputs (N, T, G, I) of its own: (N, C, T, G, O)."""
        alike = torch.einsum("ntgi,nsgi->ngts", a, self.a)
        return torch.einsum("ngts,ncsgo->nctgo", alike, self.g)


@lookup.register
def _(block: Outer) -> Callable[[Tensor], Tensor]:
    a, g = widest(block.a, block.g)
    if block._stored != (1, *block.shape):
        return lookup.dispatch(Block)(replace(block, a=a, g=g))
    a, g = a.squeeze(-2), g.squeeze(-2)  # (N, T, I), (N, C, T, O)
    n, c, t, _ = g.shape

    def rows_at(index: Tensor) -> Tensor:
        if block.layout == "oi":
            met = g.gather(3, index[:, None, None].expand(n, c, t, -1))
            return torch.einsum("ncts,nti->ncsi", met, a)
        met = a.gather(2, index[:, None].expand(n, t, -1))
        return torch.einsum("nts,ncto->ncso", met, g)

    return lambda index: cat([rows_at(index[:, s]) for s in in_chunks(index.shape[1], n * c * t * g.element_size(), g)], 2)


# Products of two blocks' rows of one sample; `join` (`each` or `own`) takes (N, C, ...) and (N, D, ...), and is summed over parts of `...`.


def _joined(left: Outer, right: Outer, join: Join, products: int) -> Tensor:
    (n, c, t, groups, o), (_, d, s, _, _), i = left.g.shape, right.g.shape, left.a.shape[3]
    costs = _formulas.inner((n, c, d), (t, s), (groups, i, o), products, same=right is left)
    return (_joined_by_rows if _formulas.choice("norms", costs) == "rows" else _joined_by_pairs)(left, right, join)


def _joined_by_pairs(left: Outer, right: Outer, join: Join) -> Tensor:
    n, d, s, groups, o = right.g.shape
    if join is each and s < o:
        return _each_by_dots(left, right)
    t, size, parts = left.a.shape[1], groups * (s + 2 * d * o) * right.g.element_size(), []
    for samples in in_chunks(n, t * size, left.g):
        mine, theirs = left._at(samples), right._at(samples)
        tiles = in_chunks(t, len(mine.g) * size, left.g)
        parts.append(reduce(torch.add, (join(mine.g[:, :, w], theirs._met(mine.a[:, w])) for w in tiles)))
    return cat(parts)


def _each_by_dots(left: Outer, right: Outer) -> Tensor:
    """Sums over t and s of (a[n,t] . b[n,s]) (g[n,c,t] . h[n,c,s]), which are fewer numbers than b's cotangents at all t."""
    (n, c, s, groups, _), t, parts = right.g.shape, left.a.shape[1], []
    size = groups * s * (1 + 2 * c) * right.g.element_size()
    for samples in in_chunks(n, t * size, left.g):
        mine, theirs, sums = left._at(samples), right._at(samples), []
        for w in in_chunks(t, len(mine.g) * size, left.g):
            alike = torch.einsum("ntgi,nsgi->ngts", mine.a[:, w], theirs.a)
            sums.append(each(torch.einsum("nctgo,ncsgo->ncgts", mine.g[:, :, w], theirs.g), alike.unsqueeze(1)))
        parts.append(reduce(torch.add, sums))
    return cat(parts)


def _joined_by_rows(left: Outer, right: Outer, join: Join) -> Tensor:
    parts = []
    for s in in_chunks(len(left.g), left._sample_bytes + right._sample_bytes, left.g):
        mine = left._at(s)
        parts.append(_summed_over_pieces(mine, mine if right is left else right._at(s), join))
    return cat(parts)


# Products of all samples with all.


def _gram(left: Outer, right: Outer) -> Tensor:
    (n, c, t, groups, o), (m, d, s, _, _), i = left.g.shape, right.g.shape, left.a.shape[3]
    rows, positions, weight = (n, c, m, d), (t, s), (groups, i, o)
    formula = _formulas.choice("gram", _formulas.gram(rows, positions, weight))
    if formula != "pairs":
        return (_gram_by_rows if formula == "rows" else _gram_by_dots)(left, right)
    if _formulas.pairs_of(rows, positions, weight) <= _formulas.pairs_of((m, d, n, c), (s, t), weight):
        return _gram_by_pairs(left, right)
    return _gram_by_pairs(right, left).permute(2, 3, 0, 1)


def _gram_by_pairs(left: Outer, right: Outer) -> Tensor:
    def tile(n: slice, m: slice) -> Tensor:
        alike = torch.einsum("ntgi,msgi->gntms", left.a[n], right.a[m])
        met = torch.einsum("gntms,mdsgo->ntgomd", alike, right.g[m])
        return torch.einsum("nctgo,ntgomd->ncmd", left.g[n], met)

    (n, _, t, groups, o), (m, d, s, _, _) = left.g.shape, right.g.shape
    return in_tiles(tile, n, m, groups * t * (s + 2 * d * o) * left.g.element_size(), left.g, left is right)


def _gram_by_dots(left: Outer, right: Outer) -> Tensor:
    """Sums over t and s of (a[n,t] . b[m,s]) (g[n,c,t] . h[m,d,s])."""

    def tile(n: slice, m: slice) -> Tensor:
        alike = rows_by_rows(left.a[n].flatten(0, 2), right.a[m].flatten(0, 2)).view(-1, 1, t, len(right.a[m]), 1, s)
        met = rows_by_rows(left.g[n].flatten(0, 3), right.g[m].flatten(0, 3)).view(-1, c, t, len(right.g[m]), d, s)
        return (met * alike).sum((2, 5))

    (n, c, t, _, _), (m, d, s, _, _) = left.g.shape, right.g.shape
    return in_tiles(tile, n, m, t * s * (1 + 2 * c * d) * left.g.element_size(), left.g, left is right)


def _gram_by_rows(left: Outer, right: Outer) -> Tensor:
    def strips(block: Outer) -> Iterator[slice]:
        wide = min(prod(block._stored), max(2048, block.a.shape[2:].numel()))  # enough entries for a matrix product to be worth its sum
        return in_chunks(len(block.g), 2 * wide * block.rows[1] * block.g.element_size(), block.g)

    def tile(n: slice, m: slice) -> Tensor:
        mine = left._at(n)
        return _summed_over_pieces(mine, mine if right is left and n == m else right._at(m), across)

    return cat([cat([tile(n, m) for m in strips(right)], 2) for n in strips(left)])


def _summed_over_pieces(left: Outer, right: Outer, join: Join) -> Tensor:
    """`join` of the rows of both blocks, of which a few output features are formed at a time."""
    o = left.g.shape[4]
    size = (left._sample_bytes * len(left.g) + right._sample_bytes * len(right.g)) // max(1, o)
    pieces = ((left._features(w), right._features(w)) for w in in_chunks(o, size, left.g))
    formed = ((x._formed(), y) for x, y in pieces)
    return reduce(torch.add, (join(x, x if right is left else y._formed()) for x, y in formed))


def _widened(left: Outer, right: Outer) -> tuple[Outer, Outer]:
    a, g, b, h = widest(left.a, left.g, right.a, right.g)
    wide = replace(left, a=a, g=g)
    return wide, wide if right is left else replace(right, a=b, g=h)


def _positions_first(x: Tensor) -> bool:
    """Does (N, T, ...) lie as (T, N, ...)?"""
    return x.shape[1] > 1 and x.stride(1) > x.stride(0)


def _lined(x: Tensor, late: bool) -> Tensor:
    """(N, T, I) as N T rows, or as T N where samples come late."""
    return (x.transpose(0, 1) if late else x).flatten(0, 1)
