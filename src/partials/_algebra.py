"""Quantities of a whole Jacobian from its blocks: several blocks of one parameter add up, parameters stand side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from itertools import combinations

import torch

from . import _room
from ._blocks import Block, Dense, Index, ranges, size_of
from ._errors import InputError, listed
from ._typing import Tensor

Blocks = Mapping[str, tuple[Block, ...]]


def squared_norms(blocks: tuple[Block, ...]) -> Tensor:
    """|sum of blocks|^2 of one parameter, cross terms included: (N, C)."""
    total = sum_of([block.squared_norms() for block in blocks])
    for left, right in combinations(blocks, 2):
        total = total + 2 * left.inner(right)
    return total.clamp_min(0) if len(blocks) > 1 else total


def pairs(function: Callable[[Block, Block], Tensor], left: Blocks, right: Blocks) -> Tensor:
    """The sum of `function` over all pairs of blocks that belong to one parameter: Gram matrices and inner products."""
    return sum_of(function(a, b) for name in left for a in left[name] for b in right[name])


def weighted_sum(blocks: Blocks, weights: Tensor) -> dict[str, Tensor]:
    """sum_n w[n] J[n]: {name: (C, *shape)}."""
    return {name: sum_of([block.weighted_sum(weights) for block in group]) for name, group in blocks.items()}


def products(left: Blocks, right: Blocks, weights: Tensor) -> dict[str, Tensor]:
    """sum_n w[n] J[n, c] K[n, c] entry by entry: {name: (C, *shape)}."""
    return {name: sum_of([a.products(b, weights) for a in group for b in right[name]]) for name, group in left.items()}


def select(blocks: Blocks, index: Index) -> dict[str, tuple[Block, ...]]:
    return {name: tuple(block.select(index) for block in group) for name, group in blocks.items()}


def mixed(blocks: Blocks, matrix: Tensor) -> dict[str, tuple[Block, ...]]:
    return {name: tuple(block.mixed(matrix) for block in group) for name, group in blocks.items()}


def rows(group: tuple[Block, ...]) -> Tensor:
    """The dense rows of one parameter: (N, C, *shape)."""
    return sum_of([block.dense() for block in group])


def write(blocks: Blocks, out: Tensor) -> None:
    """The dense rows of all parameters into the columns of `out`, (N, C, P)."""
    start = 0
    for group in blocks.values():
        width = size_of(group[0].shape)
        for i, block in enumerate(group):
            block.write(out[:, :, start : start + width], add=i > 0)
        start += width


def scatter(group: tuple[Block, ...], mean: Tensor) -> Tensor:
    """sum_n (J[n, c] - mean[c])^2 of one parameter, rows of several blocks added a few samples at a time: (C, *shape)."""
    if len(group) == 1:
        return group[0].scatter(mean)
    return reduce(torch.add, (Dense(rows(few[""])).scatter(mean) for few in in_pieces({"": group})))


def normal(blocks: Blocks, matrix: Tensor | None) -> Tensor:
    """J^T H J, H (N, C, C) or None for the identity, from the dense rows of a few samples at a time: (P, P)."""
    parts, start = [], 0
    for few in in_pieces(blocks):
        formed = _side_by_side(few)
        H = None if matrix is None else matrix[start : start + len(formed)].to(formed.dtype)
        left = formed if H is None else H.mT @ formed
        parts.append(left.flatten(0, 1).T @ formed.flatten(0, 1))
        start += len(formed)
        parts = [sum_of(parts)]
    return parts[0]


def demand_finite(squares: Mapping[str, Tensor]) -> None:
    """InputError that names the samples whose squared norms, (N, 1) of each parameter, are not finite; one answer of the device for all."""
    together = torch.cat([square.flatten() for square in {id(square): square for square in squares.values()}.values()])
    if bool(together.isfinite().all()):
        return
    for name, square in squares.items():
        if bad := (~square.isfinite()).flatten().nonzero().flatten().tolist():
            raise InputError(
                "clipped_sum met rows that are not finite",
                got=f"samples {listed(bad)} of {name!r}",
                expected="finite gradients",
                hint="drop these samples: J[mask]",
            )


def other_norms(blocks: Blocks, order: float) -> Tensor:
    """Norms other than the Euclidean one, from rows formed a few samples at a time: (N, C)."""
    return torch.cat(
        [torch.linalg.vector_norm(_side_by_side(few), order, -1) if _width(few) else _nothing(few) for few in in_pieces(blocks)]
    )


def in_pieces(blocks: Blocks) -> Iterator[Blocks]:
    """The blocks of a few samples at a time, whose dense rows of all parameters stay within their room."""
    n, c = next(iter(blocks.values()))[0].rows
    step = max(1, _room.rows() // max(1, 8 * c * _width(blocks)))
    if n <= step:
        return iter([blocks])
    return (select(blocks, piece) for piece in ranges(n, step))


def _width(blocks: Blocks) -> int:
    return sum(size_of(group[0].shape) for group in blocks.values())


def _side_by_side(blocks: Blocks) -> Tensor:
    """(N, C, P)."""
    return torch.cat([rows(group).reshape(*group[0].rows, size_of(group[0].shape)) for group in blocks.values()], -1)


def _nothing(blocks: Blocks) -> Tensor:
    return _side_by_side(blocks).sum(-1)


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum of the parts, each let go once it is added."""
    rest = iter(parts)
    total, own = next(rest), False
    for part in rest:
        if own and not total.requires_grad and not part.requires_grad and total.dtype == part.dtype:
            total.add_(part)
        else:
            total, own = total + part, True
    return total
