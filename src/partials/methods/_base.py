"""What a method is: a name, a verdict on a problem, and a run that gives values and blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .._blocks import Block, Dense
from .._errors import MethodError, listed
from .._graph import reached
from .._plan import Cost, Use, Verdict
from .._probe import Facts
from .._problem import Problem
from .._targets import Target
from .._typing import Tensor


@dataclass
class Computed:
    """A method's answer: f's output (N, *out), and for each target the blocks that add up to its rows."""

    values: Tensor
    blocks: dict[str, tuple[Block, ...]]
    notes: list[str] = field(default_factory=list)
    aux: Any = None
    sources: tuple[tuple[str, Tensor, int], ...] = ()
    """Tensors that the blocks read again, with the version they had."""
    uses: tuple[Use, ...] | Callable[[], tuple[Use, ...]] = ()
    doubtful: bool = False
    """A capture of f on the batch found uses whose cotangents belong to no one sample, or to samples in some order: samples may mix."""
    course: Callable[[], tuple[int, int]] = lambda: (0, 0)
    """Numbers for what f did in this run: one for its operations, one for constants that may place samples too."""
    kept: bool = False
    """The run kept to the script of an earlier one."""


@dataclass(frozen=True)
class Method:
    """One complete way to the Jacobian."""

    name: str
    summary: str
    judge: Callable[[Problem, Facts], Verdict]
    run: Callable[[Problem, Facts, int | None], Computed]
    whole: bool = False
    """Its reverse pass can be a whole `.backward()`, which reentrant checkpointing needs."""

    def verdict(self, problem: Problem, facts: Facts) -> Verdict:
        """Whether the method can solve the problem, at what cost, or why not."""
        if facts.reentrant and not self.whole:
            return Verdict(self.name, "reentrant checkpointing runs a reverse pass within the reverse pass, only under .backward()")
        return self.judge(problem, facts)


class Rows:
    """Where the rows of every target are collected: (N, C, *shape) each, written in place unless they must carry a graph."""

    def __init__(self, problem: Problem, outputs: int) -> None:
        self.problem, self.outputs = problem, outputs
        self.filled: dict[str, Tensor] = {}
        self.parts: dict[tuple[str, int, int], Tensor] = {}
        if not problem.create_graph:
            for t in problem.targets:
                self.filled[t.name] = t.tensor.new_zeros(problem.size, outputs, *problem.shape_of(t))

    def put(self, target: Target, n: int, c: int, row: Tensor | None) -> None:
        """The row of sample n and output c; None is a row of zeros."""
        if row is None:
            return
        if self.filled:
            self.filled[target.name][n, c] = row.detach()
        else:
            self.parts[target.name, n, c] = row

    def blocks(self) -> dict[str, tuple[Block, ...]]:
        if self.filled:
            return {name: (Dense(values),) for name, values in self.filled.items()}
        size, problem = (self.problem.size, self.outputs), self.problem
        done: dict[str, tuple[Block, ...]] = {}
        for t in problem.targets:
            zero = t.tensor.new_zeros(problem.shape_of(t))
            rows = [self.parts.get((t.name, n, c), zero) for n in range(size[0]) for c in range(size[1])]
            done[t.name] = (Dense(torch.stack(rows).unflatten(0, size)),)
        return done


def unspoilt(problem: Problem, computed: Computed) -> Computed:
    """The answer of reverse passes through the whole batch, or MethodError where a row of a sample with finite values is not a number.

    A cotangent of zero times a derivative that is not finite is nan, so that one sample's infinity reaches the rows of all others.
    """
    if problem.size < 2:
        return computed
    finite = computed.values.detach().reshape(problem.size, -1).isfinite().all(1)
    spoilt = finite.new_zeros(problem.size)
    for group in computed.blocks.values():
        for block in group:
            spoilt |= block.dense().detach().reshape(problem.size, -1).isnan().any(1)
    if bool((spoilt & finite).any()):
        raise MethodError(
            "a reverse pass through the whole batch gives rows that are not numbers, to samples whose values are finite",
            got=f"nan in the rows of samples {listed((spoilt & finite).nonzero().flatten().tolist())}",
            expected="finite derivatives of every sample: zero times another's infinity is nan",
            hint="method='loop', which runs samples apart",
        )
    return computed


def own_part(problem: Problem, target: Target, gradient: Tensor | None, n: int) -> Tensor | None:
    """The part of a whole batch's gradient that belongs to sample n: all of it for a parameter, one slice for an input."""
    if gradient is None or target.kind == "parameter" or not problem.batched:
        return gradient
    return gradient.select(problem.dim_of(target), n)


def entries(problem: Problem) -> int:
    """P, inputs counted per sample."""
    return sum(int(torch.Size(problem.shape_of(t)).numel()) for t in problem.targets)


def result_bytes(problem: Problem, facts: Facts) -> int:
    return problem.size * facts.outputs * entries(problem) * torch.finfo(problem.dtype).bits // 8


def per_sample(facts: Facts) -> tuple[float, float]:
    """FLOPs and saved bytes of one forward of one sample."""
    return facts.flops / facts.samples, facts.saved_bytes / facts.samples


def reverse_cost(problem: Problem, facts: Facts) -> Cost:
    """One vector-Jacobian product of the whole batch for every row: what `grad`, `backward` and `jacobian` do."""
    rows = problem.size * facts.outputs
    flops, saved = per_sample(facts)
    return Cost(
        passes=1 + rows,
        launches=(1 + 2 * rows) * facts.operations,
        flops=int((1 + 2 * rows) * flops * problem.size),
        bytes=int(result_bytes(problem, facts) + problem.size * saved),
    )


def no_pieces(problem: Problem, facts: Facts) -> str:
    """Why a method that cuts the batch into samples cannot run, or ""."""
    if facts.single_error is not None:
        return f"f cannot be called with one sample ({type(facts.single_error).__name__}: {str(facts.single_error).splitlines()[0]})"
    if problem.randomness == "model":
        return 'randomness="model" needs the masks of the whole batch, and this method runs samples apart'
    return ""


def no_history(problem: Problem) -> str:
    """Why a method that uses the user's own parameters cannot run where an input was computed from them, or ""."""
    computed = [leaf for leaf in problem.leaves if problem.create_graph and leaf.tensor.grad_fn is not None]
    for leaf in computed:
        names = reached(leaf.tensor, {t.name: t.tensor for t in problem.targets if t.tensor is not leaf.tensor})
        if names:
            return f"input {leaf.name!r} was computed from {listed(sorted(names))}, and create_graph=True would differentiate that too"
    return ""


def no_policy(problem: Problem) -> str:
    """Why a method that runs the whole batch at once cannot follow the randomness policy, or ""."""
    if problem.randomness in ("same", "different"):
        return f'randomness="{problem.randomness}" is a policy for samples run apart, and this method runs the batch as it is'
    return ""
