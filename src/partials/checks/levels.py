"""The levels of checking: quick, full, deep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .._errors import InputError, listed, near
from .._part import part
from .._problem import Problem
from .._run import compute, wrap
from .._state import rng_kept
from .._typing import Tensor
from .alone import alone, by_rows
from .call import Call, call
from .deep import deep
from .gaps import Gap, Key, Sides
from .identities import Identities
from .independence import independence
from .judge import FEW, judge, products
from .oracles import full
from .report import Report, Where
from .subject import Subject
from .values import values

LEVELS = ("quick", "full", "deep")
CHEAP = 2**20
"""Bytes of a parameter and its blocks up to which J v is compared on all samples of a small batch."""


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
        jacobian = wrap(problem, computed, made)
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
    """Independence, values, identities, a few samples alone: about the cost of three training steps."""
    problem, report = subject.problem, subject.report
    if not problem.size:
        report.note("no samples: nothing to compare")
        return
    bad = (~subject.values.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        report.note(f"values are not finite in sample {listed(bad)}: passed on as they are")
    own = call(problem, reading=True)
    u = subject.draws.gaussian((problem.size, own.out.shape[1]), own.values)
    if problem.randomness in ("same", "different"):
        _odd(subject)
        independence(subject, own, u, own.pull(u, [place.at for place in own.places]))
        report.note(f'randomness="{problem.randomness}": the numbers are not those of an ordinary call, so only independence was compared')
        return
    everyone, sides = own.values, Sides(subject, _small(subject))
    gradients, at_places = _pulled(own, u)
    local, odd, gaps = Identities(sides, own, u), list[int](), dict[Key, Gap]()
    if everyone.shape == subject.values.shape:
        gaps = local.gaps(own=own.named(gradients))
        odd = [] if all(gap.finite for gap in gaps.values()) else _odd(subject)
        kept = _kept(problem, odd)
        if kept is not None:  # (what is not finite would be everywhere in a sum)
            own = call(part(problem, torch.tensor(kept, device=u.device)), reading=True)
            gradients, at_places = _pulled(own, u[kept])
            local = Identities(replace(sides, pushed=_parameters(subject)), own, u[kept], kept)
            gaps = local.gaps(own=own.named(gradients))
    used = [t.name for t, g in zip(problem.targets, gradients, strict=True) if g is not None]
    gradients.clear()  # (so that others can take their memory)
    independence(subject, own, local.u, at_places)
    values(subject, everyone)
    if everyone.shape != subject.values.shape:
        return
    report.zeros += [name for name in used if ("backward", name) in gaps and _all_zero(subject, name, gaps["backward", name])]
    if odd and local.kept is None:
        _row_by_row(local, odd)
    else:
        judge(local, gaps)
    pushed = alone(local.sides, everyone, u, odd)
    if not pushed and not (odd and local.kept is None):
        products(local, [name for name in _parameters(subject) if name not in local.sides.pushed])


def _pulled(own: Call, u: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """One backward of sum u f: to the targets, and to the places where samples can be read."""
    found = own.pull(u, [*own.tensors.values(), *(place.at for place in own.places)])
    return found[: len(own.tensors)], found[len(own.tensors) :]


def _parameters(subject: Subject) -> list[str]:
    return [t.name for t in subject.targets if t.kind == "parameter"]


def _small(subject: Subject) -> list[str]:
    """The parameters whose products of all samples are cheap to compare; others are compared on the samples that run alone."""
    if subject.problem.size >= 4 * FEW:
        return []
    return [
        t.name
        for t in subject.targets
        if t.kind == "parameter" and t.tensor.nbytes + sum(block.nbytes() for block in subject.blocks[t.name]) <= CHEAP
    ]


def _all_zero(subject: Subject, name: str, gap: Gap) -> bool:
    """Whether the rows of a target are zero, every one."""
    return gap.zero and not bool(subject.squares(name).any())


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


def _odd(subject: Subject) -> list[int]:
    """Samples whose rows are not finite, noted; identities are compared on the others."""
    found: set[int] = set()
    for target in subject.targets:
        here = (~subject.squares(target.name).isfinite()).any(1).nonzero().flatten().tolist()
        if here:
            subject.report.note(
                f"rows of {target.name!r} are not finite, or too large to be squared, in sample {listed(here)}: passed on as is"
            )
            found.update(here)
    return sorted(found)
