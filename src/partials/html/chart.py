"""A dot for each of some quantities on a logarithmic axis, as SVG: readable on white and on black."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, STEP, ABOVE, BELOW = 860, 210, 190, 24, 12, 44
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1c2733 } .soft { fill: #5a6a7a; font-size: 11px } .grid { stroke: #d5dde5 }
.dot { fill: #2f6690 } .range { stroke: #2f6690; stroke-width: 3; opacity: .45 }
.bad { fill: #b3261e } .limit { stroke: #b3261e; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e3e8ee } .soft { fill: #9aa8b6 } .grid { stroke: #37434f } .dot { fill: #7fb2dd } .range { stroke: #7fb2dd }
  .bad { fill: #ff8a80 } .limit { stroke: #ff8a80 }
}
""".strip()


@dataclass(frozen=True)
class Dot:
    """A quantity with its name, what is written beside it, and the range that it was seen in."""

    name: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None
    bad: bool = False


def dots(rows: Sequence[Dot], label: str, tick: Callable[[float], str], *, limit: float | None = None, base: int = 10) -> str:
    """Rows from top to bottom; zeros and what is smaller than the axis stand at its left end, infinities at its right."""
    low, high = _ends([v for r in rows for v in (r.value, r.low, r.high) if v is not None] + ([] if limit is None else [limit]))
    height = ABOVE + STEP * len(rows) + BELOW
    bottom = height - BELOW + 6

    def x(value: float) -> float:
        share = 0.0 if value <= low else 1.0 if value >= high else math.log(value / low) / math.log(high / low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"<style>{STYLE}</style>",
    ]
    for value in _ticks(low, high, base):
        out.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{ABOVE}" y2="{bottom}"/>')
        out.append(f'<text class="soft" text-anchor="middle" x="{x(value):.1f}" y="{bottom + 14}">{escape(tick(value))}</text>')
    if limit is not None:
        out.append(f'<line class="limit" x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="{ABOVE}" y2="{bottom}"/>')
    for index, row in enumerate(rows):
        out += _row(row, x, ABOVE + STEP * (index + 0.5))
    out.append(f'<text class="soft" text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 8}">{escape(label)}</text>')
    return "\n".join([*out, "</svg>"])


def _row(row: Dot, x: Callable[[float], float], y: float) -> list[str]:
    out, end = [], x(row.value)
    if row.low is not None and row.high is not None:
        out.append(f'<line class="range" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}"/>')
        end = x(row.high)
    kind = "dot bad" if row.bad else "dot"
    out.append(f'<circle class="{kind}" cx="{x(row.value):.1f}" cy="{y}" r="5"/>')
    out.append(f'<text text-anchor="end" x="{LEFT - 12}" y="{y + 4}">{escape(_shortened(row.name))}</text>')
    out.append(f'<text class="{"bad" if row.bad else "soft"}" x="{end + 10:.1f}" y="{y + 4}">{escape(row.text)}</text>')
    return out


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the axis: a little outside of what is positive and finite."""
    seen = [value for value in values if 0 < value < math.inf] or [1.0]
    low, high = min(seen) / 1.6, max(seen) * 1.6
    return low, high


def _ticks(low: float, high: float, base: int) -> list[float]:
    """Powers of the base, eight at most; where there are fewer than two, also twice and five times those of ten."""
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    powers = range(first, last + 1, max(1, math.ceil((last - first + 1) / 8)))
    if len(powers) >= 2:
        return [float(base) ** power for power in powers]
    finer = [factor * float(base) ** power for power in range(first - 1, last + 2) for factor in (1, 2, 5)]
    return [value for value in finer if low <= value <= high]


def _shortened(name: str, limit: int = 30) -> str:
    return name if len(name) <= limit else "…" + name[1 - limit :]
