"""The optimisers: known minima, laws, and what they refuse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import partials as pt
from partials.solve import GaussNewton, LevenbergMarquardt, NaturalGradient, log_derivatives

F64 = torch.float64


def rosenbrock() -> tuple[Tensor, object]:
    a = torch.tensor([-1.2, 1.0], dtype=F64, requires_grad=True)
    which = torch.tensor([0.0, 1.0], dtype=F64)

    def residual(which: Tensor) -> Tensor:
        return (1 - which) * 10 * (a[1] - a[0] ** 2) + which * (1 - a[0])

    return a, lambda: pt.jacobian(residual, which, params={"a": a}, check="never")


@pytest.mark.parametrize("make", [GaussNewton, LevenbergMarquardt])
def test_rosenbrock(make: type) -> None:
    a, closure = rosenbrock()
    optimizer = make([a])
    losses = [optimizer.step(closure) for _ in range(60)]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    torch.testing.assert_close(a.detach(), torch.ones(2, dtype=F64), atol=1e-8, rtol=0)


def test_a_rejected_step_leaves_the_parameters_alone() -> None:
    a = torch.zeros(1, dtype=F64, requires_grad=True)
    x = torch.ones(3, dtype=F64)
    optimizer = LevenbergMarquardt([a])
    optimizer.step(lambda: pt.jacobian(lambda x: a**2 + x, x, params={"a": a}, check="never"))  # the gradient is zero: nothing is lower
    assert float(a.detach()) == 0.0 and optimizer.damping > 1e-2


def test_the_closure_runs_once_for_each_step_that_is_kept() -> None:
    a, closure = rosenbrock()
    calls = []
    optimizer = LevenbergMarquardt([a])

    def counting() -> object:
        calls.append(1)
        return closure()  # type: ignore[operator]

    for _ in range(3):
        optimizer.step(counting)
    first = len(calls)
    with torch.no_grad():
        a.add_(0.1)  # the user moves: the Jacobian of the last trial is of no use
    optimizer.step(counting)
    assert len(calls) >= first + 2


@pytest.mark.parametrize("samples", [6, 200])
def test_stochastic_reconfiguration_by_either_side(samples: int) -> None:
    """The step solves the centred least-squares problem, whichever matrix is smaller."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)).double()
    X, e = torch.randn(samples, 3, dtype=F64), torch.randn(samples, dtype=F64)
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    J = log_derivatives(net, X)
    NaturalGradient(net.parameters(), lr=0.5, damping=0.1).step(lambda: (J, e))
    rows = J.dense() - J.dense().mean(0)
    d = torch.linalg.solve(rows.T @ rows + 0.1 * samples * torch.eye(rows.shape[1], dtype=F64), rows.T @ (e - e.mean()))
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in net.parameters()]), before - 0.5 * d)


def test_momentum_is_spring() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 1).double()
    X, e = torch.randn(5, 3, dtype=F64), torch.randn(5, dtype=F64)
    J = pt.jacobian(lambda X: net(X)[:, 0], X, params=net)
    optimizer, rows, total, before = NaturalGradient(net.parameters(), lr=1.0, damping=0.1, momentum=0.9, centre=False), J.dense(), 0, 0
    start = torch.cat([p.detach().flatten() for p in net.parameters()])
    for _ in range(3):
        optimizer.step(lambda: (pt.jacobian(lambda X: net(X)[:, 0], X, params=net), e))
        right = rows.T @ (e - rows @ (0.9 * before if isinstance(before, Tensor) else torch.zeros(4, dtype=F64)))
        d = torch.linalg.solve(rows.T @ rows + 0.5 * torch.eye(4, dtype=F64), right)
        before = d + (0.9 * before if isinstance(before, Tensor) else 0)
        total = total + before
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in net.parameters()]), start - total)


class Wave(nn.Module):
    """exp of it is a complex amplitude."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.w.is_complex():
            return torch.sin((x * self.w).sum(-1))
        return torch.complex((x * self.w).sum(-1).sin(), (x * self.w).sum(-1).cos())


@pytest.mark.parametrize(("mode", "dtype"), [("complex", F64), ("holomorphic", torch.complex128)])
def test_complex_modes(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    psi, x = Wave(dtype), torch.randn(9, 3, dtype=F64)
    J = log_derivatives(psi, x, mode=mode)
    assert J.shape == (9, 2, 3 if mode == "complex" else 6)
    z = (x.to(dtype) * psi.w.detach()).sum(-1, keepdim=True)
    O = z.cos() * x if mode == "holomorphic" else torch.complex(z.cos() * x, -z.sin() * x)  # noqa: E741 - the letter of the field
    e, before = torch.randn(9, dtype=torch.complex128), psi.w.detach().clone()
    NaturalGradient(psi.parameters(), lr=1.0, damping=0.1).step(lambda: (J, e))
    centred, right = O - O.mean(0), e - e.mean()
    metric, force = centred.mH @ centred, centred.mH @ right
    if mode == "complex":
        metric, force = metric.real, force.real
    d = torch.linalg.solve(metric + 0.9 * torch.eye(3, dtype=metric.dtype), force)
    torch.testing.assert_close(psi.w.detach(), before - d)


def test_what_is_refused() -> None:
    a, closure = rosenbrock()
    with pytest.raises(pt.InputError, match="no Jacobian"):
        LevenbergMarquardt([a]).step(lambda: torch.zeros(3))  # type: ignore[arg-type,return-value]
    with pytest.raises(pt.InputError, match="other parameters"):
        LevenbergMarquardt([torch.zeros(2, requires_grad=True)]).step(closure)  # type: ignore[arg-type]
    with pytest.raises(pt.InputError, match="options"):
        LevenbergMarquardt([a], damping=0.0)


@pytest.mark.slow
def test_poisson_to_five_digits() -> None:
    """-lap u = f on the unit square by a 2-32-1 network, 900 + 120 points: the median of five seeds."""
    g, s = torch.linspace(0, 1, 32, dtype=F64)[1:-1], torch.linspace(0, 1, 31, dtype=F64)[:-1]
    zero, inside = torch.zeros_like(s), torch.cartesian_prod(g, g)
    edge = torch.cat([torch.stack(p, -1) for p in ((s, zero), (1 - s, zero + 1), (zero, 1 - s), (zero + 1, s))])
    assert len(inside) == 900 and len(edge) == 120
    errors = sorted(poisson(seed, inside, edge) for seed in range(5))
    assert errors[2] < 1e-5


def poisson(seed: int, inside: Tensor, edge: Tensor) -> float:
    """The L2 error on the square after 250 steps."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)).double()

    def exact(X: Tensor) -> Tensor:
        return torch.sin(math.pi * X[:, 0]) * torch.sin(math.pi * X[:, 1])

    f = 2 * math.pi**2 * exact(inside)

    def closure() -> pt.Jacobian:
        within = pt.jacobian(lambda X, f: pt.laplacian(net)(X)[:, 0] + f, inside, f, params=net)
        return pt.concat([within, pt.jacobian(lambda X: net(X)[:, 0], edge, params=net)], weights=[900**-0.5, 120**-0.5])

    optimizer = LevenbergMarquardt(net.parameters())
    for _ in range(250):
        optimizer.step(closure)
    T = torch.rand(2000, 2, dtype=F64)
    return float((net(T)[:, 0] - exact(T)).square().mean().sqrt().detach())
