"""`Report`: what was compared, how far apart it was, where, and what was allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import Any

import torch

from .._errors import CheckError
from .._plan import Plan
from .._typing import Shape
from ..html import of_report

ABOUT = {
    "shape": "blocks against samples, outputs and parameter shapes",
    "independence": "derivatives by other samples, which must be zero",
    "values": "J.values against f(*inputs)",
    "backward": "sum u J against one ordinary backward of sum u f",
    "product": "u.(J v) against (J.T u).v",
    "alone": "random samples against a batch of one",
    "loop": "this Jacobian against the loop over samples",
    "method": "every method against the loop over samples",
    "differences": "J v against step-halved central differences",
    "permuted": "the batch in another order",
    "doubled": "every sample twice",
    "chunk": "vmap in chunks of another size",
    "repeat": "the same method once more",
}
"""What each check compares, by the first word of its name."""


@dataclass(frozen=True)
class Where:
    """The place of the worst error: sample, index into one sample's output, index into the parameter."""

    sample: int
    output: Shape | None = None
    entry: Shape | None = None
    got: float | None = None
    expected: float | None = None

    def __str__(self) -> str:
        words = [f"sample {self.sample}"]
        words += [f"output {list(self.output)}"] if self.output else []
        words += [f"entry {list(self.entry)}"] if self.entry else []
        return ", ".join(words)

    @property
    def numbers(self) -> str:
        return "" if self.got is None else f"got {self.got:.9g}, expected {self.expected:.9g}"


@dataclass(frozen=True)
class Row:
    """One check of one parameter (or input, or of the values)."""

    check: str
    parameter: str
    error: float
    """The worst error over the scale of its row."""
    tolerance: float
    reason: str
    """Why the tolerance is what it is."""
    eps: float
    passed: bool
    where: Where | None = None
    remark: str = ""
    """Why a row passed above its tolerance, or what is wrong where it failed otherwise than by a number."""

    @property
    def verdict(self) -> str:
        return "FAILED" if not self.passed else "explained" if self.remark else "passed"

    @property
    def size(self) -> str:
        """The error in eps, in words."""
        if not isfinite(self.eps):
            return "-"
        return f"{self.error / self.eps:.2g}{' eps' * (0 < self.error < inf)}"

    @property
    def allowed(self) -> str:
        """The tolerance in eps, in words."""
        return f"{self.tolerance / self.eps:.3g} eps" if isfinite(self.eps) else "-"

    @property
    def told(self) -> str:
        """The numbers of the worst entry, or the remark."""
        return self.where.numbers if self.where is not None and self.where.numbers else self.remark


@dataclass
class Report:
    """The answer of `partials.check` and `J.check()`: a row for each check and parameter, and notes.

    >>> import torch, partials as pt
    >>> report = pt.check(torch.nn.Linear(3, 2), torch.randn(5, 3))
    >>> report.passed, {row.check for row in report.rows} >= {"values", "backward", "independence"}
    (True, True)
    """

    function: str
    method: str
    level: str
    samples: int
    outputs: Shape
    dtype: str
    seed: int
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    """Parameters that f uses and whose rows were all zero."""
    plan: Plan | None = None
    """How the Jacobian came about."""
    machine: dict[str, Any] = field(default_factory=dict)
    """Versions, processor and threads."""

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> list[Row]:
        """The failed rows, the worst first."""
        return sorted((row for row in self.rows if not row.passed), key=lambda row: -row.error)

    @property
    def vacuous(self) -> bool:
        """Whether some parameter's rows were all zero, so that comparing them told little."""
        return bool(self.zeros)

    def worst(self, check: str) -> Row | None:
        """The row of a check with the largest error."""
        return max((row for row in self.rows if row.check == check), key=lambda row: row.error, default=None)

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def raise_if_failed(self) -> Report:
        """The report itself, or CheckError with it as `.report`."""
        if self.passed:
            return self
        first, others = self.failures[0], len(self.failures) - 1
        place = "" if first.where is None else f" at {first.where}"
        more = f" (and {others} more rows)" if others else ""
        error = CheckError(
            f"the Jacobian of {self.function} by {self.method!r} failed the check {first.check!r} in {first.parameter!r}{place}{more}",
            got=f"an error of {_percent(first.error)} of the row, {first.size}"
            + (f": {first.told}" if first.told else "")
            + (f"; {first.remark}" if first.remark and first.remark != first.told else ""),
            expected=f"at most {first.tolerance:.2g} ({first.reason}); {self.about(first.check)}",
            hint="print(error.report); another method, such as method='loop'; please report it, unless a backward of your own is to blame: "
            "one that is not linear in its cotangent (a clamp, a sign) is no derivative",
        )
        error.report = self
        for note in self.notes:
            error.add_note(f"note: {note}")
        raise error

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types; a number that is not finite is a string."""
        return {
            "function": self.function,
            "method": self.method,
            "level": self.level,
            "samples": self.samples,
            "outputs": list(self.outputs),
            "dtype": self.dtype,
            "seed": self.seed,
            "passed": self.passed,
            "machine": dict(self.machine),
            "notes": list(self.notes),
            "rows": [_row_to_dict(row) for row in self.rows],
        }

    def to_html(self) -> str:
        """One self-contained page: checks, parameters, what failed and where, the plan and the machine; no script, nothing fetched."""
        return of_report(self)

    @property
    def title(self) -> str:
        """What was checked."""
        counts = f"{_counted(self.samples, 'sample')}, {_counted(torch.Size(self.outputs).numel(), 'output')}"
        return f"Jacobian of {self.function} by {self.method!r}, {counts}, {self.dtype}"

    @property
    def verdict(self) -> str:
        return f"{self.level} check " + ("passed" if self.passed else f"FAILED in {len(self.failures)} of {len(self.rows)} rows")

    def summary(self, check: str) -> tuple[int, Row]:
        """How many rows a check has, and the one that failed or came nearest to it."""
        rows = [row for row in self.rows if row.check == check]
        return len(rows), max(rows, key=lambda row: (not row.passed, row.error))

    def about(self, check: str) -> str:
        """What a check compares."""
        return ABOUT[check.split()[0]]

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.verdict}"]
        lines.append(_line("check", "rows", "worst error", "allowed", "worst in"))
        for check in dict.fromkeys(row.check for row in self.rows):
            lines += self._lines(check)
        if self.failures:
            lines += ["failed:", *(line for row in self.failures[:SHOWN] for line in _told(row))]
            lines += [f"  ... and {len(self.failures) - SHOWN} more"] * (len(self.failures) > SHOWN)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__

    def _lines(self, check: str) -> list[str]:
        count, worst = self.summary(check)
        place = worst.parameter if worst.where is None else f"{worst.parameter}, {worst.where}"
        lines = [_line(check, str(count), worst.size, worst.allowed, place, worst.verdict)]
        explained = [row for row in self.rows if row.check == check and row.verdict == "explained"]
        return lines + [f"    {row.parameter}: {row.remark}" for row in explained[:SHOWN]]


def merged(reports: Sequence[Report], samples: int) -> Report:
    """One report of reports on parts of a batch: of each check and parameter the row that failed, or was the worst."""
    whole = replace(reports[0], samples=samples, rows=[], notes=[], zeros=[])
    worst: dict[tuple[str, str], Row] = {}
    for report in reports:
        for row in report.rows:
            key = (row.check, row.parameter)
            if key not in worst or (row.passed, -row.error) < (worst[key].passed, -worst[key].error):
                worst[key] = row
        whole.zeros += [name for name in report.zeros if name not in whole.zeros]
        for sentence in report.notes:
            whole.note(sentence)
    whole.rows += worst.values()
    whole.note(f"checked in {len(reports)} pieces; samples are counted within their piece")
    return whole


SHOWN = 6
"""Failed rows that are printed in full."""


def _told(row: Row) -> list[str]:
    """A failed row in the manner of torch.testing.assert_close."""
    place = "" if row.where is None else f" at {row.where}"
    lines = [f"  {row.check}, {row.parameter}{place}: {ABOUT[row.check.split()[0]]}"]
    lines += [f"    error over its row {row.error:.3g} ({row.size}), allowed {row.tolerance:.3g} ({row.reason})"] * (isfinite(row.eps))
    numbers = "" if row.where is None else row.where.numbers
    return lines + [f"    {words}" for words in (numbers, row.remark) if words]


def _row_to_dict(row: Row) -> dict[str, Any]:
    where = None
    if row.where is not None:
        place = row.where
        where = {
            "sample": place.sample,
            "output": None if place.output is None else list(place.output),
            "entry": None if place.entry is None else list(place.entry),
            "got": _number(place.got),
            "expected": _number(place.expected),
        }
    return {
        "check": row.check,
        "parameter": row.parameter,
        "error": _number(row.error),
        "tolerance": _number(row.tolerance),
        "reason": row.reason,
        "verdict": row.verdict,
        "where": where,
        "remark": row.remark,
    }


def _number(value: float | None) -> float | str | None:
    return value if value is None or isfinite(value) else str(value)


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %" if isfinite(error) else "more than the whole"


def _line(check: str, rows: str, error: str, allowed: str, place: str, verdict: str = "") -> str:
    return f"  {check:<18}{rows:>5}  {error:>12}  {allowed:>9}  {verdict:<10}{place}".rstrip()


def _counted(number: int, one: str) -> str:
    return f"{number} {one}{'s' * (number != 1)}"
