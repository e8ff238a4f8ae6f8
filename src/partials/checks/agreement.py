"""Rows against rows: two Jacobians of one problem, row by row, each error over the size of its row."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .. import _algebra
from .._algebra import Blocks
from .._typing import Tensor
from .cloud import MEMBERS, SHAKE, belongs, cloud
from .identities import unravel
from .report import Where
from .second_look import ENTRIES, SUSPECTS, coarser
from .subject import Subject
from .tolerance import apart, over

Rows = Mapping[str, Tensor]
"""{name: (N, C, entries)}."""


def flat_rows(blocks: Blocks) -> dict[str, Tensor]:
    """The dense rows of every target."""
    with torch.no_grad():
        found = {name: _algebra.rows(group).detach() for name, group in blocks.items()}
    return {name: rows.reshape(*rows.shape[:2], rows[0, 0].numel() if rows.numel() else 0) for name, rows in found.items()}


def agree(subject: Subject, check: str, got: Rows, expected: Rows, samples: Tensor | None = None) -> None:
    """A row of the report for each target: rows (N, C, entries) against those of the same samples computed another way.

    `samples` are the problem's samples that the rows belong to (None: all of them, in order).
    """
    for target in subject.targets:
        name = target.name
        left, right = got[name], expected[name]
        errors = torch.linalg.vector_norm(apart(left, right), dim=2, dtype=torch.float64)
        scale = torch.linalg.vector_norm(right.nan_to_num(0, 0, 0), dim=2, dtype=torch.float64)
        scale = torch.maximum(scale, scale.median(0).values)
        ratios = over(errors, scale).nan_to_num(torch.inf)
        worst = float(ratios.max()) if ratios.numel() else 0.0
        if worst <= subject.tolerance.value:
            subject.row(check, name, worst)
        else:
            _second_look(subject, check, name, (left, right), ratios, scale, samples)


def _second_look(
    subject: Subject, check: str, name: str, rows: tuple[Tensor, Tensor], ratios: Tensor, scale: Tensor, samples: Tensor | None
) -> None:
    """Explained where the worst rows belong to the clouds of their samples, failed at the first that does not."""
    tolerance = coarser(subject)
    left, right = rows
    outputs = ratios.shape[1]
    order = ratios.flatten().topk(min(SUSPECTS, ratios.numel())).indices.tolist()
    suspects = [divmod(i, outputs) for i in order if float(ratios.flatten()[i]) > tolerance.value]
    for n, c in suspects:
        sample = n if samples is None else int(samples[n])
        seed = torch.zeros(outputs, dtype=subject.values.dtype, device=subject.values.device)
        seed[c] = 1
        worst = apart(left[n, c], right[n, c]).abs()
        entries = worst.topk(min(ENTRIES, len(worst))).indices
        found = cloud(subject, sample, seed, {name: entries}, tolerance)
        members = None if found is None else found.gradients[name].to(right)
        floor = tolerance.value * float(scale[n, c])
        if members is None or not all(belongs(x[n, c, entries], members, floor) for x in (left, right)):
            p = int(worst.argmax())
            shape = subject.problem.shape_of(next(t for t in subject.targets if t.name == name))
            where = Where(sample, unravel(c, subject.report.outputs), unravel(p, shape), float(left[n, c, p]), float(right[n, c, p]))
            subject.row(check, name, float(ratios[n, c]), where, passed=False, tolerance=tolerance)
            return
    remark = f"rounding of f itself: {MEMBERS} ordinary backwards differ as much when inputs and parameters move by {SHAKE} eps"
    subject.row(check, name, float(ratios.max()), passed=True, remark=remark if suspects else "", tolerance=tolerance)
