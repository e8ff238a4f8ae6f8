"""Tensors that no derivative can be taken by, or that hold no numbers: refused by name before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ._errors import InputError, listed
from ._typing import Tensor

Arguments = Iterable[tuple[str, Tensor]]


def demand_values(kind: str, tensors: Arguments) -> None:
    """InputError for tensors without numbers of their own in this process: lazy, meta, sharded, sparse or nested ones."""
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise InputError(
                f"{kind} {name!r} is not initialised yet",
                got=type(tensor).__name__,
                expected="a parameter with a shape",
                hint="call the module once on a batch, under torch.no_grad(), before asking for derivatives",
            )
        if tensor.is_meta:
            raise InputError(
                f"{kind} {name!r} is on the meta device, where tensors have a shape and no numbers",
                got="device='meta'",
                expected="a tensor on a device that computes",
                hint="module.to_empty(device='cpu'), then load or initialise its parameters",
            )
        if _is_sharded(tensor):
            raise InputError(
                f"{kind} {name!r} is distributed: this process may hold a part of it only",
                got=type(tensor).__name__,
                expected="a whole tensor in each process",
                hint="tensor.full_tensor(), or the module before it is sharded; samples, not parameters, can be spread over processes",
            )
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise InputError(
                f"{kind} {name!r} is not a dense tensor",
                got="a nested tensor" if tensor.is_nested else str(tensor.layout),
                expected="a dense tensor",
                hint="tensor.to_padded_tensor(0.0), and its lengths as a second input" if tensor.is_nested else "tensor.to_dense()",
            )


def demand_whole(module: nn.Module) -> None:
    """The same for all parameters of a module, asked for or not: running it would initialise lazy ones, or gather flattened ones."""
    sharded = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    inside = [name or "the module" for name, m in module.named_modules() if sharded is not None and isinstance(m, sharded)]
    if inside:
        raise InputError(
            f"the parameters of {type(module).__name__} are sharded by FullyShardedDataParallel, flattened and in pieces",
            got=listed(inside),
            expected="a module that holds its own parameters",
            hint="the module before it is wrapped; samples, not parameters, can be spread over processes",
        )
    demand_values("parameter", module.named_parameters())


def demand_real(kind: str, name: str, tensor: Tensor) -> None:
    """InputError for a tensor to differentiate by that is not of real floating-point numbers."""
    if tensor.is_complex():
        raise InputError(
            f"{kind} {name!r} is complex, which is not supported yet",
            got=str(tensor.dtype),
            expected="a real floating-point tensor",
            hint="torch.view_as_real, with the real and imaginary parts as parameters",
        )
    if tensor.is_floating_point():
        return
    raise InputError(
        f"{kind} {name!r} is {'quantised: ' if tensor.is_quantized else ''}not differentiable",
        got=str(tensor.dtype),
        expected="a floating-point tensor",
        hint="tensor.dequantize(), and the function of that" if tensor.is_quantized else "convert it with .float(), or leave it out of wrt",
    )


def _is_sharded(tensor: Tensor) -> bool:
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def _loaded(module: str, name: str) -> Any:
    """A class, if its module has been imported: nobody has one of its instances otherwise."""
    return getattr(sys.modules.get(module), name, None)


def scaled_by_batch() -> InputError:
    """What to say of an embedding whose gradient torch divides by counts over the batch: a backward of it is no derivative."""
    return InputError(
        "an embedding with scale_grad_by_freq=True has no derivative for each sample: torch divides its gradient by counts over the batch",
        got="scale_grad_by_freq=True",
        expected="a gradient of one sample that does not depend on the others",
        hint="scale_grad_by_freq=False, and a division of J.sum() by the counts",
    )
