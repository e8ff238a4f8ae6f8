"""The plan: which method runs, in which pieces, at what estimated cost, and why every other method lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ._errors import InputError, MemoryBudgetError, MethodError, near
from ._formulas import choice

Number = int | float
LARGE = 2**28
"""Bytes from which on it is asked whether something fits, where no budget was given."""


class TooLarge(MemoryBudgetError):
    """What was about to be held whole takes too much of what is free: it is computed in pieces instead."""


@dataclass(frozen=True)
class Cost:
    """An estimate that ranks methods; it is not a promise of seconds."""

    passes: int
    """Forward, reverse or forward-mode passes through f, of whatever batch size."""
    launches: int
    """Torch operations started: what small problems pay for."""
    flops: int
    bytes: int
    """Growth of memory: the result and what the method holds beside it."""

    @property
    def seconds(self) -> float:
        """Launches at 4 microseconds, FLOPs at 2e10 a second, fresh memory at 3e9 bytes a second."""
        return 4e-6 * self.launches + self.flops / 2e10 + self.bytes / 3e9


@dataclass(frozen=True)
class Verdict:
    """What one method says to a problem: accepted at a cost, or refused with the reason."""

    method: str
    reason: str
    cost: Cost | None = None
    chunk: int | None = None
    """Samples (or, for `forward`, parameter entries) handled at once."""

    @property
    def accepted(self) -> bool:
        return self.cost is not None


@dataclass(frozen=True)
class Use:
    """One call of an operation that takes a parameter: what `explain` prints a line for."""

    parameter: str
    operation: str
    rule: str
    layout: str = ""
    formula: str = ""
    bytes: int = 0
    flops: int = 0
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Quantity -> formula -> estimated seconds, where there are formulas to choose from: `partials.formulas` chooses another."""


@dataclass
class Plan:
    """The choice of a method, printable: `print(pt.explain(f, x))`; a Jacobian carries its own as `J.plan`.

    `.method`, `.verdicts` (each method's cost, or why it was refused), `.uses` (of each parameter: operation, rule, layout), `.notes`.

    >>> import torch, partials as pt
    >>> J = pt.jacobian(torch.nn.Linear(3, 2), torch.randn(5, 3))
    >>> J.plan.method, J.plan.to_dict()["samples"]
    ('capture', 5)
    """

    function: str
    method: str
    asked: tuple[Verdict, ...] | Callable[[], tuple[Verdict, ...]]
    """The methods' verdicts, or how to ask for them: where the first method ran at once, the others are asked when somebody looks."""
    samples: int
    outputs: tuple[int, ...]
    parameters: dict[str, tuple[int, ...]]
    dtype: str
    chunk: int | None = None
    recorded: tuple[Use, ...] | Callable[[], tuple[Use, ...]] = ()
    """The uses of parameters, or how to describe them: nobody may look."""
    notes: list[str] = field(default_factory=list)
    check: str = "first"

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What each method said, in the order of the table."""
        if callable(self.asked):
            self.asked = self.asked()
        return self.asked

    @property
    def uses(self) -> tuple[Use, ...]:
        """The uses of parameters that a capture recorded."""
        if callable(self.recorded):
            self.recorded = self.recorded()
        return self.recorded

    def __getstate__(self) -> dict[str, Any]:
        """What was left to be asked is asked before the plan goes to another process, with a report or an error."""
        return {**vars(self), "asked": self.verdicts, "recorded": self.uses}

    @property
    def chosen(self) -> Verdict:
        return next(v for v in self.verdicts if v.method == self.method)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return {
            "function": self.function,
            "method": self.method,
            "samples": self.samples,
            "outputs": list(self.outputs),
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
            "dtype": self.dtype,
            "chunk": self.chunk,
            "check": self.check,
            "notes": list(self.notes),
            "uses": [vars(use) for use in self.uses],
            "methods": [
                {
                    "method": v.method,
                    "accepted": v.accepted,
                    "reason": v.reason,
                    "chunk": v.chunk,
                    **({} if v.cost is None else {**vars(v.cost), "seconds": v.cost.seconds}),
                }
                for v in self.verdicts
            ],
        }

    def __str__(self) -> str:
        entries = sum(_product(shape) for shape in self.parameters.values())
        head = (
            f"Jacobian of {_counted(_product(self.outputs), 'output')} w.r.t. {_counted(entries, 'entry', 'entries')} "
            f"of {_counted(len(self.parameters), 'tensor')}, {_counted(self.samples, 'sample')}, {self.dtype}"
        )
        lines = [head, _row("", "method", "passes", "memory", "est. time", "why")]
        for v in self.verdicts:
            mark = ">" if v.method == self.method else ""
            if v.cost is None:
                lines.append(_row(mark, v.method, "-", "-", "-", f"refused: {v.reason}"))
            else:
                lines.append(_row(mark, v.method, str(v.cost.passes), human_bytes(v.cost.bytes), human_time(v.cost.seconds), v.reason))
        if self.uses:
            rows = [_HEAD, *map(_line, self.uses)]
            kept = [column for column in range(len(_HEAD)) if any(row[column] for row in rows[1:])]
            rows = [tuple(row[column] for column in kept) for row in rows]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["    " + "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.chunk is not None:
            lines.append(f"  in chunks of {self.chunk}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def choose(verdicts: Sequence[Verdict], wanted: str, budget: int | None) -> Verdict:
    """The cheapest accepted verdict within the budget, or the one wanted by name.

    Raises
    ------
    MethodError
        where the method refuses, or every method does.
    MemoryBudgetError
        where the methods that could run need more bytes than the budget.
    """
    by_name = {v.method: v for v in verdicts}
    if wanted != "auto":
        verdict = by_name[wanted]
        if verdict.cost is None:
            others = [v.method for v in verdicts if v.accepted]
            raise MethodError(
                f"method={wanted!r} cannot run here: {verdict.reason}",
                got=f"method={wanted!r}",
                hint=f"method={others[0]!r}" if others else "pt.explain(f, ...)",
            )
        candidates = [verdict]
    else:
        candidates = [v for v in verdicts if v.accepted]
        if not candidates:
            raise MethodError(
                "no method can compute this", got="; ".join(f"{v.method}: {v.reason}" for v in verdicts), hint="pt.explain(f, ...)"
            )
    fitting = [v for v in candidates if budget is None or (v.cost is not None and v.cost.bytes <= budget)]
    if not fitting:
        least = min(candidates, key=lambda v: v.cost.bytes if v.cost else 0)
        assert least.cost is not None
        raise MemoryBudgetError(
            "the result does not fit within max_memory",
            got=f"max_memory of {human_bytes(budget or 0)}",
            expected=f"at least {human_bytes(least.cost.bytes)} (method {least.method!r})",
            hint="fewer samples or parameters at once, or a larger max_memory",
        )
    return min(fitting, key=lambda v: v.cost.seconds if v.cost else float("inf"))


def known(method: str, names: Sequence[str]) -> str:
    """`method` if it is in the table, else an error with the table's names."""
    if method != "auto" and method not in names:
        raise InputError(
            f"method={method!r} is unknown",
            got=repr(method),
            expected=f"one of: auto, {', '.join(names)}",
            hint=near(str(method), ["auto", *names]),
        )
    return method


def parse_bytes(amount: Number | str | None) -> int | None:
    """Bytes from a number or from text such as "2GiB" or "500 MB"."""
    if amount is None:
        return None
    if isinstance(amount, int | float) and not isinstance(amount, bool):
        value = float(amount)
    else:
        text = str(amount).strip().lower().replace(" ", "")
        digits = text.rstrip("bikmgt")
        units = {
            "": 1,
            "b": 1,
            **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")},
            **{f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")},
        }
        try:
            value = float(digits) * units[text[len(digits) :]]
        except (KeyError, ValueError):
            raise InputError(
                f"max_memory={amount!r} is not an amount of memory", got=repr(amount), expected='bytes, or text such as "2GiB"'
            ) from None
    if not value > 0:
        raise InputError(f"max_memory={amount!r} is not an amount of memory", got=repr(amount), expected="more than zero bytes")
    return int(value)


def human_bytes(amount: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def human_time(seconds: float) -> str:
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def _row(mark: str, method: str, passes: str, memory: str, time: str, why: str) -> str:
    return f"{mark:<2}{method:<10}{passes:>8}  {memory:>10}  {time:>10}  {why}".rstrip()


_HEAD = ("parameter", "operation", "rule", "layout", "norms by", "Gram by", "dense by", "bytes")


def _line(use: Use) -> tuple[str, ...]:
    chosen = _ranked(use, "norms") or use.formula, _ranked(use, "gram"), _ranked(use, "dense")
    return use.parameter, use.operation, use.rule, use.layout, *chosen, human_bytes(use.bytes)


def _ranked(use: Use, quantity: str) -> str:
    """The formulas with their estimates, the chosen one first."""
    costs = dict(use.costs.get(quantity, {}))
    if not costs:
        return ""
    first = choice(quantity, costs)
    order = [first, *sorted(costs.keys() - {first}, key=lambda formula: costs[formula])]
    return ", ".join(f"{formula} {human_time(costs[formula])}" for formula in order)


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}".replace(",", " ")


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
