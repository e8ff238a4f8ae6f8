"""What a capture recorded, as lines of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from math import prod
from typing import Any

import torch

from .. import _formulas
from .._formulas import Costs
from .._plan import Use as Line
from .._typing import Tensor
from ..rules import ConvPart, ExpandedPart, GatherPart, OuterPart, Part, SumPart, data_of
from .build import READ_AGAIN
from .layout import Layout
from .trace import Use


def described(
    uses: list[Use], wanted: Mapping[str, Tensor], size: int, layouts: Sequence[Layout | None] | None = None, runner: str = "native"
) -> tuple[Line, ...]:
    """A line for each use of `size` samples; layouts are known only after the reverse passes."""
    names = {id(t): name for name, t in wanted.items()}
    places = ["when run"] * len(uses) if layouts is None else ["leads nowhere" if place is None else str(place) for place in layouts]
    return tuple(
        Line(
            parameter=names.get(id(use.part.parameter), "(computed)"),
            operation=use.operation,
            rule="expansion"
            if use.layout is not None and isinstance(use.part, ExpandedPart)
            else type(use.part).__name__.removesuffix("Part").lower(),
            layout=place if runner == "native" else runner,
            formula=form,
            costs=costs,
            bytes=held(use),
            flops=2 * prod(use.shape) * (use.part.parameter.numel() // max(features(use.part), 1)),
        )
        for use, place in zip(uses, places, strict=True)
        for form, costs in [formula(use.part, prod(use.shape) // max(size, 1), size)]
    )


def formless(t: Tensor) -> Tensor:
    """What the tensor is like, without its values."""
    return torch.empty_like(t, device="meta", requires_grad=False)


def sizes_of(use: Use, parameter: Tensor) -> Use:
    """The use as `described` sees it, without its tensors: what they and its `parameter` are like."""
    saved = tuple([(formless(t), version) for t, version in use.saved]) if type(use.part) in READ_AGAIN else ()
    part: Any = copy(use.part)
    kind: Any = type(part)
    part.parameter = parameter
    for name in data_of(kind):
        setattr(part, name, None)
    if isinstance(part, SumPart):
        part.times = None  # (it may hold more)
    return replace(use, part=part, saved=saved)


def held(use: Use) -> int:
    """Bytes of the data that the use keeps and of one cotangent."""
    return sum(t.nbytes for t, _ in use.saved) + prod(use.shape) * use.part.parameter.element_size()


def features(part: Part) -> int:
    """Output features of the operation: entries of its output at one position."""
    shape = part.parameter.shape
    if isinstance(part, OuterPart):
        return shape[-2] if part.order == "oi" else shape[-1] if part.order == "io" else 1
    if isinstance(part, ConvPart):
        return shape[0]
    return shape[1:].numel() if isinstance(part, GatherPart) else part.parameter.numel()


def formula(part: Part, entries: int, size: int) -> tuple[str, Mapping[str, Costs]]:
    """How norms of the block are computed, from the output's entries for one sample, and the estimates: of one output's rows."""
    if isinstance(part, GatherPart):
        return "equal rows", {}
    if not isinstance(part, OuterPart | ConvPart):
        return "rows", {}
    o = features(part)
    i, positions = part.parameter.numel() // max(o, 1), entries // max(o, 1)
    if isinstance(part, ConvPart) and not part.transposed:
        weight = (part.groups, i, o // part.groups)
        norms, dense = _formulas.convolved((size, 1), positions, weight, part.parameter.shape[2])
        costs = {"norms": norms, "dense": dense}
    else:
        groups = part.parameter.shape[: part.groups].numel() if isinstance(part, OuterPart) else part.groups
        weight = (groups, i // groups, o) if isinstance(part, OuterPart) else (groups, i, o // groups)
        costs = {"norms": _formulas.inner((size, 1, 1), (positions, positions), weight, 1, same=True)}
    if positions > 1 and isinstance(part, OuterPart):
        costs["gram"] = _formulas.gram((size, 1, size, 1), (positions, positions), weight)
    if positions <= 1:
        return "|a|^2 |g|^2", {quantity: found for quantity, found in costs.items() if quantity != "norms"}
    return _formulas.choice("norms", costs["norms"]), costs
