"""The heat equation u_t = a u_xx on [0, 1] from two sine waves, u = 0 at both ends; the solution is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from training import Problem, arguments, network, picture, race

import partials as pt

DIFFUSIVITY = 0.1


def exact(x: Tensor, t: Tensor) -> Tensor:
    def wave(k: int) -> Tensor:
        return torch.exp(-DIFFUSIVITY * (k * math.pi) ** 2 * t) * torch.sin(k * math.pi * x)

    return wave(1) + 0.5 * wave(3)


def grid(n: int, m: int) -> tuple[Tensor, Tensor]:
    """x and t of n times m points on the unit square."""
    pairs = torch.cartesian_prod(torch.linspace(0, 1, n, dtype=torch.float64), torch.linspace(0, 1, m, dtype=torch.float64))
    return pairs[:, 0], pairs[:, 1]


def problem() -> Problem:
    x, t = grid(32, 32)
    s = torch.linspace(0, 1, 64, dtype=torch.float64)
    zero, one = torch.zeros_like(s), torch.ones_like(s)

    def residuals(net: nn.Module) -> list:
        def u(x: Tensor, t: Tensor) -> Tensor:
            return net(torch.stack([x, t], -1)).squeeze(-1)

        def equation(x: Tensor, t: Tensor) -> Tensor:
            d = pt.derivatives(u, "t", "xx")(x, t)
            return d.t - DIFFUSIVITY * d.xx

        def known(x: Tensor, t: Tensor, value: Tensor) -> Tensor:
            return u(x, t) - value

        start = (known, (s, zero, exact(s, zero)))
        ends = (known, (torch.cat([zero, one]), torch.cat([s, s]), torch.zeros(2 * len(s), dtype=s.dtype)))
        return [(equation, (x, t)), start, ends]

    def error(net: nn.Module) -> float:
        x, t = grid(50, 50)
        with torch.no_grad():
            return float((net(torch.stack([x, t], -1)).squeeze(-1) - exact(x, t)).norm() / exact(x, t).norm())

    return Problem(residuals, error)


def main() -> None:
    options = arguments(__doc__, 500, "heat.png")
    net, curves = race(problem(), lambda: network(2, 32, 1), options.steps)
    x, t = (coordinate.reshape(100, 100) for coordinate in grid(100, 100))
    u = net(torch.stack([x, t], -1)).squeeze(-1).detach()
    picture(options.picture, "u_t = a u_xx", {"u(x, t)": u, "u - exact": u - exact(x, t)}, (0, 1, 0, 1), curves)


if __name__ == "__main__":
    main()
