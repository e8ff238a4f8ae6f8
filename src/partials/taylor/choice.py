"""Taylor mode or nested reverse mode: a choice by counting, the same at every call, so that results do not depend on a clock.

The unit is one plain forward of the function. Nested reverse mode: a pass over a graph costs what the graph cost to make, and becomes part
of the graph that the next order passes over. Taylor mode: so much for each slot and for each pair of the product table. The weights are
fitted to measured times (benchmarks/inputs.py); what follows from them is nearly always the faster one, and where the two are close it
hardly matters which is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .frame import Frame
from .nested import passes
from .specs import VALUE, Term

MARGIN = 0.95
"""Taylor mode is chosen where its estimate is below this part of the other's: in doubt, the method that everyone knows."""


@dataclass(frozen=True)
class InputPlan:
    """How derivatives by inputs were computed, and why."""

    method: str
    reason: str
    slots: int
    """Coefficients that Taylor mode carries."""
    passes: int
    """Reverse passes of nested reverse mode."""
    taylor: float
    """Estimated cost in forwards."""
    nested: float

    def __str__(self) -> str:
        return (
            f"{self.method}: {self.reason}\n"
            f"  taylor   {self.slots} coefficients, about {self.taylor:.3g} forwards\n"
            f"  nested   {self.passes} reverse passes, about {self.nested:.3g} forwards"
        )


def planned(wanted: Iterable[Term], width: int, training: bool, refusal: str = "", order: str = "auto") -> InputPlan:
    """The method for these derivatives of a function with `width` outputs for each point."""
    terms = frozenset(wanted) - {VALUE}
    frame = Frame.of(terms)
    counts = [len(level) * max(width, 1) for level in passes(terms)]
    jets, reverse = taylor_cost(frame, training), nested_cost(counts, training)
    if refusal:
        method, reason = "nested", refusal
    elif order != "auto":
        method, reason = order, "asked for"
    else:
        method = "taylor" if jets < MARGIN * reverse else "nested"
        reason = f"the cheaper one by count{', with a backward pass after it' if training else ''}"
    return InputPlan(method, reason, len(frame.slots), sum(counts), jets, reverse)


def nested_cost(counts: list[int], training: bool) -> float:
    graph = 1.0
    for passes_of_level in counts:
        graph *= 1 + passes_of_level
    return 3.6 * graph if training else graph


def taylor_cost(frame: Frame, training: bool) -> float:
    pairs = sum(len(row) for _, row in frame.table)
    slots = len(frame.slots)
    return 2.5 + 2.9 * slots + 0.15 * pairs if training else 0.4 + 1.05 * slots + 0.12 * pairs


PLANS: ContextVar[list[InputPlan] | None] = ContextVar("PLANS", default=None)
"""Where `explain` collects what was chosen."""


def explained(at: Callable[..., Any]) -> Callable[..., InputPlan]:
    """A function of the inputs that says how `at` computes its derivatives there: it runs it once."""

    def explain(*inputs: Any, **kwargs: Any) -> InputPlan:
        plans: list[InputPlan] = []
        token = PLANS.set(plans)
        try:
            at(*inputs, **kwargs)
        finally:
            PLANS.reset(token)
        return plans[-1]

    return explain
