"""A value that depends on other points is found; what was proved is not proved again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partials._errors import MixingError
from partials.taylor import derivatives, laplacian, partial

Points = tuple[Tensor, Tensor]
Run = Callable[[Callable[[], Any]], Any]


@pytest.mark.parametrize(
    "u",
    [
        lambda x, t: x - x.mean(),
        lambda x, t: x - x.detach().mean(),
        lambda x, t: torch.softmax(x, 0),
        lambda x, t: torch.cumsum(x, 0),
        lambda x, t: x.flip(0),
        lambda x, t: x.roll(1) - x.roll(-1),
        lambda x, t: x / x.norm(),
        lambda x, t: x.sort().values,
        lambda x, t: torch.sin(x) + 1e-3 * t.sum(),
        lambda x, t: torch.stack([x, t - t.max()], -1),
    ],
)
def test_mixing_is_found(points: Points, run: Run, u: Callable[..., Tensor]) -> None:
    with pytest.raises(MixingError, match="depends on other points"):
        run(lambda: derivatives(u, "x", "t")(*points).dict())


@pytest.mark.parametrize("spec", ["x", "xx", "xt"])
def test_mixing_is_found_at_any_order_and_shape(spec: str) -> None:
    x, t = torch.rand(2, 3, 4, dtype=torch.float64)
    with pytest.raises(MixingError):
        partial(lambda x, t: x * t - (x * t).mean(-1, keepdim=True), spec)(x, t)


def test_two_points_suffice() -> None:
    with pytest.raises(MixingError):
        partial(lambda x: x - x.mean(), "x")(torch.rand(2))


def test_full_text(points: Points) -> None:
    with pytest.raises(MixingError) as error:
        partial(lambda x, t: x - x.mean(), "x")(*points)
    lines = str(error.value).splitlines()
    assert lines[0] == "the value at one point depends on other points, so there are no derivatives point by point"
    assert lines[1].startswith("  got       values at half of the points have derivatives by 'x' at the other half")
    assert lines[2] == "  expected  every point's value computed from its own coordinates"
    assert lines[3] == '  try       vectors=("r",) if the last dimension of an input is one vector'


def test_batch_statistics_are_named(points: Points) -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    with pytest.raises(MixingError, match="batch statistics in 1"):
        laplacian(model)(torch.stack(points, -1))
    laplacian(model.eval())(torch.stack(points, -1))
    with pytest.raises(MixingError):
        laplacian(model.train())(torch.stack(points, -1))


def test_a_vector_taken_for_points_is_found() -> None:
    """r of shape (N, 3) not named in `vectors`: each entry would be its own sample."""
    r = torch.rand(5, 3, dtype=torch.float64)
    with pytest.raises(MixingError, match="vectors="):
        partial(lambda r: r / r.norm(dim=-1, keepdim=True), "r")(r)
    assert partial(lambda r: r / r.norm(dim=-1, keepdim=True), "r", vectors="r")(r).shape == (5, 3, 3)


def counting() -> tuple[list[int], Callable[[Tensor], Tensor]]:
    calls: list[int] = []

    def u(x: Tensor) -> Tensor:
        calls.append(1)
        return x**2

    return calls, u


def test_a_function_is_proved_once_by_code() -> None:
    x = torch.rand(5)
    calls, u = counting()
    partial(u, "x")(x)
    first = len(calls)
    partial(u, "x")(x)
    assert len(calls) == first + 1
    calls, again = counting()
    partial(again, "xx", method="nested")(torch.rand(9))
    assert len(calls) == 1


def test_one_point_proves_nothing() -> None:
    def u(x: Tensor) -> Tensor:
        return x * x.sum()

    partial(u, "x")(torch.rand(1))
    with pytest.raises(MixingError):
        partial(u, "x")(torch.rand(4))


def test_same_code_around_another_function_is_proved_again(points: Points) -> None:
    def wrapped(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: inner(x)

    partial(wrapped(lambda x: x**2), "x")(points[0])
    with pytest.raises(MixingError):
        partial(wrapped(lambda x: x - x.mean()), "x")(points[0])


class Layer(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Plain:
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f = f

    def __call__(self, x: Tensor) -> Tensor:
        return self.f(x)


def normalised(x: Tensor) -> Tensor:
    return x / x.norm()


def by_first_input(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The first derivative by the only input, whatever its name."""
    return derivatives(u, (1,))(x)[(1,)]


@pytest.mark.parametrize(
    "wrap", [lambda f: f, lambda f: lambda x: f(x), functools.partial, torch.vmap, lambda f: Layer(f), lambda f: Plain(f)]
)
def test_built_in_functions_and_callables_are_told_apart(points: Points, wrap: Callable[[Any], Any]) -> None:
    x = points[0]
    torch.testing.assert_close(by_first_input(wrap(torch.sin), x), torch.cos(x))
    if wrap is not torch.vmap:
        with pytest.raises(MixingError):
            by_first_input(wrap(normalised), x)
        with pytest.raises(MixingError):
            by_first_input(wrap(torch.msort), x)


def test_switches_are_part_of_what_is_proved(points: Points) -> None:
    def u(x: Tensor, mix: bool) -> Tensor:
        return x - x.mean() if mix else x**2

    partial(u, "x")(points[0], mix=False)
    with pytest.raises(MixingError):
        partial(u, "x")(points[0], mix=True)


def test_another_rank_is_proved_again() -> None:
    def u(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    partial(u, "x")(torch.rand(5, 1))
    with pytest.raises(MixingError):
        partial(u, "x")(torch.rand(5))


def test_infinities_are_no_mixing() -> None:
    assert torch.isinf(partial(torch.sqrt, "xx", coords=("x",))(torch.tensor([[1.0], [0.0], [4.0]]))).tolist() == [[False], [True], [False]]
