"""What a capture recorded, as lines of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from .._plan import Use as Line
from .._typing import Tensor
from .layout import Layout
from .recorder import Trace, Use


def described(trace: Trace, wanted: Mapping[str, Tensor], layouts: list[Layout] | None = None, runner: str = "native") -> tuple[Line, ...]:
    """A line for each use; layouts are known only after the reverse passes."""
    names = {id(t): name for name, t in wanted.items()}
    places = ["measured when run"] * len(trace.uses) if layouts is None else [str(place) for place in layouts]
    return tuple(
        Line(
            parameter=names.get(id(use.part.parameter), "(computed)"),
            operation=use.operation,
            rule="expansion" if use.known_layout else type(use.part).__name__.removesuffix("Part").lower(),
            layout=place if runner == "native" else runner,
            bytes=held(use),
        )
        for use, place in zip(trace.uses, places, strict=True)
    )


def held(use: Use) -> int:
    """Bytes of the data that the use keeps and of one cotangent."""
    return sum(t.nbytes for t, _ in use.saved) + prod(use.shape) * use.part.parameter.element_size()
