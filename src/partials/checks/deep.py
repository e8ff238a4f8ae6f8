"""Deep: differences, the batch in another order and doubled, other chunk sizes, and a second run."""

from __future__ import annotations

from dataclasses import replace

import torch

from .._blocks import Block
from .._errors import PartialsError
from .._part import part
from .._probe import look
from .._problem import Problem
from .._typing import Tensor
from ..methods import METHODS
from .agreement import Beside, Rows, agree, flat_rows
from .differences import differences
from .oracles import blocks_by
from .subject import Subject
from .tolerance import apart

CHUNKS = (1, 2, None)


def deep(subject: Subject) -> None:
    """What takes longer than `full`: see the functions below."""
    problem = subject.problem
    differences(subject)
    rows = flat_rows(subject.blocks)
    if problem.randomness in ("same", "different"):
        return
    _repeat(subject, rows)
    if not problem.batched or problem.random_state is not None:
        return
    _regrouped(subject, rows)
    _chunks(subject, rows)


def _repeat(subject: Subject, rows: Rows) -> None:
    """The same method once more: how far it is from itself."""
    again = _blocks(subject, subject.problem, subject.method)
    if again is None:
        return
    second = flat_rows(again)
    agree(subject, "repeat", second, Beside(rows))
    same = all(not bool(apart(second[t.name], rows[t.name]).any()) for t in subject.targets)
    others = "other rows in their last bits: f, or torch, is not deterministic here"
    subject.report.note(f"a second run gave {'the same rows bit for bit' if same else others}")


def _regrouped(subject: Subject, rows: Rows) -> None:
    """A row must not depend on its batch mates: the batch in another order, and every sample twice."""
    problem, device = subject.problem, subject.values.device
    order = subject.draws.permutation(problem.size).to(device)
    blocks = _blocks(subject, part(problem, order), subject.method)
    if blocks is not None:
        agree(subject, "permuted", flat_rows(blocks), Beside({name: found[order] for name, found in rows.items()}, order))
    twice = torch.arange(problem.size, device=device).repeat(2)
    blocks = _blocks(subject, part(problem, twice), subject.method)
    if blocks is not None:
        agree(subject, "doubled", flat_rows(blocks), Beside({name: found[twice] for name, found in rows.items()}, twice))


def _chunks(subject: Subject, rows: Rows) -> None:
    problem = replace(subject.problem, budget=None)
    facts, method = look(problem), METHODS["vmap"]
    if not method.verdict(problem, facts).accepted:
        subject.report.note("vmap does not run here: chunk sizes were not compared")
        return
    for chunk in CHUNKS:
        try:
            found: dict[str, Tensor] = flat_rows(method.run(problem, facts, chunk).blocks)
        except PartialsError as error:
            subject.report.note(f"vmap in chunks of {chunk} refused: {error.what}")
            return
        agree(subject, f"chunk {chunk or problem.size}", found, Beside(rows))


def _blocks(subject: Subject, problem: Problem, method: str) -> dict[str, tuple[Block, ...]] | None:
    try:
        return blocks_by(problem, method)
    except PartialsError as error:
        subject.report.note(f"method {method!r} refused another grouping of the samples: {error.what}")
        return None
