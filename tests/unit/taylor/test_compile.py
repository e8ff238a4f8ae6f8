"""Compiled code: derivatives inside `torch.compile` train, and a traced Taylor mode is compiled whole."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import partials as pt

F64 = torch.float64


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1)).double()


def loss(net: nn.Module, parameters: dict[str, Tensor], X: Tensor) -> Tensor:
    def u(X: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (X,))

    return (pt.laplacian(u, method="taylor", check="never")(X) + pt.partial(u, "xx", coords="xt", method="taylor")(X)).square().mean()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_traced_graph_compiles_and_trains(net: nn.Sequential, backend: str) -> None:
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    parameters, X = dict(net.named_parameters()), torch.rand(16, 2, dtype=F64)
    expected = torch.autograd.grad(loss(net, parameters, X), list(parameters.values()), allow_unused=True)
    traced = make_fx(lambda parameters, X: loss(net, parameters, X))(parameters, X)
    compiled = torch.compile(traced, backend=backend, fullgraph=True)
    Y = torch.rand(16, 2, dtype=F64)
    for points in (X, Y):
        torch.testing.assert_close(compiled(parameters, points), loss(net, parameters, points))
    found = torch.autograd.grad(compiled(parameters, X), list(parameters.values()), allow_unused=True)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.filterwarnings("ignore")
def test_derivatives_inside_a_compiled_function_run_as_they_are(net: nn.Sequential) -> None:
    lap, X = pt.laplacian(net), torch.rand(16, 2, dtype=F64)

    def residual(X: Tensor) -> Tensor:
        return (lap(X * 2).squeeze(-1) + X.sum(-1)).square().mean()

    compiled = torch.compile(residual, backend="aot_eager")
    for made in (compiled, residual):
        net.zero_grad()
        made(X).backward()
        if made is compiled:
            first = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    torch.testing.assert_close(compiled(X), residual(X))
    for p, ours in zip(net.parameters(), first, strict=True):
        torch.testing.assert_close(ours, p.grad)
