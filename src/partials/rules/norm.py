"""Normalisations, z = x_hat * weight + bias with x_hat free of parameters, and the one activation that has a weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .._typing import Tensor
from ._parts import Part, SumPart
from ._table import ALIKE, rule


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Iterator[Part]:
    if weight is not None:
        yield SumPart(weight, lambda x: F.layer_norm(x, normalized_shape, eps=eps), (input,))
    if bias is not None:
        yield SumPart(bias)


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Iterator[Part]:
    if weight is not None:
        yield SumPart(weight, lambda x: F.rms_norm(x, normalized_shape, eps=eps), (input,))


@rule(F.group_norm, torch.group_norm)
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Iterator[Part]:
    yield from _channels(input, weight, bias, lambda x: F.group_norm(x, num_groups, eps=eps))


@rule(F.instance_norm, torch.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Iterator[Part]:
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)
    yield from _channels(input, weight, bias, lambda x: F.instance_norm(x, mean, var, None, None, use_input_stats, 0.0, eps))


@rule(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[Part]:
    """In training mode samples mix, which the layout probe and the checks find."""
    mean, var = (None, None) if training else (running_mean, running_var)
    yield from _channels(input, weight, bias, lambda x: F.batch_norm(x, mean, var, None, None, training, 0.0, eps))


def _channels(input: Tensor, weight: Tensor | None, bias: Tensor | None, normalised: Any) -> Iterator[Part]:
    """Parameters of one value for each channel, dimension 1 of the input."""
    channel = 1 - input.ndim
    if weight is not None:
        yield SumPart(weight, normalised, (input,), channel)
    if bias is not None:
        yield SumPart(bias, channel=channel)


@rule(F.prelu, torch.prelu, torch.Tensor.prelu)
def prelu(input: Tensor, weight: Tensor) -> Iterator[Part]:
    """z = max(0, input) + weight min(0, input), one weight for all or one for each channel."""
    channel = 1 - input.ndim if weight.numel() > 1 and input.ndim > 1 else 0
    yield SumPart(weight, lambda x: x.clamp(max=0), (input,), channel)


ALIKE.update((F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm))
