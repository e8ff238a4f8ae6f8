"""The points that the coordinates of a call span.

Every entry of a coordinate tensor is its own sample. Coordinates broadcast against each other and are expanded, so that each point has
its own. A packed input, and a vector block, hold one feature vector for each point in their last dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._errors import InputError, OutputError
from .._typing import Shape, Tensor
from .coordinates import Coordinates
from .rehearsal import rehearse


@dataclass(frozen=True, eq=False)
class Points:
    """Coordinate tensors expanded against each other; `shape` is that of the points without trailing ones."""

    shape: Shape
    tensors: Mapping[str, Tensor]
    expanded: bool

    @classmethod
    def of(cls, coordinates: Coordinates, asked: Sequence[str]) -> Points:
        """The points that the asked inputs span, with every other coordinate that broadcasts to them."""
        tensors = coordinates.call.tensors
        required = tuple(dict.fromkeys((*asked, *(name for name, _ in coordinates.slots)))) if coordinates.named else tuple(asked)
        for name in required:
            _require_real(name, tensors[name])
        spans = _spans(coordinates, {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() or name in required})
        shape = _broadcast({name: spans[name] for name in required})
        others = () if coordinates.named else tuple(name for name in spans if name not in required)
        wide = _widened(shape, [spans[name] for name in others])
        if wide != shape and _spanned_by_value(coordinates, wide):
            shape = wide
        return cls._expand(coordinates, shape, {name: spans[name] for name in (*required, *others) if _reaches(spans[name], shape)})

    @classmethod
    def _expand(cls, coordinates: Coordinates, shape: Shape, spans: Mapping[str, Shape]) -> Points:
        given = {name: coordinates.call.tensors[name] for name in spans}
        device = next((tensor.device for tensor in given.values() if tensor.dim()), None)
        expanded = {}
        for name, tensor in given.items():
            target = (*shape, *tensor.shape[len(spans[name]) :])
            placed = tensor.to(device) if device is not None and not tensor.dim() else tensor
            expanded[name] = placed if tuple(tensor.shape) == target else placed.expand(target).contiguous()
        return cls(_stripped(shape), expanded, any(expanded[name].shape != given[name].shape for name in given))

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()


def checked_value(value: Any, points: Shape) -> Tensor:
    """What the function returned, if it is a tensor with one entry, or one block of entries, for each point."""
    if not isinstance(value, Tensor):
        raise OutputError("the function returned no tensor", got=type(value).__name__, expected="one real or complex tensor")
    if not (value.is_floating_point() or value.is_complex()):
        raise OutputError(
            "the function returned a tensor that has no derivatives", got=str(value.dtype), expected="a floating-point or complex dtype"
        )
    if tuple(value.shape[: len(points)]) != points:
        raise OutputError(
            "the output does not keep the shape of the points in front",
            got=f"output {tuple(value.shape)}",
            expected=f"{points} and then the shape of one point's output",
            hint="a function that returns one value for each point, without reductions over points",
        )
    if value.numel() == 0 and torch.Size(points).numel():
        raise OutputError(
            "the output has no entries for a point", got=f"output {tuple(value.shape)}", expected="at least one entry for each point"
        )
    return value


def _require_real(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise InputError(
            f"the coordinate {name!r} is not real",
            got=str(tensor.dtype),
            expected="a floating-point dtype",
            hint=f"{name}.to(torch.get_default_dtype())",
        )


def _spans(coordinates: Coordinates, tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The part of each shape that runs over points: without the features of a block, or the column (N, 1) of a scalar beside blocks."""
    spans = {name: tuple(tensor.shape[:-1] if name in coordinates.blocks else tensor.shape) for name, tensor in tensors.items()}
    deepest = max((len(spans[name]) for name in coordinates.blocks if name in spans), default=None)
    for name, span in spans.items():
        if deepest is not None and name not in coordinates.blocks and len(span) == deepest + 1 and span[-1] == 1:
            spans[name] = span[:-1]
    return spans


def _broadcast(spans: Mapping[str, Shape]) -> Shape:
    if len(set(spans.values())) == 1:
        return next(iter(spans.values()))
    try:
        return tuple(torch.broadcast_shapes(*spans.values()))
    except RuntimeError:
        raise InputError(
            "the coordinates do not broadcast against each other",
            got=", ".join(f"{name} {span}" for name, span in spans.items()),
            expected="equal sizes or 1 in every dimension, counted from the last",
            hint='vectors=("r",) for an input whose last dimension is a vector, or coords= to name only the coordinates',
        ) from None


def _widened(shape: Shape, others: Iterable[Shape]) -> Shape:
    """The points with the shape of inputs that are not asked for, so that one t serves many x."""
    for other in others:
        try:
            shape = tuple(torch.broadcast_shapes(shape, other))
        except RuntimeError:
            continue
    return shape


def _spanned_by_value(coordinates: Coordinates, shape: Shape) -> bool:
    """Whether the output for the inputs as given runs over these points; a call that needs expanded coordinates fails, and has no say."""
    try:
        value = rehearse(coordinates.call, {})
    except Exception:
        return True
    points = _stripped(shape)
    return not isinstance(value, Tensor) or tuple(value.shape[: len(points)]) == points


def _reaches(span: Shape, shape: Shape) -> bool:
    """Whether a tensor over `span` can be expanded to `shape`."""
    padded = (1,) * (len(shape) - len(span)) + span
    return len(padded) == len(shape) and all(size in (1, whole) for size, whole in zip(padded, shape, strict=True))


def _stripped(shape: Shape) -> Shape:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
