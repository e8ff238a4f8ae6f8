"""Paired timing: the candidates take turns, so that a busy moment hits all of them; ratios are medians of the turns' ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Times = dict[str, list[float]]
"""Candidate -> seconds of every turn, in the order of the turns."""


@dataclass(frozen=True)
class Timing:
    name: str
    seconds: float
    """Median."""
    ratio: float
    """Median over turns of this candidate's time by the first one's."""
    spread: float
    """Interquartile range of that ratio."""


def taken(candidates: dict[str, Callable[[], Any]], turns: int, seconds: float = float("inf")) -> Times:
    """Times of all candidates, in turns, after two warm-ups of each; fewer turns (three at the least) where they would take longer."""
    for _ in range(2):
        start = time.perf_counter()
        for run in candidates.values():
            run()
        once = time.perf_counter() - start
    times: Times = {name: [] for name in candidates}
    for _ in range(max(3, int(min(turns, seconds / max(once, 1e-9))))):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Times, name: str, by: str) -> tuple[float, float]:
    """(median, interquartile range) over turns of one candidate's time by another's."""
    ratios = [t / s for t, s in zip(times[name], times[by], strict=True)]
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return statistics.median(ratios), quarters[2] - quarters[0]


def paired(candidates: dict[str, Callable[[], Any]], turns: int) -> list[Timing]:
    """The candidates' times beside the first one's."""
    times = taken(candidates, turns)
    first = next(iter(times))
    return [Timing(name, statistics.median(times[name]), *ratio(times, name, first)) for name in times]
