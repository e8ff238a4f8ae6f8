"""What torch.func has around us: whether a transform is running, and numbers read out of its tensors. Public torch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._typing import Tensor


class _Plain(torch.autograd.Function):
    """A Function without `setup_context`: torch refuses to apply it where a torch.func transform is running."""

    @staticmethod
    def forward(*context_and_input: Any) -> Any:
        return context_and_input[1]


_apply: Callable[[Tensor], Any] = _Plain.apply
_NOTHING = torch.empty(0)


def inside_transform() -> bool:
    """Whether a torch.func transform (vmap, grad, vjp, jvp, ...) is running in this thread.

    A function may close over batched tensors while its inputs look ordinary, so that no tensor at hand would tell.
    """
    try:
        _apply(_NOTHING)
    except RuntimeError:
        return True
    return False


def largest(tensor: Tensor) -> float:
    """The largest entry of a tensor of any kind, over the batch dimensions of transforms as well; 0 where there is none."""
    raw = torch.func.debug_unwrap(tensor)
    return float(torch.func.debug_unwrap(raw.max())) if raw.numel() else 0.0
