"""Functions that differentiate by themselves: what the checks compare with is right where torch's own operation is not."""

import pytest
import torch
from torch import Tensor, nn

import partials as pt
from partials._probe import look
from partials._problem import normalise
from partials.checks import first


class WrittenOut(nn.Module):
    """`nn.LayerNorm` in elementary operations."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight + self.bias


def residual_of(net: nn.Module):
    def residual(X: Tensor) -> Tensor:
        X = X if X.requires_grad else X.clone().requires_grad_()
        (g,) = torch.autograd.grad(net(X).sum(), X, create_graph=True)
        (h,) = torch.autograd.grad(g[:, 0].sum(), X, create_graph=True)
        return g[:, 1] - h[:, 0]

    return residual


@pytest.fixture
def nets() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    layers = [nn.Linear(2, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 1)]
    return nn.Sequential(*layers).double(), nn.Sequential(*layers[:2], WrittenOut(layers[2]), layers[3]).double()


@pytest.fixture
def X() -> Tensor:
    return torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def expected(net: nn.Module, X: Tensor) -> Tensor:
    residual = residual_of(net)
    rows = [torch.autograd.grad(residual(x[None])[0], list(net.parameters()), allow_unused=True) for x in X]
    zero = [torch.zeros_like(p) for p in net.parameters()]
    return torch.stack([torch.cat([(z if g is None else g).reshape(-1) for g, z in zip(row, zero, strict=True)]) for row in rows])


def test_a_residual_with_layer_norm_is_no_false_alarm(nets, X) -> None:
    net, plain = nets
    first.PASSED.clear()
    J = pt.jacobian(residual_of(net), X, params=net, check="first")
    torch.testing.assert_close(J.dense(), expected(plain, X))
    assert pt.check(residual_of(net), X, params=net, level="full").passed


@pytest.mark.parametrize("method", ["loop", "grad", "backward"])
def test_every_method_is_right_there(nets, X, method) -> None:
    net, plain = nets
    J = pt.jacobian(residual_of(net), X, params=net, method=method)
    torch.testing.assert_close(J.dense(), expected(plain, X))


def test_only_functions_that_differentiate_are_run_otherwise(nets, X) -> None:
    net, _ = nets
    assert look(normalise(residual_of(net), (X,), {}, params=net)).inexact
    assert look(normalise(lambda X: torch.func.vmap(torch.func.grad(lambda x: net(x)[0]))(X), (X,), {}, params=net)).inexact
    assert not look(normalise(net, (X,), {})).inexact
    assert not look(normalise(residual_of(net[:2]), (X,), {}, params=net)).inexact


def test_torch_is_still_wrong(nets, X) -> None:
    """Where this fails, torch has been repaired, and normalisations need not be written out any more."""
    net, plain = nets
    assert not torch.allclose(expected(net, X), expected(plain, X), rtol=0.01)
