"""Jacobians of residuals that hold derivatives, in factors, against a loop of batches of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import partials as pt

F64 = torch.float64


class Problem(nn.Module):
    """A network and a coefficient of its equation."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.nu = body, nn.Parameter(torch.tensor(0.3, dtype=F64))


def made(*middle: nn.Module) -> Problem:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Problem(nn.Sequential(nn.Linear(2, 6), *middle, nn.Linear(6, 1)).double())


def loop(residual: Callable[..., Tensor], inputs: tuple[Tensor, ...], module: nn.Module) -> Tensor:
    """One sample at a time, by nested reverse mode."""
    parameters, rows = list(module.parameters()), []
    for n in range(len(inputs[0])):
        r = residual(*(x[n : n + 1] for x in inputs), method="nested")
        gradients = torch.autograd.grad(r.sum(), parameters, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def close(J: pt.Jacobian, expected: Tensor) -> None:
    assert (J.dense() - expected).norm() <= 1e-12 * expected.norm()


NETWORKS = {
    "tanh": lambda: made(nn.Tanh(), nn.Linear(6, 6), nn.Tanh()),
    "silu": lambda: made(nn.SiLU(), nn.Linear(6, 6, bias=False), nn.Softplus()),
    "layer norm": lambda: made(nn.LayerNorm(6), nn.GELU()),
    "sigmoid": lambda: made(nn.Sigmoid(), nn.RMSNorm(6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_burgers_in_factors(name: str) -> None:
    m = NETWORKS[name]()
    x, t = torch.rand(2, 9, dtype=F64)

    def residual(x: Tensor, t: Tensor, method: str = "auto") -> Tensor:
        d = pt.derivatives(lambda x, t: m.body(torch.stack([x, t], -1))[..., 0], "t", "x", "xx", method=method)(x, t)
        return d.t + d.u * d.x - m.nu * d.xx

    J = pt.jacobian(residual, x, t, params=m, check="always")
    expected = loop(residual, (x, t), m)
    assert J.plan.method == "capture"
    close(J, expected)
    u, v = torch.randn(9, dtype=F64), torch.randn(J.shape[-1], dtype=F64)
    torch.testing.assert_close(J @ v, expected @ v)
    torch.testing.assert_close(J.T @ u, expected.T @ u)
    torch.testing.assert_close(J.gram(), expected @ expected.T)
    torch.testing.assert_close(J.norms(), expected.norm(dim=1))


def test_blocks_of_interior_and_boundary_with_their_cross_terms() -> None:
    m = made(nn.Tanh())
    inside, edge = torch.rand(7, 2, dtype=F64), torch.rand(4, 2, dtype=F64)

    def interior(X: Tensor, method: str = "auto") -> Tensor:
        return pt.laplacian(m.body, method=method)(X)[:, 0] - m.nu

    def boundary(X: Tensor, method: str = "auto") -> Tensor:
        return m.body(X)[:, 0]

    parts = [pt.jacobian(interior, inside, params=m), pt.jacobian(boundary, edge, params=m)]
    J = pt.concat(parts, weights=[7**-0.5, 0.5])
    expected = torch.cat([loop(interior, (inside,), m) * 7**-0.5, loop(boundary, (edge,), m) * 0.5])
    close(J, expected)
    torch.testing.assert_close(J.gram(), expected @ expected.T)


def test_what_has_no_rule_is_exact_all_the_same() -> None:
    m = made(nn.Tanh())
    X = torch.rand(6, 2, dtype=F64)

    def residual(X: Tensor, method: str = "auto") -> Tensor:
        return pt.partial(lambda X: torch.lgamma(m.body(X)[:, 0] ** 2 + 1), "xx", coords="xy", method=method)(X)

    close(pt.jacobian(residual, X, params=m, check="never"), loop(residual, (X,), m))


def test_a_use_that_leads_nowhere_and_later_somewhere() -> None:
    """The layouts of the first call know nothing of the last bias, which a Laplacian does not see."""
    m = made(nn.Tanh())
    X = torch.rand(6, 2, dtype=F64)
    switch: dict[str, Any] = {"value": 0.0}

    def residual(X: Tensor, method: str = "auto") -> Tensor:
        value, _, lap = pt.laplacian(m.body, aux=True, method=method)(X)
        return (lap + value)[:, 0] if switch["value"] else lap[:, 0]

    for on in (0.0, 1.0, 0.0):
        switch["value"] = on
        close(pt.jacobian(residual, X, params=m), loop(residual, (X,), m))
