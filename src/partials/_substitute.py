"""Calling the user's function with other tensors in the place of its parameters, without touching the function.

A module is copied in structure: every tensor is shared, but for those that are replaced. Swapping tensors inside the user's
module (`functional_call`) gives silently wrong results when two threads share it. A function that reaches tensors from
outside is run under a mode that replaces them, by identity, wherever they are passed to a torch function.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from ._errors import MethodError
from ._signature import first_tensor, rebuild, walk
from ._typing import Function, Tensor

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(a tensor that the function owns or reaches, the tensor to use instead of it)."""


def call_with(f: Function, replaced: Pairs, args: tuple[Any, ...], kwargs: dict[str, Any], *, attached: bool = False) -> Any:
    """`f(*args, **kwargs)` with tensors replaced; a module's other parameters are detached unless `attached`."""
    if not replaced:
        return f(*args, **kwargs)
    if isinstance(f, nn.Module):
        return structural_copy(f, replaced, attached=attached)(*args, **kwargs)
    with _Replacing(replaced):
        return f(*args, **kwargs)


def structural_copy(module: nn.Module, replaced: Pairs = (), *, attached: bool = False) -> nn.Module:
    """A module of the same structure whose tensors are the same objects, but for `replaced`; buffers that training writes are copies."""
    memo: dict[int, Any] = {}
    for owner in module.modules():
        for value in vars(owner).values():
            for _, tensor in walk(value, "") if isinstance(value, Tensor | tuple | list | dict) else ():
                memo[id(tensor)] = tensor
    for owner in module.modules():
        if owner.training:
            memo |= {id(buffer): buffer.clone() for buffer in owner._buffers.values() if buffer is not None}
    if not attached:
        memo |= {id(parameter): parameter.detach() for parameter in module.parameters()}
    memo |= {id(old): new for old, new in replaced}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise MethodError(
            f"{type(module).__name__} cannot be copied in structure, so other tensors cannot stand in for its parameters",
            got=f"{type(error).__name__}: {error}",
            expected="a module that copy.deepcopy accepts",
            hint="method='loop' or method='grad', which use the parameters as they are",
        ) from error


def with_constants(f: Function, constants: Sequence[Tensor], kept: Sequence[Tensor]) -> Function | None:
    """f with `constants` detached and the very tensors `kept`; None for a module that cannot be copied in structure with them."""
    if not isinstance(f, nn.Module):
        pairs = [(tensor, tensor.detach()) for tensor in constants]
        return lambda *args, **kwargs: call_with(f, pairs, args, kwargs)
    try:
        copied = structural_copy(f, [(tensor, tensor) for tensor in kept])
    except MethodError:
        return None
    held = {id(parameter) for parameter in copied.parameters()}
    return copied if all(id(tensor) in held for tensor in kept) else None


class _Replacing(TorchFunctionMode):
    """Replaces tensors by identity in the arguments of every torch function."""

    def __init__(self, replaced: Pairs) -> None:
        super().__init__()
        self.by_id = {id(old): new for old, new in replaced}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._swap(args), **self._swap(kwargs or {}))

    def _swap(self, tree: Any) -> Any:
        if first_tensor(tree) is None:
            return tree
        return rebuild(tree, (self.by_id.get(id(tensor), tensor) for _, tensor in walk(tree, "")))
