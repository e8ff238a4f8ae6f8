"""Beneath vmap: what its tensors are made of, where the mapped dimensions lie, and operations that are run on the batch itself.

Samples that are run apart by our own vmap lie in a batch all the same, along a dimension that f does not see. An operation that does to
a batch what it does to each sample is run there at once: vmap would decompose it, or run it sample by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Parameter

from .. import _compat
from .._signature import rebuild, tensors_in
from .._typing import Tensor
from ..rules import ALIKE, PHYSICAL, NoRule, Part, SumPart, with_data
from .layout import FIRST, Layout


@dataclass(slots=True, eq=False)
class Placement:
    """How an operation's output lies beneath vmap: its shape with the mapped dimensions in front, and how it gets there."""

    whole: torch.Size
    order: tuple[int, ...] | None = None
    levels: int = 0
    merged: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.whole[0] * self.whole[1], *self.whole[2:]) if self.merged else self.whole

    @property
    def layout(self) -> Layout:
        """Where the samples are, if the mapped dimension is theirs."""
        return Layout(0, 1, self.whole[1]) if self.merged and self.whole[1] != 1 else FIRST


Settled = tuple[Tensor, Tensor, torch.Size | None, Placement, Sequence[Part]]


def settled(func: Any, out: Tensor, parts: Sequence[Part], *, mapped: bool) -> Settled:
    """A use's output, the tensor whose node its cotangent comes to, how the output lies, and the parts with their data beneath vmap.

    A view would get another node when f writes to it: the output gets memory of its own, or the cotangent is taken of the view's base,
    and the third is the shape to see it in. `mapped` says that a vmap may be running.
    """
    raw = _compat.first_mapped(out) if mapped else out
    order = None
    if raw is None:
        raw, order = _compat.unwrapped(out)
    owner, folded, shape = raw, None, raw.shape
    if raw._is_view():
        base = _product(raw, shape) if func is F.linear else None
        if base is None:
            out, owner = _compat.own_memory(out)
        else:
            owner, folded = base, shape
    levels = len(shape) - out.ndim if mapped else 0
    if not levels:
        return out, owner, folded, Placement(shape), parts
    merges = False
    for part in parts:
        merges |= part.batched
    if merges and levels > 1:
        raise NoRule("a batch within several vmaps")
    if order is None and not merges:  # (one mapped dimension, in front already)
        place = Placement(shape, None, levels)
    else:
        order = order or tuple(range(len(shape)))
        place = Placement(torch.Size([shape[d] for d in order]), order, levels, merges)
    for part in parts:
        rank = len(shape) - levels if type(part) is SumPart else 0  # (what broadcasts in a product, broadcasts beneath too)
        with_data(part, physical, place, rank)
    return out, owner, folded, place, parts


def _product(view: Tensor, shape: torch.Size) -> Tensor | None:
    """The product of rows that a linear's output of this shape is a view of, where the graph has nothing in between."""
    base: Any = view._base
    node = base.grad_fn
    if node is None or view.grad_fn.next_functions[0][0] is not node:  # type: ignore[union-attr]
        return None
    whole = base.ndim == 2 and base.shape[1] == shape[-1] and base.numel() == view.numel()
    return base if whole and view.is_contiguous() and base.is_contiguous() else None


def physical(t: Tensor, place: Placement, rank: int = 0) -> Tensor:
    """The tensor beneath vmap with the mapped dimensions of the output in front, of at least `rank` dimensions behind them."""
    raw = _compat.first_mapped(t)
    if raw is None:
        raw, order = _compat.unwrapped(t)
        raw = raw.permute(order)
    levels = place.levels
    if raw is t:
        raw = t.expand(*place.whole[:levels], *t.shape)
    elif raw.ndim - t.ndim != levels:
        raise NoRule("arguments of different vmaps")
    if rank and t.ndim < rank:
        raw = raw.reshape(*place.whole[:levels], *(1,) * (rank - t.ndim), *t.shape)
    return raw.flatten(0, 1) if place.merged else raw


def at_once(func: Any, args: Any, kwargs: Any, level: int | None, size: int) -> Any:
    """An operation; under our own vmap, that of `level`, on the batch beneath where vmap would decompose it or run it sample by sample."""
    if level is not None and level == _compat.transform_now():
        if func in ALIKE:
            raw = _alone(args, kwargs)
            if raw is not None:
                with _compat.Below():
                    out = func(raw, *args[1:], **kwargs) if kwargs else func(raw, *args[1:])
                return _compat.batched(out, level)
        elif func in PHYSICAL:
            return _merged(func, args, kwargs or {}, level, size)
    return func(*args, **kwargs) if kwargs else func(*args)


def _alone(args: Any, kwargs: Any) -> Tensor | None:
    """The first argument as it is beneath vmap, where the others are the same for all samples."""
    first = args[0] if args else None
    raw = _compat.first_mapped(first) if type(first) is Tensor else None
    if raw is None or raw is first:
        return None
    for value in args[1:]:
        if type(value) is not Parameter and isinstance(value, Tensor) and _compat.first_mapped(value) is not value:
            return None
    return None if kwargs and tensors_in(kwargs.values()) else raw


def _merged(func: Any, args: Any, kwargs: Any, level: int, size: int) -> Any:
    tensors = tensors_in((*args, *kwargs.values()))
    below = [_compat.unwrapped(t)[0] for t in tensors]
    if any(raw.ndim - t.ndim != (raw is not t) for raw, t in zip(below, tensors, strict=True)):
        return func(*args, **kwargs)
    place = Placement(torch.Size([size]), levels=1)
    whole, named = rebuild((args, kwargs), iter([physical(t, place) for t in tensors]))
    try:
        return _compat.batched(PHYSICAL[func](*whole, **named), level)
    except NoRule:
        return func(*args, **kwargs)
