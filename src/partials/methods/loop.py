"""`loop`: every sample by itself, every output by itself, `torch.autograd.grad`. The oracle of everything else."""

from __future__ import annotations

import torch

from .._graph import strided
from .._output import check_output
from .._plan import Cost, Verdict
from .._probe import Facts
from .._problem import Problem
from .._typing import Tensor
from ._base import Computed, Method, Rows, no_history, no_pieces, per_sample, result_bytes
from ._complete import all_seen


def verdict(problem: Problem, facts: Facts) -> Verdict:
    if reason := no_pieces(problem, facts) or no_history(problem):
        return Verdict("loop", reason)
    passes = problem.size * (1 + facts.outputs)
    flops, saved = per_sample(facts)
    cost = Cost(
        passes=passes,
        launches=problem.size * (1 + 2 * facts.outputs) * facts.operations,
        flops=int(problem.size * (1 + 2 * facts.outputs) * flops),
        bytes=int(result_bytes(problem, facts) + saved),
    )
    return Verdict("loop", "one sample at a time: the reference", cost)


def run(problem: Problem, facts: Facts, chunk: int | None) -> Computed:
    rows, values = Rows(problem, facts.outputs), []
    tensors = problem.tensors()
    state = torch.get_rng_state()
    for n in range(problem.size):
        if problem.randomness == "same":
            torch.set_rng_state(state)
        leaves, cut = problem.sample(n, tensors)
        out = check_output(problem(cut, leaves), 1, problem.name, batched=problem.batched)
        all_seen(problem, out, "loop", tensors)
        values.append(out if problem.create_graph else out.detach())
        for c, output in enumerate(out.reshape(-1)):
            for target, row in zip(problem.targets, gradients(output, cut, create_graph=problem.create_graph), strict=True):
                if row is not None and target.kind == "input" and problem.batched:
                    row = row.select(problem.dim_of(target), 0)
                rows.put(target, n, c, row)
    return Computed(torch.cat(values) if problem.batched else values[0], rows.blocks())


def gradients(output: Tensor, tensors: dict[str, Tensor], *, create_graph: bool) -> list[Tensor | None]:
    """d output / d tensors, None where output does not depend on one."""
    if not output.requires_grad:
        return [None] * len(tensors)
    found = torch.autograd.grad(output, list(tensors.values()), retain_graph=True, create_graph=create_graph, allow_unused=True)
    return [strided(gradient) for gradient in found]


METHOD = Method("loop", "a batch of one at a time, one reverse pass for each output", verdict, run)
