"""`backward`: the notebook's way, accumulate into `.grad`, read, reset; on aliases, so that the user's `.grad` is never seen."""

from __future__ import annotations

from torch import nn

from .._graph import strided
from .._plan import Verdict
from .._probe import Facts
from .._problem import Problem
from ._base import Computed, Method, Rows, no_policy, own_part, reverse_cost, unspoilt
from ._complete import all_seen
from .grad import stays_apart


def verdict(problem: Problem, facts: Facts) -> Verdict:
    if problem.create_graph:
        return Verdict("backward", "create_graph=True with .backward() ties every gradient to its tensor in a reference cycle")
    if reason := no_policy(problem):
        return Verdict("backward", reason)
    if facts.reentrant and not isinstance(problem.function, nn.Module) and any(t.leaf is None for t in problem.targets):
        return Verdict(
            "backward", "reentrant checkpointing in a function reaches its parameters from outside (use_reentrant=False would do)"
        )
    return Verdict("backward", "a reverse pass of the whole batch for every row, into .grad", reverse_cost(problem, facts))


def run(problem: Problem, facts: Facts, chunk: int | None) -> Computed:
    tensors = problem.tensors(fresh=True)
    rows = Rows(problem, facts.outputs)
    out = problem(tensors)
    all_seen(problem, out, "backward")
    flat = out.reshape(problem.size, -1)
    inputs = None if facts.reentrant else list(tensors.values())
    for n in range(problem.size):
        for c in range(facts.outputs if flat.requires_grad else 0):
            flat[n, c].backward(retain_graph=True, inputs=inputs)
            for target in problem.targets:
                gradient = strided(tensors[target.name].grad)
                stays_apart(problem, target, gradient, n)
                rows.put(target, n, c, own_part(problem, target, gradient, n))
                tensors[target.name].grad = None
    return unspoilt(problem, Computed(out.detach(), rows.blocks()))


METHOD = Method("backward", "tensor.backward(), accumulate and reset", verdict, run, whole=True)
