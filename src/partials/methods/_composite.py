"""Operations whose derivative torch's `vmap` has wrong, spelled out in elementary operations.

torch 2.13's `vmap` of `layer_norm` (and of `instance_norm` by the sample's own statistics) treats the statistics as constants
when its derivative is differentiated again: `vmap(grad)` under an outer `grad` is off by 60 % with no error. The same formula
in elementary operations is right, so the vectorised methods run it wherever these operations were seen. Its `prelu` multiplies the
cotangents of one output with the inputs of one sample where there are as many of both (a vmap over outputs within one over samples).

Operations that the rules re-express in others (recurrent layers, which vmap cannot run) are re-expressed here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .._compat import transform_of
from .._typing import Tensor
from ..rules import COMPOSITES, NoRule, Run


class Composite(TorchFunctionMode):
    """Runs the functions of a table, that below, in place of torch's own."""

    def __init__(self, table: Mapping[Any, Any] | None = None) -> None:
        super().__init__()
        self.table = TABLE if table is None else table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.table:
            return self.table[func](*args, **kwargs)
        if func in COMPOSITES:
            with suppress(NoRule):
                return COMPOSITES[func](Run(lambda t: transform_of(t) == "vmap", True), *args, **kwargs)
        return func(*args, **kwargs)


def layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    count = 1 if isinstance(normalized_shape, int) else len(normalized_shape)
    return _affine(_standard(input, tuple(range(-count, 0)), eps), weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    if running_mean is not None or not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    ones = (1,) * (input.ndim - 2)
    parts = [None if p is None else p.reshape(-1, *ones) for p in (weight, bias)]
    return _affine(_standard(input, tuple(range(2, input.ndim)), eps), *parts)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    weight = weight.reshape(-1, *(1,) * (input.ndim - 2)) if input.ndim > 1 else weight
    return torch.where(input > 0, input, weight * input)


def _standard(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


TABLE: dict[Any, Any] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.instance_norm: instance_norm,
    torch.instance_norm: instance_norm,
    F.prelu: prelu,
    torch.prelu: prelu,
    torch.Tensor.prelu: prelu,
}
