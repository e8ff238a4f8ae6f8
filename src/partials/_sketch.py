"""Sketches J S of all rows, S (P, k) random: from factors, and never with more of S at once than `TILE` bytes.

S is fixed by seed, parameter name and entry (`_random`), so blocks of one parameter add up, and sketches made apart belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce, singledispatch
from math import gcd, isqrt
from typing import TypeAlias

import torch

from . import _algebra
from ._blocks import Block, Dense, size_of
from ._conv import CONV, Conv
from ._errors import InputError
from ._factors import Outer
from ._gather import Gather, cat, in_chunks
from ._pullback import Placed
from ._random import Projection, key_of, matrix, words
from ._typing import Tensor
from ._wide import wide

Kind: TypeAlias = Callable[[Block, int, int, str, Tensor], Tensor]
TILE = 2**23
"""Bytes of the projection that are made at once."""
HEAVY = 4
"""Columns that an entry is added to by the sparse sketch, where k is a multiple of it."""


def sketch(blocks: _algebra.Blocks, k: int, kind: str, seed: int, like: Tensor) -> Tensor:
    """(N, C, k), computed in the dtype of `like`."""
    if kind not in KINDS:
        raise InputError(f"a sketch of kind {kind!r} is unknown", got=repr(kind), expected=f"one of: {', '.join(map(repr, KINDS))}")
    for name, value, least in (("k", k, 1), ("seed", seed, None)):
        if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
            raise InputError(f"{name} is not understood", got=f"{name}={value!r}", expected="an integer" + (" above 0" if least else ""))
    project = KINDS[kind]
    return _algebra.sum_of([project(wide(block, like.dtype), k, seed, name, like) for name, group in blocks.items() for block in group])


# The projection as a matrix: Gaussian numbers or signs.


def _by_matrix(kind: str) -> Kind:
    return lambda block, k, seed, name, like: projected(block, Projection(key_of(seed, name), k, kind), like)


@singledispatch
def projected(block: Block, S: Projection, like: Tensor) -> Tensor:
    """J S: (N, C, k)."""
    parts = []
    for start, piece in _pieces(block, S.k):
        entries = torch.arange(start, start + size_of(piece.shape), device=like.device)
        columns = [piece.matmul(S.rows(entries, c, like.dtype).view(*piece.shape, c.stop - c.start)) for c in _columns(S, len(entries))]
        parts.append(cat(columns, -1))
    return reduce(torch.add, parts)


@projected.register
def _(block: Placed, S: Projection, like: Tensor) -> Tensor:
    return projected(block.view, S.at(block.index), like)


@projected.register
def _(block: Gather, S: Projection, like: Tensor) -> Tensor:
    """Only the rows of S that were looked up: for each strip of them, the positions that looked there."""
    index, g = block._kept()
    (n, c, t, e), size = g.shape, g.element_size()
    values, order = torch.unique(index, return_inverse=True)
    found = g.new_zeros(n, c, S.k)
    g = g.transpose(1, 2).reshape(n * t, c, e)
    for strip in in_chunks(len(values), e * S.k * size, g):
        here = ((order >= strip.start) & (order < strip.stop)).flatten().nonzero().squeeze(1)
        entries = (values[strip, None] * e + torch.arange(e, device=g.device)).flatten()
        rows = S.rows(entries, slice(0, S.k), g.dtype).view(-1, e, S.k)
        for s in in_chunks(len(here), e * S.k * size, g):
            seen = g[here[s]] @ rows[order.flatten()[here[s]] - strip.start]
            found = found.index_add(0, here[s].div(t, rounding_mode="floor"), seen)
    return found


# Sparse: every entry is added, with a sign, to a few columns.


def _by_entry(block: Block, k: int, seed: int, name: str, like: Tensor) -> Tensor:
    return _scattered(block, key_of(seed, name), k, torch.arange(size_of(block.shape), device=like.device))


@singledispatch
def _scattered(block: Block, key: int, k: int, places: Tensor) -> Tensor:
    parts = []
    for start, piece in _pieces(block, HEAVY):
        at, signs = _destinations(key, k, places[start : start + size_of(piece.shape)])
        parts.append(piece._by_samples(lambda few, at=at, signs=signs: _poured(few._flat(), at, signs, k)))
    return reduce(torch.add, parts)


@_scattered.register
def _(block: Placed, key: int, k: int, places: Tensor) -> Tensor:
    return _scattered(block.view, key, k, places[block.index])


@_scattered.register
def _(block: Gather, key: int, k: int, places: Tensor) -> Tensor:
    index, g = block._kept()
    entries = (index[..., None] * g.shape[3] + torch.arange(g.shape[3], device=g.device)).flatten(1)  # (N, T E)
    at, signs = _destinations(key, k, places[entries])
    return _poured(g.flatten(2), at, signs, k)


def _destinations(key: int, k: int, entries: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of entries (...) and the signs with which they go there: (..., h) both."""
    h = gcd(k, HEAVY)
    bits = words(key, entries[..., None] * h + torch.arange(h, device=entries.device))
    wide = k // h
    upper = (bits >> 32).bitwise_and_(2**32 - 1)
    columns = (upper * wide >> 32) + wide * torch.arange(h, device=entries.device)
    return columns, (2 * (bits & 1) - 1).double()


def _poured(rows: Tensor, at: Tensor, signs: Tensor, k: int) -> Tensor:
    """(N, C, p) into the columns (p, h) or (N, p, h): (N, C, k)."""
    (n, c, p), h = rows.shape, at.shape[-1]
    at, signs = at.expand(n, p, h), (signs * h**-0.5).to(rows.dtype).expand(n, p, h)
    found = rows.new_zeros(n, c, k)
    for s in in_chunks(p, n * c * h * rows.element_size(), rows):
        values = rows[:, :, s, None] * signs[:, None, s]
        found = found.scatter_add(2, at[:, None, s].expand(n, c, -1, h).flatten(2), values.flatten(2))
    return found


# Two-sided: a matrix of the parameter's first dimension and the rest is projected from both sides.


def _by_sides(block: Block, k: int, seed: int, name: str, like: Tensor) -> Tensor:
    rows, columns = block.shape[0] if block.shape else 1, size_of(block.shape[1:])
    if min(rows, columns) < 2:
        return _by_entry(block, k, seed, name, like)  # (k numbers for each entry of a vector would be most of the work)
    left, right = sides(k)
    A, B = matrix(seed, f"{name}\0rows", rows, left, like), matrix(seed, f"{name}\0columns", columns, right, like)
    return two_sided(block, A, B).flatten(2)


def sides(k: int) -> tuple[int, int]:
    """k = left x right, as nearly square as its divisors allow, left <= right."""
    left = next(d for d in range(isqrt(k), 0, -1) if k % d == 0)
    return left, k // left


@singledispatch
def two_sided(block: Block, A: Tensor, B: Tensor) -> Tensor:
    """A^T X B for each row X (d, e) of the block: A (d, x), B (e, y) -> (N, C, x, y)."""
    return block._by_samples(lambda few: A.T @ few._flat().unflatten(-1, (len(A), len(B))).to(A.dtype) @ B)


@two_sided.register
def _(block: Outer, A: Tensor, B: Tensor) -> Tensor:
    groups, o, i = block.a.shape[2], block.g.shape[4], block.a.shape[3]
    if block.layout == "io" and groups == 1 and (i, o) == (len(A), len(B)):
        return two_sided(replace(block, shape=(o, i), layout="oi"), B, A).mT
    if block.layout == "io" or (groups * o, i) != (len(A), len(B)):
        return two_sided.dispatch(Block)(block, A, B)
    A = A.view(groups, o, -1)

    def few(s: slice) -> Tensor:
        g = block.g[s]
        left = (g @ A[0] if groups == 1 else torch.einsum("nctgo,gox->nctgx", g, A)).flatten(2, 3)
        return left.mT @ (block.a[s] @ B).flatten(1, 2).unsqueeze(1)

    each = block.a.shape[1] * groups * (block.rows[1] * A.shape[2] + B.shape[1]) * block.g.element_size()
    return cat([few(s) for s in in_chunks(block.rows[0], each, block.g)])


@two_sided.register
def _(block: Gather, A: Tensor, B: Tensor) -> Tensor:
    index, g = block._kept()

    def few(s: slice) -> Tensor:
        return A[index[s]].mT.unsqueeze(1) @ (g[s] @ B)

    each = g.shape[2] * (A.shape[1] + g.shape[1] * B.shape[1]) * g.element_size()
    return cat([few(s) for s in in_chunks(len(g), each, g)])


@two_sided.register
def _(block: Conv, A: Tensor, B: Tensor) -> Tensor:
    """B is applied as a convolution with as many output channels as it has columns: no patches are unfolded."""
    n, c, frames, o = block.g.shape[:4]
    groups, space = block.groups, block.g.shape[4:]
    kernel = B.T.reshape(-1, *block.shape[1:]).repeat(groups, *[1] * (len(space) + 1))
    A = A.view(groups, o // groups, -1)

    def few(s: slice) -> Tensor:
        cut = block._at(s)
        seen = CONV[len(space)](cut._padded().flatten(0, 1), kernel, None, block.stride, 0, block.dilation, groups)
        seen = seen[(slice(None), slice(None), *(slice(0, size) for size in space))]
        seen = seen.reshape(len(cut.a), frames, groups, B.shape[1], -1).permute(0, 2, 1, 4, 3).flatten(1, 3)  # (N, groups frames L, y)
        g = cut.g.reshape(len(cut.g), c, frames, groups, o // groups, -1)
        left = torch.einsum("ncfgol,gox->ncxgfl", g, A).flatten(3)
        return left @ seen.unsqueeze(1)

    each = groups * frames * space.numel() * (B.shape[1] + c * A.shape[2]) * block.g.element_size()
    return cat([few(s) for s in in_chunks(n, each, block.g)]) if n else block.g.new_zeros(0, c, A.shape[2], B.shape[1])


@two_sided.register
def _(block: Placed, A: Tensor, B: Tensor) -> Tensor:
    """Where the view takes rows and columns, or columns and rows, of the parameter, it meets those rows of A and B."""
    shape = block.view.shape
    if len(shape) >= 1 and block.index.numel():
        rows = block.index.div(len(B), rounding_mode="floor").view(shape[0], -1)
        columns = (block.index % len(B)).view(shape[0], -1)
        if (rows == rows[:, :1]).all() and (columns == columns[:1]).all():
            return two_sided(block.view, A[rows[:, 0]], B[columns[0]])
        if (rows == rows[:1]).all() and (columns == columns[:, :1]).all():
            return two_sided(block.view, B[columns[:, 0]], A[rows[0]]).mT
    return two_sided.dispatch(Block)(block, A, B)


KINDS: dict[str, Kind] = {
    "gaussian": _by_matrix("gaussian"),
    "rademacher": _by_matrix("rademacher"),
    "sparse": _by_entry,
    "kronecker": _by_sides,
}


# Parts of blocks.


def _pieces(block: Block, k: int) -> Iterator[tuple[int, Block]]:
    """(first entry, the block of some of the parameter's first dimension), such that S is small; the whole block where it has no parts."""
    if len(block.shape) == 0 or not size_of(block.shape) or narrowed(block, slice(0, 1)) is None:
        yield 0, block
        return
    inner = size_of(block.shape[1:])
    step = max(1, TILE // (inner * k * 8))
    for start in range(0, block.shape[0], step):
        piece = narrowed(block, slice(start, min(start + step, block.shape[0])))
        assert piece is not None
        yield start * inner, piece


def _columns(S: Projection, entries: int) -> list[slice]:
    step = max(1, TILE // (8 * max(1, entries) * S.step)) * S.step
    return [slice(start, min(start + step, S.k)) for start in range(0, S.k, step)]


@singledispatch
def narrowed(block: Block, part: slice) -> Block | None:
    """The block of `parameter[part]`, None where that is no cheaper than the whole."""
    return None


@narrowed.register
def _(block: Dense, part: slice) -> Block | None:
    return Dense(block.values[:, :, part])


@narrowed.register
def _(block: Outer, part: slice) -> Block | None:
    groups, o, i = block.a.shape[2], block.g.shape[4], block.a.shape[3]
    shape = (part.stop - part.start, *block.shape[1:])
    if groups != 1 or block.shape[0] != (o if block.layout == "oi" else i):
        return None
    return replace(block, g=block.g[..., part], shape=shape) if block.layout == "oi" else replace(block, a=block.a[..., part], shape=shape)


@narrowed.register
def _(block: Conv, part: slice) -> Block | None:
    return None if block.groups != 1 else replace(block, g=block.g[:, :, :, part], shape=(part.stop - part.start, *block.shape[1:]))
