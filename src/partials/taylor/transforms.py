"""What torch.func has around us: whether a transform is running, and numbers read out of its tensors."""

from __future__ import annotations

import torch

from .._compat import inside_transform
from .._typing import Tensor

__all__ = ["inside_transform", "largest"]


def largest(tensor: Tensor) -> float:
    """The largest entry of a tensor of any kind, over the batch dimensions of transforms as well; 0 where there is none."""
    raw = torch.func.debug_unwrap(tensor)
    return float(torch.func.debug_unwrap(raw.max())) if raw.numel() else 0.0
