"""A few random samples, each by itself in a batch of one: values and rows must be those of the batch."""

from __future__ import annotations

from dataclasses import replace

import torch

from .._blocks import Block
from .._part import part
from .._typing import Tensor
from .agreement import flat_rows
from .call import Call, call, gradients_of, in_short
from .gaps import Gap, Key, Sides, pushed, ratio
from .identities import Identities
from .second_look import settle
from .subject import Subject, squares_of
from .tables import looked_up, others_zero
from .tolerance import apart, distance, dot, over, size
from .values import ROUNDED, same_alone, scale_of

COUNT, ODD, OUTPUTS, EACH = 2, 4, 16, 8
"""Samples that are compared; samples whose rows are not finite; outputs, where these are compared one by one; the largest batch of which
every sample's values are compared."""


def alone(sides: Sides, own: Tensor, u: Tensor, odd: list[int]) -> bool:
    """Compare `COUNT` samples, and `ODD` of the `odd` ones, whose rows are not finite. `own`, `u`: (N, C).

    Whether there was something to compare; then the products of all parameters were compared with it, too, where they were not before.

    Raises
    ------
    MixingError
        where f gives another value for a sample alone than in the batch.
    """
    subject = sides.subject
    problem = subject.problem
    if not problem.batched or problem.size < 2:
        return False
    if problem.random_state is not None:
        subject.report.note('randomness="model": a batch of one would draw other numbers, so samples were not compared with it')
        return False
    sides = replace(sides, pushed=[t.name for t in subject.targets if t.kind == "parameter" and t.name not in sides.pushed])
    error, rounded = 0.0, False
    runs: list[tuple[int, Identities]] = []
    for n in dict.fromkeys([*subject.draws.choice(range(problem.size), COUNT), *odd[:ODD]]):
        found = _apart(sides, n)
        if found is None:
            return False
        single, kept = found
        found_error, above = same_alone(subject, n, single.values[0], own)
        error, rounded = max(error, found_error), rounded or above
        runs.append((n, Identities(sides, single, u[kept] * (torch.arange(len(kept), device=u.device) == 0)[:, None], kept)))
    worst = _compared(sides, runs, odd)
    error = max(error, _halves(subject, own))
    subject.row("alone", "values", error, passed=True, remark=ROUNDED if rounded else "")
    for (check, name), gap in worst.items():
        subject.row(check, name, gap.error, tolerance=subject.tolerance.summing(gap.terms))
    return any(n not in odd for n, _ in runs)


def _compared(sides: Sides, runs: list[tuple[int, Identities]], odd: list[int]) -> dict[Key, Gap]:
    """The worst gaps of the rows and products of single samples, of those that keep to the tolerance; rows for the others."""
    subject, worst = sides.subject, dict[Key, Gap]()
    usual = [identities for n, identities in runs if n not in odd]
    told = _told(sides, usual) if usual else {}
    for name, gap in told.items():
        worst["alone", name] = gap
        if name in sides.pushed:
            worst["product", name] = gap
    names = [t.name for t in subject.targets if t.name not in told]
    for n, identities in runs:
        gaps = by_rows(identities, 0) if n in odd else identities.gaps(names) if names else {}
        failing = {key: gap for key, gap in gaps.items() if gap.over(subject.tolerance) > 1}
        for (check, name), gap in gaps.items():
            row = "alone" if check == "backward" else check, name
            if (check, name) not in failing and gap.error >= worst.get(row, gap).error:
                worst[row] = gap
        if failing:
            settle(identities, failing, "alone")
    return worst


def _told(sides: Sides, runs: list[Identities]) -> dict[str, Gap]:
    """One number for each target: u.(J v) of single samples against <v, ordinary backward>. Those that are too large are left out.

    A random v meets an error wherever it is in the rows, and misses one of e times their size with a probability of about the tolerance
    over e. An input's rows are compared entry by entry.
    """
    subject = sides.subject
    own = gradients_of([run.call for run in runs], [run.u for run in runs])
    u, samples = torch.cat([run.u for run in runs]), [n for run in runs for n in run.kept or ()]
    inputs = [t.name for t in subject.problem.inputs]
    found = {name: gap for (_, name), gap in sides.gaps(own, u, samples, inputs).items()} if inputs else {}
    for target in subject.targets:
        if target.kind == "input":
            continue
        group, v, plain = sides.group(target.name, samples), sides.v(target.name), own[target.name]
        table = looked_up(group) if plain.ndim == 2 else None
        if table is not None and others_zero(plain, table[0]):
            group, v, plain = table[1], v[table[0]], plain[table[0]]
        error = apart(pushed(group, u, v), dot(plain, v)).abs()
        gap = sides.measured(error, size(plain), u.numel(), lambda group=group: _scale(group, u))  # type: ignore[misc]
        found[target.name] = Gap(gap, u.numel())
    return {name: gap for name, gap in found.items() if gap.over(subject.tolerance) <= 1}


def _scale(group: tuple[Block, ...], u: Tensor) -> Tensor:
    """sqrt(sum_nc |u_nc J_nc|^2)."""
    return (u.double().square() * squares_of(group)).sum().sqrt()


def _halves(subject: Subject, own: Tensor) -> float:
    """The error of every sample's values where f runs on a random half of the batch, against those in the batch (N, C).

    In a small batch, also where it runs on that sample alone. Ranks, capacities and detached statistics may leave a few samples as they
    are, and no derivative tells of them.
    """
    problem, worst = subject.problem, 0.0
    if problem.size < 4:
        return worst
    order = subject.draws.permutation(problem.size).to(own.device)
    scale = scale_of(own)
    for half in (*order.tensor_split(2), *(order.split(1) if problem.size <= EACH else ())):
        half = half.sort().values
        try:
            found = call(part(problem, half)).values
        except Exception as error:  # f's refusal of another batch is no fault
            subject.report.note(f"f refuses a batch of {len(half)} ({in_short(error)})")
            return worst
        errors = over(distance(found, own[half], samples=True), scale[half]).nan_to_num(torch.inf)
        n = int(errors.argmax())
        if float(errors[n]) > subject.tolerance.value:
            same_alone(subject, int(half[n]), found[n], own)
        worst = max(worst, float(errors[n]))
    return worst


def by_rows(identities: Identities, n: int) -> dict[Key, Gap]:
    """Gaps of the call's sample n output by output: in a sum of rows infinities make other NaNs than in the rows themselves."""
    found: dict[Key, Gap] = {}
    sides = identities.sides
    rows = flat_rows({name: sides.group(name, [identities.sample(n)]) for name in sides.subject.blocks})
    for c in range(min(identities.u.shape[1], OUTPUTS)):
        seed = torch.zeros_like(identities.u)
        seed[n, c] = 1
        own = identities.call.gradients(seed)
        for target in sides.subject.targets:
            left = rows[target.name][0, c]
            right = (own[target.name][n] if target.kind == "input" else own[target.name]).reshape(-1)
            error = ratio(distance(left, right), size(right.nan_to_num(0, 0, 0)))
            if error >= found.get(("backward", target.name), Gap(0.0, 1)).error:
                found["backward", target.name] = Gap(error, 1)
    return found


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
