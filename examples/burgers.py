"""Burgers' equation u_t + u u_x = nu u_xx on [-1, 1] from -sin(pi x), which steepens; against the Cole-Hopf solution by quadrature."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from training import Problem, arguments, network, picture, race

import partials as pt

VISCOSITY = 0.05 / math.pi


def exact(x: Tensor, t: Tensor) -> Tensor:
    """The ratio of two Gaussian averages by 120 Gauss-Hermite nodes (Basdevant et al. 1986)."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite.hermgauss(120))
    y = x[..., None] - (4 * VISCOSITY * t[..., None]).sqrt() * nodes
    f = weights * torch.exp(-torch.cos(math.pi * y) / (2 * math.pi * VISCOSITY))
    return -(torch.sin(math.pi * y) * f).sum(-1) / f.sum(-1)


def grid(n: int, m: int) -> tuple[Tensor, Tensor]:
    """x in [-1, 1] and t in [0, 1]."""
    pairs = torch.cartesian_prod(torch.linspace(-1, 1, n, dtype=torch.float64), torch.linspace(0, 1, m, dtype=torch.float64))
    return pairs[:, 0], pairs[:, 1]


def problem() -> Problem:
    x, t = grid(60, 30)
    s, r = torch.linspace(-1, 1, 80, dtype=torch.float64), torch.linspace(0, 1, 40, dtype=torch.float64)

    def residuals(net: nn.Module) -> list:
        def u(x: Tensor, t: Tensor) -> Tensor:
            return net(torch.stack([x, t], -1)).squeeze(-1)

        def equation(x: Tensor, t: Tensor) -> Tensor:
            d = pt.derivatives(u, "t", "x", "xx")(x, t)
            return d.t + d.value * d.x - VISCOSITY * d.xx

        def known(x: Tensor, t: Tensor, value: Tensor) -> Tensor:
            return u(x, t) - value

        ends = torch.cat([torch.ones_like(r), -torch.ones_like(r)])
        start = (known, (s, torch.zeros_like(s), -torch.sin(math.pi * s)))
        return [(equation, (x, t)), start, (known, (ends, torch.cat([r, r]), torch.zeros_like(ends)))]

    def error(net: nn.Module) -> float:
        x, t = grid(81, 41)
        with torch.no_grad():
            return float((net(torch.stack([x, t], -1)).squeeze(-1) - exact(x, t)).norm() / exact(x, t).norm())

    return Problem(residuals, error)


def main() -> None:
    options = arguments(__doc__, 300, "burgers.png")
    net, curves = race(problem(), lambda: network(2, 20, 20, 1), options.steps)
    x, t = (coordinate.reshape(200, 100) for coordinate in grid(200, 100))
    u = net(torch.stack([x, t], -1)).squeeze(-1).detach()
    title = "u_t + u u_x = nu u_xx"
    picture(options.picture, title, {"u(x, t)": u, "u - exact": u - exact(x, t)}, (-1, 1, 0, 1), curves)


if __name__ == "__main__":
    main()
