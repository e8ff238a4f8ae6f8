"""Data with rows by number: tensors, memory maps and data sets, of which a block is read at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from .._errors import InputError
from . import fingerprint

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
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


def of_arrays(args: Sequence[Any], kwargs: Mapping[str, Any], change: Callable[[Any], Any] = lambda value: value) -> Data:
    """Arrays or tensors with samples first, memory-mapped ones among them; anything else is passed to every block as it is."""
    arrays: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
    lengths = {name: len(value) for name, value in arrays.items() if _has_rows(value)}
    if not lengths or len(set(lengths.values())) > 1:
        raise InputError("the data have no common number of samples", got=str(lengths), expected="arrays of one length, samples first")

    def cut(value: Any, start: int, stop: int) -> Any:
        if not _has_rows(value):
            return value
        rows = value[start:stop]
        return change(rows if isinstance(rows, torch.Tensor) else torch.from_numpy(numpy.array(rows)))

    def take(start: int, stop: int) -> Inputs:
        return tuple(cut(value, start, stop) for value in args), {name: cut(value, start, stop) for name, value in kwargs.items()}

    return Data(next(iter(lengths.values())), take)


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


def samples_in(inputs: Inputs) -> int:
    """The number of samples of a block: the length of its first array."""
    return next(len(value) for value in (*inputs[0], *inputs[1].values()) if _has_rows(value))


def _has_rows(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and len(value.shape) > 0
