"""Normalisations, written out: forward mode nested in torch is wrong for some of them, which is one reason to have rules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..jets import Jet, NoRule, compose, linear, plus, scaled, times
from ..series import power
from ..table import jet_rule
from .reduce import centred, mean


def _whitened(f: Jet, dims: Any, eps: float) -> Jet:
    c = centred(f, dims)
    return times(c, compose(power(-0.5), plus(mean(times(c, c), dims, True), eps)))


def _affine(f: Jet, weight: Any, bias: Any) -> Jet:
    f = f if weight is None else scaled(f, weight)
    return f if bias is None else plus(f, bias)


def _by_channel(parameter: Any, ndim: int) -> Any:
    return None if parameter is None else parameter.reshape(-1, *(1,) * (ndim - 2))


@jet_rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    input: Jet, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enable: bool = True
) -> Jet:
    dims = tuple(range(-len(tuple(normalized_shape)), 0))
    return _affine(_whitened(input, dims, eps), weight, bias)


@jet_rule(F.rms_norm, torch.rms_norm)
def rms_norm(input: Jet, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Jet:
    dims = tuple(range(-len(tuple(normalized_shape)), 0))
    eps = torch.finfo(input.anything.dtype).eps if eps is None else eps
    return _affine(times(input, compose(power(-0.5), plus(mean(times(input, input), dims, True), eps))), weight, None)


@jet_rule(F.group_norm, torch.group_norm)
def group_norm(input: Jet, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True) -> Jet:
    n, channels, *places = input.shape
    grouped = linear(input, lambda t: t.reshape(t.shape[0], n, num_groups, -1))
    white = linear(_whitened(grouped, -1, eps), lambda t: t.reshape(t.shape[0], n, channels, *places))
    return _affine(white, _by_channel(weight, input.ndim), _by_channel(bias, input.ndim))


@jet_rule(F.instance_norm, torch.instance_norm)
def instance_norm(
    input: Jet,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Jet:
    if running_mean is not None:
        raise NoRule("instance_norm with running statistics")
    return group_norm(input, input.shape[1], weight, bias, eps)


@jet_rule(F.batch_norm)
def batch_norm(
    input: Jet,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Jet:
    """In evaluation: a fixed linear map of each channel."""
    if training or running_mean is None:
        raise NoRule("batch_norm in training, which mixes samples")
    scale = torch.rsqrt(running_var + eps)
    fixed = [_by_channel(t, input.ndim) for t in (scale, -running_mean * scale)]
    return _affine(plus(scaled(input, fixed[0]), fixed[1]), _by_channel(weight, input.ndim), _by_channel(bias, input.ndim))


@jet_rule(F.normalize)
def normalize(input: Jet, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Jet:
    from .bent import clamp
    from .reduce import norm

    return times(input, compose(power(-1), clamp(norm(input, p, dim, True), min=eps)))
