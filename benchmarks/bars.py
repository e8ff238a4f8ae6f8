"""The bars: what each figure is, and what it should be at the most (or at the least)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import CASES
from benchmarks.measure import GPT2, LINE, ONE_STEP, OVERHEAD, SKETCH
from benchmarks.overhead import BARS
from benchmarks.timing import ratio

Figures = dict[str, Any]
"""Case -> what `measure` found."""

MLP, CNN, FIELD, TRANSFORMER, LSTM, TEN, HUNDRED, ROWS = (
    "MLP 784-512-512-10, N=256",
    "tutorial CNN, N=64",
    "2-64-64-1 tanh, N=4096",
    "transformer d=128, T=64, N=64",
    "LSTM H=128, T=64, N=64",
    "MLP C=10, N=64",
    "MLP C=100, N=64",
    "table of 50 000 rows, N=32",
)
IN_STEPS = {
    "factors": {MLP: 0.8, CNN: 0.9, FIELD: 0.9, TRANSFORMER: 1.0, LSTM: 2.0},
    "norms": {MLP: 0.8, CNN: 1.6, TRANSFORMER: 1.1},
    "clipped sum": {MLP: 1.3, CNN: 2.0, TRANSFORMER: 1.6},
    "Gram": {MLP: 1.1},
}
"""Quantity -> case -> training steps that it may cost, from the call to the result."""


@dataclass(frozen=True)
class Bar:
    quantity: str
    case: str
    unit: str
    value: float | None
    spread: float
    bound: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if (self.value >= self.bound if self.at_least else self.value <= self.bound) else "missed"


def bars(figures: Figures) -> Iterator[Bar]:
    """Every bar, with the value that was measured."""
    for quantity, bounds in IN_STEPS.items():
        for case, bound in bounds.items():
            yield _by(figures, case, "quantities", quantity, ONE_STEP, bound, quantity, "training steps")
    for case in (MLP, CNN):
        yield _by(figures, case, "norms", "partials", "Opacus ghost", 0.95, "norms", "of Opacus ghost")
    for peer in ("torch.func and product", "TorchJD autogram"):
        yield _by(figures, MLP, "Gram", peer, "partials", 50, "Gram", f"times as fast as {peer}", at_least=True)
    for quantity in ("J v", "J^T u"):
        for case in CASES:
            yield _by(figures, case, "given factors", quantity, ONE_STEP, 0.5, f"{quantity}, given factors", "training steps")
    yield from _ten_outputs(figures)
    yield from _dense(figures)
    for peer, bound in (("the loop", 300), ("functional.jacobian", 50)):
        yield _by(figures, LINE, "line, slow", peer, "partials", bound, "the whole call", f"times as fast as {peer}", at_least=True)
    yield _by(figures, LINE, "line", "partials", "vmap(grad)", 0.4, "the whole call", "of vmap(grad)")
    yield from _overhead(figures)
    yield _sketch(figures)
    for case in CASES:
        yield _first_check(figures, case)


def _by(figures: Figures, case: str, group: str, name: str, by: str, bound: float, what: str, unit: str, *, at_least: bool = False) -> Bar:
    times = figures.get(case, {}).get("times", {}).get(group, {})
    value, spread = ratio(times, name, by) if name in times and by in times else (None, 0.0)
    return Bar(what, case, unit, value, spread, bound, at_least)


def _ten_outputs(figures: Figures) -> Iterator[Bar]:
    times, memory = (figures.get(TEN, {}).get(key, {}) for key in ("times", "memory"))
    ours, theirs = times.get("quantities", {}).get("factors"), times.get("rows", {}).get("torch.func")
    value = statistics.median(theirs) / statistics.median(ours) if ours and theirs else None
    yield Bar("factors", TEN, "times as fast as vmap(jacrev)", value, 0.0, 10, at_least=True)
    ours, theirs = memory.get("factors"), memory.get("torch.func")
    yield Bar("factors", TEN, "of the memory of vmap(jacrev)", ours / theirs if ours and theirs else None, 0.0, 0.05)


def _dense(figures: Figures) -> Iterator[Bar]:
    times = figures.get(MLP, {}).get("times", {})
    into = times.get("into out=", {})
    value = None
    if into:
        value = statistics.median([d / (f + z) for d, f, z in zip(into["dense(out=)"], into["factors"], into["fill"], strict=True)])
    yield Bar("dense into out=", MLP, "of factors and a fill of the result", value, 0.0, 1.4)
    peer = best_peer(times.get("rows", {}))
    value = statistics.median(times["rows"][peer]) / statistics.median(into["dense(out=)"]) if peer and into else None
    yield Bar("dense into out=", MLP, f"times as fast as the best peer ({peer})", value, 0.0, 4, at_least=True)
    for case in (MLP, CNN, TRANSFORMER):
        peer = best_peer(figures.get(case, {}).get("times", {}).get("rows", {}))
        yield _by(figures, case, "rows", "partials", peer or "", 1.0, "dense, fresh memory", f"of the best peer ({peer})")


def best_peer(rows: dict[str, list[float]]) -> str | None:
    """The peer of the least median."""
    peers = {name: statistics.median(times) for name, times in rows.items() if name not in ("partials", ONE_STEP)}
    return min(peers, key=lambda name: peers[name]) if peers else None


def _first_check(figures: Figures, case: str) -> Bar:
    """What the first call takes beyond a later one, less the ten milliseconds that it may take for any case."""
    times = figures.get(case, {}).get("times", {}).get("first check", {})
    value = None
    if times:
        more = statistics.median(times["first call"]) - statistics.median(times["later call"])
        value = max(0.0, more - 0.01) / statistics.median(times[ONE_STEP])
    return Bar('check="first", more than later calls, less 10 ms', case, "training steps", value, 0.0, 4)


def _sketch(figures: Figures) -> Bar:
    return _by(figures, GPT2, "quantities", SKETCH, ONE_STEP, 1.5, SKETCH, "training steps")


def _overhead(figures: Figures) -> Iterator[Bar]:
    """Slopes over depth, less those of a training step."""
    for what, bound in BARS.items():
        found = figures.get(OVERHEAD, {}).get("times", {}).get("slopes", {}).get(what)
        yield Bar(f"overhead of one use: {what}", OVERHEAD, "microseconds", 1e6 * found[0] if found else None, 0.0, bound)
