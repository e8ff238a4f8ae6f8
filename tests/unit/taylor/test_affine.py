"""Coordinates and what linear maps make of them are kept in short form: by both methods, with derivatives of derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partials as pt

F64 = torch.float64
with torch.random.fork_rng():
    torch.manual_seed(0)
    FIRST, SECOND = nn.Linear(3, 8).double(), nn.Linear(8, 2).double()
    NET = nn.Sequential(FIRST, nn.Tanh(), nn.Linear(8, 8).double(), nn.SiLU(), SECOND)
    X = torch.rand(6, 3, dtype=F64)
    BATCH = torch.rand(6, 2, 3, dtype=F64)
Function = Callable[[Tensor], Tensor]


def written(X: Tensor) -> Tensor:
    z = X * 1.0
    z[:, 0] = X[:, 1] ** 2
    return NET(z)


FIELDS: dict[str, Function] = {
    "net": NET,
    "linear alone": lambda X: SECOND(FIRST(X)),
    "product": lambda X: FIRST(X) * FIRST(2 * X),
    "with a constant column": lambda X: NET(torch.cat([X[..., :2], torch.full((len(X), 1), 0.3, dtype=F64)], -1)),
    "stacked": lambda X: NET(torch.stack([X[..., 2], X[..., 0], torch.ones(6, dtype=F64)], -1)),
    "a factor for each point": lambda X: NET(X * torch.linspace(1, 2, 6, dtype=F64)[:, None]),
    "a shift for each feature": lambda X: NET((X - torch.tensor([0.1, 0.2, 0.3], dtype=F64)) / 2),
    "more points": lambda X: NET(torch.cat([X, X * 2]))[:6] * NET(torch.cat([X, X * 2]))[6:],
    "a matrix for each point": lambda X: (BATCH @ X[..., None]).sin().squeeze(-1),
    "sums": lambda X: X.cumsum(-1).sin() * X.sum(-1, keepdim=True).exp(),
    "clamped": lambda X: NET(FIRST(X).clamp(-0.3, 0.3)[:, :3]),
    "turned": lambda X: NET(X * (X - 0.5).sign()),
    "larger": lambda X: NET(torch.maximum(X, 1 - X)),
    "bent": lambda X: F.prelu(FIRST(X), torch.tensor(0.2, dtype=F64)) ** 3,
    "one branch is not affine": lambda X: NET(torch.where(X > 0.5, X, X**2)),
    "written": written,
    "slopes by results": lambda X: torch.tan(0.3 * X) + 1 / (X + 1) + X.exp2() + X.expm1() + X.sigmoid() + torch.exp(0.3 * FIRST(X)[:, :3]),
    "complex": lambda X: torch.exp(1j * FIRST(X)),
}


def operators() -> Iterator[Callable[..., Callable[[Tensor], Tensor]]]:
    yield pt.hessian
    yield pt.laplacian
    yield pt.biharmonic


@pytest.mark.parametrize("name", FIELDS)
def test_values(name: str) -> None:
    for operator in operators():
        ours, right = (operator(FIELDS[name], method=method, check="never")(X) for method in ("taylor", "nested"))
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("name", ["net", "product", "slopes by results", "a factor for each point"])
def test_gradients_and_gradients_of_gradients(name: str) -> None:
    for operator in operators():
        found = []
        for method in ("taylor", "nested"):
            Z = X.clone().requires_grad_()
            leaves = [Z, *NET.parameters()]
            value = operator(FIELDS[name], method=method, check="never")(Z)
            first = torch.autograd.grad((value * value.detach()).sum(), leaves, create_graph=True, materialize_grads=True)
            norm = sum((g**2).sum() for g in first)
            assert isinstance(norm, Tensor)
            found.append([*first, *torch.autograd.grad(norm, leaves, materialize_grads=True)])
        for ours, right in zip(*found, strict=True):
            torch.testing.assert_close(ours, right, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 4, 3), (0, 3)])
def test_shapes_of_points(shape: tuple[int, ...]) -> None:
    points = torch.rand(shape, dtype=F64)
    for operator in operators():
        ours, right = (operator(NET, method=method, check="never")(points) for method in ("taylor", "nested"))
        torch.testing.assert_close(ours, right)


def test_memory_that_is_not_contiguous() -> None:
    for points in (torch.rand(3, 6, dtype=F64).T, torch.rand(12, 3, dtype=F64)[::2], X[:1].expand(6, 3)):
        ours, right = (pt.laplacian(NET, method=method, check="never")(points) for method in ("taylor", "nested"))
        torch.testing.assert_close(ours, right)
