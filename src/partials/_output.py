"""What f returned: picking one tensor of it, and the sentences for what has no per-sample Jacobian."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import vmap

from ._compat import inside_transform
from ._errors import InputError, OutputError, listed
from ._losses import at_once
from ._signature import rebuild, walk
from ._typing import Tensor


@dataclass(frozen=True)
class Picker:
    """Takes the one tensor to differentiate out of whatever f returns.

    `choice` is a key, an index, an attribute name or a callable; None demands that there is only one. Where a loss is
    chained behind the function, the choice is made before the loss (`select`) and the loss's answer is taken as it is.
    """

    choice: Any
    function: str
    chained: bool = False

    def __call__(self, returned: Any) -> Tensor:
        if isinstance(returned, Tensor) and (self.chained or self.choice is None):
            return returned
        if self.chained:
            return _tensor(returned, f"the loss of {self.function}")
        return _tensor(self.select(returned), self.function)

    def select(self, returned: Any) -> Any:
        """The chosen part of f's output."""
        if self.choice is None:
            return _only(returned, self.function)
        if callable(self.choice):
            return self.choice(returned)
        try:
            if isinstance(self.choice, str) and not (isinstance(returned, Mapping) and self.choice in returned):
                return getattr(returned, self.choice)
            return returned[self.choice]
        except (AttributeError, KeyError, IndexError, TypeError):
            raise OutputError(
                f"output={self.choice!r} is not in what {self.function} returned",
                got=_described(returned),
                expected="a key, index or attribute of it",
            ) from None


def check_output(out: Tensor, size: int, function: str, *, batched: bool) -> Tensor:
    """`out` if it is a real floating tensor with `size` samples along dimension 0; else the sentence that says what it is."""
    if out.is_complex():
        raise OutputError(
            f"{function} returned complex numbers, which are not supported yet",
            got=str(out.dtype),
            expected="a real tensor",
            hint="torch.view_as_real in f",
        )
    if not out.is_floating_point():
        raise OutputError(
            f"{function} returned an integer tensor",
            got=str(out.dtype),
            expected="a floating-point tensor",
            hint="return the scores, not the classes",
        )
    if not batched:
        return out
    if out.ndim == 0:
        raise OutputError(
            f"{function} returned one number for the whole batch",
            got=f"a 0-d tensor for {size} samples",
            expected=f"a tensor whose dimension 0 is the sample, of size {size}",
            hint="reduction='none' in the loss, or pt.gradient(model, x, target, loss=...), which applies it to each sample",
        )
    if out.shape[0] != size:
        raise OutputError(
            f"the output of {function} has no sample dimension",
            got=f"shape {tuple(out.shape)} for {size} samples",
            expected=f"dimension 0 of size {size}",
            hint="return samples first; in_dims for inputs that hold them elsewhere or not at all; "
            "torch.vmap(f) for a one-sample f; batched=False for one sample",
        )
    return out


def per_sample_loss(loss: Any, *, batched: bool = True) -> Any:
    """`loss` as a function of the batch that gives (N,): applied to `output[n:n+1], target[n:n+1]` for each n.

    Raises
    ------
    InputError
        for a loss module whose class weights cancel within one sample: a weighted mean over a single entry is w*l/w = l; and for one
        whose weights are those of the samples.
    """
    weighted = isinstance(loss, nn.Module) and getattr(loss, "weight", None) is not None
    if weighted and getattr(loss, "reduction", None) == "mean" and not isinstance(loss, UNDIVIDED):
        raise InputError(
            f"{type(loss).__name__} with class weights and reduction='mean' loses the weights within one sample (w*l/w = l)",
            got="weight=..., reduction='mean'",
            expected="a loss whose per-sample value keeps the weight",
            hint=f"{type(loss).__name__}(weight=..., reduction='sum')",
        )

    def one(output: Tensor, target: Any) -> Tensor:
        _same_for_all(loss, output)
        value = _tensor(loss(output, target), "the loss")
        return value.reshape(()) if value.numel() == 1 else value

    def batch_loss(output: Tensor, target: Any) -> Tensor:
        if not len(output):
            return output.new_zeros(0)
        if not inside_transform() and (known := at_once(loss, output, target)) is not None:
            return known  # (under a transform nobody may ask what the targets are)
        tensors = [tensor for _, tensor in walk(target, "target")]
        dims = [0 if tensor.ndim else None for tensor in tensors]

        def sample(output: Tensor, *parts: Tensor) -> Tensor:
            ones = (part if dim is None else part.unsqueeze(0) for part, dim in zip(parts, dims, strict=True))
            return one(output.unsqueeze(0), rebuild(target, ones))

        try:
            return vmap(sample, in_dims=(0, *dims), randomness="different")(output, *tensors)
        except (RuntimeError, ValueError):  # a loss that vmap cannot run; if it is the loss's own error, the loop raises it again
            columns = [[tensor] * len(output) if dim is None else tensor.unbind() for tensor, dim in zip(tensors, dims, strict=True)]
            return torch.stack([sample(*parts) for parts in zip(output.unbind(), *columns, strict=True)])

    def single_loss(output: Tensor, target: Any) -> Tensor:
        return one(output.unsqueeze(0), rebuild(target, iter([tensor.unsqueeze(0) for _, tensor in walk(target, "target")])))

    return batch_loss if batched else single_loss


ENTRYWISE = (nn.BCELoss, nn.BCEWithLogitsLoss)
UNDIVIDED = (*ENTRYWISE, nn.MultiMarginLoss, nn.MultiLabelSoftMarginLoss)
"""Losses whose mean is over entries or samples, not over weights."""


def _same_for_all(loss: Any, output: Tensor) -> None:
    """InputError where an entry-by-entry loss has weights for each sample of the batch: beside one sample they would all be repeated."""
    for name in ("weight", "pos_weight"):
        weight = getattr(loss, name, None) if isinstance(loss, ENTRYWISE) else None
        if weight is not None and weight.ndim >= output.ndim and any(n != 1 for n in weight.shape[: weight.ndim - output.ndim + 1]):
            raise InputError(
                f"{type(loss).__name__} has a {name} for each sample of a batch, and the loss of one sample cannot tell its own",
                got=f"{name} of shape {tuple(weight.shape)} beside an output of shape {tuple(output.shape)} for one sample",
                expected=f"a {name} that all samples share, of shape {tuple(output.shape[1:])}",
                hint="a function as loss, with the weights as part of the target: target=(t, w)",
            )


def detached(returned: Any) -> Any:
    """The same containers around tensors without a graph; the fields of a dataclass likewise."""
    if is_dataclass(returned) and not isinstance(returned, type | Mapping):
        return replace(returned, **{field.name: detached(getattr(returned, field.name)) for field in fields(returned) if field.init})
    return rebuild(returned, iter([tensor.detach() for _, tensor in walk(returned, "")]))


def _only(returned: Any, function: str) -> Any:
    if isinstance(returned, Tensor):
        return returned
    inside = list(walk(_fields(returned), ""))
    if isinstance(returned, tuple | list | Mapping) or inside:
        if len(inside) == 1 and isinstance(returned, tuple | list):
            return inside[0][1]
        raise OutputError(
            f"{function} returned several outputs" if len(inside) != 1 else f"{function} returned a container",
            got=_described(returned),
            expected="one tensor",
            hint=f"output={_first_key(returned)!r}, or a callable that picks it",
        )
    return returned


def _tensor(value: Any, function: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    raise OutputError(
        f"{function} returned no tensor",
        got=type(value).__name__,
        expected="a floating-point tensor, samples first",
        hint="output= to pick it",
    )


def _fields(returned: Any) -> Any:
    if isinstance(returned, Tensor | tuple | list | Mapping) or not hasattr(returned, "__dict__"):
        return returned
    return dict(vars(returned))


def _described(returned: Any) -> str:
    if isinstance(returned, Mapping):
        return f"{type(returned).__name__} with keys {listed(returned)}"
    if isinstance(returned, tuple | list):
        return f"{type(returned).__name__} of {len(returned)}"
    return type(returned).__name__


def _first_key(returned: Any) -> Any:
    fields = _fields(returned)
    if isinstance(fields, Mapping):
        return next(iter(fields), "name")
    return 0
