"""Losses of torch's own whose value for every sample is one call with reduction="none": no transform has to run them sample by sample.

Each function takes a loss by its settings and gives (output, target) -> (N,), or None where what the loss says of a batch of one is
more than that: other shapes, weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from ._typing import Tensor

ENTRY_BY_ENTRY: dict[Any, Callable[..., Tensor]] = {
    F.mse_loss: F.mse_loss,
    F.l1_loss: F.l1_loss,
    F.smooth_l1_loss: F.smooth_l1_loss,
    F.huber_loss: F.huber_loss,
    F.binary_cross_entropy_with_logits: F.binary_cross_entropy_with_logits,
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
}
"""The loss, a function or a class of modules without settings but the reduction -> the function."""


def at_once(loss: Any, output: Tensor, target: Any) -> Tensor | None:
    """The loss of every sample, (N,), by one call on the batch; None for what is not known to be that."""
    if not isinstance(target, Tensor) or output.ndim == 0 or target.ndim == 0 or len(target) != len(output):
        return None
    function = ENTRY_BY_ENTRY.get(type(loss) if isinstance(loss, nn.Module) else loss)
    if function is not None:
        return _entry_by_entry(function, getattr(loss, "reduction", "mean"), output, target)
    if loss is F.cross_entropy:
        return _classes(output, target, -100, 0.0, mean=True)
    if type(loss) is nn.CrossEntropyLoss and loss.weight is None and loss.reduction in ("mean", "sum"):
        return _classes(output, target, loss.ignore_index, loss.label_smoothing, mean=loss.reduction == "mean")
    return None


def _entry_by_entry(function: Callable[..., Tensor], reduction: str, output: Tensor, target: Tensor) -> Tensor | None:
    if output.shape != target.shape or output.dtype != target.dtype or reduction not in ("mean", "sum"):
        return None  # (one that broadcasts warns, or is no mean of the sample's own entries)
    entries = function(output, target, reduction="none")
    if entries.ndim == 1:
        return entries
    return entries.flatten(1).mean(1) if reduction == "mean" else entries.flatten(1).sum(1)


def _classes(output: Tensor, target: Tensor, ignore: int, smoothing: float, *, mean: bool) -> Tensor | None:
    """A class for each sample; the mean over a sample whose class is ignored is not a number, and its gradient nothing."""
    if output.ndim != 2 or target.ndim != 1 or target.is_floating_point():
        return None
    each = F.cross_entropy(output, target, ignore_index=ignore, reduction="none", label_smoothing=smoothing)
    return each.masked_fill(target == ignore, math.nan) if mean else each
