"""Data with rows by number: tensors, memory maps and data sets, of which a block is read at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from .._errors import InputError
from .._signature import rebuild
from . import fingerprint

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Dims = Callable[[tuple[Any, ...], dict[str, Any]], list[int | None]]
"""From positional and keyword inputs to the sample dimension of every tensor in them, in the order of `_signature.walk`."""
SAMPLED = 64
"""Rows, evenly spread, whose bytes stand for all in the fingerprint; every block's own digest is in its journal line."""


@dataclass(frozen=True)
class Data:
    """`length` samples; `take(start, stop)` is (positional inputs, keyword inputs) of a range."""

    length: int
    take: Callable[[int, int], Inputs]

    def digest(self) -> str:
        """Of the number of samples and some of them."""
        digest = hashlib.sha256(str(self.length).encode())
        for n in sorted({int(n) for n in numpy.linspace(0, self.length - 1, SAMPLED)} if self.length else ()):
            args, kwargs = self.take(n, n + 1)
            digest.update(fingerprint.of_inputs([*args, *kwargs.values()]).encode())
        return digest.hexdigest()

    def limited(self, limit: int | None) -> Data:
        return self if limit is None else Data(min(limit, self.length), self.take)


def of_arrays(
    args: Sequence[Any], kwargs: Mapping[str, Any], change: Callable[[Any], Any] = lambda value: value, dims: Dims | None = None
) -> Data:
    """Arrays or tensors, memory-mapped ones among them, cut along their sample dimension; what holds no samples is passed whole.

    `dims` says which dimension that is, from stand-ins of the same shapes that take no memory: by default the first of every array.
    """
    stand_ins = [_mapped(_stand_in, value) for value in (tuple(args), dict(kwargs))]
    flat = _flat((tuple(args), dict(kwargs)))
    found = [0 if len(value.shape) else None for value in flat] if dims is None else dims(*stand_ins)
    lengths = {value.shape[dim] for value, dim in zip(flat, found, strict=True) if dim is not None}
    if len(lengths) != 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in flat)
        raise InputError("the data have no common number of samples", got=shapes, expected="arrays of one length, samples first")

    whole = [change(_tensor(_all(value))) if dim is None else None for value, dim in zip(flat, found, strict=True)]

    def take(start: int, stop: int) -> Inputs:
        cuts: list[Any] = [
            shared if dim is None else change(_tensor(_cut(value, dim, start, stop)))
            for value, dim, shared in zip(flat, found, whole, strict=True)
        ]
        inputs: Inputs = rebuild(tuple(stand_ins), iter(cuts))
        return inputs

    return Data(lengths.pop(), take)


def _cut(value: Any, dim: int, start: int, stop: int) -> Any:
    if dim == 0:
        return value[start:stop]
    rows = value if isinstance(value, torch.Tensor | numpy.ndarray) else _all(value)
    return rows[(*[slice(None)] * dim, slice(start, stop))]


def _all(value: Any) -> Any:
    return value if isinstance(value, torch.Tensor) or not len(value.shape) else value[0 : value.shape[0]]


def _tensor(rows: Any) -> torch.Tensor:
    return rows if isinstance(rows, torch.Tensor) else torch.from_numpy(numpy.array(rows))


def _has_rows(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Nested tuples, lists and mappings with every array replaced."""
    if _has_rows(tree):
        return function(tree)
    if isinstance(tree, Mapping):
        return {name: _mapped(function, value) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_mapped(function, value) for value in tree)
    return tree


def _flat(tree: Any) -> list[Any]:
    found: list[Any] = []
    _mapped(found.append, tree)
    return found


def _stand_in(value: Any) -> torch.Tensor:
    """A tensor of the same shape and kind without memory of its own; a tensor stands for itself."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.zeros((), dtype=_dtype(value.dtype), device="cpu").expand(tuple(value.shape))


def _dtype(dtype: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    try:
        return torch.from_numpy(numpy.empty(0, dtype)).dtype
    except (TypeError, ValueError) as error:
        raise InputError("the data are no numbers that torch has", got=str(dtype), expected="numbers", hint=str(error)) from None


def of_dataset(dataset: Any, change: Callable[[Any], Any] = lambda value: value) -> Data:
    """A map-style data set, `len(dataset)` and `dataset[n]`: its items, collated as a DataLoader would."""
    from torch.utils.data import default_collate

    def take(start: int, stop: int) -> Inputs:
        batch = default_collate([dataset[n] for n in range(start, stop)])
        if isinstance(batch, Mapping):
            return (), {str(name): change(part) for name, part in batch.items()}
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        return tuple(change(part) for part in parts), {}

    return Data(len(dataset), take)
