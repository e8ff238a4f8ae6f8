"""Functions whose graph allows one reverse pass: checked by calling them again, or refused in a sentence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import partials as pt

N = 6


@pytest.fixture
def options():
    return pytest.importorskip("torch.nn.modules.linear_cross_entropy_options").LinearCrossEntropyOptions()


def fused(options, reduction):
    def f(x, w, t):
        if reduction == "none":
            return F.linear_cross_entropy(x, w, t, reduction="none", options=options)
        parts = [(x[n : n + 1], w, t[n : n + 1]) for n in range(len(x))]
        return torch.stack([F.linear_cross_entropy(*part, reduction=reduction, options=options) for part in parts])

    return f


def problem():
    torch.manual_seed(0)
    x, t = torch.randn(N, 8, dtype=torch.float64), torch.randint(5, (N,))
    return x, torch.randn(5, 8, dtype=torch.float64, requires_grad=True), t


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("check", ["never", "always"])
def test_a_fused_loss_that_cannot_be_pulled_back_twice(options, reduction, check):
    x, w, t = problem()
    J = pt.jacobian(fused(options, reduction), x, w, t, in_dims={"w": None}, check=check)
    rows = [torch.autograd.grad(F.cross_entropy(x[n : n + 1] @ w.T, t[n : n + 1]), w)[0] for n in range(N)]
    torch.testing.assert_close(J["w"], torch.stack(rows), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("level", ["quick", "full", "deep"])
def test_every_level_has_a_verdict(options, level):
    x, w, t = problem()
    assert pt.check(fused(options, "mean"), x, w, t, in_dims={"w": None}, level=level).passed


@pytest.mark.parametrize("method", ["grad", "backward"])
def test_methods_that_pull_one_call_back_again_and_again_refuse_it(options, method):
    x, w, t = problem()
    with pytest.raises(pt.MethodError, match="several reverse passes through one call of f, which allows one"):
        pt.jacobian(fused(options, "mean"), x, w, t, in_dims={"w": None}, method=method)


class Once(torch.autograd.Function):
    """Frees what it has saved when it is pulled back."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.kept = (x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        if ctx.kept is None:
            raise RuntimeError("backward called twice")
        (x, w), ctx.kept = ctx.kept, None
        return g[:, None] * w, x.T @ g


def test_a_function_of_the_users_that_allows_one_pass():
    x, w = torch.randn(N, 4), torch.randn(4, requires_grad=True)
    J = pt.jacobian(lambda x, w: Once.apply(x, w), x, w, method="loop", check="always")
    torch.testing.assert_close(J["w"], x)
    assert J.check().passed
