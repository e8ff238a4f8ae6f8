"""What people ask about derivatives by inputs in forums and issue trackers, and the answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import partials as pt

F64 = torch.float64


def wave(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x) * torch.exp(-t)


@pytest.fixture
def at() -> tuple[Tensor, Tensor]:
    x, t = torch.rand(2, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    return x, t


def smooth(inputs: int, outputs: int = 1) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


@pytest.mark.parametrize("order", range(1, 11))
@pytest.mark.parametrize("method", ["taylor", "auto"])
def test_u_xxxx_and_orders_that_nested_grad_does_not_reach(at: tuple[Tensor, Tensor], order: int, method: str) -> None:
    x, t = at
    expected = 3**order * torch.sin(3 * x + order * torch.pi / 2) * torch.exp(-t)
    torch.testing.assert_close(pt.partial(wave, "x" * order, method=method)(x, t), expected)


def test_diff_u_x_x_t(at: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(pt.partial(wave, ("x", "x", "t"))(*at), 9 * wave(*at))


def test_only_the_diagonal_entries_of_the_hessian_are_computed() -> None:
    net, X = smooth(30), torch.rand(4, 30, dtype=F64)
    plan = pt.laplacian(net).explain(X)
    assert plan.slots == 32  # the value, 30 first derivatives, one sum
    assert pt.hessian(net).explain(X).slots == 1 + 30 + 30 * 31 // 2


def test_the_forum_recipe_is_u_xx_plus_u_xt() -> None:
    net, X = smooth(2), torch.rand(5, 2, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(net(X).sum(), X, create_graph=True)
    (recipe,) = torch.autograd.grad(g.sum(), X)
    d = pt.derivatives(net, "xx", "xt", coords="xt")(X.detach())
    assert (recipe[:, :1] - d.xx).abs().max() > 1e-4
    torch.testing.assert_close(recipe[:, :1], d.xx + d.xt)


def test_zeros_where_a_tensor_was_not_used_in_the_graph(at: tuple[Tensor, Tensor]) -> None:
    for u in (lambda x, t: 2 * x + t**2, lambda x, t: t):
        found = pt.partial(u, "xx")(*at)
        assert found.shape == (6,) and not found.any()
    found = pt.partial(nn.Linear(2, 1).double(), "xx", coords="xt")(torch.stack(at, -1))
    assert found.shape == (6, 1) and not found.any()


def test_second_derivatives_of_relu_networks_are_zero_and_that_is_said() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 1)).double()
    with pytest.warns(UserWarning, match="straight pieces"):
        assert not pt.laplacian(net)(torch.rand(5, 2, dtype=F64)).any()


def test_the_sum_trick_under_batch_statistics_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    with pytest.raises(pt.MixingError, match="batch statistics"):
        pt.laplacian(net)(torch.rand(5, 2, dtype=F64))
    assert pt.laplacian(net.eval())(torch.rand(5, 2, dtype=F64)).shape == (5, 1)


def test_a_batch_has_the_laplacian_of_each_of_its_points() -> None:
    net, X = smooth(3), torch.rand(5, 3, dtype=F64)
    alone = [torch.autograd.functional.hessian(lambda x: net(x).sum(), x).trace() for x in X]
    torch.testing.assert_close(pt.laplacian(net)(X)[:, 0], torch.stack(alone))


@pytest.mark.parametrize("name", ["layer norm", "slogdet", "attention", "lstm"])
@pytest.mark.parametrize("method", ["taylor", "nested"])
def test_layers_on_which_iterated_jvp_is_wrong_or_stops(name: str, method: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, lstm, attention = nn.Linear(3, 4).double(), nn.LSTM(1, 4, batch_first=True).double(), nn.MultiheadAttention(4, 2).double()
        u = {
            "layer norm": lambda x: F.layer_norm(first(x), (4,))[..., 0],
            "slogdet": lambda x: torch.linalg.slogdet(torch.einsum("...i,...j->...ij", x, x.sin()) + torch.eye(3, dtype=F64)).logabsdet,
            "attention": lambda x: attention(*[first(x)[None]] * 3, need_weights=False)[0][0, :, 0] if x.ndim > 1 else u(x[None])[0],
            "lstm": lambda x: lstm(x[..., None])[0][..., -1, 0],
        }[name]
    X = torch.rand(1, 3, dtype=F64) if name == "attention" else torch.rand(4, 3, dtype=F64)
    found = pt.hessian(u, method=method)(X)
    with sdpa_kernel(SDPBackend.MATH):  # for torch's own; ours needs no choice
        for n, x in enumerate(X):
            torch.testing.assert_close(found[n], torch.autograd.functional.hessian(lambda x: u(x[None])[0], x))


def test_the_gradient_of_each_points_residual_without_a_loop_of_backward() -> None:
    net, X = smooth(2), torch.rand(6, 2, dtype=F64)

    def residual(X: Tensor) -> Tensor:
        d = pt.derivatives(net, "xx", "t", coords="xt")(X)
        return (d.t - d.xx)[:, 0]

    J = pt.jacobian(residual, X, params=net)
    loop = [torch.autograd.grad(residual(x[None])[0], list(net.parameters()), materialize_grads=True) for x in X]
    rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in loop])
    torch.testing.assert_close(J.dense(), rows)
    torch.testing.assert_close(J.gram(), rows @ rows.T)


def test_results_of_jets_are_derivatives_and_no_taylor_coefficients() -> None:
    v = torch.tensor([1.0, 2.0], dtype=F64)
    cube = pt.directional(lambda X: (X @ v) ** 3, v, order=3)(torch.rand(4, 2, dtype=F64))
    torch.testing.assert_close(cube, torch.full((4,), 6.0 * 125, dtype=F64))
