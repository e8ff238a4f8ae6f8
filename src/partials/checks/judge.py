"""The verdict on the identities: passed, or looked at again, in blocks of samples where the batch is large.

NOTE on blocks. A sum of K rows, added up one after the other, is off by about eps sqrt(K / 2) of its size, in J^T u and in an ordinary
backward alike, and in a sum of very many a single wrong row weighs little. So a batch of more than `ROWS` rows that is not right to the
tolerance of `ROWS` is judged block by block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .._part import part
from .call import call
from .gaps import Gap, Key
from .identities import Identities
from .second_look import settle
from .subject import Subject
from .tolerance import ROWS

BLOCKS, FEW = 512, 16
"""The most blocks; random samples of a larger batch on which J v is compared with J^T u: both take the same way for every sample."""


def judge(identities: Identities, gaps: Mapping[Key, Gap]) -> None:
    """A row for each identity; `gaps`: those of all samples with weights u."""
    subject = identities.sides.subject
    problem = identities.call.problem
    divisible = identities.u.numel() > ROWS and problem.size > 1 and problem.random_state is None  # else other numbers would be drawn
    failing: dict[Key, Gap] = {}
    for key, gap in gaps.items():
        tolerance = subject.tolerance.summing(min(gap.terms, ROWS) if divisible else gap.terms)
        if gap.error > tolerance.value:
            failing[key] = gap
        else:
            subject.row(*key, gap.error, tolerance=tolerance)
    if failing and divisible:
        _by_blocks(subject, identities, failing)
    elif failing:
        settle(identities, failing)


def products(identities: Identities, names: Sequence[str]) -> None:
    """A row for the product of each of some parameters, compared on a few samples of a large batch."""
    sides, size = replace(identities.sides, pushed=names), len(identities.u)
    few = sides.subject.draws.choice(range(size), FEW) if size >= 4 * FEW else list(range(size))
    u, samples = identities.u[few], [identities.sample(n) for n in few]
    failing: dict[Key, Gap] = {}
    for name in names:
        gap = sides.product(name, u, samples)
        if gap.over(sides.subject.tolerance) > 1:
            failing["product", name] = gap
        else:
            sides.subject.row("product", name, gap.error, tolerance=sides.subject.tolerance.summing(gap.terms))
    if failing:
        settle(replace(identities, sides=sides), failing)


def _by_blocks(subject: Subject, identities: Identities, failing: dict[Key, Gap]) -> None:
    """Judge the identities that failed on all samples block by block: their worst block decides."""
    (size, outputs), names = identities.u.shape, [name for _, name in failing]
    step = max(1, ROWS // outputs, -(-size // BLOCKS))
    worst: dict[Key, tuple[float, int, Gap]] = {}
    for start in range(0, size, step):
        gaps = _block(identities, start, step).gaps(names)
        for key in failing:
            if key not in worst or gaps[key].over(subject.tolerance) > worst[key][0]:
                worst[key] = (gaps[key].over(subject.tolerance), start, gaps[key])
    subject.report.note(f"{len(failing)} identities were judged in blocks of {step} samples, since a sum over all {size} rounds more")
    again: dict[int, dict[Key, Gap]] = {}
    for key, (over, start, gap) in worst.items():
        if over <= 1:
            subject.row(*key, gap.error, tolerance=subject.tolerance.summing(gap.terms))
        else:
            again.setdefault(start, {})[key] = gap
    for start, keys in again.items():
        settle(_block(identities, start, step), keys)


def _block(identities: Identities, start: int, step: int) -> Identities:
    problem = identities.call.problem
    local = list(range(start, min(start + step, problem.size)))
    index = torch.tensor(local, device=identities.u.device)
    return Identities(identities.sides, call(part(problem, index)), identities.u[index], [identities.sample(n) for n in local])
