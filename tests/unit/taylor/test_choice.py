"""Which method is chosen, what is refused, and what is said about zeros and about precision."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from partials._errors import InputError
from partials.taylor import biharmonic, derivatives, laplacian, partial
from partials.taylor.choice import planned
from partials.taylor.frame import Frame
from partials.taylor.specs import Term

F64 = torch.float64


def mlp(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 8), activation, nn.Linear(8, 1)).double()


@pytest.mark.parametrize(
    ("terms", "slots"),
    [
        ([Term((), (0,))], 2),
        ([Term((), (0, 0)), Term((), (1,))], 4),
        ([Term((), (0, 1))], 4),
        ([Term((), (0,) * 6)], 7),
        ([Term((tuple(range(50)),), ())], 52),
        ([Term(((0, 1), (0, 1)), ())], 10),
    ],
)
def test_the_closure_has_no_slot_too_many(terms: list[Term], slots: int) -> None:
    assert len(Frame.of(terms).slots) == slots


def test_low_orders_are_nested_and_high_ones_are_not() -> None:
    assert planned([Term((), (0,))], 1, True).method == "nested"
    assert planned([Term((), (0, 0)), Term((), (1,))], 1, True).method == "nested"
    assert planned([Term((), (0,) * 4)], 1, True).method == "taylor"
    assert planned([Term((tuple(range(10)),), ())], 1, True).method == "taylor"


@pytest.mark.parametrize("method", ["taylor", "nested"])
def test_a_method_can_be_asked_for(method: str) -> None:
    X = torch.rand(5, 2, dtype=F64)
    d = derivatives(mlp(nn.Tanh()), "xx", coords="xy", method=method)(X)
    assert d.plan.method == method and "asked for" in str(d.plan)
    assert laplacian(mlp(nn.Tanh()), method=method).explain(X).method == method  # type: ignore[attr-defined]


@pytest.mark.parametrize("option", [{"method": "forward"}, {"check": "sometimes"}])
def test_unknown_options(option: dict[str, str]) -> None:
    with pytest.raises(InputError, match="is unknown"):
        partial(torch.sin, "x", coords="x", **option)(torch.rand(5, 1))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.Hardtanh()])
@pytest.mark.parametrize("method", ["auto", "taylor", "nested"])
def test_zeros_of_straight_pieces_are_said(activation: nn.Module, method: str) -> None:
    net = mlp(activation)
    u = lambda X, _marker=(method, activation): net(X)  # noqa: E731 - a function of its own for each case
    with pytest.warns(UserWarning, match=r"straight pieces \((relu|leaky_relu|hardtanh)\)"):
        laplacian(u, method=method, check="always")(torch.rand(5, 2, dtype=F64))


def test_other_zeros_are_not_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partial(lambda x, t: x**2 + t**2, "xt")(*torch.rand(2, 5, dtype=F64))
        laplacian(mlp(nn.Tanh()))(torch.rand(5, 2, dtype=F64))


def test_an_order_that_float32_cannot_hold() -> None:
    with pytest.raises(InputError, match="order 9 means nothing in float32"):
        partial(torch.sin, {"x": 9}, coords="x")(torch.rand(5, 1))
    x = torch.rand(5, 1, dtype=F64)
    torch.testing.assert_close(partial(torch.sin, {"x": 9}, coords="x")(x), torch.cos(x))


def test_no_points_and_integers() -> None:
    X = torch.empty(0, 2, dtype=F64)
    for method in ("auto", "taylor", "nested"):
        assert laplacian(mlp(nn.Tanh()), method=method)(X).shape == (0, 1)
    with pytest.raises(InputError, match="not real"):
        partial(torch.sin, "x", coords="x")(torch.arange(5)[:, None])


def test_the_biharmonic_operator_by_both_methods() -> None:
    net, X = mlp(nn.Tanh()), torch.rand(5, 2, dtype=F64)
    torch.testing.assert_close(biharmonic(net, method="taylor")(X), biharmonic(net, method="nested")(X))


def test_a_complex_wave_by_both_methods() -> None:
    x, t = torch.rand(2, 7, dtype=F64)

    def wave(x: Tensor, t: Tensor) -> Tensor:
        return torch.exp(1j * (3 * x - 2 * t)) * torch.sin(x * t)

    ours, right = (derivatives(wave, "t", "xx", "xxt", method=method)(x, t).dict() for method in ("taylor", "nested"))
    for name in right:
        torch.testing.assert_close(ours[name], right[name])
