"""The least precise arithmetic inside f: autocast, casts in its code, or TF32 products."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .._problem import Problem
from .._signature import walk
from .._state import drawn_from
from .tolerance import coarsest, name_of


class _Watch(TorchFunctionMode):
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
    watch = _Watch(coarsest(*(t.tensor.dtype for t in problem.targets)))
    with watch, drawn_from(problem.random_state, device):
        problem()
    tf32 = device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    if watch.dtype is torch.float32 and tf32:
        return torch.float16, "TF32"
    if watch.dtype is torch.float32 and device.type == "cpu" and torch.get_float32_matmul_precision() == "medium":
        return torch.bfloat16, "bfloat16 products"
    return watch.dtype, name_of(watch.dtype)
