"""`python -m benchmarks.calibrate [--write]`: the constants that formulas are chosen by, and how often the choice is the faster one."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import partials as pt
from benchmarks.timing import taken
from partials import _constants, _formulas
from partials._conv import Conv
from partials._factors import Outer
from partials._machine import describe

FILE = Path(_constants.__file__)
BLOCK = [(256, 2, 64, 64), (64, 16, 64, 64), (64, 64, 128, 128), (64, 64, 32, 32), (64, 128, 16, 16), (16, 128, 128, 512), (8, 512, 64, 64)]
"""Outer blocks: samples, positions, input and output features."""
CONV = [(64, 3, 6, 32, 5), (64, 6, 16, 14, 5), (32, 16, 16, 32, 3), (32, 64, 64, 8, 3), (32, 128, 128, 4, 3), (256, 8, 8, 16, 3)]
"""Convolutions: samples, channels in and out, height and width, kernel."""


def constants() -> dict[str, float]:
    """Seconds of each kind of elementary work: the least of many, since other work on the machine only adds."""
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    x, g = torch.randn(64, 64, 64), torch.randn(64, 64, 64)
    p, q, r = torch.randn(2**19), torch.randn(2**19), torch.empty(2**19)
    tiny = torch.randn(4, 4)
    return {
        "PRODUCT": _least(lambda: a @ b) / 768**3,
        "BATCHED": _least(lambda: torch.bmm(x.mT, g)) / 64**4,
        "ENTRY": _least(lambda: torch.mul(p, q, out=r).sum()) / 2**19,
        "CALL": _least(lambda: [torch.einsum("ab,cb->ac", tiny, tiny) for _ in range(50)]) / 50,
    }


def choices() -> Iterator[tuple[str, str, dict[str, float], dict[str, float]]]:
    """(block, quantity, seconds measured by formula, seconds estimated)."""
    for n, t, i, o in BLOCK:
        block = Outer(torch.randn(n, t, 1, i), torch.randn(n, 1, t, 1, o), (o, i))
        rows, positions, weight = (n, 1, 1), (t, t), (1, i, o)
        name = f"N={n} T={t} I={i} O={o}"
        yield name, "norms", *_both("norms", block.squared_norms, _formulas.inner(rows, positions, weight, 1, same=True))
        yield name, "gram", *_both("gram", lambda block=block: block.gram(block), _formulas.gram((n, 1, n, 1), positions, weight))
    for n, i, o, size, k in CONV:
        pads = ((k // 2, k // 2),) * 2
        conv = Conv(torch.randn(n, 1, i, size, size), torch.randn(n, 1, 1, o, size, size), (o, i, k, k), (1, 1), pads, (1, 1), 1)
        norms, dense = conv._costs()
        name, out = f"conv N={n} {i}-{o} {size}x{size} k={k}", torch.empty(n, 1, o * i * k * k)
        yield name, "norms", *_both("norms", conv.squared_norms, norms)
        yield name, "dense", *_both("dense", lambda conv=conv, out=out: conv.write(out), dense)


def _both(quantity: str, run: Callable[[], Any], estimated: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    def forced(formula: str) -> Any:
        with pt.formulas(**{quantity: formula}):
            return run()

    times = taken({formula: lambda formula=formula: forced(formula) for formula in estimated}, 7, 0.5)  # type: ignore[misc]
    return {formula: statistics.median(seconds) for formula, seconds in times.items()}, estimated


def _least(run: Callable[[], Any]) -> float:
    return min(taken({"": run}, 61)[""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.calibrate", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the constants into {FILE.name}")
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    found, machine = constants(), describe(torch.device("cpu"))
    words = f"{machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}"
    line = f"{', '.join(found)} = {', '.join(f'{seconds:.2g}' for seconds in found.values())}"
    print(f"{words}\n{line}")
    lost = []
    for block, quantity, seconds, estimated in choices():
        chosen, best = min(estimated, key=lambda formula: estimated[formula]), min(seconds.values())
        lost.append(seconds[chosen] / best)
        told = ", ".join(f"{formula} {1e3 * s:.3g} (estimated {1e3 * estimated[formula]:.3g})" for formula, s in seconds.items())
        print(f"  {block:<34}{quantity:<7}{'' if lost[-1] < 1.1 else f'{lost[-1]:.1f} times the best: '}{chosen}; ms: {told}")
    print(
        f"the choice takes {statistics.geometric_mean(lost):.2f} times the best formula's time (geometric mean), {max(lost):.2f} at worst"
    )
    if options.write:
        text = FILE.read_text()
        head = text[: text.index("MACHINE = ")]
        tail = text[text.index('"""A multiplication') :]
        FILE.write_text(f'{head}MACHINE = "{words}"\n{line}\n{tail}')


if __name__ == "__main__":
    main()
