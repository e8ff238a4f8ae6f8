"""Values: what the Jacobian says f returned, against f on the batch; and f on a sample alone, against f on the batch."""

from __future__ import annotations

from math import inf

import torch

from .._mixing import mixing
from .._part import part
from .._typing import Tensor
from .call import call
from .cloud import SHAKE, belongs, cloud
from .identities import unravel
from .report import Row, Where
from .second_look import SUSPECTS, coarser
from .subject import Subject
from .tolerance import Tolerance, apart, distance, over, size, typical

ROUNDED = f"rounding of f itself: its values move as far when inputs and parameters move by {SHAKE} eps"


def scale_of(own: Tensor) -> Tensor:
    """The size of each sample's values, (N, C) -> (N,), the median sample's at least."""
    return typical(size(own.nan_to_num(0, 0, 0), samples=True))


def values(subject: Subject, own: Tensor) -> None:
    """Compare J.values with f's own, (N, C) both.

    Raises
    ------
    MixingError
        where f itself gives another value for a sample alone than in the batch.
    """
    got = subject.values
    if got.shape != own.shape:
        remark = f"shape {tuple(got.shape)}, not {tuple(own.shape)}"
        subject.report.add(Row("values", "values", torch.inf, 0.0, "shapes are equal or not", torch.inf, False, None, remark))
        return
    errors = over(distance(got, own, samples=True), scale_of(own)).nan_to_num(torch.inf)
    worst = int(errors.argmax())
    if float(errors[worst]) <= subject.tolerance.value:
        subject.row("values", "values", float(errors[worst]))
        return
    tolerance = coarser(subject)
    suspects = [n for n in errors.topk(min(SUSPECTS, len(errors))).indices.tolist() if float(errors[n]) > tolerance.value]
    for n in suspects:
        if not _rounding(subject, n, (got[n], own[n]), tolerance, own):
            _whose_fault(subject, n, own)
            difference = apart(got[n], own[n]).abs()
            c = int(difference.argmax())
            where = Where(n, unravel(c, subject.report.outputs), None, float(got[n, c]), float(own[n, c]))
            subject.row("values", "values", float(errors[n]), where, passed=False, tolerance=tolerance)
            return
    remark = ROUNDED if suspects else ""
    subject.row("values", "values", float(errors[worst]), Where(worst), passed=True, remark=remark, tolerance=tolerance)


def same_alone(subject: Subject, n: int, alone: Tensor, own: Tensor) -> tuple[float, bool]:
    """The error of f's values for sample n alone (C,) against those in the batch (N, C), and whether it is above the tolerance.

    Raises
    ------
    MixingError
        where it is more than the rounding of f itself.
    """
    error = float(over(distance(alone, own[n]), scale_of(own)[n]).nan_to_num(torch.inf))
    if error > subject.tolerance.value:
        tolerance = coarser(subject)
        if error > tolerance.value and not _rounding(subject, n, (alone, own[n]), tolerance, own):
            raise mixing(
                subject.problem,
                n,
                f"sample {n} has another value alone than in the batch",
                f"{_some(alone)} alone, {_some(own[n])} in the batch: {100 * error:.3g} % apart",
                "the same value whatever the other samples are",
            )
    return error, error > subject.tolerance.value


def _rounding(subject: Subject, n: int, both: tuple[Tensor, Tensor], tolerance: Tolerance, own: Tensor) -> bool:
    """Whether two values of sample n, which differ, both belong to its cloud."""
    found = cloud(subject, n, own[n], {}, tolerance, copies=False)
    floor = tolerance.value * float(scale_of(own)[n])
    return found is not None and all(belongs(x, found.values, floor, coarsest=inf) for x in both)


def _whose_fault(subject: Subject, n: int, own: Tensor) -> None:
    """MixingError if f alone on sample n differs from f on the batch; nothing where f says the same, or refuses one sample."""
    problem = subject.problem
    if not problem.batched or problem.size < 2 or problem.random_state is not None:
        return
    try:
        alone = call(part(problem, torch.tensor([n], device=own.device))).values[0]
    except Exception:  # f cannot be asked: the row fails as it is
        return
    same_alone(subject, n, alone, own)


def _some(row: Tensor) -> str:
    shown = ", ".join(f"{x:.4g}" for x in row[:3].tolist())
    return f"[{shown}{', ...' if len(row) > 3 else ''}]" if len(row) > 1 else shown
