"""The conformance run: every case judged, a line for each module. What the page in the documentation is made of."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tests.coverage import extra, modules
from tests.coverage.judge import Call, Verdict, judge
from tests.coverage.refusals import Reason, reason_of

ORDER = ("rule", "expansion", "vmap", "forward", "jacobian", "grad", "backward", "loop")
SHARE = 6
"""Cases of a module in the default run."""


@dataclass
class Line:
    """One module of the page."""

    module: str
    parameters: bool
    """Whether the module has parameters of its own; else it was run behind a scale."""
    cases: int = 0
    how: set[str] = field(default_factory=set)
    runners: set[str] = field(default_factory=set)
    worst: float = 0.0
    refused: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    """Exact answers that a check took for wrong ones: saturated functions, whose rounding is all there is."""

    def add(self, case: Any, verdict: Verdict, reason: Reason | None) -> None:
        self.cases += 1
        if verdict.how == "refused":
            if reason is None or not reason.matches(verdict.refusal):
                self.faults.append(f"{case}: a refusal that is not in the list: {verdict.refusal}")
            else:
                self.refused.add(reason.why)
            return
        self.how.add(verdict.how)
        self.alarms += [str(case)] * verdict.alarm
        self.runners.add(verdict.runner)
        self.worst = max(self.worst, verdict.error) if verdict.error == verdict.error else verdict.error
        if verdict.wrong:
            self.faults.append(f"{case}: WRONG by {verdict.error:.1e} of the row, by {verdict.how}")
        if reason is not None:
            self.faults.append(f"{case}: exact, though the list says that it is refused ({reason.why})")

    @property
    def by_rules(self) -> bool:
        return self.how <= {"rule"}

    def said(self) -> str:
        return ", ".join(how for how in ORDER if how in self.how) or "refused"


def of_database(info: Any, *, whole: bool) -> Line:
    """All cases of a module of torch's database, or a share that is always the same."""
    lists = {training: modules.drawn(info, training) for training in (False, True)}
    cases = list(modules.cases(info, {training: len(found[0]) for training, found in lists.items()}))
    if not whole:
        cases = sorted(cases, key=lambda case: zlib.crc32(str(case).encode()))[: 2 * SHARE]
    line = Line(info.name, False)
    for case in cases:
        call = modules.made(info, lists[case.training], case)
        if call is None or line.cases >= (len(cases) if whole else SHARE):
            continue
        module = asked_about(call)
        line.parameters |= any(True for _ in module.parameters())
        line.add(case, judge(call), reason_of(module, case.style == "batch", first_shape(call)))
    return line


def of_extra(name: str) -> Line:
    line = Line(name, False)
    for training in (False, True):
        for requires_grad in (False, True):
            call = extra.made(name, training, requires_grad)
            module = asked_about(call)
            line.parameters |= any(True for _ in module.parameters())
            mode = f"{name} {'train' if training else 'eval'}{' grad' if requires_grad else ''}"
            line.add(mode, judge(call), reason_of(module, True, first_shape(call)))
    return line


def asked_about(call: Call) -> nn.Module:
    """The module of torch within our wrappers."""
    if call.loss is not None:
        return call.loss
    f: Any = call.f
    return (f.called if hasattr(f, "called") else f).module


def first_shape(call: Call) -> tuple[int, ...]:
    return next(tuple(x.shape) for x in call.inputs if x.is_floating_point()) if any(x.is_floating_point() for x in call.inputs) else ()


def lines(*, whole: bool) -> Iterator[Line]:
    for info in modules.database():
        yield of_database(info, whole=whole)
    for name in extra.EXTRA:
        yield of_extra(name)
