"""Problems like a given one: fewer samples, fewer outputs, other tensors among the arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ._output import Picker
from ._problem import Problem
from ._signature import rebuild
from ._targets import Target
from ._typing import Tensor


def part(problem: Problem, samples: Tensor) -> Problem:
    """The same problem for the chosen samples (int64) only."""

    def cut(tensor: Tensor, dim: int) -> Tensor:
        return tensor.detach().index_select(dim, samples)

    return _cut(problem, len(samples), cut)


def span(problem: Problem, samples: slice) -> Problem:
    """The same problem for consecutive samples: views of the inputs, no copies."""

    def cut(tensor: Tensor, dim: int) -> Tensor:
        return tensor.detach().narrow(dim, samples.start, samples.stop - samples.start)

    return _cut(problem, samples.stop - samples.start, cut)


def outputs_of(problem: Problem, outputs: slice) -> Problem:
    """The same problem for some entries of each sample's flattened output: output shape (count,)."""
    whole = problem.picker

    def some(returned: Any) -> Tensor:
        out: Tensor = whole.select(returned)
        return out.reshape(problem.size, -1)[:, outputs] if problem.batched else out.reshape(-1)[outputs]

    return replace(problem, picker=Picker(some, whole.function))


def with_leaves(problem: Problem, tensors: list[Tensor]) -> Problem:
    """The problem with other tensors among its arguments, in the order of its leaves."""
    args, kwargs, wanted = rebuild((problem.args, problem.kwargs, problem.loss_target), iter(tensors))
    by_name = {leaf.name: tensor for leaf, tensor in zip(problem.leaves, tensors, strict=True)}
    return replace(
        problem,
        args=args,
        kwargs=kwargs,
        loss_target=wanted,
        leaves=tuple(replace(leaf, tensor=by_name[leaf.name]) for leaf in problem.leaves),
        targets=tuple(t if t.leaf is None else Target.of(t.name, by_name[t.leaf], t.kind, t.leaf) for t in problem.targets),
    )


def _cut(problem: Problem, size: int, cut: Callable[[Tensor, int], Tensor]) -> Problem:
    tensors = [
        leaf.tensor if leaf.dim is None else cut(leaf.tensor, leaf.dim).requires_grad_(leaf.tensor.requires_grad) for leaf in problem.leaves
    ]
    return with_leaves(replace(problem, size=size), tensors)
