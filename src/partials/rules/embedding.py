"""Rows of a table by index, alone or in bags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .._errors import InputError
from .._typing import Tensor
from ._parts import GatherPart, NoRule, Part
from ._table import REPEATED, rule


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
            f"{func.__name__} with scale_grad_by_freq divides by how often an index occurs in the batch: no derivative of one sample",
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


@rule(F.embedding_bag)
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Iterator[Part]:
    """z[b] = sum, mean or maximum over k of weight[input[b, k]], each weighted in a sum; padding rows are no part of a bag."""
    bags, weights = _bags(input, offsets, per_sample_weights, include_last_offset)
    if padding_idx is not None:
        bags = bags.masked_fill(bags == padding_idx % weight.shape[0], -1)
    if mode == "max":
        scale = _largest(bags, weight)
    else:
        scale = (bags >= 0).to(weight.dtype) if weights is None else weights
        scale = (scale / (bags >= 0).sum(-1, keepdim=True).clamp_min(1) if mode == "mean" else scale).unsqueeze(-1)
    yield GatherPart(weight, bags, scale)


def _bags(input: Tensor, offsets: Tensor | None, weights: Tensor | None, with_last: bool) -> tuple[Tensor, Tensor | None]:
    """Indices (bags, longest), filled up with -1, and their weights filled up with 0."""
    if input.ndim == 2 or offsets is None:
        return input, weights
    ends = offsets[1:] if with_last else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
    starts = offsets[:-1] if with_last else offsets
    longest = int((ends - starts).max()) if len(starts) else 0
    place = starts[:, None] + torch.arange(longest, device=input.device)
    inside = place < ends[:, None]
    place = place.where(inside, place.new_zeros(()))
    return input[place].where(inside, input.new_full((), -1)), None if weights is None else weights[place] * inside


def _largest(bags: Tensor, weight: Tensor) -> Tensor:
    """(bags, longest, features): one where the row gives its bag's maximum, the first of those that do."""
    rows = weight.detach()[bags.clamp_min(0)].masked_fill((bags < 0).unsqueeze(-1), -torch.inf)
    if not bags.shape[-1]:
        return rows
    first = rows.max(-2, keepdim=True).indices
    return torch.zeros_like(rows).scatter_(-2, first, 1.0).masked_fill((bags < 0).unsqueeze(-1), 0)


@rule(torch.index_select, torch.Tensor.index_select)
def index_select(input: Tensor, dim: int, index: Tensor) -> Iterator[Part]:
    """z[t] = input[index[t]]."""
    if dim % max(input.ndim, 1) or index.ndim != 1:
        raise NoRule("a selection along another dimension than the first")
    yield GatherPart(input, index)


def repeated(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, tuple[int, ...]] | None:
    """An index with the same rows for every sample, expanded or written out (token types of zeros, positions), looks them up again."""
    sizes = enumerate(zip(input.shape, input.stride(), strict=True))
    alike = [d for d, (size, stride) in sizes if size > 1 and (stride == 0 or bool((input == input.narrow(d, 0, 1)).all()))]
    if not alike:
        return None
    once = input[tuple(slice(0, 1) if d in alike else slice(None) for d in range(input.ndim))]
    return once, (*input.shape, weight.shape[-1])


REPEATED[F.embedding] = repeated


@rule(torch.Tensor.__getitem__)
def rows(input: Tensor, index: Any) -> Iterator[Part]:
    """z[t] = input[index[t]] for one tensor of integers."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or input.ndim < 1:
        raise NoRule("an index that depends on the samples and is not one tensor of integers")
    yield GatherPart(input, torch.where(index < 0, index + input.shape[0], index))
