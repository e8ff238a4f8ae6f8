"""What a run of f leaves: its uses of wanted parameters, the edges where their cotangents arrive, and why a run is refused."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import resolve_name

from .._errors import listed
from .._typing import Tensor
from ..rules import Part
from .layout import Layout

NO_GRAPH = "f's output carries no graph (it is detached, computed under no_grad, or uses no parameter): all rows are zero"


@dataclass(slots=True, eq=False)
class Use:
    """One recorded use: the edge whose cotangent is wanted, and the part that turns it into a block."""

    func: Any
    part: Part
    slot: int
    """Which of the trace's edges."""
    shape: tuple[int, ...]
    """Of the edge's tensor as the block will see it, with mapped dimensions in front."""
    order: tuple[int, ...] | None = None
    """Under vmap: the permutation that brings the mapped dimensions of the edge's tensor to the front."""
    merged: bool = False
    """Under vmap: the batch dimension that the operation saw is merged with the mapped one."""
    layout: Layout | None = None
    """Where the samples are, if that is known: under our own vmap."""
    saved: tuple[tuple[Tensor, int], ...] = ()
    """Tensors that the block will read, with their versions when they were recorded."""

    @property
    def operation(self) -> str:
        return label(self.func)


@dataclass(slots=True)
class Trace:
    """What one run of f recorded."""

    uses: list[Use] = field(default_factory=list)
    edges: list[GradientEdge] = field(default_factory=list)
    folded: dict[int, torch.Size] = field(default_factory=dict)
    """Slot -> the shape in which a cotangent is seen, where it comes to a tensor that f sees with more dimensions."""
    stops: dict[Any, list[Any]] = field(default_factory=dict)
    """Graph node of a recorded edge -> nodes of its data inputs, from which the completeness walk goes on."""
    course: list[Hashable] = field(default_factory=list)
    nested: bool = False
    """f called torch.autograd.grad itself."""
    routed: bool = False
    """Where samples go depends on data: layouts hold for this call only."""
    one_by_one: bool = False
    """A derivative that torch computes wrongly for several outputs at once is in the graph."""
    refused: str = ""
    expanded: list[str] = field(default_factory=list)
    draft: Any = None
    """The script of the run (`script.Draft`), where it was written down."""
    dtypes: set[torch.dtype] = field(default_factory=set)
    """Of the tensors that depend on the samples: the coarsest sets how well two reverse passes can agree."""


class Refused(Exception):
    """This run cannot be captured; the text says why. `nested`: since f differentiates inside."""

    def __init__(self, why: str, *, nested: bool = False) -> None:
        super().__init__(why)
        self.nested = nested


class Unplaced(Refused):
    """The cotangents of a use belong to no one sample, in no layout that its sizes allow."""


def without_rule(expanded: Iterable[str]) -> list[str]:
    """What the plan says of operations whose parameters were expanded."""
    found = sorted(set(expanded))
    return [f"no rule, expanded: {listed(found)}"] if found else []


def edge_of(t: Tensor) -> GradientEdge:
    """The gradient edge of an operation's output; one of a Python function needs the care that torch's own call takes."""
    node = t.grad_fn
    if node is None or isinstance(node, torch.autograd.function.BackwardCFunction):
        return get_gradient_edge(t)
    return GradientEdge(node, t.output_nr)


@functools.cache
def label(func: Any) -> str:
    """A function's name as a user would write it."""
    name = resolve_name(func) or getattr(func, "__name__", str(func))
    return str(name).replace("torch.nn.functional.", "F.").removeprefix("torch.").replace("Tensor.__get__", "attribute")
