"""Whose results a store holds: digests of parameters and data, and all that a number depends on. Another run's are refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .._errors import StoreError
from .._typing import Tensor
from ..checks.tolerance import distance, size, typical


def of_tensors(named: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for name, tensor in named.items():
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
        digest.update(_raw(tensor))
    return digest.hexdigest()


def words_of(value: Any) -> str:
    """What stands for a value that is no tensor: its representation, without the address, which is another in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def of_inputs(values: Iterable[Any]) -> str:
    """A digest of one block's inputs, tensors by their bytes and anything else by its representation."""
    digest = hashlib.sha256()
    _add(digest, values)
    return digest.hexdigest()[:16]


def _add(digest: Any, values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(_raw(value))
        elif isinstance(value, tuple | list):
            _add(digest, value)
        elif isinstance(value, Mapping):
            _add(digest, value.values())
        else:
            digest.update(words_of(value).encode("utf-8", "surrogatepass"))


def demand_same(found: Mapping[str, Any], expected: Mapping[str, Any], place: str) -> None:
    """
    Raises
    ------
    StoreError
        where a store of one fingerprint is to be continued by a run of another.
    """
    apart = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    if apart:
        name = apart[0]
        raise StoreError(
            f"{place} belongs to another run: its {', '.join(apart)} {'differs' if len(apart) == 1 else 'differ'}",
            got=f"{name}: {_short(expected.get(name))}",
            expected=f"{name}: {_short(found.get(name))}, as when it was made",
            hint="another folder for this run; nothing was overwritten",
        )


def demand_same_values(kept: Tensor, found: Tensor, dtype: torch.dtype, place: str, sample: int) -> None:
    """The values of the first of some samples, kept (n, C), beside those that f has now, which computes in `dtype`.

    Raises
    ------
    StoreError
        where they are apart by more than rounding: a fingerprint knows the parameters, and no code.
    """
    found = found.detach().cpu().reshape(len(found), kept.shape[1])[:1].to(kept.dtype)
    usual = typical(size(kept.nan_to_num(0, 0, 0), samples=True))
    error = float(distance(kept[:1], found)) / max(float(usual[0]), torch.finfo(kept.dtype).tiny)
    if not error <= torch.finfo(dtype).eps ** 0.5:
        raise StoreError(
            f"{place} belongs to another function: sample {sample} has other values",
            got=f"off by {error:.1e} of what is usual there",
            expected="the values that the store holds, to rounding",
            hint="another folder for this run; nothing was overwritten",
        )


def _raw(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data if plain.numel() else memoryview(b"")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
