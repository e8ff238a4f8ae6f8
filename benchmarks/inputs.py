"""`python -m benchmarks.inputs`: derivatives by inputs beside nested reverse mode, Jacobians of residuals beside torch.func, memory of a
training step in a process of its own, and Poisson's equation, in one run. With `--threads 1`, say, on a machine that is not idle.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, hessian, vmap

import partials as pt
from benchmarks.timing import Timing, paired
from partials.solve import LevenbergMarquardt

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


def network(widths: list[int]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())][:-1])


def stepping(case: Case, method: str, training: bool) -> Callable[[], Any]:
    widths, samples, operator = case
    net = network(widths)
    X, parameters, at = torch.randn(samples, widths[0]), list(net.parameters()), operator(net, method=method)

    def value() -> Any:
        with torch.no_grad():
            return at(X)

    def step() -> Any:
        return torch.autograd.grad(at(X).square().mean(), parameters, allow_unused=True)

    return step if training else value


def timed(case: Case, turns: int, training: bool) -> list[Timing]:
    """Nested reverse mode first: the others are told in its units."""
    return paired({method: stepping(case, method, training) for method in ("nested", "taylor", "auto")}, turns)


def residuals(widths: list[int], samples: int, turns: int) -> list[Timing]:
    """The Jacobian of a Laplacian by the parameters, the textbook's first; all compared before they are timed."""
    net = network(widths)
    X, parameters = torch.randn(samples, widths[0]), {name: p.detach() for name, p in net.named_parameters()}

    def residual(X: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = pt.laplacian(net)(X)[:, 0] - 1
        return found

    def one(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return hessian(lambda x: functional_call(net, parameters, (x,))[0])(x).diagonal().sum() - 1

    def textbook() -> torch.Tensor:
        return torch.cat([rows.flatten(1) for rows in vmap(grad(one), (None, 0))(parameters, X).values()], 1)

    def factors() -> pt.Jacobian:
        return pt.jacobian(residual, X, params=net)

    torch.testing.assert_close(factors().dense(), textbook(), rtol=1e-3, atol=1e-4)
    return paired({"vmap(grad(hessian))": textbook, "dense": lambda: factors().dense(), "factors": factors}, turns)


def grams(widths: list[int], samples: int, turns: int) -> list[Timing]:
    """J J^T from factors, beside forming J and multiplying."""
    net = network(widths)
    J = pt.jacobian(lambda X: pt.laplacian(net)(X)[:, 0], torch.randn(samples, widths[0]), params=net)

    def explicit() -> torch.Tensor:
        rows = J.dense()
        return rows @ rows.T

    torch.testing.assert_close(J.gram(), explicit(), rtol=1e-3, atol=1e-3)
    return paired({"explicit": explicit, "gram": J.gram}, turns)


def poisson(seed: int) -> tuple[float, float]:
    """(seconds, L2 error) of -lap u = f on the unit square by Levenberg-Marquardt: 2-32-1 tanh, 900 + 120 points, float64."""
    torch.manual_seed(seed)
    f64 = torch.float64
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    g, s = torch.linspace(0, 1, 32, dtype=f64)[1:-1], torch.linspace(0, 1, 31, dtype=f64)[:-1]
    zero, inside = torch.zeros_like(s), torch.cartesian_prod(g, g)
    edge = torch.cat([torch.stack(p, -1) for p in ((s, zero), (1 - s, zero + 1), (zero, 1 - s), (zero + 1, s))])

    def exact(X: torch.Tensor) -> torch.Tensor:
        return torch.sin(math.pi * X[:, 0]) * torch.sin(math.pi * X[:, 1])

    f = 2 * math.pi**2 * exact(inside)

    def closure() -> pt.Jacobian:
        within = pt.jacobian(lambda X, f: pt.laplacian(net)(X)[:, 0] + f, inside, f, params=net)
        return pt.concat([within, pt.jacobian(lambda X: net(X)[:, 0], edge, params=net)], weights=[900**-0.5, 120**-0.5])

    optimizer, start = LevenbergMarquardt(net.parameters()), time.perf_counter()
    for _ in range(STEPS):
        optimizer.step(closure)
    seconds, T = time.perf_counter() - start, torch.rand(2000, 2, dtype=f64)
    return seconds, float((net(T)[:, 0] - exact(T)).square().mean().sqrt().detach())


STEPS = 250


def peak(name: str, method: str) -> float:
    """MiB that a training step takes beyond what was there before it, in a process of its own."""
    found = subprocess.run([sys.executable, "-m", "benchmarks.inputs", "--peak", name, method], check=True, capture_output=True, text=True)
    return float(found.stdout)


def _peak_here(name: str, method: str) -> None:
    step = stepping(CASES[name], method, training=True)
    before = _memory("VmRSS")
    step()
    step()
    print(_memory("VmHWM") - before)


def _memory(key: str) -> float:
    """MiB of this process; getrusage would tell the parent's peak, which is kept across exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def _told(name: str, what: str, figures: list[Timing]) -> None:
    print(f"{name:<34}{what:<10}" + "".join(f"{t.name} {1e3 * t.seconds:8.2f} ms x {t.ratio:<6.2f}" for t in figures))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--peak", nargs=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        _peak_here(*options.peak)
        return
    for name, case in CASES.items():
        for training in (False, True):
            _told(name, "training" if training else "value", timed(case, 7, training))
    for name in ("u_xx + u_yy, 2-64-64-1, N=4096", "4th order", "6th order"):
        taylor, nested = peak(name, "taylor"), peak(name, "nested")
        print(f"{name:<34}peak      nested {nested:8.1f} MiB  taylor {taylor:8.1f} MiB x {taylor / nested:.2f}")
    _told("residual, 2-64-64-1, N=4096", "Jacobian", residuals([2, 64, 64, 1], 4096, 5))
    _told("residual, 10-256-256-1, N=512", "Jacobian", residuals([10, 256, 256, 1], 512, 5))
    _told("residual, 2-256-256-1, N=512", "J J^T", grams([2, 256, 256, 1], 512, 5))
    seconds, errors = zip(*(poisson(seed) for seed in range(5)), strict=True)
    print(
        f"Poisson, {STEPS} steps, five seeds       {statistics.median(seconds):.2f} s, L2 error {statistics.median(errors):.1e} (medians)"
    )


if __name__ == "__main__":
    main()
