"""What is checked: a problem, the Jacobian that answers it, and what every check needs beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch

from .. import _algebra, _machine
from .._algebra import Blocks
from .._blocks import Block
from .._plan import Plan
from .._probe import look
from .._problem import Problem
from .._run import exact, without_graph
from .._targets import Target
from .._typing import Tensor
from . import draws
from .draws import Draws
from .report import Report, Row, Where
from .tolerance import Tolerance, coarsest, name_of


@dataclass
class Subject:
    """Values (N, C) and blocks by target, without graph; `whole` is the part of the targets whose blocks have the right shape."""

    problem: Problem
    method: str
    values: Tensor
    blocks: dict[str, tuple[Block, ...]]
    draws: Draws
    report: Report
    tolerance: Tolerance
    targets: tuple[Target, ...]
    """Those whose blocks have the right shape."""
    known: dict[str, Tensor] = field(default_factory=dict)
    """The squares of `squares`, as far as they were asked for: for long inputs they cost as much as a training step."""

    @classmethod
    def of(cls, problem: Problem, J: Any, method: str, level: str) -> Subject:
        problem = _exact(without_graph(problem), J.plan)
        with J._reading():  # refuses a Jacobian whose factors have been changed
            values = J.values.detach()
        inputs = getattr(J, "inputs", None)
        blocks = {**({} if inputs is None else inputs.blocks), **J.blocks}
        lowest = coarsest(values.dtype, *(t.tensor.dtype for t in problem.targets))
        outputs = tuple(values.shape[1:] if problem.batched else values.shape)
        numbers = Draws(draws.fresh_seed())
        report = Report(problem.name, method, level, problem.size, outputs, name_of(lowest), numbers.seed)
        report.plan, report.machine = J.plan, _machine.describe(values.device)
        flat = values.reshape(len(values) if problem.batched else 1, torch.Size(outputs).numel())
        subject = cls(problem, method, flat, dict(blocks), numbers, report, Tolerance(lowest), problem.targets)
        subject.targets = tuple(t for t in problem.targets if _fits(subject, t))
        return subject

    def row(self, check: str, parameter: str, error: float, where: Where | None = None, **rest: Any) -> Row:
        """A row judged by the tolerance, put into the report."""
        allowed: Tolerance = rest.pop("tolerance", self.tolerance)
        passed = rest.pop("passed", error <= allowed.value)
        row = Row(check, parameter, error, allowed.value, allowed.reason(check), allowed.eps, passed, where, rest.pop("remark", ""))
        self.report.add(row)
        return row

    def chosen(self, index: Tensor) -> Blocks:
        return _algebra.select(self.blocks, index)

    def squares(self, name: str) -> Tensor:
        """|J[n, c]|^2 of a target in float64, (N, C)."""
        if name not in self.known:
            self.known[name] = squares_of(self.blocks[name])
        return self.known[name]


def squares_of(group: tuple[Block, ...]) -> Tensor:
    """|J[n, c]|^2 of the sum of some blocks in float64, (N, C)."""
    with torch.no_grad():
        return _algebra.squared_norms(group).double()


def _exact(problem: Problem, plan: Plan) -> Problem:
    """The problem as references must run it; f is looked at only where it may differentiate by itself."""
    if not problem.size or (plan.uses and all(use.layout != "taped" for use in plan.uses)):
        return problem
    return exact(problem, look(problem))


def _fits(subject: Subject, target: Target) -> bool:
    """Whether the blocks of a target have its shape; a row for it where they do not."""
    shape, rows = subject.problem.shape_of(target), tuple(subject.values.shape)
    group = subject.blocks.get(target.name, ())
    wrong = [block for block in group if tuple(block.shape) != shape or tuple(block.rows) != rows]
    if group and not wrong:
        return True
    got = f"rows {tuple(wrong[0].rows)} of shape {tuple(wrong[0].shape)}" if wrong else "no block"
    row = Row("shape", target.name, inf, 0.0, "shapes are equal or not", inf, False, None, f"{got}, expected rows {rows} of shape {shape}")
    subject.report.add(row)
    return False
