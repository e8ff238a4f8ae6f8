"""What is refused, and why that is right: the only refusals that the conformance run allows, and each must still be one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
SOFTMAXES = (nn.Softmax, nn.LogSoftmax, nn.Softmin)


@dataclass(frozen=True)
class Reason:
    """Why there is no Jacobian for each sample, how the library says it, and where."""

    why: str
    says: str
    """The beginning of the error, its kind first, "..." for what varies."""
    holds: Callable[[nn.Module, bool, tuple[int, ...]], bool]
    """Of the module, whether samples are put in a batch, and the shape of its first floating input."""

    def matches(self, refusal: str) -> bool:
        at = 0
        for part in self.says.split("..."):
            at = refusal.find(part, at)
            if at < 0:
                return False
        return True


def batch_statistics(module: nn.Module, batched: bool, shape: tuple[int, ...]) -> bool:
    return isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None) and shape[0] > 0


def weights_cancel(module: nn.Module, batched: bool, shape: tuple[int, ...]) -> bool:
    """`gradient(loss=)` of a weighted mean: over one sample it is w l / w."""
    return isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss) and module.weight is not None and module.reduction == "mean"


def numbers_under_softmax(module: nn.Module, batched: bool, shape: tuple[int, ...]) -> bool:
    """Of single numbers in a batch, softmax over dimension 0 is one over the samples."""
    return isinstance(module, SOFTMAXES) and batched and len(shape) == 1


REASONS = (
    Reason("batch statistics: the output of a sample depends on the others", "MixingError: ...mixes samples", batch_statistics),
    Reason("class weights cancel in the mean over a single sample", "InputError: ...loses the weights within one sample", weights_cancel),
    Reason("softmax over a batch of single numbers", "MixingError: ...mixes samples", numbers_under_softmax),
)


def reason_of(module: nn.Module, batched: bool, shape: tuple[int, ...]) -> Reason | None:
    return next((reason for reason in REASONS if reason.holds(module, batched, shape)), None)
