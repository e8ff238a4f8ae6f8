"""Rows of a table by index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .._errors import InputError
from .._typing import Tensor
from ._parts import GatherPart, NoRule, Part
from ._table import rule


def refuse(func: Any, args: Any, kwargs: Any) -> None:
    """InputError for a table whose gradient is no derivative of one sample."""
    if func not in (F.embedding, F.embedding_bag):
        return
    found = {name: kwargs.get(name, args[i] if len(args) > i else None) for name, i in (("max_norm", 3), ("scale_grad_by_freq", 5))}
    if found["max_norm"] is not None:
        raise InputError(
            f"{func.__name__} with max_norm writes to its weight when it is called",
            got=f"max_norm={found['max_norm']}",
            expected="a function that leaves its parameters as they are",
            hint="normalise the rows before, and set max_norm=None; or freeze the weight",
        )
    if found["scale_grad_by_freq"]:
        raise InputError(
            f"{func.__name__} with scale_grad_by_freq divides by how often an index occurs in the batch: that is no derivative of one sample",
            got="scale_grad_by_freq=True",
            expected="False",
            hint="set it to False, and divide rows of the result by the counts you want",
        )


@rule(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Iterator[Part]:
    """z[t] = weight[input[t]]; the padding row has no derivative, though its value is used."""
    if padding_idx is not None:
        padding = padding_idx % weight.shape[0]
        input = input.masked_fill(input == padding, -1)
    yield GatherPart(weight, input)


@rule(torch.Tensor.__getitem__)
def rows(input: Tensor, index: Any) -> Iterator[Part]:
    """z[t] = input[index[t]] for one tensor of integers."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or input.ndim < 1:
        raise NoRule("an index that depends on the samples and is not one tensor of integers")
    yield GatherPart(input, torch.where(index < 0, index + input.shape[0], index))
