"""What the examples share: residuals at points, fitted by Levenberg-Marquardt and by Adam for the same time, and a picture of both."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import partials as pt
from partials.solve import LevenbergMarquardt

Residual = Callable[..., Tensor]
Curve = list[tuple[float, float]]
"""(seconds, error) pairs."""


@dataclass(frozen=True)
class Problem:
    """An equation: residuals of a network at points, each with mean square zero at the solution, and how far the network is from that."""

    residuals: Callable[[nn.Module], Sequence[tuple[Residual, tuple[Tensor, ...]]]]
    error: Callable[[nn.Module], float]


def network(*widths: int, seed: int = 0) -> nn.Sequential:
    """A tanh network in float64."""
    torch.manual_seed(seed)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def by_levenberg_marquardt(problem: Problem, net: nn.Module, steps: int) -> Curve:
    """Each step solves a damped least-squares problem with the Jacobian of all residuals by all parameters."""
    blocks = problem.residuals(net)

    def closure() -> pt.Jacobian:
        parts = [pt.jacobian(residual, *points, params=net) for residual, points in blocks]
        return pt.concat(parts, weights=[len(J) ** -0.5 for J in parts])

    optimizer, curve, spent = LevenbergMarquardt(net.parameters()), [(0.0, problem.error(net))], 0.0
    for step in range(1, steps + 1):
        start = time.perf_counter()
        optimizer.step(closure)
        spent += time.perf_counter() - start
        if step % 5 == 0 or step == steps:
            curve.append((spent, problem.error(net)))
    return curve


def by_adam(problem: Problem, net: nn.Module, seconds: float, lr: float = 1e-2) -> Curve:
    """The same sum of squares, with a learning rate that falls to a hundredth along half a cosine."""
    blocks = problem.residuals(net)
    optimizer, curve, spent = torch.optim.Adam(net.parameters()), [(0.0, problem.error(net))], 0.0
    for step in itertools.count(1):
        start, done = time.perf_counter(), min(spent / seconds, 1.0)
        rate = lr * (0.01 + 0.99 * (1 + torch.cos(torch.tensor(torch.pi * done)).item()) / 2)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        sum(residual(*points).square().mean() for residual, points in blocks).backward()  # type: ignore[union-attr]
        optimizer.step()
        spent += time.perf_counter() - start
        if step % 50 == 0 or spent >= seconds:
            curve.append((spent, problem.error(net)))
        if spent >= seconds:
            return curve
    raise AssertionError


def race(problem: Problem, make: Callable[[], nn.Module], steps: int) -> tuple[nn.Module, dict[str, Curve]]:
    """The network by Levenberg-Marquardt, and both error curves."""
    net, other = make(), make()
    curves = {"Levenberg-Marquardt": by_levenberg_marquardt(problem, net, steps)}
    curves["Adam"] = by_adam(problem, other, curves["Levenberg-Marquardt"][-1][0])
    for name, curve in curves.items():
        print(f"{name:<20} {curve[-1][0]:6.1f} s   relative L2 error {curve[-1][1]:.1e}")
    return net, curves


def arguments(doc: str | None, steps: int, picture: str) -> argparse.Namespace:
    """--steps and --picture."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--steps", type=int, default=steps, help="steps of the optimiser")
    parser.add_argument("--picture", default=picture, help="where the picture goes")
    return parser.parse_args()


def picture(path: str, title: str, fields: dict[str, Tensor], extent: tuple[float, float, float, float], curves: dict[str, Curve]) -> None:
    """Fields side by side, (first coordinate, second coordinate) each, and the error curves."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(fields) + 1, figsize=(4 * (len(fields) + 1), 3.4), layout="constrained")
    for axis, (name, field) in zip(axes, fields.items(), strict=False):
        figure.colorbar(axis.imshow(field.detach().T, origin="lower", extent=extent, aspect="auto"), ax=axis)
        axis.set_title(name)
    for name, curve in curves.items():
        axes[-1].semilogy(*zip(*curve, strict=True), label=name)
    axes[-1].set(xlabel="seconds", title="relative L2 error")
    axes[-1].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"picture: {path}")
