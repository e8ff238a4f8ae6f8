"""What `torch.func` has around us: whether a transform is active, and numbers read out of its tensors."""

from __future__ import annotations

import torch

from .._typing import Tensor


def inside_transform() -> bool:
    """Whether a torch.func transform (vmap, grad, vjp, jvp, ...) is running in this thread.

    There is no public question for this: a function may close over batched tensors while its inputs look ordinary. torch asks itself the
    same way before it applies a `torch.autograd.Function`.
    """
    return bool(torch._C._are_functorch_transforms_active())


def number(tensor: Tensor) -> float:
    """The largest entry of a tensor of any kind, over the batch dimensions of transforms as well."""
    raw = torch.func.debug_unwrap(tensor)
    return float(torch.func.debug_unwrap(raw.max())) if raw.numel() else 0.0
