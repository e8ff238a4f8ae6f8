"""Full: the Jacobian in hand, and every method that accepts, against the loop over samples in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from .._blocks import Block
from .._errors import MixingError, PartialsError
from .._part import part
from .._probe import Facts, look
from .._problem import Problem
from .._reference import Reference, oracle_for, reference
from .._run import NAMES, compute
from .._state import drawn_from
from .._typing import Tensor
from ..methods import METHODS
from .agreement import Beside, Rows, agree, flat_rows
from .subject import Subject

TOO_LONG = 20.0
"""Estimated seconds from which a method is left out."""


def full(subject: Subject) -> None:
    """Compare with the loop; every method that accepts the problem takes part."""
    problem, report = subject.problem, subject.report
    facts = look(problem)
    if facts.random and problem.randomness in ("same", "different"):
        report.note("every method draws its own random numbers under this policy, so methods were not compared")
        return
    with drawn_from(problem.random_state, problem.targets[0].tensor.device):
        trusted = reference(problem, facts)
    if trusted is None:
        report.note("the loop over samples does not run here: methods were not compared")
        return
    report.note(f"the reference is {trusted.words}")
    beside = Beside(trusted.rows, trusted.samples, _in_own_dtype(problem, facts, trusted))
    agree(subject, "loop", _of(trusted, flat_rows(subject.blocks)), beside)
    for name in NAMES:
        found = _by(subject, facts, name)
        if found is not None:
            agree(subject, f"method {name}", _of(trusted, found), beside)


def _in_own_dtype(problem: Problem, facts: Facts, trusted: Reference) -> Callable[[], Rows] | None:
    """The rows of the reference's samples by the same loop in f's own dtype, computed when asked for; None where they are the reference."""
    if all(rows.dtype is problem.dtype for rows in trusted.rows.values()):
        return None
    asked = problem if trusted.samples is None else part(problem, trusted.samples)
    return cache(lambda: flat_rows(blocks_by(asked, oracle_for(problem, facts))))


def _by(subject: Subject, facts: Facts, name: str) -> Rows | None:
    """The rows of one method, None with a note where it refuses or would take too long."""
    problem = subject.problem
    if name in METHODS:
        verdict = METHODS[name].verdict(problem, facts)
        if verdict.cost is not None and verdict.cost.seconds > TOO_LONG:
            subject.report.note(f"method {name!r} was left out: it would take about {verdict.cost.seconds:.0f} s")
            return None
    try:
        return flat_rows(blocks_by(problem, name))
    except MixingError:
        raise
    except PartialsError as error:
        got = f" ({error.got})" if error.got and error.got not in error.what else ""
        subject.report.note(f"method {name!r} refused: {error.what}{got}")
        return None


def blocks_by(problem: Problem, name: str) -> dict[str, tuple[Block, ...]]:
    """The blocks of every target by one method, with the random numbers of the first call."""
    with drawn_from(problem.random_state, problem.targets[0].tensor.device):
        return compute(replace(problem, budget=None), name)[0].blocks


def _of(trusted: Reference, rows: Rows) -> dict[str, Tensor]:
    """Rows of the samples that the reference has."""
    if trusted.samples is None:
        return dict(rows)
    return {name: part[trusted.samples] for name, part in rows.items()}
