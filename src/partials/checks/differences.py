"""J v against central differences in float64 whose step is halved, so that bugs, kinks and noise are told apart.

With D(h) = (f(p + h v) - f(p - h v)) / 2h = J v + O(h^2), the differences D(h) - D(h/2) fall by 4 for each halving, and
R(h) = (4 D(h/2) - D(h)) / 3 = J v + O(h^4) is known to about |R(h) - R(h/2)|, whatever J is. Where that is small, R decides.
Where it is not, one-sided differences that stay apart show a kink, at which J v must lie between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from .. import _algebra
from .._algebra import Blocks
from .._problem import Problem
from .._reference import doubled
from .._state import drawn_from
from .._sums import Sums
from .._targets import Target
from .._typing import Tensor
from .call import in_short
from .oracles import blocks_by
from .precision import stops
from .report import Row, Where
from .subject import Subject
from .tolerance import over, size, typical

STEPS = [2.0**-k for k in range(4, 16)]
ALLOWED, KINK = 1e-6, 1e-3
REASON = "1e-6: extrapolated central differences in float64 are right to about 1e-9"


OfTensors = Callable[[dict[str, Tensor]], Tensor]


def differences(subject: Subject) -> None:
    """A random direction for each target, in float64."""
    problem, report = subject.problem, subject.report
    if problem.randomness in ("same", "different"):
        return
    try:
        double = doubled(problem) if problem.dtype is not torch.float64 else problem
        f = _function(double)
        if f(double.tensors(fresh=True)).dtype is not torch.float64:
            raise TypeError("its output stays in a lower precision")
        blocks = blocks_by(double, subject.method)
    except Exception as error:  # whatever the user's code has against float64: differences in float32 would tell nothing
        report.note(f"central differences need float64, in which f does not run ({in_short(error)})")
        return
    known = {t.name for t in subject.targets}
    falls = [_one(subject, double, f, target, blocks) for target in double.targets if target.name in known]
    seen = sorted(fall for fall in falls if fall is not None)
    if seen:
        report.note(f"central differences fell by {seen[len(seen) // 2]:.3g} for each halving of the step (4 where f is smooth)")


def _function(problem: Problem) -> OfTensors:
    def f(tensors: dict[str, Tensor]) -> Tensor:
        with drawn_from(problem.random_state, problem.targets[0].tensor.device):  # (gradients stay on: f may take derivatives inside)
            return problem(tensors).detach().reshape(problem.size, -1)

    return f


def _one(subject: Subject, problem: Problem, f: OfTensors, target: Target, blocks: Blocks) -> float | None:
    """The row of one target; the factor by which differences fall, None where f is linear along the direction."""
    at = {name: tensor.detach() for name, tensor in problem.tensors(fresh=True).items()}
    point = at[target.name]
    spread = float(point.square().mean().sqrt()) if point.numel() else 0.0
    v = subject.draws.normal(point.shape, point) * (spread or 0.1)

    def moved(h: float) -> Tensor:
        return f({**at, target.name: point + h * v})

    expected = _along(problem, target, blocks, v)
    centre, ahead, behind = f(at), [moved(h) for h in STEPS], [moved(-h) for h in STEPS]
    fan = _Fan(
        centre,
        torch.stack([(a - b) / (2 * h) for a, b, h in zip(ahead, behind, STEPS, strict=True)]),
        (ahead[-1] - centre) / STEPS[-1],
        (centre - behind[-1]) / STEPS[-1],
        stops(problem),
    )
    fan.judge(subject, target.name, expected)
    return fan.fall(expected)


def _along(problem: Problem, target: Target, blocks: Blocks, v: Tensor) -> Tensor:
    """J v, (N, C); v has the target's own shape."""
    with torch.no_grad():
        if target.kind == "parameter" or not problem.batched:
            return Sums({target.name: blocks[target.name]}).matmul({target.name: v.unsqueeze(-1)}).squeeze(-1)
        rows = _algebra.rows(blocks[target.name]).flatten(2)
        return torch.einsum("ncp,np->nc", rows, v.movedim(problem.dim_of(target), 0).flatten(1))


@dataclass(frozen=True)
class _Fan:
    """Differences of one direction: the value (N, C), central ones (K, N, C) with the step halved, and the last one-sided ones."""

    centre: Tensor
    central: Tensor
    right: Tensor
    left: Tensor
    stopped: str = ""
    """What stops gradients inside f."""

    def judge(self, subject: Subject, name: str, expected: Tensor) -> None:
        """A row: right where the differences converge to it, explained on a kink or where nothing converges, else failed."""
        scale = typical(size(expected, samples=True))
        R = (4 * self.central[1:] - self.central[:-1]) / 3
        doubt = torch.stack([size(a - b, samples=True) for a, b in pairwise(R)])  # (K - 2, N)
        best = doubt.argmin(0)
        nearest = R[1:].gather(0, best[None, :, None].expand(1, *expected.shape))[0]
        errors = over(size(expected - nearest, samples=True), scale)
        known = over(doubt.min(0).values, scale) <= ALLOWED / 16
        bad = (errors > ALLOWED).nonzero().flatten().tolist()
        wrong = [n for n in bad if bool(known[n]) or (self._kink(n, scale) and not self._between(n, expected, scale))]
        kinks = [n for n in bad if n not in wrong and self._kink(n, scale)]
        lost = [n for n in bad if n not in wrong and n not in kinks]
        remarks = [f"{len(kinks)} of {len(errors)} samples on a kink, J v between the one-sided differences"] if kinks else []
        remarks += [f"differences do not converge in {len(lost)} of {len(errors)} samples: nothing was told there"] if lost else []
        told = [n for n in range(len(errors)) if n not in kinks and n not in lost]
        error = float(errors[told].max()) if told else 0.0
        where = Where(max(wrong, key=lambda n: float(errors[n]))) if wrong else None
        if wrong and self.stopped:
            remarks, wrong = [*remarks, f"not judged: f stops gradients ({self.stopped}), which differences see through"], []
        elif wrong:
            remarks.append("a derivative inside f (of a custom Function, say) is not that of its values")
        eps = torch.finfo(torch.float64).eps
        subject.report.add(Row("differences", name, error, ALLOWED, REASON, eps, not wrong, where, "; ".join(remarks)))

    def _kink(self, n: int, scale: Tensor) -> bool:
        """Whether the two one-sided slopes of sample n stay apart: a smooth f's differ by the smallest step times its curvature."""
        return float(size(self.right[n] - self.left[n]) / scale[n]) > KINK

    def _between(self, n: int, expected: Tensor, scale: Tensor) -> bool:
        low, high = torch.minimum(self.left[n], self.right[n]), torch.maximum(self.left[n], self.right[n])
        room = KINK * float(scale[n])
        return bool(((expected[n] >= low - room) & (expected[n] <= high + room)).all())

    def fall(self, expected: Tensor) -> float | None:
        """The median factor between successive differences, where these are above rounding."""
        steps = (self.central[1:] - self.central[:-1]).double().flatten(1)
        sizes = torch.linalg.vector_norm(steps, dim=1)
        floor = 1e-8 * float(size(expected)) + 1e-11 * float(size(self.centre)) + 1e-300
        ratios = [a / b for a, b in pairwise(sizes.tolist()) if b > floor]
        return sorted(ratios)[len(ratios) // 2] if ratios else None
