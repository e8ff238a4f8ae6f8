"""Gradients by an ordinary backward in another precision, where f runs in it.

NOTE on other precisions. A sum of many terms of one sign, added up one after the other, rounds by about eps times their number: an
ordinary backward does so over the positions of a sample, and moving numbers in their last bits does not show it. What is right in
float32 is known from float64. In float64 it is known from float32 how many eps such a sum is off, and it may be off by as many there:
a fault is no smaller in units of what is compared because the precision is higher.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from .._part import part
from .._problem import Problem
from .._reference import doubled
from .._typing import Tensor
from .call import call
from .gaps import ratio
from .tolerance import distance, name_of

TIMES, EXACT = 8, 1e-11
"""How many times as many eps an error may be as in another precision; what is exact in float64, and the most that is allowed there."""


def in_precision(problem: Problem, u: Tensor, dtype: torch.dtype, names: Collection[str] | None = None) -> dict[str, Tensor] | None:
    """d sum u f / d target by name (of all targets) in `dtype`, an input's with samples first; None for an f that does not run in it.

    Random numbers would be others in another dtype: an f that draws them does not run in it.
    """
    found = call_in(problem, dtype, names)
    return None if found is None else found(u)


def call_in(
    problem: Problem, dtype: torch.dtype, names: Collection[str] | None = None
) -> Callable[[Tensor], dict[str, Tensor] | None] | None:
    """`in_precision` of one u after another, by one call of f."""
    if problem.random_state is not None:
        return None
    try:
        found = call(doubled(problem, dtype))
    except Exception:  # whatever the user's code has against this precision, or against a batch of one
        return None
    if found.out.dtype is not dtype:
        return None

    def gradients(u: Tensor) -> dict[str, Tensor] | None:
        try:
            return found.gradients(u.to(dtype), names)
        except Exception:  # the same of its backward
            return None

    return gradients


def told_by_precision(
    problem: Problem, n: int, u: Tensor, both: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, Tensor], tolerance: float
) -> dict[str, str]:
    """Why the Jacobian's row and an ordinary backward's, which differ, are both right: words by name, for those where it is known."""
    double = problem.dtype is torch.float64
    single = part(problem, torch.tensor([n], device=u.device)) if problem.batched else problem
    found = in_precision(single, u[None], torch.float32 if double else torch.float64, both.keys()) if both else None
    words: dict[str, str] = {}
    for name, (row, plain) in both.items():
        if found is None:
            return {}
        error = ratio(distance(row, found[name].reshape(-1)), scales[name])
        if not double and error <= tolerance:
            words[name] = f"an ordinary backward in {name_of(problem.dtype)} is as far from one in float64, to which this row keeps"
        elif double:
            allowed = min(EXACT, TIMES * error / torch.finfo(torch.float32).eps * torch.finfo(torch.float64).eps)
            if ratio(distance(row, plain), scales[name]) <= allowed:
                words[name] = "an ordinary backward in float32 is as many of its eps from this row"
    return words
