"""Nested reverse passes of the user's own: every use on tape, against a loop of batches of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import partials as pt

F64 = torch.float64


def seeded(make: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()  # type: ignore[operator]


NETWORKS = {
    "mlp": lambda: nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 1)),
    "no bias": lambda: nn.Sequential(nn.Linear(2, 6, bias=False), nn.Sigmoid(), nn.Linear(6, 1)),
    "rms norm": lambda: nn.Sequential(nn.Linear(2, 6), nn.RMSNorm(6), nn.Tanh(), nn.Linear(6, 1)),
    "group norm": lambda: nn.Sequential(nn.Linear(2, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 1)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1, 2)), nn.Conv2d(1, 3, (1, 2), padding=(0, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(9, 1)
    ),
    "conv in one dimension": lambda: nn.Sequential(
        *(nn.Linear(2, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 2, 2, 1, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1))
    ),
    "conv in three dimensions": lambda: nn.Sequential(
        *(nn.Linear(2, 8), nn.Unflatten(1, (1, 2, 2, 2)), nn.Conv3d(1, 2, 3, padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1))
    ),
}


def residual(net: nn.Module, X: Tensor, order: int = 2) -> Tensor:
    """u u_x + u_t + the derivative of some order by the first coordinate."""
    X = X.detach().requires_grad_()
    u = net(X)[:, 0]
    (g,) = torch.autograd.grad(u.sum(), X, create_graph=True)
    high = g[:, 0]
    for _ in range(order - 1):
        high = torch.autograd.grad(high.sum(), X, create_graph=True)[0][:, 0]
    return u * g[:, 0] + g[:, 1] + high


def loop(net: nn.Module, X: Tensor, order: int) -> Tensor:
    parameters = list(net.parameters())
    rows = [torch.autograd.grad(residual(net, x[None], order).sum(), parameters, materialize_grads=True) for x in X]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_in_a_jacobian(name: str, order: int) -> None:
    net, X = seeded(NETWORKS[name]), torch.rand(7, 2, dtype=F64)
    J = pt.jacobian(lambda X: residual(net, X, order), X, params=net)
    expected = loop(net, X, order)
    assert J.plan.method == "capture" and all(use.layout == "taped" for use in J.plan.uses)
    assert (J.dense() - expected).norm() <= 1e-12 * expected.norm()
    torch.testing.assert_close(J.gram(), expected @ expected.T)


@pytest.mark.parametrize("named", [False, True])
def test_a_tape_around_old_code(named: bool) -> None:
    net, X = seeded(NETWORKS["mlp"]), torch.rand(7, 2, dtype=F64)
    with pt.tape(net, *([X] if named else [])) as tape:
        r = residual(net, X)
    expected = loop(net, X, 2)
    J = tape.jacobian(r)
    assert (J.dense() - expected).norm() <= 1e-12 * expected.norm()
    r.square().sum().backward()
    for (name, p), rows in zip(net.named_parameters(), expected.split([p.numel() for p in net.parameters()], 1), strict=True):
        torch.testing.assert_close((2 * r.detach() @ rows).reshape(p.shape), torch.zeros_like(p) if p.grad is None else p.grad, msg=name)


def test_uses_after_the_tape_are_refused() -> None:
    net, X = seeded(NETWORKS["mlp"]), torch.rand(7, 2, dtype=F64, requires_grad=True)
    with pt.tape(net) as tape:
        u = net(X)
    (g,) = torch.autograd.grad(u.sum(), X, create_graph=True)
    with pytest.raises(pt.MethodError, match="does not hold every use"):
        tape.jacobian(g[:, 0])
    with pytest.raises(pt.InputError, match="records once"), tape:
        pass


def test_mixing_is_found_by_the_sum_of_rows() -> None:
    net, X = seeded(NETWORKS["mlp"]), torch.rand(7, 2, dtype=F64)
    with pt.tape(net) as tape:
        u = net(X)[:, 0]
        r = u - u.mean()
    with pytest.raises((pt.CheckError, pt.MethodError)):
        tape.jacobian(r)


def test_a_residual_without_samples() -> None:
    net = seeded(NETWORKS["mlp"])
    with pt.tape(net) as tape:
        r = residual(net, torch.rand(7, 2, dtype=F64)).sum()
    with pytest.raises(pt.InputError, match="one entry or block for each sample"):
        tape.jacobian(r)
