"""Paired timing: the candidates take turns, so that a busy moment hits all of them; ratios are medians of the turns' ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    name: str
    seconds: float
    """Median."""
    ratio: float
    """Median over turns of this candidate's time by the first one's."""
    spread: float
    """Interquartile range of that ratio."""


def paired(candidates: dict[str, Callable[[], Any]], turns: int) -> list[Timing]:
    """Times of all candidates, in turns, after two warm-ups of each."""
    for run in candidates.values():
        run()
        run()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    first = next(iter(taken.values()))
    found = []
    for name, times in taken.items():
        ratios = [t / s for t, s in zip(times, first, strict=True)]
        quarters = statistics.quantiles(ratios, n=4) if turns > 1 else [ratios[0]] * 3
        found.append(Timing(name, statistics.median(times), statistics.median(ratios), quarters[2] - quarters[0]))
    return found
