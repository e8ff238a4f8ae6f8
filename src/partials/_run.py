"""From a problem to blocks: look, ask every method for a verdict, choose, run; with `auto`, go on to the next where one fails."""

from __future__ import annotations

from dataclasses import replace

import torch

from ._blocks import Dense
from ._columns import Columns
from ._errors import MethodError
from ._input_jacobian import InputJacobian
from ._jacobian import Jacobian
from ._plan import Plan, Verdict, choose, known
from ._probe import Facts, demand_policy, look
from ._problem import Problem
from ._rows import Origin
from .methods import METHODS, Computed


def plan(problem: Problem, method: str = "auto") -> tuple[Plan, Facts]:
    """The plan for a problem, and the facts that it rests on. Runs f on one sample."""
    known(method, list(METHODS))
    facts = look(problem)
    demand_policy(problem, facts)
    verdicts = tuple(m.verdict(problem, facts) for m in METHODS.values())
    chosen = choose(verdicts, method, problem.budget)
    return _plan(problem, facts, verdicts, chosen), facts


def compute(problem: Problem, method: str = "auto") -> tuple[Computed, Plan]:
    """Plan and run. With "auto", a method that fails while running is refused with its reason and the next one runs."""
    made, facts = plan(problem, method)
    while True:
        with problem.running(f"computing the Jacobian (method {made.method!r})"):
            try:
                if problem.size == 0:
                    return _empty(problem, facts), made
                return METHODS[made.method].run(problem, facts, made.chunk), made
            except MethodError as error:
                if method != "auto":
                    raise
                refused = Verdict(made.method, f"{error.what}: {error.got}" if error.got else error.what)
        verdicts = tuple(refused if v.method == refused.method else v for v in made.verdicts)
        made = _plan(problem, facts, verdicts, choose(verdicts, "auto", problem.budget))


def wrap(problem: Problem, computed: Computed, made: Plan, origin: Origin) -> Jacobian | InputJacobian:
    """The user's object: rows of parameters, of inputs, or of parameters with those of inputs beside them."""
    values = computed.values if problem.batched else computed.values.squeeze(0)
    made.notes += computed.notes

    def columns(kind: str) -> Columns:
        return Columns({t.name: problem.shape_of(t) for t in problem.targets if t.kind == kind}, dict(problem.aliases) if kind == "parameter" else {})

    inputs = None
    if problem.inputs:
        blocks = {t.name: computed.blocks[t.name] for t in problem.inputs}
        inputs = InputJacobian(values, blocks, columns("input"), made, problem.batched, problem.create_graph, computed.aux, origin)
        if not problem.parameters:
            return inputs
    blocks = {t.name: computed.blocks[t.name] for t in problem.parameters}
    leaves = {t.name: t.tensor for t in problem.parameters}
    return Jacobian(values, blocks, columns("parameter"), made, problem.batched, problem.create_graph, computed.aux, origin, inputs, leaves)


def _plan(problem: Problem, facts: Facts, verdicts: tuple[Verdict, ...], chosen: Verdict) -> Plan:
    notes = [] if facts.single_error is None else ["f refuses a batch of one; facts were taken from the whole batch"]
    return Plan(
        function=problem.name,
        method=chosen.method,
        verdicts=verdicts,
        samples=problem.size,
        outputs=facts.out_shape,
        parameters={t.name: problem.shape_of(t) for t in problem.targets},
        dtype=str(problem.dtype).removeprefix("torch."),
        chunk=chosen.chunk,
        notes=notes,
    )


def _empty(problem: Problem, facts: Facts) -> Computed:
    """No samples: f still says what an output looks like."""
    values = problem.values()
    values = values if problem.create_graph else values.detach()
    outputs = int(torch.Size(values.shape[1:]).numel())
    return Computed(values, {t.name: (Dense(t.tensor.new_zeros(0, outputs, *problem.shape_of(t))),) for t in problem.targets})


def without_graph(problem: Problem) -> Problem:
    """The same problem with results that carry no graph: what checks compare with."""
    return replace(problem, create_graph=False)
