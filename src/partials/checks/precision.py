"""The least precise arithmetic inside f: autocast, casts in its code, or TF32 products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from .._graph import of_python
from .._problem import Problem
from .._signature import walk
from .._state import drawn_from
from .tolerance import coarsest, name_of


class _Stops(TorchFunctionMode):
    """Notes the first function that keeps a derivative from autograd where the value depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = (resolve_name(func) or getattr(func, "__name__", "")).removeprefix("torch.")
        tracked = any(tensor.requires_grad for _, tensor in walk((args, kwargs), ""))
        padding = func is F.embedding and (kwargs.get("padding_idx") is not None or (len(args) > 2 and args[2] is not None))
        if not self.seen and tracked and (name.rpartition(".")[2] in ("detach", "detach_") or ".data" in name or padding):
            self.seen = f"{name} with padding_idx" if padding else name
        if not self.seen and tracked and not torch.is_grad_enabled():
            self.seen = f"{name} under torch.no_grad"
        return func(*args, **kwargs)


def stops(problem: Problem) -> str:
    """The first function of f that stops gradients on purpose, or "": central differences see through it, autograd does not.

    A custom Function stops them inside, to give a derivative of its own: then nothing is said.
    """
    watch, tensors, given = _Stops(), problem.tensors(fresh=True), problem.given
    with watch, drawn_from(problem.random_state, problem.targets[0].tensor.device):
        out = problem(tensors, given)
    return "" if of_python(out) else watch.seen


class Watch(TorchFunctionMode):
    """Notes the coarsest floating dtype that any torch function returns."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor | tuple | list):
            for _, tensor in walk(out, ""):
                if tensor.is_floating_point():
                    self.dtype = coarsest(self.dtype, tensor.dtype)
        return out


def inside(problem: Problem) -> tuple[torch.dtype, str]:
    """(the coarsest dtype that f computes in, its name); TF32 counts as float16, whose precision it has."""
    device = problem.targets[0].tensor.device
    watch = Watch(coarsest(*(t.tensor.dtype for t in problem.targets)))
    with watch, drawn_from(problem.random_state, device):
        problem()
    tf32 = device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    if watch.dtype is torch.float32 and tf32:
        return torch.float16, "TF32"
    if watch.dtype is torch.float32 and device.type == "cpu" and torch.get_float32_matmul_precision() == "medium":
        return torch.bfloat16, "bfloat16 products"
    return watch.dtype, name_of(watch.dtype)
