"""From a recorded use, its cotangent and its layout to the block of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from .._blocks import Block, Dense, size_of
from .._conv import Conv
from .._factors import Outer
from .._gather import Gather
from .._graph import reached
from .._pullback import carried
from .._typing import Tensor
from ..rules import ConvPart, ExpandedPart, GatherPart, OuterPart, Part, SumPart, data_of, with_data
from ..rules.arithmetic import itself
from .layout import FIRST, Layout
from .trace import Refused, Use

READ_AGAIN = {OuterPart, GatherPart, ConvPart}
"""Parts whose data the block keeps; what the others read is used up when the block is made."""


Saved = tuple[tuple[Tensor, int], ...]
Quick = Callable[[Tensor, Saved], Block]
"""From a cotangent and what the use has kept to the block."""


def block_of(use: Use, g: Tensor, layout: Layout, n: int, *, single: bool) -> Block:
    """The use's block of the tensor that it took; g is (C, *edge shape), or (*edge shape) of a `single` output."""
    part = use.part
    if g.dtype is not part.parameter.dtype:  # (autocast: the operation rounded its input, and the row has the parameter's dtype)
        rounded = g.dtype
        with_data(part, lambda t: t.to(rounded) if t.is_floating_point() else t)
        g = g.to(part.parameter.dtype)
    elif single and use.order is None and (quick := quickly(part, g.shape, layout, n)) is not None:
        return quick(g, use.saved)
    return BUILDERS[type(part)](use, canonical(use, g.unsqueeze(0) if single else g), layout, n)


def quickly(part: Part, shape: torch.Size, layout: Layout, n: int) -> Quick | None:
    """How a block is made from the cotangent of this shape, of one output for each sample, where fewer steps than usual will do."""
    maker = SINGLE.get(type(part)) if layout is FIRST else None
    return None if maker is None else maker(part, shape, n)


def canonical(use: Use, g: Tensor) -> Tensor:
    """(C, *edge shape), under a vmap with the mapped dimensions brought to the front."""
    if use.order is None:
        return g
    g = g.permute(0, *(1 + d for d in use.order))
    return g.flatten(1, 2) if use.merged else g


def carried_to(use: Use, block: Block, wanted: Mapping[str, Tensor], *, attached: bool) -> dict[str, Block]:
    """The blocks of the wanted parameters that the tensor of a use was computed from."""
    derived = use.part.parameter
    return {name: carried(block, derived, wanted[name], attached=attached) for name in sorted(reached(derived, wanted))}


def merged(group: list[Block]) -> list[Block]:
    """Dense blocks of one parameter are one dense block."""
    if len(group) < 2:
        return group
    dense = [b for b in group if type(b) is Dense]
    if len(dense) < 2:
        return group
    return [*(b for b in group if type(b) is not Dense), Dense(sum((b.values for b in dense[1:]), dense[0].values))]


def zero(parameter: Tensor, n: int, outputs: int) -> Block:
    """Rows of zeros."""
    return Dense(
        parameter.detach().new_zeros(1).expand(n, outputs, *parameter.shape) if parameter.ndim else parameter.detach().new_zeros(n, outputs)
    )


def release(use: Use) -> None:
    """Let go of the tensors that the use's block does not keep; what is left is enough to describe it."""
    if use.saved and type(use.part) not in READ_AGAIN:
        use.saved = ()
        kind: Any = type(use.part)
        for name in data_of(kind):
            setattr(use.part, name, None)


def features(part: Part, rank: int) -> set[int]:
    """Dimensions of the operation's output, of `rank` dimensions, along which the parameter has entries of its own: never the samples'."""
    if isinstance(part, OuterPart):
        if part.order == "i":
            return set()
        return {*range(rank - 2 - part.groups, rank - 2), rank - 2 if part.transposed else rank - 1}
    if isinstance(part, GatherPart):
        return set(range(rank - part.parameter.ndim + 1, rank))
    if isinstance(part, ConvPart):
        return set(range(1, rank))
    if isinstance(part, SumPart) and part.channel:
        return {rank + part.channel}
    shape = part.parameter.shape
    return {rank - len(shape) + d for d, size in enumerate(shape) if size != 1}


def _outer(use: Use, g: Tensor, layout: Layout, n: int) -> Block:
    part: Any = use.part
    a = part.a
    if part.order == "i":
        g = g.unsqueeze(-1)
    if part.transposed:
        g, a, layout = g.mT, a.mT, _swapped(layout, g.ndim - 1)
    _keep(
        layout, range(g.ndim - 2 - part.groups - (part.groups > 0), g.ndim - 2 - (part.groups > 0)) if part.groups else (), g.ndim - 2, use
    )
    if a.shape[:-1] != g.shape[1:-1]:
        raise Refused(f"{use.operation}: input and output do not stand side by side")
    g, a = layout.samples_first(g, n, 1), layout.samples_first(a, n)
    if part.groups:  # (N, C, lead, *groups, t, O) -> (N, C, lead, t, *groups, O)
        g, a = (x.movedim(-2, -2 - part.groups) for x in (g, a))
    lead = a.ndim - 2 - part.groups
    a = a.flatten(1, lead) if lead else a.unsqueeze(1)
    g = g.flatten(2, lead + 1) if lead else g.unsqueeze(2)
    a = a.flatten(2, -2) if part.groups else a.unsqueeze(2)
    g = g.flatten(3, -2) if part.groups else g.unsqueeze(3)
    g = g if part.scale == 1 else g * part.scale
    return Outer(like(a, g), g, tuple(part.parameter.shape), "oi" if part.order == "i" else part.order)


def _sum(use: Use, g: Tensor, layout: Layout, n: int) -> Block:
    part: Any = use.part
    shape, rank = tuple(part.parameter.shape), g.ndim - 1
    if part.times is not None:
        g = g * like(part.times(*part.saved), g)
    if part.scale != 1:
        g = g * part.scale
    if part.channel:
        rows = layout.samples_first(g, n, 1)
        _keep(layout, (rank + part.channel,), rank, use)  # (rank: no dimension is the last one)
        rows = rows.sum([d for d in range(2, rows.ndim) if d != rows.ndim + part.channel])
    else:
        rows = _reduced(g, shape, layout, n, use)
    return Dense(like(rows, part.parameter))


def _expanded(use: Use, g: Tensor, layout: Layout, n: int) -> Block:
    if use.layout is not None:
        return Dense(g.movedim(1, 0))
    return Dense(_reduced(g, tuple(use.part.parameter.shape), layout, n, use))


def _gather(use: Use, g: Tensor, layout: Layout, n: int) -> Block:
    part: Any = use.part
    inner = part.parameter.ndim - 1
    _keep(layout, range(g.ndim - 1 - inner, g.ndim - 1), g.ndim - 1, use)
    index, g = layout.samples_first(part.index, n), layout.samples_first(g, n, 1)
    if part.scale is not None:  # (N, C, bags, E) -> (N, C, bags, rows of a bag, E)
        g = g.unsqueeze(-2) * layout.samples_first(part.scale, n).to(g.dtype).unsqueeze(1)
    index = index.reshape(n, -1)
    g = g.reshape(n, g.shape[1], index.shape[1], size_of(part.parameter.shape[1:]))
    shape = tuple(part.parameter.shape)
    return Gather(index, g, (shape[0], g.shape[-1])) if len(shape) == 2 else _Reshaped(Gather(index, g, (shape[0], g.shape[-1])), shape)


def _Reshaped(block: Gather, shape: tuple[int, ...]) -> Block:
    return Dense(block.dense().reshape(*block.rows, *shape))


def _conv(use: Use, g: Tensor, layout: Layout, n: int) -> Block:
    part: Any = use.part
    if layout.dim > 0 or (layout.dim == 0 and not part.batched) or (part.batched and part.a.shape[0] != g.shape[1]):
        raise Refused(f"{use.operation}: the samples are not along the batch dimension")
    a, g = layout.samples_first(part.a, n), layout.samples_first(g, n, 1)
    if not part.batched:  # one image alone
        a, g = a.unsqueeze(1), g.unsqueeze(2)
    shape = tuple(part.parameter.shape)
    return Conv(a.to(g.dtype), g, shape, part.stride, part.padding, part.dilation, part.groups, part.transposed)


def _reduced(g: Tensor, shape: tuple[int, ...], layout: Layout, n: int, use: Use) -> Tensor:
    """(C, *positions) -> (N, C, *shape), summed over what broadcasting repeated; the sample dimension must have been repeated."""
    rank = g.ndim - 1
    wide = (1,) * (rank - len(shape)) + shape
    if layout.dim >= 0 and wide[layout.dim] != 1:
        raise Refused(f"{use.operation}: the parameter has a value for each sample of its own")
    rows = layout.samples_first(g, n, 1)
    repeated = [2 + d for d in range(rank) if wide[d] == 1 and rows.shape[2 + d] != 1]
    rows = rows.sum(repeated, keepdim=True) if repeated else rows
    return rows.reshape(*rows.shape[:2], *shape)


def _swapped(layout: Layout, rank: int) -> Layout:
    """The layout after the last two of `rank` dimensions change places."""
    other = {rank - 1: rank - 2, rank - 2: rank - 1}.get(layout.dim, layout.dim)
    return replace(layout, dim=other)


def _keep(layout: Layout, taken: Any, last: int, use: Use) -> None:
    if layout.dim >= 0 and (layout.dim == last or layout.dim in [d % (last + 1) for d in taken]):
        raise Refused(f"{use.operation}: the samples lie along a feature dimension")


# One output for each sample and the samples along dimension 0, as in most calls: fewer steps to the same block.


def _outer_single(part: Any, shape: torch.Size, n: int) -> Quick | None:
    order, scale, its = part.order, part.scale, tuple(part.parameter.shape)
    lead, o = (shape, 1) if order == "i" else (shape[:-1], shape[-1])
    if part.transposed or part.groups or not lead or part.a.shape[:-1] != lead:
        return None
    t = lead[1:].numel()
    stored: Any = "oi" if order == "i" else order
    inputs, outputs = (n, t, 1, part.a.shape[-1]), (n, 1, t, 1, o)

    def quick(g: Tensor, saved: Saved) -> Block:
        g = g if scale == 1 else g * scale
        a = saved[0][0]
        return Outer((a if a.dtype is g.dtype else a.to(g.dtype)).reshape(*inputs), g.reshape(*outputs), its, stored)

    return quick


def _sum_single(part: Any, shape: torch.Size, n: int) -> Quick | None:
    its, rank, times, scale = tuple(part.parameter.shape), len(shape), part.times, part.scale
    wide = (1,) * (rank - len(its)) + its
    if part.channel or not wide or wide[0] != 1:
        return None
    rows, repeated = (n, 1, *its), [d for d in range(1, rank) if wide[d] == 1 and shape[d] != 1]

    def quick(g: Tensor, saved: Saved) -> Block:
        if times is itself and saved[0][0].dtype is g.dtype:  # (a call of Python less)
            g = g * saved[0][0]
        elif times is not None:
            g = g * like(times(*[t for t, _ in saved]), g)
        if scale != 1:
            g = g * scale
        return Dense((g.sum(repeated) if repeated else g).reshape(*rows))  # (sizes one by one: a third less time)

    return quick


def _expanded_single(part: Any, shape: torch.Size, n: int) -> Quick | None:
    return _sum_single(SumPart(part.parameter), shape, n)


def like(t: Tensor, other: Tensor) -> Tensor:
    """t in the dtype of the other."""
    return t if t.dtype == other.dtype else t.to(other.dtype)


SINGLE: dict[type, Callable[[Any, torch.Size, int], Quick | None]] = {
    OuterPart: _outer_single,
    SumPart: _sum_single,
    ExpandedPart: _expanded_single,
}
BUILDERS: dict[type, Callable[[Use, Tensor, Layout, int], Block]] = {
    OuterPart: _outer,
    SumPart: _sum,
    ExpandedPart: _expanded,
    GatherPart: _gather,
    ConvPart: _conv,
}
