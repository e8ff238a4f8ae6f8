"""What a comparison and a report say, as pages."""

from __future__ import annotations

from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from .._machine import sentence
from .._plan import human_bytes, human_time
from .chart import Dot, dots
from .page import Cell, Marked, heading, lines, page, picture, table

if TYPE_CHECKING:
    from .._compare import Comparison
    from .._compare import Row as Measured
    from .._plan import Plan
    from ..checks.report import Report, Row

SHOWN = 40
"""Parameters in the picture of errors: the worst."""


def of_comparison(found: Comparison) -> str:
    """Methods by time, error and memory, and the plan of a call that names none."""
    measured = found.measured
    parts = [heading("Methods"), _methods(found), lines(found.notes)]
    if measured:
        first = measured[0].median
        times = [
            Dot(r.method, r.median, f"{human_time(r.median)}, ×{r.median / first:.3g}", min(r.seconds), max(r.seconds)) for r in measured
        ]
        svg = dots(times, "median time of one Jacobian; the bar is from the fastest to the slowest run", _time)
        parts += [heading("Time"), picture(svg, "the time that each method took, fastest first")]
    sizes = [(row, row.memory) for row in measured if row.memory is not None]
    if any(size for _, size in sizes):
        memory = [Dot(row.method, size, human_bytes(size)) for row, size in sizes]
        parts += [
            heading("Memory"),
            picture(dots(memory, "growth of memory at its highest", human_bytes, base=2), "the memory that each method took"),
        ]
    return page(f"Methods for {found.title}", _fastest(found), bool(measured), [*parts, *_plan(found.plan)])


def of_report(report: Report) -> str:
    """Each check, each parameter, what failed and where, and the plan of what was checked."""
    parts = [heading("Checks"), _checks(report)]
    if report.failures:
        parts += [heading("What failed"), _failures(report)]
    judged = _by_parameter(report)
    if judged:
        shown = sorted(judged, key=lambda name: -judged[name][0])[:SHOWN]
        svg = dots(
            [_dot(name, *judged[name]) for name in shown], "worst error of any check, over what that check allows", _ratio, limit=1.0
        )
        more = [f"the worst {SHOWN} of {len(judged)}"] if len(judged) > SHOWN else []
        parts += [
            heading("Errors by parameter"),
            picture(svg, "the worst error of each parameter, over what is allowed"),
            lines(more),
            _errors(report),
        ]
    parts += [heading("Notes"), lines(report.notes)] if report.notes else []
    small = [f"random numbers of the check: seed {report.seed}", *([sentence(report.machine)] if report.machine else [])]
    return page(report.title, report.verdict, report.passed, [*parts, *_plan(report.plan), lines(small)])


# --- a comparison ----------------------------------------------------------------------------------------------------------


def _fastest(found: Comparison) -> str:
    if not found.measured:
        return "no method could compute this"
    first = found.measured[0]
    errors = [row.error for row in found.measured if row.error is not None]
    agreed = f"; the largest error of any method is {_error(max(errors))}" if errors else ""
    return f"{first.method} is fastest, with {human_time(first.median)}{agreed}"


def _methods(found: Comparison) -> str:
    rows: list[list[Cell]] = [[row.method, *(found.cells(row) if row.status == "ok" else [_refused(row)])] for row in found.rows]
    fastest = [index for index, row in enumerate(found.rows) if row.method == found.fastest]
    return table(found.columns, rows, marked=fastest)


def _refused(row: Measured) -> Cell:
    words = f"{row.status}: {row.reason}"
    return Marked(words) if row.status == "failed" else words


# --- a report --------------------------------------------------------------------------------------------------------------


def _checks(report: Report) -> str:
    rows: list[list[Cell]] = []
    for check in dict.fromkeys(row.check for row in report.rows):
        count, worst = report.summary(check)
        place = worst.parameter if worst.where is None else f"{worst.parameter}, {worst.where}"
        rows.append([check, report.about(check), _verdict(worst), str(count), worst.size, worst.allowed, place])
    return table(("check", "what is compared", "verdict", "rows", "worst error", "allowed", "worst in"), rows, words=(0, 1, 2, 6))


def _failures(report: Report) -> str:
    rows: list[list[Cell]] = []
    for row in report.failures[:SHOWN]:
        place = "" if row.where is None else str(row.where)
        rows.append(
            [row.check, row.parameter, place, f"{row.error:.3g}", f"{row.tolerance:.3g}", "; ".join(filter(None, (row.told, row.reason)))]
        )
    more = [f"and {len(report.failures) - SHOWN} more"] * (len(report.failures) > SHOWN)
    head = ("check", "parameter", "where", "error over its row", "allowed", "numbers, and why so much is allowed")
    return table(head, rows, words=(0, 1, 2, 5)) + lines(more)


def _by_parameter(report: Report) -> dict[str, tuple[float, str, bool]]:
    """The worst ratio of error and tolerance of each parameter, its words, and whether it failed."""
    found: dict[str, tuple[float, str, bool]] = {}
    for row in report.rows:
        ratio = row.error / row.tolerance if row.tolerance else 0.0 if row.passed else inf
        if row.parameter not in found or ratio > found[row.parameter][0]:
            words = f"{_ratio(ratio)} ({row.check})" if ratio else "0"
            found[row.parameter] = (ratio, words if row.verdict == "passed" else f"{words} {row.verdict}", not row.passed)
    return found


def _dot(name: str, ratio: float, words: str, failed: bool) -> Dot:
    return Dot(name, ratio, words, bad=failed)


def _errors(report: Report) -> str:
    """A row for each parameter, a column for each check: the error in eps of the dtype."""
    checks = list(dict.fromkeys(row.check for row in report.rows))
    cells: dict[str, dict[str, Row]] = {}
    for row in report.rows:
        here = cells.setdefault(row.parameter, {})
        if row.check not in here or (row.passed, -row.error) < (here[row.check].passed, -here[row.check].error):
            here[row.check] = row
    rows: list[list[Cell]] = [[name, *(_size(found.get(check)) for check in checks)] for name, found in cells.items()]
    return table(("parameter", *checks), rows)


def _size(row: Row | None) -> Cell:
    if row is None:
        return ""
    return row.size if row.verdict == "passed" else Marked(f"{row.size} {row.verdict}", not row.passed)


def _verdict(row: Row) -> Cell:
    return Marked(row.verdict, not row.passed)


# --- both ------------------------------------------------------------------------------------------------------------------


def _plan(plan: Plan | None) -> list[str]:
    if plan is None:
        return []
    rows: list[list[Cell]] = []
    for v in plan.verdicts:
        numbers = ("-", "-", "-") if v.cost is None else (str(v.cost.passes), human_bytes(v.cost.bytes), human_time(v.cost.seconds))
        rows.append([v.method, *numbers, v.reason if v.accepted else f"refused: {v.reason}"])
    chosen = [index for index, v in enumerate(plan.verdicts) if v.method == plan.method]
    parts = [heading("The plan"), table(("method", "passes", "memory", "estimated time", "why"), rows, words=(0, 4), marked=chosen)]
    if plan.uses:
        uses: Any = [[u.parameter, u.operation, u.rule, u.layout, u.formula, human_bytes(u.bytes)] for u in plan.uses]
        parts += [
            heading("Uses of parameters"),
            table(("parameter", "operation", "rule", "layout", "norms by", "bytes"), uses, words=range(5)),
        ]
    return [*parts, lines(f"note: {note}" for note in plan.notes)]


def _time(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else human_time(seconds)


def _ratio(value: float) -> str:
    return f"{value:.2g}" if isfinite(value) else "no number"


def _error(error: float) -> str:
    return "0" if error == 0 else f"{error:.1e}"
