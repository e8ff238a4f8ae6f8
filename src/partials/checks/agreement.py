"""Rows against rows: two Jacobians of one problem, row by row, each error over the size of its row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .. import _algebra
from .._algebra import Blocks
from .._typing import Tensor
from .cloud import SHAKE, belongs, cloud
from .identities import unravel
from .report import Where
from .second_look import ENTRIES, SUSPECTS, coarser
from .subject import Subject
from .tolerance import Tolerance, apart, over, size

Rows = Mapping[str, Tensor]
"""{name: (N, C, entries)}."""


def flat_rows(blocks: Blocks) -> dict[str, Tensor]:
    """The dense rows of every target."""
    with torch.no_grad():
        found = {name: _algebra.rows(group).detach() for name, group in blocks.items()}
    return {name: rows.reshape(*rows.shape[:2], rows[0, 0].numel() if rows.numel() else 0) for name, rows in found.items()}


@dataclass(frozen=True)
class Beside:
    """What rows are compared with: (N, C, entries) by name, and where those are in float64, the same in f's own dtype."""

    rows: Rows
    samples: Tensor | None = None
    """The problem's samples that the rows belong to; None for all of them, in order."""
    own: Callable[[], Rows] | None = None


def agree(subject: Subject, check: str, got: Rows, beside: Beside) -> None:
    """A row of the report for each target: `got` against rows of the same samples computed another way."""
    for target in subject.targets:
        name = target.name
        ratios = _ratios(got[name], beside.rows[name])
        worst = float(ratios.max()) if ratios.numel() else 0.0
        if worst <= subject.tolerance.value:
            subject.row(check, name, worst)
            continue
        tolerance, expected, ordinary = coarser(subject), beside.rows[name], SHAKEN
        if beside.own is not None:
            expected, ordinary = beside.own()[name], FLOAT64
            ratios = _ratios(got[name], expected)
        stranger = _stranger(subject, name, (got[name], expected), ratios, tolerance, beside.samples)
        if stranger is None:
            subject.row(check, name, worst, passed=True, remark=f"rounding of f itself: {ordinary}", tolerance=tolerance)
            continue
        n, c = stranger
        shape, left, right = subject.problem.shape_of(target), got[name][n, c], expected[n, c]
        p = int(apart(left, right).abs().argmax())
        sample = n if beside.samples is None else int(beside.samples[n])
        where = Where(sample, unravel(c, subject.report.outputs), unravel(p, shape), float(left[p]), float(right[p]))
        subject.row(check, name, float(ratios[n, c]), where, passed=False, tolerance=tolerance)


SHAKEN = f"ordinary backwards differ as much when inputs and parameters move by {SHAKE} eps"
FLOAT64 = "so far is an ordinary loop in f's dtype from that in float64, and these rows are those of the former"


def _ratios(left: Tensor, right: Tensor) -> Tensor:
    """(N, C): the error of each row over its size, the median sample's at least."""
    errors = torch.linalg.vector_norm(apart(left, right), dim=2, dtype=torch.float64)
    scale = torch.linalg.vector_norm(right.nan_to_num(0, 0, 0), dim=2, dtype=torch.float64)
    return over(errors, torch.maximum(scale, scale.median(0).values) if scale.numel() else scale).nan_to_num(torch.inf)


def _stranger(
    subject: Subject, name: str, rows: tuple[Tensor, Tensor], ratios: Tensor, tolerance: Tolerance, samples: Tensor | None
) -> tuple[int, int] | None:
    """The first (sample, output) of the worst ones where the two rows, which differ, do not both belong to its cloud."""
    outputs, worst = ratios.shape[1], ratios.flatten()
    for i in worst.topk(min(SUSPECTS, len(worst))).indices.tolist():
        n, c = divmod(i, outputs)
        if float(worst[i]) <= tolerance.value:
            return None
        left, right = rows[0][n, c], rows[1][n, c]
        seed = torch.zeros(outputs, dtype=subject.values.dtype, device=subject.values.device).index_fill(
            0, torch.tensor(c, device=subject.values.device), 1
        )
        difference = apart(left, right).abs()
        entries = difference.topk(min(ENTRIES, len(difference))).indices
        found = cloud(subject, n if samples is None else int(samples[n]), seed, {name: entries}, tolerance)
        floor = tolerance.value * float(size(difference)) / float(worst[i])
        if found is None or not all(belongs(x[entries], found.gradients[name].to(x), floor) for x in (left, right)):
            return n, c
    return None
