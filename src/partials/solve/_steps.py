"""What the optimisers share: parameters by the names of a Jacobian, moved and put back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .._errors import InputError, listed
from .._jacobian import Jacobian
from .._typing import Tensor


def own(J: Any, parameters: Iterable[Tensor]) -> Mapping[str, Tensor]:
    """The tensors that a closure's Jacobian is about, which must be parameters of the optimiser."""
    if not isinstance(J, Jacobian):
        raise InputError(
            "the closure returned no Jacobian",
            got=type(J).__name__,
            expected="pt.jacobian(residual, ..., params=net), or pt.concat of them",
        )
    known = {tensor.data_ptr() for tensor in parameters}
    strange = [name for name, tensor in J.leaves.items() if tensor.numel() and tensor.data_ptr() not in known]
    if strange:
        raise InputError("the Jacobian is about other parameters than the optimiser's", got=listed(strange))
    return J.leaves


def move(tensors: Mapping[str, Tensor], J: Jacobian, step: Tensor, scale: float) -> None:
    """Add `scale * step`, a flat vector (P,), to the parameters."""
    with torch.no_grad():
        for name, part in J.unflatten(step).items():
            tensors[name].add_(part.reshape(tensors[name].shape).to(tensors[name].dtype), alpha=scale)


def saved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def put_back(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(before[name])


def squares(values: Tensor) -> float:
    """|r|^2; infinity where anything is not finite, so that no step ends there."""
    total = float(values.detach().double().square().sum())
    return total if total == total else float("inf")
