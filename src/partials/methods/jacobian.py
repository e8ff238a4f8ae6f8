"""`jacobian`: `torch.autograd.functional.jacobian` of the whole batch."""

from __future__ import annotations

import torch

from .._blocks import Block, Dense
from .._errors import MethodError
from .._plan import Verdict
from .._probe import Facts
from .._problem import Problem
from .._targets import Target
from .._typing import Tensor
from ._base import Computed, Method, no_policy, reverse_cost, unspoilt
from ._complete import all_seen
from .grad import stays_apart


def verdict(problem: Problem, facts: Facts) -> Verdict:
    if reason := no_policy(problem):
        return Verdict("jacobian", reason)
    if facts.outputs == 0:
        return Verdict("jacobian", "torch.autograd.functional.jacobian does not take an output without entries")
    return Verdict("jacobian", "torch.autograd.functional, a reverse pass of the whole batch for every row", reverse_cost(problem, facts))


def run(problem: Problem, facts: Facts, chunk: int | None) -> Computed:
    names = [t.name for t in problem.targets]
    tensors = problem.tensors() if problem.create_graph else problem.tensors(fresh=True)
    kept: list[Tensor] = []

    def function(*given: Tensor) -> Tensor:
        out = problem(dict(zip(names, given, strict=True)))
        all_seen(problem, out, "jacobian") if not problem.create_graph else None
        kept.append(out if problem.create_graph else out.detach())
        return out

    try:
        found = torch.autograd.functional.jacobian(function, tuple(tensors.values()), create_graph=problem.create_graph)
    except NotImplementedError as error:  # rows that cannot be put together: sparse gradients
        raise MethodError(
            f"method='jacobian' cannot run {problem.name}",
            got=str(error).splitlines()[0],
            expected="dense gradients",
            hint="method='loop'",
        ) from error
    blocks: dict[str, tuple[Block, ...]] = {
        target.name: (Dense(_rows(problem, target, jac, facts.outputs)),) for target, jac in zip(problem.targets, found, strict=True)
    }
    return unspoilt(problem, Computed(kept[0], blocks))


def _rows(problem: Problem, target: Target, jac: Tensor, outputs: int) -> Tensor:
    """(N, *out, *whole tensor) -> (N, C, *shape), an input's diagonal over samples."""
    jac = (jac.to_dense() if jac.is_sparse else jac).reshape(problem.size, outputs, *target.tensor.shape)
    if target.kind == "parameter" or not problem.batched:
        return jac
    dim = problem.dim_of(target)
    for n in range(problem.size):
        for c in range(outputs):
            stays_apart(problem, target, jac[n, c], n)
    return torch.stack([jac[n].select(dim + 1, n) for n in range(problem.size)])


METHOD = Method("jacobian", "torch.autograd.functional.jacobian", verdict, run)
