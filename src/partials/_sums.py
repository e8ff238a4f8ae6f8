"""Sums over parameters, where several keep one cotangent (a weight and its bias, both weights of a recurrent layer): it is met once.

J v is <g, V a + b> for all blocks that keep g. With one position a row's parts are g (x) a and g (x) 1, so that a norm or an inner product
is that of the cotangents times the sum of those of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod

import torch

from . import _formulas
from ._algebra import Blocks, pairs, squared_norms, sum_of
from ._blocks import Block, Factored, size_of
from ._compat import inside_transform
from ._factors import Outer
from ._gather import across, cat, contracted, folded, in_chunks, own, widest
from ._products import dots, rows_by_rows, strip_of
from ._typing import Tensor
from ._vectors import Row, Weight

Members = list[tuple[str, Factored]]


@dataclass(frozen=True, eq=False)
class Sums:
    """The blocks of a Jacobian, and those quantities of them that are sums over parameters."""

    blocks: Blocks
    attached: bool = False
    """Results carry a graph: each block by itself."""

    def matmul(self, v: Mapping[str, Tensor]) -> Tensor:
        """J v: {name: (*shape, k)} -> (N, C, k)."""
        alone, together = self._for(next(iter(v.values())).shape[-1])
        return sum_of([*(block.matmul(v[name]) for name, block in alone), *(_met(members, v) for members in together)])

    def push(self, v: Sequence[Tensor]) -> Tensor:
        """J v of one vector, in the parts (p,) of the parameters: (N, C)."""
        rows, rest = self._laid_out if self._by_rows else ([], self)
        total: Tensor | None = None
        for row in rows:
            total = row.push(v) if total is None else total.add_(row.push(v))
        if rest.blocks:
            parts = {name: v[self._places[name]].view(*group[0].shape, 1) for name, group in rest.blocks.items()}
            found = rest.matmul(parts).squeeze(-1)
            total = found if total is None else total + found
        assert total is not None
        return total

    def rmatmul(self, u: Tensor) -> Tensor:
        """J^T u: (N, C, k) -> (P, k), each parameter's part written to its place."""
        k, sizes = u.shape[-1], self._sizes
        if self.attached or inside_transform():  # (which writes to no memory that is not its own)
            parts = [sum_of([block.rmatmul(u) for block in group]) for group in self.blocks.values()]
            return torch.cat([part.reshape(size, k) for part, size in zip(parts, sizes, strict=True)])
        flat = u.new_empty(sum(sizes), k, dtype=self.dtype)
        if k == 1 and self._by_rows:
            rows, rest = self._laid_out
            parts, column = flat.view(-1).split(sizes), u.squeeze(-1).to(self.dtype)
            for row in rows:
                row.pull(column, parts)
        else:
            rest, parts = self, flat.split(sizes)
        if rest.blocks:
            out = {name: parts[self._places[name]].view(*group[0].shape, k) for name, group in rest.blocks.items()}
            rest._write(out, u, set() if rest is self else {name for name in rest.blocks if name in self._in_rows})
        return flat

    def _write(self, out: Mapping[str, Tensor], u: Tensor, written: set[str]) -> None:
        """J^T u into the places of the parameters, added to those that are `written`."""
        alone, together = self._for(u.shape[-1])
        for name, block in alone:
            if name in written:
                out[name].add_(block.rmatmul(u))
            else:
                block.rmatmul_into(out[name], u)
                written.add(name)
        for members in together:
            _pulled(members, u, out, written)
            written.update(name for name, _ in members)

    def squared_norms(self) -> Tensor:
        """|J[n, c]|^2: (N, C)."""
        rest, once = self._rest, self._once.values()
        return sum_of([*(squared_norms(group) for group in rest.values()), *(_squared_norms(members) for members in once)])

    def own_gram(self) -> Tensor:
        """<J[n, c], J[n, d]>: (N, C, C)."""
        parts = [_own_gram(members) for members in self._once.values()]
        return sum_of([*parts, pairs(lambda a, b: a.own_gram(b), self._rest, self._rest)] if self._rest else parts)

    def gram(self, other: Sums) -> Tensor:
        """<J[n, c], K[m, d]>: (N, C, M, D)."""
        mine, its = self._once, other._once
        alone = other is self and not self.attached
        common = [names for names in mine if names in its]
        joined = {name for names in common for name in names}
        rest = [name for name in self.blocks if name not in joined]
        left, right = ({name: side.blocks[name] for name in rest} for side in (self, other))
        parts = _own_grams([mine[names] for names in common]) if alone else (_gram(mine[names], its[names]) for names in common)
        return sum_of([*parts, pairs(lambda a, b: a.gram(b), left, right)] if rest else parts)

    @property
    def _by_rows(self) -> bool:
        return not self.attached and _formulas.asked("products") != "rows"

    @cached_property
    def _sizes(self) -> list[int]:
        return [size_of(group[0].shape) for group in self.blocks.values()]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.blocks)}

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of J^T u."""
        return reduce(torch.promote_types, {block.dtype for group in self.blocks.values() for block in group})

    @cached_property
    def _laid_out(self) -> tuple[list[Row], Sums]:
        """For one vector: the blocks of one position by their cotangent, and those that are left."""
        found: dict[object, Members] = {}
        for name, group in self.blocks.items():
            for block in group:
                if isinstance(block, Factored) and block.once is not None and block.dtype == self.dtype:
                    found.setdefault(_place(block.cotangent), []).append((name, block))
        rows, written, taken = list[Row](), set[str](), set[int]()
        for members in found.values():
            row = _row(members, self._places, written)
            if row is not None:
                rows.append(row)
                written.update(name for name, _ in members)
                taken.update(id(block) for _, block in members)
        left = {name: tuple(block for block in group if id(block) not in taken) for name, group in self.blocks.items()}
        return rows, Sums({name: group for name, group in left.items() if group})

    @cached_property
    def _in_rows(self) -> frozenset[str]:
        rest = self._laid_out[1].blocks
        return frozenset(name for name, group in self.blocks.items() if len(group) > len(rest.get(name, ())))

    @cached_property
    def _together(self) -> list[Members]:
        """Blocks by cotangent, in lists of two or more."""
        found: dict[object, Members] = {}
        for name, group in self.blocks.items() if not self.attached else ():
            for block in group:
                if isinstance(block, Factored):
                    found.setdefault(_place(block.cotangent), []).append((name, block))
        together = [members for members in found.values() if len(members) > 1]
        for members in together:
            members.sort(key=lambda member: not isinstance(member[1].once, int))  # (a product adds to the bias that comes before it)
        return together

    @cached_property
    def _once(self) -> dict[tuple[str, ...], Members]:
        """By their names, of these the only blocks of their parameters whose rows are cotangent (x) a; not biases alone."""
        found = ([(name, b) for name, b in members if b.once is not None and len(self.blocks[name]) == 1] for members in self._together)
        return {
            tuple(name for name, _ in members): members
            for members in found
            if len(members) > 1 and any(isinstance(block.once, Tensor) for _, block in members)
        }

    @cached_property
    def _rest(self) -> Blocks:
        """The other parameters."""
        joined = {name for names in self._once for name in names}
        return {name: group for name, group in self.blocks.items() if name not in joined}

    def _for(self, k: int) -> tuple[list[tuple[str, Block]], list[Members]]:
        """Of a product with k columns: the blocks that go through it alone, and those that share a cotangent."""
        return self._for_one if k == 1 and not _formulas.asked("products") else self._sorted(k)

    @cached_property
    def _for_one(self) -> tuple[list[tuple[str, Block]], list[Members]]:
        return self._sorted(1)

    def _sorted(self, k: int) -> tuple[list[tuple[str, Block]], list[Members]]:
        together = [members for members in self._together if all(block.through(k) for _, block in members)]
        shared = {id(block) for members in together for _, block in members}
        return [(name, block) for name, group in self.blocks.items() for block in group if id(block) not in shared], together


def _place(g: Tensor) -> object:
    """Equal for tensors that are the same numbers in the same memory, (N, C, *features), features of one entry aside."""
    sizes = [(size, 0 if size == 1 else stride) for size, stride in zip(g.shape, g.stride(), strict=True)]
    return g.data_ptr(), g.dtype, *sizes[:2], *[pair for pair in sizes[2:] if pair[0] != 1]


def _bare(g: Tensor) -> Tensor:
    """Without features of one entry, but for one where there are no others."""
    return g.view(*g.shape[:2], *([size for size in g.shape[2:] if size != 1] or [1]))


def _row(members: Members, places: Mapping[str, int], written: set[str]) -> Row | None:
    """The members as one row; None of biases alone, which need none."""
    seen, weights, biases = set(written), list[Weight](), list[tuple[int, bool]]()
    for name, block in sorted(members, key=lambda member: isinstance(member[1].once, int)):  # (as they are written: weights first)
        place, a, add = places[name], block.once, name in seen
        seen.add(name)
        if isinstance(block, Outer) and isinstance(a, Tensor):
            weights.append(Weight(place, a, block.layout == "io", add))
        else:
            biases.append((place, add))
    return Row.of(_bare(members[0][1].cotangent), weights, biases) if weights else None


def _met(members: Members, v: Mapping[str, Tensor]) -> Tensor:
    """J v of all members: (N, C, k)."""
    g, k = _bare(members[0][1].cotangent), v[members[0][0]].shape[-1]
    n, features, parts = len(g), g.shape[2:], []
    for columns in in_chunks(k, n * prod(features) * g.element_size(), g):
        met: Tensor | None = None
        for name, block in members:
            besides = None if met is None else met.reshape(len(met), *block.cotangent.shape[2:], met.shape[-1])
            met = block.met(v[name] if k == 1 else v[name][..., columns], besides)
        assert met is not None
        met = met.reshape(len(met), *features, met.shape[-1])
        parts.append(contracted(g, met if len(met) == n else met.expand(n, *met.shape[1:])))
    return cat(parts, -1)


def _pulled(members: Members, u: Tensor, out: Mapping[str, Tensor], written: set[str]) -> None:
    """J^T u of all members, into the columns of `out`; added where something has been written."""
    g, u = _bare(members[0][1].cotangent), u.to(members[0][1].dtype)
    for columns in in_chunks(u.shape[-1], len(g) * prod(g.shape[2:]) * g.element_size(), g):
        f, done = folded(g, u if u.shape[-1] == 1 else u[..., columns]), set(written)
        for name, block in members:
            its, place = f.view(len(f), *block.cotangent.shape[2:], f.shape[-1]), out[name]
            place = place if u.shape[-1] == 1 else place[..., columns]
            if name in done:
                place.add_(block.pulled(its))
            else:
                block.pulled_into(place, its)
                done.add(name)


# With one position.


def _alike(left: Members, right: Members, products: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The sum over members of products of what their cotangents meet: inputs, or the one of a bias."""
    pairs = [(x.once, y.once) for (_, x), (_, y) in zip(left, right, strict=True)]
    found = sum_of(products(*widest(a, b)) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))
    ones = sum(not isinstance(a, Tensor) for a, _ in pairs)
    return found.add_(ones) if ones and not found.requires_grad else found + ones


def _squared_norms(members: Members) -> Tensor:
    (g,) = widest(_bare(members[0][1].cotangent).flatten(2))
    return dots(g, g) * _alike(members, members, dots).unsqueeze(1)


def _own_gram(members: Members) -> Tensor:
    g = _bare(members[0][1].cotangent)
    return own(g, g) * _alike(members, members, dots)[:, None, None]


def _own_grams(groups: list[Members]) -> list[Tensor]:
    """The products of the groups' rows with themselves, added up where they have one dtype."""
    by_dtype: dict[torch.dtype, list[tuple[Tensor, Members]]] = {}
    for members in groups:
        (g,) = widest(_bare(members[0][1].cotangent).flatten(2))
        by_dtype.setdefault(g.dtype, []).append((g, members))
    return [_mirrored(sides) for sides in by_dtype.values()]


def _mirrored(sides: list[tuple[Tensor, Members]]) -> Tensor:
    """The sum of the products of rows with themselves: from the diagonal on, and mirrored once they are added."""
    n, c = sides[0][0].shape[:2]
    rows = [g.flatten(0, 1) for g, _ in sides]
    dtype = reduce(torch.promote_types, [g.dtype for g in rows])
    found = rows[0].new_empty(n, c, n, c, dtype=dtype)
    step = -(-strip_of(n * c) // max(1, c))
    for start in range(0, n, step):
        here, on = slice(start, start + step), slice(start, None)
        tile = found[here, :, on]
        for i, (_, members) in enumerate(sides):
            met = torch.mm(rows[i][start * c : (start + step) * c], rows[i][start * c :].T).view(tile.shape).to(dtype)
            alike = _alike(members, members, lambda a, b: a[here] @ b[on].T)[:, None, :, None].to(dtype)  # noqa: B023
            tile.addcmul_(met, alike) if i else torch.mul(met, alike, out=tile)
        found[here, :, :start] = found[:start, :, here].permute(2, 3, 0, 1)
    return found


def _gram(left: Members, right: Members) -> Tensor:
    found = across(*(_bare(side[0][1].cotangent) for side in (left, right)))
    return found.mul_(_alike(left, right, rows_by_rows)[:, None, :, None].to(found.dtype))
