"""`grad`: one forward of the batch, then one vector-Jacobian product for every entry of the output."""

from __future__ import annotations

from .._output import check_output
from .._plan import Verdict
from .._probe import Facts
from .._problem import Problem
from .._targets import Target
from .._typing import Tensor
from ._base import Computed, Method, Rows, no_history, no_policy, own_part, reverse_cost, unspoilt
from ._complete import all_seen
from .loop import gradients


def verdict(problem: Problem, facts: Facts) -> Verdict:
    if reason := no_policy(problem) or no_history(problem):
        return Verdict("grad", reason)
    return Verdict("grad", "a reverse pass of the whole batch for every row", reverse_cost(problem, facts))


def run(problem: Problem, facts: Facts, chunk: int | None) -> Computed:
    tensors = problem.tensors()
    rows = Rows(problem, facts.outputs)
    out = check_output(problem(tensors), problem.size, problem.name, batched=problem.batched)
    all_seen(problem, out, "grad", tensors)
    flat = out.reshape(problem.size, -1)
    for n in range(problem.size):
        for c in range(facts.outputs):
            for target, gradient in zip(problem.targets, gradients(flat[n, c], tensors, create_graph=problem.create_graph), strict=True):
                stays_apart(problem, target, gradient, n)
                rows.put(target, n, c, own_part(problem, target, gradient, n))
    return unspoilt(problem, Computed(out if problem.create_graph else out.detach(), rows.blocks()))


def stays_apart(problem: Problem, target: Target, gradient: Tensor | None, n: int) -> None:
    """A sample's output has no derivative in another sample's input, or MixingError."""
    if gradient is None or target.kind == "parameter" or not problem.batched:
        return
    dim = problem.dim_of(target)
    others = gradient.detach().clone()
    others.select(dim, n).zero_()
    if bool((others != 0).any()):
        from .._mixing import mixing  # (that runs f by way of methods, and only once mixing has been found)

        raise mixing(
            problem,
            n,
            f"the output of sample {n} depends on input {target.name!r} of other samples",
            f"a derivative of up to {others.abs().max():.3g} across samples",
        )


METHOD = Method("grad", "torch.autograd.grad, one vector-Jacobian product per output entry", verdict, run)
