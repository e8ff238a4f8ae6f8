"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._typing import Tensor
from ._parts import ConvPart, Part, SumPart
from ._table import rule


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Iterator[Part]:
    """z[n,o,l] = sum_{i,k} input[n, i, stride l + dilation k - padding] weight[o,i,k] + bias[o]."""
    dims = weight.ndim - 2
    steps, gaps = _each(stride, dims), _each(dilation, dims)
    yield ConvPart(weight, input, steps, _padding(padding, weight, gaps), gaps, groups)
    if bias is not None:
        yield SumPart(bias, channel=-dims - 1)


@rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Iterator[Part]:
    """z[n, o, stride l + dilation k - padding] += sum_i input[n,i,l] weight[i,o,k], and bias[o]: a convolution with exchanged roles."""
    dims = weight.ndim - 2
    steps, gaps = _each(stride, dims), _each(dilation, dims)
    yield ConvPart(weight, input, steps, _padding(padding, weight, gaps), gaps, groups, transposed=True)
    if bias is not None:
        yield SumPart(bias, channel=-dims - 1)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (int(value),) * dims if isinstance(value, int) else tuple(int(v) for v in value) * (dims if len(value) == 1 else 1)


def _padding(padding: Any, weight: Tensor, dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(before, after) for each dimension; "same" puts the odd one after, as torch does."""
    dims = len(dilation)
    if padding == "valid":
        return ((0, 0),) * dims
    if padding == "same":
        total = [gap * (size - 1) for gap, size in zip(dilation, weight.shape[2:], strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in _each(padding, dims))
