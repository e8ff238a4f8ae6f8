"""Every method on the user's own problem: time, worst error and memory side by side, refusals with their reasons."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from . import _machine
from ._errors import InputError, MixingError, PartialsError
from ._part import part
from ._plan import Plan, human_bytes, human_time, known
from ._probe import Facts, demand_policy, look
from ._problem import Problem
from ._reference import Reference, dense_rows, reference
from ._run import NAMES, plan
from ._state import drawn_from, random_state, rng_kept
from .checks import inspect
from .html import of_comparison
from .methods import METHODS
from .methods._base import entries, result_bytes

ENOUGH = 5.0
"""Seconds of measuring that a method may take: slow ones are run fewer times than asked, at least once."""
TOO_LONG = 20.0
"""Estimated seconds of one run from which a method is left out, unless it was named."""

Progress = Callable[[str], None]
Drawing = Callable[[], AbstractContextManager[None]]
"""A context in which f draws the same random numbers each time; it does nothing where f draws none."""


@dataclass(frozen=True)
class Row:
    """What one method did."""

    method: str
    status: Literal["ok", "refused", "skipped", "failed"]
    reason: str = ""
    seconds: tuple[float, ...] = ()
    """Every timed run. A run makes the plan, computes, and forms dense rows: `pt.jacobian(..., check="never").dict()`."""
    warm: bool = True
    """Whether an untimed run went before; a run so slow that one is enough is timed at once."""
    error: float | None = None
    """max over rows of |row - reference| / |reference|."""
    memory: int | None = None
    """Growth of memory in bytes at its highest, results included; None where it could not be measured."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float | None:
        """The distance between the quartiles; None for a single run."""
        if len(self.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"method": self.method, "status": self.status, "reason": self.reason}
        if self.status == "ok":
            found |= {"median": self.median, "iqr": self.spread, "min": min(self.seconds), "runs": len(self.seconds), "warm": self.warm}
            found |= {"seconds": list(self.seconds), "error": None if self.error is None else _finite(self.error), "memory": self.memory}
        return found


@dataclass(frozen=True)
class Comparison:
    """What `partials.compare` found: `print` it, `.plot(path)` it, or take `.to_json()`, `.to_markdown()`, `.to_html()`, `.rows`.

    >>> import torch, partials as pt
    >>> found = pt.compare(torch.nn.Linear(3, 2), torch.randn(5, 3), methods="capture", repeats=1)
    >>> found.fastest, found.samples, found.entries
    ('capture', 5, 8)
    """

    function: str
    samples: int
    outputs: tuple[int, ...]
    entries: int
    dtype: str
    rows: tuple[Row, ...]
    reference: str
    """Where the rows come from that errors are measured against."""
    machine: dict[str, Any]
    plan: Plan | None = None
    """What a call that names no method would do; None where it would be refused."""

    @property
    def measured(self) -> tuple[Row, ...]:
        """The rows of the methods that ran, fastest first."""
        return tuple(sorted((row for row in self.rows if row.status == "ok"), key=lambda row: row.median))

    @property
    def fastest(self) -> str | None:
        """The name of the method with the smallest median; None where none ran."""
        return self.measured[0].method if self.measured else None

    def relative(self, row: Row) -> float:
        """How many times as long as the fastest."""
        return row.median / self.measured[0].median

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types."""
        return {
            "function": self.function,
            "samples": self.samples,
            "outputs": list(self.outputs),
            "entries": self.entries,
            "dtype": self.dtype,
            "fastest": self.fastest,
            "reference": self.reference,
            "machine": self.machine,
            "rows": [row.to_dict() | ({"relative": self.relative(row)} if row.status == "ok" else {}) for row in self.rows],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """A table for a README or an issue, with the machine below it."""
        lines = ["| " + " | ".join(HEAD) + " |", "| --- |" + " ---: |" * (len(HEAD) - 1)]
        for row in self.rows:
            cells = self.cells(row) if row.status == "ok" else [f"{row.status}: {row.reason}".replace("|", "\\|"), *[""] * (len(HEAD) - 2)]
            lines.append(f"| `{row.method}` | " + " | ".join(cells) + " |")
        return "\n".join([self.title, "", *lines, "", *(f"{sentence}  " for sentence in self.notes)]) + "\n"

    def to_html(self) -> str:
        """One self-contained page: the table, pictures of time and memory, the plan and the machine; no script, nothing fetched."""
        return of_comparison(self)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """A matplotlib figure of the times, written to `path` if there is one."""
        figure = self._figure()
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=160)
        return figure

    @property
    def title(self) -> str:
        outputs = torch.Size(self.outputs).numel()
        words = [
            f"{outputs} output{'s' * (outputs != 1)} w.r.t. {self.entries} entries",
            f"{self.samples} sample{'s' * (self.samples != 1)}",
            self.dtype,
        ]
        return f"{self.function}: {', '.join(words)}"

    def __str__(self) -> str:
        lines = [self.title, _line(*HEAD)]
        lines += [
            _line(row.method, *self.cells(row)) if row.status == "ok" else f"  {row.method:<10}{row.status}: {row.reason}"
            for row in self.rows
        ]
        return "\n".join([*lines, *(f"  {sentence}" for sentence in self.notes)])

    __repr__ = __str__

    @property
    def columns(self) -> tuple[str, ...]:
        """The heads of the table."""
        return HEAD

    def cells(self, row: Row) -> list[str]:
        """The row of a method that ran, under all columns but the first."""
        spread, runs = "-" if row.spread is None else human_time(row.spread), str(len(row.seconds)) + ("" if row.warm else "*")
        error = "-" if row.error is None else "0" if row.error == 0 else f"{row.error:.1e}"
        memory = "-" if row.memory is None else human_bytes(row.memory)
        return [human_time(row.median), spread, human_time(min(row.seconds)), runs, f"{self.relative(row):.2f}", error, memory]

    @property
    def notes(self) -> list[str]:
        """What stands below the table."""
        cold = ["* one run, without a warm-up"] if any(not row.warm for row in self.measured) else []
        return [*cold, f"error: the largest |row - reference| / |reference|; reference: {self.reference}", _machine.sentence(self.machine)]

    def _figure(self) -> Any:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("a plot needs matplotlib: pip install 'partials[plot]'") from None
        shown = self.measured[::-1]
        others = [row for row in self.rows if row.status != "ok"]
        figure = Figure(figsize=(8, 1.6 + 0.42 * (len(shown) + 0.6 * len(others))), layout="constrained")
        draw_times(figure.add_subplot(), self)
        figure.suptitle(self.title, fontsize=11)
        below = [f"{row.method} {row.status}: {_shortened(row.reason)}" for row in others] + [_machine.sentence(self.machine)]
        figure.supxlabel("\n".join(below), fontsize=7, color="0.4")
        return figure


HEAD = ("method", "median", "IQR", "min", "runs", "relative", "worst error", "peak memory")


def draw_times(axes: Any, comparison: Comparison, *, errors: bool = True) -> None:
    """A dot for each method's median time on matplotlib axes, fastest on top, with its error and memory written beside it."""
    rows = comparison.measured[::-1]
    if not rows:
        axes.text(0.5, 0.5, "no method ran", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    low, high = min(min(row.seconds) for row in rows), max(max(row.seconds) for row in rows)
    left, right = low / 2, high * (2 * high / low) ** 0.75
    for i, row in enumerate(rows):
        color = "#2f6690" if i == len(rows) - 1 else "#7d98b3"
        axes.hlines(i, left, row.median, color=color, lw=0.8, ls=":")
        axes.hlines(i, min(row.seconds), max(row.seconds), color=color, lw=3, alpha=0.5)
        axes.plot(row.median, i, "o", color=color, ms=8)
        told = [human_time(row.median), f"×{comparison.relative(row):.3g}" if i < len(rows) - 1 else ""]
        told += ["exact" if row.error == 0 else f"error {row.error:.0e}"] if errors and row.error is not None else []
        told += [human_bytes(row.memory)] if row.memory is not None else []
        axes.annotate(
            "   ".join(filter(None, told)), (max(row.seconds), i), xytext=(9, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), [row.method for row in rows])
    axes.xaxis.set_major_formatter(_tick)
    axes.xaxis.set_minor_formatter(_tick if right < 10 * left else lambda *_: "")
    axes.set_xlabel("median time of one Jacobian (line: fastest to slowest run)", fontsize=8)
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _tick(seconds: float, _: int | None = None) -> str:
    return f"{seconds:.0f} s" if seconds >= 1 else human_time(seconds)


def compare_methods(problem: Problem, methods: Any = None, *, repeats: int = 7, progress: Progress | None = None) -> Comparison:
    """Run every method of the table, or those named, on one problem.

    A method is run once to warm up, and what it gave is compared with the reference; then it is timed up to `repeats` times
    within `ENOUGH` seconds.

    Raises
    ------
    InputError
        for names that are not in the table, or `repeats` below one.
    MixingError
        where f mixes samples: no row of any method would belong to one sample.
    RandomnessError
        where f draws random numbers and no policy was given.
    """
    say = progress or (lambda _: None)
    names = _names(methods)
    if not isinstance(repeats, int) or repeats < 1:
        raise InputError("repeats is not a number of runs", got=repr(repeats), expected="a whole number from 1 on")
    facts = look(problem)
    demand_policy(problem, facts)
    device = problem.targets[0].tensor.device
    drawing = partial(drawn_from, random_state(device), device) if facts.random else nullcontext
    with rng_kept(device):
        say("checking that samples stay apart")
        _demand_independence(problem)
        say("computing the reference")
        with drawing():
            trusted = reference(problem, facts)
        rows = [_row(problem, facts, name, trusted, repeats, methods is not None, say, drawing) for name in names]
    return Comparison(
        function=problem.name,
        samples=problem.size,
        outputs=facts.out_shape,
        entries=entries(problem),
        dtype=str(problem.dtype).removeprefix("torch."),
        rows=tuple(rows),
        reference="none, since every method draws its own random numbers" if trusted is None else trusted.words,
        machine=_machine.describe(device),
        plan=_planned(problem),
    )


def _planned(problem: Problem) -> Plan | None:
    try:
        made = plan(problem)[0]
    except Exception:  # each method's row tells its own reason
        return None
    made.recorded = made.uses  # described now, so that what was recorded is let go
    return made


def _demand_independence(problem: Problem) -> None:
    try:
        inspect(problem, "auto", "quick")
    except MixingError:
        raise
    except Exception:  # each method's row tells its own reason
        return


def _names(methods: Any) -> list[str]:
    if methods is None:
        return NAMES
    names = [methods] if isinstance(methods, str) else list(methods) if isinstance(methods, Iterable) else [methods]
    if not names or "auto" in names:
        raise InputError("methods are given by name", got=repr(methods), expected=f"some of: {', '.join(NAMES)}")
    return [known(name, NAMES) for name in dict.fromkeys(names)]


def _row(
    problem: Problem, facts: Facts, name: str, trusted: Reference | None, repeats: int, named: bool, say: Progress, drawing: Drawing
) -> Row:
    if reason := _refusal(problem, facts, name):
        say(f"{name}: refused")
        return Row(name, "refused", reason)
    device = problem.targets[0].tensor.device

    def run() -> dict[str, torch.Tensor]:
        with drawing():
            return dense_rows(problem, name)

    try:
        say(f"{name}: warming up")
        expected = _rehearsed(problem, facts, name)
        if expected > TOO_LONG and not named:
            return Row(name, "skipped", f"one run would take about {_long(expected)}; name the method to run it all the same")
        rows, first, memory = _machine.measured(run, device)
        error = None if trusted is None else trusted.worst_error(rows)
        del rows
        runs = min(repeats, int(ENOUGH / max(first, 1e-9)))
        say(f"{name}: timing {max(runs, 1)} run{'s' * (runs > 1)}")
        seconds = tuple(_machine.timed(run, device) for _ in range(runs)) or (first,)
    except PartialsError as said:
        return Row(name, "refused", f"{said.what} ({said.got})" if said.got else said.what)
    except Exception as error_of_method:  # a method that breaks on the user's function is a row of the table, too
        return Row(name, "failed", f"{type(error_of_method).__name__}: {str(error_of_method).partition(chr(10))[0]}")
    return Row(name, "ok", "", seconds, warm=runs > 0, error=error, memory=memory)


def _refusal(problem: Problem, facts: Facts, name: str) -> str:
    """Why a method cannot run, as far as that is known without running it; else ""."""
    needed = result_bytes(problem, facts)
    if problem.budget is not None and needed > problem.budget:
        return f"the dense rows need {human_bytes(needed)}, more than max_memory"
    verdict = METHODS[name].verdict(problem, facts) if name in METHODS else None
    return "" if verdict is None or verdict.accepted else verdict.reason


def _rehearsed(problem: Problem, facts: Facts, name: str) -> float:
    """About how many seconds one run will take: that of a few samples, scaled by the method's own cost.

    The rehearsal also loads what torch loads at a first use, which belongs neither to a method's time nor to its memory.
    """
    device = problem.targets[0].tensor.device
    if not problem.batched or problem.size < 2 or facts.single_error is not None:
        return 0.0
    few = part(problem, torch.arange(max(1, min(16, problem.size // 8)), device=device))
    if name not in METHODS:
        dense_rows(few, name)
        return 0.0
    whole, cost = METHODS[name].verdict(problem, facts).cost, METHODS[name].verdict(few, facts).cost
    assert whole is not None
    if cost is None or cost.seconds > TOO_LONG:
        return whole.seconds
    expected = float("inf")
    for _ in range(3):
        expected = min(expected, _machine.timed(lambda: dense_rows(few, name), device) * whole.seconds / cost.seconds)
        if expected < TOO_LONG:
            break
    return expected


def _long(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _line(method: str, *cells: str) -> str:
    widths = (10, 10, 10, 6, 10, 13, 13)
    return f"  {method:<10}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _finite(number: float) -> float | str:
    """JSON has no infinity: its name."""
    return number if abs(number) < torch.inf else str(number)


def _shortened(text: str, limit: int = 110) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
