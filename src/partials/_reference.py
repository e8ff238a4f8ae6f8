"""What methods are measured against: the loop over samples in float64, on all samples or on some of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from . import _algebra
from ._errors import PartialsError
from ._part import part, with_leaves
from ._probe import Facts, look
from ._problem import Problem
from ._run import compute
from ._signature import walk
from ._substitute import call_with, structural_copy
from ._targets import Target
from ._typing import Tensor
from .methods import METHODS
from .methods._base import entries

SECONDS, ROOM = 10.0, 256 * 2**20
"""How long a reference may take, and the bytes of its rows: beyond either, fewer samples are compared."""


@dataclass(frozen=True)
class Reference:
    """Rows in which the most trust is put, and the words that say where they come from."""

    words: str
    rows: Mapping[str, Tensor]
    """{name: (S, C, entries)}."""
    samples: Tensor | None = None
    """The S samples that they belong to; None for all."""

    def worst_error(self, rows: Mapping[str, Tensor]) -> float:
        """max over rows of |row - reference| / |reference|; equal infinities and NaN agree, and rows that are zero in both."""
        first = next(iter(self.rows.values()))
        wrong, scale = first.new_zeros(first.shape[:2]), first.new_zeros(first.shape[:2])
        for name, expected in self.rows.items():
            got = rows[name] if self.samples is None else rows[name].index_select(0, self.samples)
            got = got.reshape(expected.shape).to(expected.dtype)
            alike = (got == expected) | (got.isnan() & expected.isnan())
            wrong += torch.where(alike, 0, got - expected).square().sum(-1)
            scale += expected.nan_to_num(0, 0, 0).square().sum(-1)
        ratio = torch.where(wrong == 0, 0, wrong / scale).sqrt().nan_to_num(torch.inf, torch.inf)
        return float(ratio.max()) if ratio.numel() else 0.0


def dense_rows(problem: Problem, method: str) -> dict[str, Tensor]:
    """The rows of every target by one method: {name: (N, C, *shape)}."""
    computed, _ = compute(problem, method)
    return {name: _algebra.rows(group).detach() for name, group in computed.blocks.items()}


def reference(problem: Problem, facts: Facts) -> Reference | None:
    """The loop in float64; in f's own dtype where f does not run in float64; None where no rows can be trusted.

    A function that draws random numbers keeps its dtype, since another dtype would draw other numbers.
    """
    if facts.random and problem.randomness == "different":
        return None
    oracle = oracle_for(problem, facts)
    own, name = str(problem.dtype).removeprefix("torch."), "the loop" if oracle == "loop" else f"method {oracle!r}"
    if facts.random:
        return _own(problem, facts, oracle, f"{name} in {own} from the same random state")
    if problem.dtype is torch.float64:
        return _own(problem, facts, oracle, f"{name} in float64")
    try:
        double = doubled(problem)
        facts = look(double)
        if facts.dtype is torch.float64:
            found = _rows(double, facts, oracle, f"{name} in float64")
            return replace(found, words=f"{found.words}; in {own} it is {_rounding(problem, found, oracle):.1e} away")
        reason = f"its output stays {str(facts.dtype).removeprefix('torch.')}"
    except Exception as error:  # whatever the user's code has against float64, its own dtype is left
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return _own(problem, facts, oracle, f"{name} in {own}, since {problem.name} does not run in float64 ({reason}),")


def oracle_for(problem: Problem, facts: Facts) -> str:
    """The plainest method that can run: batches of one, else reverse passes of the whole batch."""
    return next((name for name in ("loop", "grad") if METHODS[name].verdict(problem, facts).accepted), "backward")


def _own(problem: Problem, facts: Facts, oracle: str, words: str) -> Reference | None:
    try:
        return _rows(problem, facts, oracle, words)
    except PartialsError:
        return None


def _rows(problem: Problem, facts: Facts, oracle: str, words: str) -> Reference:
    problem = replace(problem, budget=None, create_graph=False)
    samples = None if facts.random or oracle != "loop" else _affordable(problem, facts)
    rows = dense_rows(problem if samples is None else part(problem, samples), oracle)
    flat = {name: found.reshape(*found.shape[:2], found.shape[2:].numel()) for name, found in rows.items()}
    count = f"all {problem.size} samples" if samples is None else f"{len(samples)} of {problem.size} samples"
    return Reference(f"{words} on {count}" if problem.batched else words, flat, samples)


def _rounding(problem: Problem, found: Reference, oracle: str) -> float:
    """How far f's own dtype is from float64 by the same method: what no method can be blamed for."""
    problem = replace(problem, budget=None, create_graph=False)
    rows = dense_rows(problem if found.samples is None else part(problem, found.samples), oracle)
    return replace(found, samples=None).worst_error(rows)


def _affordable(problem: Problem, facts: Facts) -> Tensor | None:
    """Evenly spread samples, as many as `SECONDS` and `ROOM` allow; None for all of them."""
    if not problem.batched or problem.size < 2:
        return None
    device = problem.targets[0].tensor.device
    few = part(problem, torch.arange(min(problem.size, 4), device=device))
    dense_rows(few, "loop")
    start = time.perf_counter()
    dense_rows(few, "loop")
    each = (time.perf_counter() - start) / few.size
    count = int(max(1, min(problem.size, SECONDS // each, ROOM // (8 * facts.outputs * max(entries(problem), 1)))))
    if count == problem.size:
        return None
    return torch.linspace(0, problem.size - 1, count, device=device).round().long()


def doubled(problem: Problem, dtype: torch.dtype = torch.float64) -> Problem:
    """The same problem in float64 (or `dtype`): inputs cast, and in the place of a module a copy of its structure with such tensors."""
    casts: dict[int, tuple[Tensor, Tensor]] = {}

    def cast(tensor: Tensor) -> Tensor:
        wide = dtype.to_complex() if tensor.is_complex() else dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.dtype is wide:
            return tensor
        if id(tensor) not in casts:
            casts[id(tensor)] = (tensor, tensor.detach().to(wide).requires_grad_(tensor.requires_grad))
        return casts[id(tensor)][1]

    targets = tuple(Target.of(t.name, cast(t.own), t.kind, t.leaf) for t in problem.targets)
    leaves = [cast(leaf.tensor) for leaf in problem.leaves]
    outside = [t.own for t in problem.targets if t.leaf is None]
    owned = (
        [tensor for owner in problem.module.modules() for _, tensor in walk(_plain(vars(owner)), "")] if problem.module is not None else []
    )
    pairs = [(tensor, cast(tensor)) for tensor in (*outside, *owned) if cast(tensor) is not tensor]
    f, module = problem.function, problem.module
    if isinstance(f, nn.Module):
        module = f = structural_copy(f, pairs, attached=True)
    elif pairs:

        def f(*args: Any, **kwargs: Any) -> Any:
            return call_with(problem.function, pairs, args, kwargs, attached=True)

    return with_leaves(replace(problem, function=f, module=module, targets=targets), leaves)


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if isinstance(value, Tensor | tuple | list | dict)}
