"""The levels of checking: quick, full, deep."""

from __future__ import annotations

from typing import Any

import torch

from .._errors import InputError, listed, near
from .._part import part
from .._problem import Problem
from .._rows import Origin
from .._run import compute, wrap
from .._state import rng_kept
from .._typing import Tensor
from .alone import alone, by_rows
from .call import call
from .deep import deep
from .gaps import Sides, vectors
from .identities import Identities
from .independence import independence
from .judge import judge
from .oracles import full
from .report import Report, Where
from .subject import Subject
from .values import values

LEVELS = ("quick", "full", "deep")
FEW = 16
"""Random samples of a larger batch on which J v is compared with J^T u: both take the same way for every sample."""


def inspect(problem: Problem, method: str = "auto", level: str = "quick", jacobian: Any = None) -> Report:
    """Compare a Jacobian (computed by `method` where none is given) with independent computations.

    Raises
    ------
    InputError
        for an unknown level.
    MixingError
        where f itself mixes samples: no method can be right then.
    """
    if level not in LEVELS:
        known = ", ".join(LEVELS)
        raise InputError(f"level={level!r} is unknown", got=repr(level), expected=f"one of: {known}", hint=near(str(level), LEVELS))
    if jacobian is None:
        computed, made = compute(problem, method)
        jacobian = wrap(problem, computed, made, Origin())
    subject = Subject.of(problem, jacobian, jacobian.plan.method, level)
    with problem.running(f"checking the Jacobian ({level})"), rng_kept(problem.targets[0].tensor.device):
        quick(subject)
        if level != "quick" and problem.size:
            full(subject)
        if level == "deep" and problem.size:
            deep(subject)
    return subject.report


def samples_apart(problem: Problem, jacobian: Any) -> Report:
    """Independence and values only.

    Raises
    ------
    MixingError
        where f mixes samples.
    """
    subject = Subject.of(problem, jacobian, jacobian.plan.method, "quick")
    with problem.running("looking for samples that mix"), rng_kept(problem.targets[0].tensor.device):
        own = call(problem, reading=True)
        u = subject.draws.gaussian((problem.size, own.out.shape[1]), own.values)
        independence(subject, own, u, own.pull(u, [place.at for place in own.places]))
        if problem.randomness not in ("same", "different"):
            values(subject, own.values)
    return subject.report


def quick(subject: Subject) -> None:
    """Independence, values, identities, a few samples alone: about the cost of four training steps."""
    problem, report = subject.problem, subject.report
    if not problem.size:
        report.note("no samples: nothing to compare")
        return
    squares = subject.squares()
    odd = _odd(subject, squares)
    kept = _kept(problem, odd)
    own = call(problem if kept is None else part(problem, torch.tensor(kept, device=subject.values.device)), reading=True)
    u = subject.draws.gaussian((problem.size, own.out.shape[1]), own.values)
    local = u if kept is None else u[kept]
    pulled = own.pull(local, [*own.tensors.values(), *(place.at for place in own.places)])
    gradients, at_places = pulled[: len(own.tensors)], pulled[len(own.tensors) :]
    independence(subject, own, local, at_places)
    if problem.randomness in ("same", "different"):
        report.note(f'randomness="{problem.randomness}": the numbers are not those of an ordinary call, so only independence was compared')
        return
    everyone = own.values if kept is None else call(problem).values
    values(subject, everyone)
    if everyone.shape != subject.values.shape:
        return
    used = [t.name for t, g in zip(problem.targets, gradients, strict=True) if g is not None]
    report.zeros += [name for name in used if name in squares and not squares[name].any()]
    few = subject.draws.choice(range(problem.size), FEW) if problem.size >= 4 * FEW else None
    sides = Sides(subject, squares, vectors(subject), few)
    identities = Identities(sides, own, local, kept)
    if odd and kept is None:
        _row_by_row(identities, odd)
    else:
        judge(identities, own.named(gradients))
    alone(sides, everyone, u, odd)


def _kept(problem: Problem, odd: list[int]) -> list[int] | None:
    """The samples whose sums are compared; None for all, and where a part of the batch cannot be told from the rest."""
    if not odd or not problem.batched or problem.random_state is not None or problem.randomness in ("same", "different"):
        return None
    return [n for n in range(problem.size) if n not in odd] or None


def _row_by_row(identities: Identities, odd: list[int]) -> None:
    """One sample's rows, where sums over samples would not be finite: of the first sample whose rows are, if there is one."""
    subject = identities.sides.subject
    problem = subject.problem
    if len(odd) == problem.size > 1 and problem.batched and problem.random_state is None:
        subject.report.note("the rows of every sample are not finite: they were compared with batches of one alone")
        return  # (in a backward of the whole batch the others' infinities, times zero, would be everywhere)
    n = next((n for n in range(subject.problem.size) if n not in odd), 0)
    for (check, name), gap in by_rows(identities, n).items():
        subject.row(check, name, gap.error, Where(n))
    subject.report.note(f"sums over samples are not finite: only the rows of sample {n} were compared")


def _odd(subject: Subject, squares: dict[str, Tensor]) -> list[int]:
    """Samples whose rows are not finite, noted; identities are compared on the others."""
    found: set[int] = set()
    for name, square in squares.items():
        here = (~square.isfinite()).any(1).nonzero().flatten().tolist()
        if here:
            subject.report.note(f"rows of {name!r} are not finite, or too large to be squared, in sample {listed(here)}: passed on as is")
            found.update(here)
    bad = (~subject.values.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        subject.report.note(f"values are not finite in sample {listed(bad)}: passed on as they are")
    return sorted(found)
