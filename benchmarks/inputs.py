"""`python -m benchmarks.inputs`: derivatives by inputs, Taylor mode and the automatic choice beside nested reverse mode, in one run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import partials as pt
from benchmarks.timing import Timing, paired

Case = tuple[list[int], int, Callable[..., Callable[[torch.Tensor], torch.Tensor]]]
CASES: dict[str, Case] = {
    "u_xx + u_yy, 2-64-64-1, N=4096": ([2, 64, 64, 1], 4096, pt.laplacian),
    "Laplacian, 10-64-64-1, N=4096": ([10, 64, 64, 1], 4096, pt.laplacian),
    "Laplacian, 50-256-256-1, N=256": ([50, 256, 256, 1], 256, pt.laplacian),
    "u_x": ([2, 64, 64, 1], 4096, lambda u, **how: pt.partial(u, "x", coords="xy", **how)),
    "u_xx": ([2, 64, 64, 1], 4096, lambda u, **how: pt.partial(u, "xx", coords="xy", **how)),
    "4th order": ([2, 64, 64, 1], 4096, lambda u, **how: pt.partial(u, {"x": 4}, coords="xy", **how)),
    "6th order": ([2, 64, 64, 1], 4096, lambda u, **how: pt.partial(u, {"x": 6}, coords="xy", **how)),
    "biharmonic": ([2, 64, 64, 1], 4096, pt.biharmonic),
    "small Laplacian, N=50": ([2, 20, 20, 1], 50, pt.laplacian),
}


def timed(case: Case, turns: int, training: bool) -> list[Timing]:
    """Nested reverse mode first: the others are told in its units."""
    widths, samples, operator = case
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())][:-1]
    net, X = nn.Sequential(*layers), torch.randn(samples, widths[0])
    parameters = list(net.parameters())

    def run(method: str) -> Callable[[], Any]:
        at = operator(net, method=method)

        def value() -> Any:
            with torch.no_grad():
                return at(X)

        def step() -> Any:
            return torch.autograd.grad(at(X).square().mean(), parameters, allow_unused=True)

        return step if training else value

    return paired({method: run(method) for method in ("nested", "taylor", "auto")}, turns)


def main() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    for name, case in CASES.items():
        for training in (False, True):
            figures = timed(case, 7, training)
            what = "training" if training else "value"
            print(f"{name:<34}{what:<10}" + "".join(f"{t.name} {1e3 * t.seconds:8.2f} ms x {t.ratio:<6.2f}" for t in figures))


if __name__ == "__main__":
    main()
