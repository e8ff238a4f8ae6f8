"""From figures to text: the table that is printed, and docs/benchmarks.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bars import Bar, Figures, bars
from benchmarks.measure import ONE_STEP
from benchmarks.reasons import reason
from benchmarks.timing import ratio
from partials._plan import human_bytes

ACCELERATOR = Path(__file__).parent / "accelerator.json"
"""What `benchmarks.accelerator --json` wrote on a machine that has one."""
HEAD = """# Benchmarks

This page is written by `./dev bench --write`; its figures come from the run that it describes.

{machine}
{versions}

The unit is one *training step*: a forward and a backward of the sum, of the same model and batch, in the same process. Candidates take
turns, ratios are medians over turns of the ratio within a turn, and the spread is the interquartile range. Every result is compared with
that of the library before it is timed. Times are of whole calls with `check="never"`, from the function to the result, unless factors
are given.

These are figures of a CPU; at the end are those of a GPU, of larger cases, as `python -m benchmarks.accelerator` measured them.
Derivatives by inputs, stores, two workers and calls have benchmarks of their own: `python -m benchmarks.inputs`, `.store`, `.workers`,
`.overhead`.
"""


def printed(case: str, found: dict[str, Any]) -> str:
    """One case for the terminal."""
    lines = [f"\n{case}"]
    for group, times in found["times"].items():
        by = next((name for name in (ONE_STEP, "partials") if name in times), next(iter(times)))
        for name, seconds in times.items():
            if name != by and len(seconds) == len(times[by]):
                (median, spread), ms = ratio(times, name, by), 1e3 * statistics.median(seconds)
                lines.append(f"  {group:<14}{name:<24}{ms:>10.3f} ms   x {median:<8.3g}of {by} (spread {spread:.2g})")
    lines += [f"  {peer}: {why}" for peer, why in found["refused"].items()]
    return "\n".join(lines)


def table(figures: Figures) -> str:
    """Every bar, met or missed."""
    rows = ["| quantity | case | measured | spread | bar | |", "| --- | --- | --- | --- | --- | --- |"]
    return "\n".join(rows + [_row(bar) for bar in bars(figures) if bar.case in figures])


def _row(bar: Bar) -> str:
    value = "-" if bar.value is None else f"{bar.value:.3g} {bar.unit}"
    bound = f"{'at least' if bar.at_least else 'at most'} {bar.bound:g}"
    verdict = bar.verdict if bar.verdict == "met" else f"**{bar.verdict}**"
    return f"| {bar.quantity} | {bar.case} | {value} | {f'{bar.spread:.2g}' if bar.spread else ''} | {bound} | {verdict} |"


def page(figures: Figures, machine: str, versions: str) -> str:
    """docs/benchmarks.md."""
    parts = [HEAD.format(machine=machine, versions=versions), "## The bars\n", table(figures), *_missed(figures)]
    for case, found in figures.items():
        parts += [f"\n## {case}\n", *_case(found)]
    if ACCELERATOR.exists():
        parts += _accelerator(json.loads(ACCELERATOR.read_text()))
    return "\n".join(parts) + "\n"


def _accelerator(known: dict[str, Any]) -> Iterator[str]:
    """The record of a run of `benchmarks.accelerator`."""
    yield f"\n## On an accelerator\n\n{known['machine']}. Memory is what the allocator handed out at once, beyond the model and the batch."
    yield "\n| case | quantity | | time, ms | training steps | memory |\n| --- | --- | --- | --- | --- | --- |"
    plain: list[str] = []
    for case, quantities in known.items():
        for quantity, candidates in quantities.items() if case != "machine" else ():
            for who, its in candidates.items():
                if isinstance(its, dict):
                    cells = f"{1e3 * its['seconds']:.2f} | {its['steps']:.2f} | {human_bytes(float(its['peak'] or 0))}"
                    yield f"| {case} | {quantity} | {who} | {cells} |"
                else:
                    plain.append(
                        f"- {case}, {quantity}, {who}: "
                        + (f"{human_bytes(its)}/s" if "bytes/s" in quantity else f"{its:.2g}" if isinstance(its, float) else its)
                    )
    yield "\n" + "\n".join(plain)


def _missed(figures: Figures) -> Iterator[str]:
    """Under the table: why, and what was tried, the bars of one reason together."""
    groups: dict[str, list[str]] = {}
    for bar in bars(figures):
        if bar.case in figures and bar.verdict == "missed":
            groups.setdefault(reason(bar), []).append(f"{bar.quantity} ({bar.case}: {bar.value:.3g} {bar.unit})")
    if groups:
        yield "\n### Bars that were missed\n"
    yield from (f"- {'; '.join(missed)}. {words}" for words, missed in groups.items())


def _case(found: dict[str, Any]) -> Iterator[str]:
    yield "| | time, ms | training steps | spread |\n| --- | --- | --- | --- |"
    for group, times in found["times"].items():
        for name, seconds in times.items():
            if name == ONE_STEP and group not in ("quantities", "line"):
                continue
            what = f"{group}: {name}" if group in ("rows", "norms", "Gram", "J v", "line", "line, slow") else name
            own = ONE_STEP in times and len(times[ONE_STEP]) == len(seconds)
            median, spread = ratio(times, name, ONE_STEP) if own else (None, 0.0)
            steps = f"{median:.3g} | {spread:.2g}" if median is not None else " | "
            yield f"| {what} | {1e3 * statistics.median(seconds):.3g} | {steps} |"
    memory = {name: amount for name, amount in found["memory"].items() if amount is not None}
    if memory:
        yield "\n| in a fresh process | peak growth |\n| --- | --- |"
        yield from (f"| {name} | {human_bytes(amount)} |" for name, amount in memory.items() if not name.endswith("seconds"))
        kept = {name.removesuffix(", kept memory, seconds"): s for name, s in memory.items() if name.endswith("seconds")}
        if kept:
            told = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in kept.items())
            yield f"\nRows with an allocator that keeps its memory: {told}."
    if found["refused"]:
        yield "\nNot timed:\n"
        yield from (f"- {peer}: {_plain(why)}" for peer, why in found["refused"].items())


def _plain(why: str) -> str:
    """An exception's words, without what Markdown would take for its own."""
    return "`" + why.replace("`", "'") + "`"
