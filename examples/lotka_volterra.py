"""How the solution of an ODE depends on its parameters, by forward mode, and a fit of real data with it.

Lotka and Volterra's equations, x' = a x - b x y and y' = d x y - c y, by Runge and Kutta's method of order 4. Few parameters and many
outputs are the case for forward mode: one pass of the whole integration for each parameter, whatever the number of points in time.

Two independent checks: central differences, and a law. V = d x - c log x + b y - a log y is constant along a solution, so that its
derivative by each parameter is the same at all times. Data: pelts of hares and lynxes of the Hudson's Bay Company, thousands a year,
1900 to 1920 (Elton and Nicholson 1942, "The ten-year cycle in numbers of the lynx in Canada").
"""

from __future__ import annotations

import torch
from torch import Tensor
from training import arguments

import partials as pt
from partials.solve import LevenbergMarquardt

HARE = [30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4, 27.1, 40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
LYNX = [4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1, 7.4, 8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
PUBLISHED = {"a": 0.55, "b": 0.028, "c": 0.80, "d": 0.024}
"""Estimates from these data in the literature, to two digits."""
FINE = 10
"""Steps a year."""


def solution(start: Tensor, rates: Tensor, years: int = 20) -> Tensor:
    """Hares and lynxes (N, years + 1, 2) from those of the first year, (N, 2), at the rates a, b, c, d, (4,)."""
    a, b, c, d = rates.unbind()

    def rate(z: Tensor) -> Tensor:
        x, y = z.unbind(-1)
        return torch.stack([a * x - b * x * y, d * x * y - c * y], -1)

    z, h, seen = start, 1 / FINE, [start]
    for step in range(1, years * FINE + 1):
        k1 = rate(z)
        k2 = rate(z.add(k1, alpha=h / 2))  # torch's forward mode is slow where a Python number multiplies a tensor
        k3 = rate(z.add(k2, alpha=h / 2))
        k4 = rate(z.add(k3, alpha=h))
        z = z.add(k1 + k4, alpha=h / 6).add(k2 + k3, alpha=h / 3)
        if step % FINE == 0:
            seen.append(z)
    return torch.stack(seen, -2)


def by_differences(start: Tensor, rates: Tensor, h: float = 1e-5) -> Tensor:
    """(N, years + 1, 2, 4)"""
    moves = torch.diag(h * rates)
    return torch.stack([(solution(start, rates + move) - solution(start, rates - move)) / (2 * move.sum()) for move in moves], -1)


def broken_law(rates: Tensor, J: pt.Jacobian) -> float:
    """How far dV/d(a, b, c, d) moves along the solutions, over the sizes of what adds up to it."""
    a, b, c, d = rates
    x, y = J.values.unbind(-1)
    by_state = torch.stack([d - c / x, b - a / y], -1)[..., None] * J.dense()
    by_rate = torch.stack([-y.log(), y, -x.log(), x], -1)
    total = by_state.sum(-2) + by_rate
    return float((total - total[:, :1]).abs().max() / by_state.abs().max())


def fitted(hare: Tensor, lynx: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Logarithms of the rates and of the first year's animals, and their standard errors, by least squares of log counts."""
    seen = torch.stack([hare, lynx], -1).log()
    theta = torch.tensor([0.5, 0.03, 0.8, 0.03, 30.0, 4.0], dtype=torch.float64).log().requires_grad_()

    def residual(seen: Tensor, theta: Tensor) -> Tensor:
        return solution(theta[4:].exp()[None], theta[:4].exp()).log() - seen

    optimizer = LevenbergMarquardt([theta])
    for _ in range(steps):
        optimizer.step(lambda: pt.jacobian(residual, seen[None], theta, method="forward"))
    J = pt.jacobian(residual, seen[None], theta, method="forward")
    variance = J.values.square().sum() / (J.values.numel() - 6)
    return theta.detach(), (variance * torch.linalg.inv(J.normal()).diagonal()).sqrt()


def main() -> None:
    options = arguments(__doc__, 12, "lotka_volterra.png")
    hare, lynx = (torch.tensor(counts, dtype=torch.float64) for counts in (HARE, LYNX))
    theta, errors = fitted(hare, lynx, options.steps)
    for name, value, error in zip("abcd", theta[:4].exp().tolist(), errors[:4].tolist(), strict=True):
        print(f"{name} = {value:.4f} +- {value * error:.4f}   published {PUBLISHED[name]}")
    rates = theta[:4].exp()
    starts = theta[4:].exp() * torch.tensor([[1.0, 1.0], [0.5, 1.0], [1.0, 2.0]], dtype=torch.float64)
    J = pt.jacobian(solution, starts, rates.requires_grad_(), method="forward")
    rates = rates.detach()
    differences = by_differences(starts, rates)
    print(f"forward mode against differences {float((J.dense() - differences).abs().max() / differences.abs().max()):.1e}, ", end="")
    print(f"the law broken by {broken_law(rates, J):.1e}")
    draw(options.picture, hare, lynx, J, differences)


def draw(path: str, hare: Tensor, lynx: Tensor, J: pt.Jacobian, differences: Tensor) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, *others) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    year = torch.arange(1900, 1900 + len(hare))
    for column, (name, counts) in enumerate((("hares", hare), ("lynxes", lynx))):
        (line,) = left.plot(year, J.values[0, :, column], label=name)
        left.plot(year, counts, "o", color=line.get_color(), ms=4)
    left.set(title="thousands of pelts: data and fit", xlabel="year")
    left.legend()
    rows = J.dense()[0]
    for axis, column, name in zip(others, (0, 1), ("hares", "lynxes"), strict=True):
        for i, rate in enumerate("abcd"):
            scale = rows[:, column, i].abs().max()
            (line,) = axis.plot(year, rows[:, column, i] / scale, label=rate)
            axis.plot(year, differences[0, :, column, i] / scale, ".", color=line.get_color())
        axis.set(title=f"d {name} / d rate, over its largest\n(line: forward mode, dots: differences)", xlabel="year")
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
