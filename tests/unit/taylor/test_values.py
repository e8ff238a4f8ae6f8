"""Derivatives against analytic ones, and against one autograd call at a time."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from partials.taylor import derivatives, partial

Points = tuple[Tensor, Tensor]
Run = Callable[[Callable[[], Any]], Any]
Oracle = Callable[[Callable[..., Tensor], Sequence[Tensor], Sequence[int]], Tensor]
ORDERS = [(a, b) for a in range(5) for b in range(5) if 0 < a + b <= 4]


def close(left: Tensor, right: Tensor, tolerance: float = 1e-12) -> bool:
    assert left.shape == right.shape, (left.shape, right.shape)
    return bool((left - right).abs().max() <= tolerance * (1 + right.abs().max()))


def falling(power: int, order: int) -> int:
    return math.perm(power, order) if order <= power else 0


@pytest.mark.parametrize("orders", ORDERS)
def test_polynomials(points: Points, run: Run, orders: tuple[int, int]) -> None:
    x, t = points
    a, b = orders
    expected = falling(4, a) * x ** max(4 - a, 0) * falling(3, b) * t ** max(3 - b, 0)
    assert close(run(lambda: partial(lambda x, t: x**4 * t**3, orders)(x, t)), expected)


@pytest.mark.parametrize("orders", ORDERS)
def test_sine_and_exponential(points: Points, run: Run, orders: tuple[int, int]) -> None:
    x, t = points
    a, b = orders
    expected = 2.0**a * torch.sin(2 * x + a * math.pi / 2) * (-3.0) ** b * torch.exp(-3 * t)
    assert close(run(lambda: partial(lambda x, t: torch.sin(2 * x) * torch.exp(-3 * t), orders)(x, t)), expected)


@pytest.mark.parametrize("order", [5, 6])
def test_orders_above_four(points: Points, order: int) -> None:
    x, _ = points
    assert close(partial(torch.sin, {"x": order}, coords=("x",))(x[:, None])[:, 0], torch.sin(x + order * math.pi / 2))


@pytest.mark.parametrize("index", [index for order in (1, 2, 3, 4) for index in combinations_with_replacement((0, 1), order)])
def test_network_against_the_oracle(brute_force: Oracle, points: Points, net: nn.Module, run: Run, index: tuple[int, ...]) -> None:

    def u(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.stack([x, t], -1))[..., 0]

    spec = "".join("xt"[place] for place in index)
    assert close(run(lambda: partial(u, spec)(*points)), brute_force(u, points, index)[:, 0])


def test_all_orders_at_once_against_the_oracle(brute_force: Oracle, points: Points, net: nn.Module, run: Run) -> None:

    def u(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.stack([x, t], -1))[..., 0]

    specs = ["t", "x", "xx", "xt", "xxt", "xxtt", "xxxx"]
    found = run(lambda: derivatives(u, *specs)(*points).dict())
    for spec in specs:
        assert close(found[spec], brute_force(u, points, ["xt".index(letter) for letter in spec])[:, 0])


def test_the_oracle_is_alive(brute_force: Oracle, points: Points, net: nn.Module) -> None:
    """A planted error of a tenth of a percent, or of one point, is seen."""

    def u(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.stack([x, t], -1))[..., 0]

    right = partial(u, "xx")(*points)
    expected = brute_force(u, points, (0, 0))[:, 0]
    assert close(right, expected)
    assert not close(right * 1.001, expected)
    assert not close(right.roll(1), expected)
    assert not close(partial(u, "xt")(*points), expected)


def test_the_forum_recipe_is_another_derivative(brute_force: Oracle, points: Points, net: nn.Module) -> None:
    """Summing the gradient over both coordinates before the second pass gives u_xx + u_xt."""
    packed = torch.stack(points, -1).requires_grad_()
    (first,) = torch.autograd.grad(net(packed).sum(), packed, create_graph=True)
    (recipe,) = torch.autograd.grad(first.sum(), packed)
    d = derivatives(net, "xx", "xt", coords="xt")(packed.detach())
    assert close(recipe[:, 0], (d.xx + d.xt)[:, 0].detach())
    assert not close(recipe[:, 0], d.xx[:, 0].detach(), 1e-3)
    expected = brute_force(lambda x, t: net(torch.stack([x, t])), points, (0, 0))
    assert close(d.xx, expected)


@pytest.mark.parametrize("spec", ["x", "xt", "xxt"])
def test_vector_output(brute_force: Oracle, points: Points, run: Run, spec: str) -> None:

    def u(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([torch.sin(x * t), x**3 * t**2, t.exp(), torch.full_like(x, 2.0)], -1)

    expected = brute_force(u, points, ["xt".index(letter) for letter in spec])
    assert close(run(lambda: partial(u, spec)(*points)), expected)


def test_matrix_output(points: Points) -> None:
    x, _ = points

    def u(x: Tensor) -> Tensor:
        return torch.stack([x, x**2, x**3, torch.sin(x)], -1).reshape(*x.shape, 2, 2)

    assert close(partial(u, "xx")(x), torch.stack([0 * x, 2 + 0 * x, 6 * x, -torch.sin(x)], -1).reshape(7, 2, 2))


def test_complex_output(points: Points, run: Run) -> None:
    x, t = points

    def wave(x: Tensor, t: Tensor) -> Tensor:
        return torch.exp(1j * (3 * x - 2 * t))

    found = run(lambda: derivatives(wave, "t", "xx")(x, t).dict())
    assert close(found["t"], -2j * wave(x, t)) and close(found["xx"], -9 * wave(x, t))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Softplus(), nn.ELU(), nn.Sigmoid(), nn.Softmax(-1)])
def test_layers_on_which_nested_forward_mode_fails(brute_force: Oracle, points: Points, run: Run, activation: nn.Module) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(2, 16).double(), activation, nn.Linear(16, 1).double())

    def u(x: Tensor, t: Tensor) -> Tensor:
        return model(torch.stack([x, t], -1))[..., 0]

    assert close(run(lambda: partial(u, "xxt")(*points)), brute_force(u, points, (0, 0, 1))[:, 0])


def test_layer_norm_to_the_fourth_order(brute_force: Oracle, points: Points, run: Run) -> None:
    """torch's own layer_norm is wrong from the third reverse pass on; written out in elementary operations it is right."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, last, norm = nn.Linear(2, 16).double(), nn.Linear(16, 1).double(), nn.LayerNorm(16).double()
        nn.init.normal_(norm.weight)

    def written_out(z: Tensor) -> Tensor:
        c = z - z.mean(-1, keepdim=True)
        return c / torch.sqrt((c * c).mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias

    def u(x: Tensor, t: Tensor, normalise: Callable[[Tensor], Tensor] = norm) -> Tensor:
        return last(normalise(first(torch.stack([x, t], -1))))[..., 0]

    for spec, index in (("xx", (0, 0)), ("xxt", (0, 0, 1)), ("xxtt", (0, 0, 1, 1))):
        expected = brute_force(lambda x, t: u(x, t, written_out), points, index)[:, 0]
        assert close(run(lambda spec=spec: partial(u, spec)(*points)), expected, 1e-11)
        for method in ("taylor", "nested"):
            assert close(partial(u, spec, method=method)(*points), expected, 1e-11)


class Cube(torch.autograd.Function):
    """An old-style function: nested forward mode gives zero on its kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_custom_autograd_function(points: Points) -> None:
    x, _ = points
    assert close(partial(lambda x: Cube.apply(x), "xx")(x), 6 * x)


def test_a_function_that_differentiates_inside(points: Points) -> None:
    """A velocity that is itself a derivative: u = d/dx of sin(x t)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.autograd.grad(torch.sin(x * t).sum(), x, create_graph=True)[0]

    x, t = points
    assert close(partial(velocity, "x")(x, t), -(t**2) * torch.sin(x * t))

    def twice(x: Tensor, t: Tensor) -> Tensor:
        return derivatives(lambda x, t: torch.sin(x * t), "x")(x, t).x

    x = x.requires_grad_()
    assert close(partial(twice, "x")(x, t).detach(), (-(t**2) * torch.sin(x * t)).detach())


def test_functions_of_one_point_checkpoints_and_partial_functions(points: Points, net: nn.Module) -> None:
    def u(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.stack([x, t], -1))[..., 0]

    expected = partial(u, "xxt")(*points)
    assert close(partial(torch.vmap(lambda x, t: net(torch.stack([x, t]))[0]), "xxt")(*points), expected)
    assert close(partial(lambda x, t: checkpoint(u, x, t, use_reentrant=False), "xxt")(*points), expected)
    assert close(partial(functools.partial(u, t=points[1]), "xx")(points[0]), partial(u, "xx")(*points))


def test_meta_tensors() -> None:
    x = torch.rand(5, device="meta")
    assert partial(torch.sin, (2,))(x).shape == (5,)


def test_exact_zeros(points: Points, run: Run) -> None:
    x, t = points
    d = run(lambda: derivatives(lambda x, t: 3 * x + 1, "x", "t", "xx", "xt", "tt", "xxx")(x, t).dict())
    assert torch.equal(d["x"], torch.full_like(x, 3.0))
    for name in ("t", "xx", "xt", "tt", "xxx"):
        assert torch.equal(d[name], torch.zeros_like(x)) and d[name].dtype == x.dtype


def test_a_separable_sum_has_no_mixed_derivative(points: Points) -> None:
    assert torch.equal(partial(lambda x, t: x**2 + t**2, "xt")(*points), torch.zeros(7, dtype=torch.float64))


def test_a_constant(points: Points) -> None:
    assert torch.equal(partial(lambda x, t: torch.ones(7, 2), "xx")(*points), torch.zeros(7, 2))


def test_relu_network_has_second_derivatives_of_exactly_zero(points: Points, run: Run) -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which says so: tests/unit/taylor/test_zeros.py
        d = run(lambda: derivatives(model, "x", "xx", "xt", coords="xt")(torch.stack(points, -1)).dict())
    assert d["x"].abs().max() > 0
    assert torch.equal(d["xx"], torch.zeros(7, 1, dtype=torch.float64)) and torch.equal(d["xt"], torch.zeros(7, 1, dtype=torch.float64))


def test_nan_stays_at_its_point(points: Points) -> None:
    x = torch.tensor([1.0, 0.0, 4.0])
    found = partial(torch.sqrt, "x", coords=("x",))(x[:, None])[:, 0]
    assert found.tolist() == [0.5, math.inf, 0.25]
