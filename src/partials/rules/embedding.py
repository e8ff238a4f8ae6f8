"""Rows of a table by index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .._typing import Tensor
from ._parts import GatherPart, NoRule, Part
from ._table import rule


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
    if max_norm is not None or scale_grad_by_freq:
        raise NoRule(
            "max_norm writes to the weight in forward, and scale_grad_by_freq counts over the batch: neither is a derivative of one sample"
        )
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
