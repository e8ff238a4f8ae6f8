"""A few random samples, each by itself in a batch of one: values and rows must be those of the batch."""

from __future__ import annotations

from dataclasses import replace

import torch

from .._reference import part
from .._typing import Tensor
from .call import Call, call, in_short
from .gaps import Gap, Sides
from .identities import Identities
from .second_look import settle
from .values import ROUNDED, same_alone

COUNT = 2
"""Samples that are compared."""


def alone(sides: Sides, own: Tensor, u: Tensor, odd: list[int]) -> None:
    """Compare `COUNT` samples, and one of the `odd` ones (whose rows are not finite) if there are any. `own`, `u`: (N, C).

    Raises
    ------
    MixingError
        where f gives another value for a sample alone than in the batch.
    """
    subject = sides.subject
    problem = subject.problem
    if not problem.batched or problem.size < 2:
        return
    if problem.random_state is not None:
        subject.report.note('randomness="model": a batch of one would draw other numbers, so samples were not compared with it')
        return
    sides = replace(sides, v={})
    error, rounded, worst = 0.0, False, dict[str, Gap]()
    for n in [*subject.draws.choice(range(problem.size), COUNT), *odd[:1]]:
        found = _apart(sides, n)
        if found is None:
            return
        single, kept = found
        found_error, above = same_alone(subject, n, single.values[0], own)
        error, rounded = max(error, found_error), rounded or above
        identities = Identities(sides, single, u[kept] * (torch.arange(len(kept), device=u.device) == 0)[:, None], kept)
        gaps = identities.gaps()
        failing = {key: gap for key, gap in gaps.items() if gap.over(subject.tolerance) > 1}
        for (check, name), gap in gaps.items():
            if (check, name) not in failing and gap.error >= worst.get(name, gap).error:
                worst[name] = gap
        if failing:
            settle(identities, failing, "alone")
    subject.row("alone", "values", error, passed=True, remark=ROUNDED if rounded else "")
    for name, gap in worst.items():
        subject.row("alone", name, gap.error, tolerance=subject.tolerance.summing(gap.terms))


def _apart(sides: Sides, n: int) -> tuple[Call, list[int]] | None:
    """f on sample n alone, or where it refuses a batch of one, on n and one other; which samples those are."""
    problem, report = sides.subject.problem, sides.subject.report
    device = problem.targets[0].tensor.device
    others = [m for m in range(problem.size) if m != n]
    for kept in ([n], [n, *sides.subject.draws.choice(others, 1)]):
        if len(kept) < problem.size:
            try:
                return call(part(problem, torch.tensor(kept, device=device))), kept
            except Exception as error:  # f's refusal of so small a batch is no fault
                report.note(f"f refuses a batch of {len(kept)} ({in_short(error)})")
    return None
