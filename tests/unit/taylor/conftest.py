"""Points, a small network, and the two reverse modes under which the same tests run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

Oracle = Callable[[Callable[..., torch.Tensor], Sequence[torch.Tensor], Sequence[int]], torch.Tensor]


@pytest.fixture
def brute_force() -> Oracle:
    """The oracle: one point, one output entry and one `torch.autograd.grad` at a time, in float64."""
    return _brute_force


@pytest.fixture
def points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    return x, t


@pytest.fixture
def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()


@pytest.fixture(params=["tape", "functional", "vmapped"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], Any]:
    """Runs a thunk as it is, inside torch.func.grad, or inside torch.func.vmap, and gives what it returns."""
    if request.param == "tape":
        return lambda thunk: thunk()
    if request.param == "functional":
        return lambda thunk: torch.func.grad(lambda z: (z.sum(), thunk()), has_aux=True)(torch.zeros(1))[1]
    return lambda thunk: torch.utils._pytree.tree_map(lambda r: r[0], torch.func.vmap(lambda z: thunk())(torch.zeros(1)))


def _brute_force(u: Callable[..., torch.Tensor], columns: Sequence[torch.Tensor], index: Sequence[int]) -> torch.Tensor:
    """The derivative by the inputs of `index`, one after another, of a function of scalars; `(N, C)` for inputs of shape `(N,)`."""
    rows = []
    for values in zip(*columns, strict=True):
        leaves = [value.detach().clone().requires_grad_() for value in values]
        row = []
        for entry in u(*leaves).reshape(-1):
            derivative = entry
            for place in index:
                if derivative.requires_grad:
                    (derivative,) = torch.autograd.grad(derivative, leaves[place], create_graph=True, materialize_grads=True)
                else:
                    derivative = torch.zeros_like(derivative)
            row.append(derivative.detach())
        rows.append(torch.stack(row))
    return torch.stack(rows)
