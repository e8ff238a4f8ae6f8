"""What decides, beside the course, where samples go: indices, and products with constants or with what was computed from the data.

NOTE on constants. A product with a permutation matrix, or rows picked by an index of the user's, put the samples in an order that no
course shows. So a constant beside samples in such an operation goes into the course, as the memory that it lies in and its version: a
layout that was measured with one holds for that one only. Constants of one number place nothing: the zeros that a recurrence starts from.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .. import _compat
from .._signature import tensors_in
from .._typing import Tensor
from ..rules.elementwise import ENTRY_BY_ENTRY

EXPANDS = {
    torch.Tensor.expand,
    torch.Tensor.expand_as,
    torch.Tensor.repeat,
    torch.broadcast_to,
    torch.Tensor.broadcast_to,
    torch.tile,
    torch.Tensor.tile,
}
"""Operations that can give a parameter a sample dimension of its own: a class token expanded to the batch."""
_OPERATORS = (type(torch.ops.aten.mm), type(torch.ops.aten.mm.default))
"""Of `torch.ops`: overloads and their packets."""
_NAMES = (
    *("index_select", "gather", "take", "take_along_dim", "masked_select", "sort", "argsort", "topk", "nonzero", "argwhere"),
    *("index_put", "index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce", "masked_scatter"),
    *("index_put_", "index_add_", "index_copy_", "scatter_", "scatter_add_", "scatter_reduce_", "masked_scatter_"),
    *("repeat_interleave", "segment_reduce", "tensor_split", "unique", "unique_consecutive", "numpy", "__array__"),
)
_ROUTES = frozenset(getattr(owner, name) for owner in (torch, torch.Tensor) for name in _NAMES if hasattr(owner, name))
_PRODUCTS = ("mm", "mv", "matmul", "dot", "einsum", "linear", "conv", "inner", "kron", "solve", "lstsq", "embedding", "index", "take")
PICKS = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_SERIALS: dict[int, tuple[weakref.ref[Any], int]] = {}
_NEXT = itertools.count(1)


class Constant(NamedTuple):
    """A constant as an entry of the course."""

    serial: int
    version: int
    place: tuple[int, torch.Size, tuple[int, ...]]
    """Offset, shape and stride."""


UNIFORM = frozenset(
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
    if hasattr(owner, name)
)
"""Operations that make constants of one number: whatever they are multiplied with stays where it is."""


_DATA: Any = torch.Tensor.data
_OPENED = {_DATA.__get__, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.untyped_storage, torch.Tensor.data_ptr}
"""What hands out memory to code that may write to it without a word."""


class Uniform:
    """The constants of one number that a run has made, and the views of them: while nothing was written there."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[Tensor, int]] = {}

    def see(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Follow an operation: it makes such a constant, or writes to one, or hands it out to code that may (`.data`, numpy)."""
        if func in UNIFORM and isinstance(out, Tensor) and out.numel():
            self.made[out.untyped_storage().data_ptr()] = out, out._version
        elif self.made and (writes(func) or func in _OPENED or "out" in kwargs):
            for t in tensors_in((*args, *kwargs.values())):
                if t.layout is torch.strided:
                    self.made.pop(t.untyped_storage().data_ptr(), None)

    def __contains__(self, t: Tensor) -> bool:
        if not self.made or type(t) is not Tensor or t.layout is not torch.strided:
            return False
        known = self.made.get(t.untyped_storage().data_ptr())
        return known is not None and known[1] == t._version


@lru_cache(maxsize=4096)
def writes(func: Any) -> bool:
    """Whether a function's name says that it writes to its first argument."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


@lru_cache(maxsize=4096)
def routes(func: Any) -> bool:
    """Whether data decide, by this operation, where samples go: a layout measured for some data is none for others."""
    if isinstance(func, _OPERATORS):
        space, _, name = str(func).partition(".")
        return space not in ("aten", "prims") or name.partition(".")[0] in (*_NAMES, "index")  # (who knows what others' operations do)
    return func in _ROUTES


def by_data(index: Any) -> bool:
    """Whether an index picks entries by a tensor or a list, not by numbers and slices alone."""
    return any(isinstance(part, Tensor | list) or _array(part) for part in (index if isinstance(index, tuple) else (index,)))


def _array(value: Any) -> bool:
    """Whether this is numpy's, or anybody's, that has several numbers."""
    return getattr(value, "ndim", 0) > 0 and hasattr(value, "__array__")


def bounded(index: Any) -> bool:
    """Whether a tensor bounds a slice: its value is seen when the index is read, and not again."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(b, Tensor) for part in parts if isinstance(part, slice) for b in (part.start, part.stop, part.step))


def spreads(before: Tensor, after: Any, n: int) -> bool:
    """Whether an expansion gives what depends on the samples a dimension that could hold them a second time."""
    if n < 2 or not isinstance(after, Tensor):
        return False
    old = (1,) * (after.ndim - before.ndim) + tuple(before.shape)
    return any(size > 1 and size % n == 0 and size != its for size, its in zip(after.shape, old, strict=True))


def pools(func: Any, args: Any, n: int) -> bool:
    """Whether samples lie along the queries of an attention, where a mask says which of them get what."""
    return func is torch.nn.functional.scaled_dot_product_attention and bool(args) and n > 1 and args[0].shape[0] % n != 0


def picks(func: Any, args: Any) -> bool:
    """Whether this is an index that picks entries by a tensor or a list."""
    return func in PICKS and by_data(args[1])


@lru_cache(maxsize=4096)
def multiplies(func: Any) -> bool:
    """Whether values of one argument may decide where entries of another go: a product, a pick. (Not attention: masks add to scores.)"""
    name = str(func).partition(".")[2] if isinstance(func, _OPERATORS) else getattr(func, "__name__", "")
    return func not in ENTRY_BY_ENTRY and "attention" not in name and any(word in name for word in _PRODUCTS)


def opens(func: Any, t: Tensor) -> bool | None:
    """Whether a constant of one number lets through what it meets entry by entry: behind a gate that is shut every layout fits.

    None of other tensors, and where the answer would have to be waited for.
    """
    if func not in ENTRY_BY_ENTRY or t.numel() != 1 or type(t) is not Tensor or t.requires_grad:
        return None
    plain = t.device.type == "cpu" and t.layout is torch.strided and not _compat.transform_of(t)
    return bool(t) if plain else None


def gains(constant: Tensor, samples: Iterable[Tensor], n: int) -> bool:
    """Whether a constant broadcasts the samples along a dimension that could then hold them: times a one-hot matrix, say."""
    shapes = [t.shape for t in samples]
    for d, size in enumerate(reversed(constant.shape), 1):
        if size > 1 and size % n == 0 and all(len(shape) < d or shape[-d] == 1 for shape in shapes):
            return True
    return False


def constant(t: Tensor) -> Constant | None:
    """The entry of a constant; None where its memory cannot be told from another's."""
    try:
        storage = t.untyped_storage()
        version = 0 if t.is_inference() else t._version
        place = (int(t.storage_offset()), t.shape, t.stride())
    except (RuntimeError, NotImplementedError):  # (sparse, nested, or of a transform)
        return None
    reference, serial = _SERIALS.get(id(storage), (None, 0))
    if reference is None or reference() is not storage:
        key, serial = id(storage), next(_NEXT)
        _SERIALS[key] = (weakref.ref(storage, lambda _: _forget(key, serial)), serial)
    return Constant(serial, version, place)


def _forget(key: int, serial: int) -> None:
    if _SERIALS.get(key, (None, 0))[1] == serial:
        _SERIALS.pop(key, None)
