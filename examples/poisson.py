"""Poisson's equation on the unit square, -lap u = f with u = 0 on the edge; u = sin(pi x) sin(pi y) is the solution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from training import Problem, arguments, network, picture, race

import partials as pt


def exact(X: Tensor) -> Tensor:
    return torch.sin(math.pi * X[..., 0]) * torch.sin(math.pi * X[..., 1])


def points() -> tuple[Tensor, Tensor]:
    """900 points inside, 120 on the edge."""
    grid = torch.linspace(0, 1, 32, dtype=torch.float64)[1:-1]
    s = torch.linspace(0, 1, 31, dtype=torch.float64)[:-1]
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    edge = torch.cat([torch.stack(side, -1) for side in ((s, zero), (1 - s, one), (zero, 1 - s), (one, s))])
    return torch.cartesian_prod(grid, grid), edge


def problem() -> Problem:
    inside, edge = points()
    axis = torch.linspace(0, 1, 60, dtype=torch.float64)
    test = torch.cartesian_prod(axis, axis)

    def residuals(net: nn.Module) -> list:
        def equation(X: Tensor, f: Tensor) -> Tensor:
            return pt.laplacian(net)(X).squeeze(-1) + f

        def boundary(X: Tensor) -> Tensor:
            return net(X).squeeze(-1)

        return [(equation, (inside, 2 * math.pi**2 * exact(inside))), (boundary, (edge,))]

    def error(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(test).squeeze(-1) - exact(test)).norm() / exact(test).norm())

    return Problem(residuals, error)


def main() -> None:
    options = arguments(__doc__, 300, "poisson.png")
    net, curves = race(problem(), lambda: network(2, 32, 1), options.steps)
    axis = torch.linspace(0, 1, 100, dtype=torch.float64)
    X = torch.cartesian_prod(axis, axis).reshape(100, 100, 2)
    u = net(X).squeeze(-1).detach()
    picture(options.picture, "-lap u = f", {"u": u, "u - exact": u - exact(X)}, (0, 1, 0, 1), curves)


if __name__ == "__main__":
    main()
