"""Shapes of points: any batch shape, broadcast coordinates, packed inputs, vector blocks, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partials.taylor import derivatives, partial

Run = Callable[[Callable[[], Any]], Any]
Shape = tuple[int, ...]
F64 = torch.float64


def heat(x: Tensor, t: Tensor) -> Tensor:
    return torch.exp(-t) * torch.sin(x)


@pytest.mark.parametrize("shape", [(), (5,), (5, 1), (1,), (1, 1), (0,), (2, 3), (2, 1, 3), (0, 1)])
def test_any_shape_of_points(shape: tuple[int, ...], run: Run) -> None:
    x, t = torch.rand(2, *shape, dtype=F64)
    d = run(lambda: derivatives(heat, "t", "x", "xx", "xxt")(x, t).dict())
    assert all(tensor.shape == shape for tensor in d.values())
    torch.testing.assert_close(d["xx"], d["t"])
    torch.testing.assert_close(d["xxt"], heat(x, t))


@pytest.mark.parametrize(
    ("x_shape", "t_shape", "whole"),
    [
        ((5,), (), (5,)),
        ((5,), (1,), (5,)),
        ((5, 1), (), (5, 1)),
        ((5, 1), (1,), (5, 1)),
        ((), (4,), (4,)),
        ((5, 1), (4,), (5, 4)),
        ((2, 5), (5,), (2, 5)),
    ],
)
@pytest.mark.parametrize("spec", ["t", "xt", "tt"])
def test_broadcast_coordinates_are_each_points_own(x_shape: Shape, t_shape: Shape, whole: Shape, spec: str) -> None:
    x, t = torch.rand(x_shape, dtype=F64), torch.rand(t_shape, dtype=F64)
    expected = partial(heat, spec)(x.expand(whole).clone(), t.expand(whole).clone())
    assert expected.shape == whole
    torch.testing.assert_close(partial(heat, spec)(x, t), expected)


def test_broadcast_for_a_function_that_stacks(net: nn.Module, run: Run) -> None:
    """torch.stack and torch.cat do not broadcast: the coordinates arrive expanded."""
    x, t = torch.rand(5, dtype=F64), torch.tensor(0.3, dtype=F64)
    for spec in ("x", "t", "xt"):
        found = run(lambda spec=spec: partial(lambda x, t: net(torch.stack([x, t], -1)), spec)(x, t))
        torch.testing.assert_close(found, partial(net, spec, coords="xt")(torch.stack([x, t.expand(5)], -1)))
        column = partial(lambda x, t: net(torch.cat([x, t], -1)), spec)(x[:, None], t)
        torch.testing.assert_close(column, found)


def test_one_column_convention_with_several_outputs() -> None:
    """x and t of shape (N, 1) beside outputs of shape (N, m)."""
    x, t = torch.rand(2, 5, 1, dtype=F64)
    d = derivatives(lambda x, t: torch.cat([x * t, x**2, t**3], -1), "x", "tt")(x, t)
    torch.testing.assert_close(d.x, torch.cat([t, 2 * x, 0 * x], -1))
    torch.testing.assert_close(d.tt, torch.cat([0 * x, 0 * x, 6 * t], -1))


def test_column_in_and_flat_out() -> None:
    x = torch.rand(5, 1, dtype=F64)
    torch.testing.assert_close(partial(lambda x: x[:, 0] ** 3, "xx")(x), 6 * x[:, 0])


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_packed_input(batch: tuple[int, ...], run: Run) -> None:
    points = torch.rand(*batch, 3, dtype=F64)
    x, y, t = points.unbind(-1)

    def u(X: Tensor) -> Tensor:
        return X[..., 0] ** 2 * X[..., 1] * torch.exp(X[..., 2])

    d = run(lambda: derivatives(u, "t", "xx", "xy", (1, 1, 1), coords="xyt")(points).dict())
    torch.testing.assert_close(d["t"], u(points))
    torch.testing.assert_close(d["xx"], 2 * y * t.exp())
    torch.testing.assert_close(d["xyt"], 2 * x * t.exp())


def test_packed_input_with_long_names_and_its_own_name_among_them() -> None:
    points = torch.rand(4, 2, dtype=F64)
    found = derivatives(lambda x: x[:, 0] ** 3 * x[:, 1], "theta theta x", coords=("theta", "x"))(points)
    torch.testing.assert_close(found["theta theta x"], 6 * points[:, 0])
    torch.testing.assert_close(found[("x", "theta", "theta")], 6 * points[:, 0])


def test_packed_input_passes_other_inputs_on() -> None:
    points, scale = torch.rand(4, 2, dtype=F64), torch.rand(4, 2, dtype=F64)
    found = partial(lambda X, scale: (X**2 * scale).sum(-1), "xx", coords="xy")(points, scale)
    torch.testing.assert_close(found, 2 * scale[:, 0])


def test_inputs_that_are_no_coordinates_arrive_as_they_are() -> None:
    """`coords` names the coordinates; a weight matrix that happens to fit the points is left alone."""
    x, weights = torch.rand(4, dtype=F64), torch.rand(4, 4, dtype=F64)

    def u(x: Tensor, weights: Tensor) -> Tensor:
        return torch.tanh(x[:, None] * weights[0]).sum(-1)

    expected = torch.stack([torch.func.grad(lambda p: torch.tanh(p * weights[0]).sum())(p) for p in x])
    torch.testing.assert_close(partial(u, "x", coords="x")(x, weights), expected)
    torch.testing.assert_close(partial(u, "x")(x, weights), expected)
    labels = torch.arange(4)
    torch.testing.assert_close(partial(lambda x, k: x**2 * k, "x")(x, labels), 2 * x * labels)


def test_a_single_point_with_a_wide_input_beside_it() -> None:
    point, weights = torch.rand(3, dtype=F64), torch.rand(3, 16, dtype=F64)
    found = partial(lambda r, w: torch.tanh(r @ w).sum(-1), "r", vectors="r")(point, weights)
    torch.testing.assert_close(found, (1 - torch.tanh(point @ weights) ** 2) @ weights.T)


def test_keyword_coordinates_and_other_arguments() -> None:
    x, t = torch.rand(2, 5, dtype=F64)

    def u(x: Tensor, *, t: Tensor, power: int = 2, flip: bool = False) -> Tensor:
        return (-1 if flip else 1) * x**power * t

    torch.testing.assert_close(partial(u, "xt")(x, t=t, power=3), 3 * x**2)
    torch.testing.assert_close(partial(u, "xt")(x, t=t, flip=True), -2 * x)


def test_variadic_function_with_coordinates_named_by_place() -> None:
    x, t = torch.rand(2, 5, dtype=F64)
    torch.testing.assert_close(partial(lambda *inputs: inputs[0] ** 2 * inputs[1], "xt", coords="xt")(x, t), 2 * x)


def test_module_coordinates_are_those_of_forward() -> None:
    class Heat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(2.0, dtype=F64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.exp(-self.rate * t) * torch.sin(x)

    x, t = torch.rand(2, 5, dtype=F64)
    torch.testing.assert_close(partial(Heat(), "t")(x, t), -2 * torch.exp(-2 * t) * torch.sin(x))


def field(r: Tensor, t: Tensor) -> Tensor:
    return (r**3).sum(-1) * r[..., 0] * torch.exp(t)


@pytest.mark.parametrize("t_shape", [(5,), (5, 1), (), (1,)])
def test_vector_block(t_shape: tuple[int, ...], run: Run) -> None:
    r, t = torch.rand(5, 3, dtype=F64), torch.rand(t_shape, dtype=F64)

    def u(r: Tensor, t: Tensor) -> Tensor:
        return field(r, t.reshape(-1)) if t.dim() else field(r, t)

    d = run(lambda: derivatives(u, "r", "rr", "r.r", "r.rt", "rt", vectors=("r",))(r, t).dict())

    def one(p: Tensor, s: Tensor) -> Tensor:
        return field(p, s)

    times = t.reshape(-1).expand(5)
    gradient = torch.func.vmap(torch.func.jacrev(one))(r, times)
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(one)))(r, times)
    trace = hessian.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert d["r"].shape == (5, 3) and d["rr"].shape == (5, 3, 3) and d["r.r"].shape == (5,)
    for name, expected in (("r", gradient), ("rr", hessian), ("r.r", trace), ("r.rt", trace)):
        torch.testing.assert_close(d[name], expected)


def test_vector_block_with_vector_output() -> None:
    r = torch.rand(5, 3, dtype=F64)

    def v(r: Tensor) -> Tensor:
        return torch.stack([(r**2).sum(-1), r.prod(-1)], -1)

    d = derivatives(v, "r", "rr", "r.r", vectors="r")(r)
    assert d.r.shape == (5, 2, 3) and d.rr.shape == (5, 2, 3, 3)
    torch.testing.assert_close(d.rr, torch.func.vmap(torch.func.jacrev(torch.func.jacrev(v)))(r))
    torch.testing.assert_close(d["r.r"], torch.stack([torch.full((5,), 6.0, dtype=F64), torch.zeros(5, dtype=F64)], -1))


def test_axes_of_two_blocks_are_as_written() -> None:
    r, s = torch.rand(4, 2, dtype=F64), torch.rand(4, 3, dtype=F64)

    def u(r: Tensor, s: Tensor) -> Tensor:
        return (r[:, 0] * s[:, 1] + 5 * r[:, 1] * s[:, 2]).exp()

    d = derivatives(u, "rs", "sr", "rsr", vectors=("r", "s"))(r, s)
    assert d["rs"].shape == (4, 2, 3) and d["sr"].shape == (4, 3, 2) and d["rsr"].shape == (4, 2, 3, 2)
    torch.testing.assert_close(d["sr"], d["rs"].mT)
    torch.testing.assert_close(d["rsr"][:, 0, 2, 1], d["rrs"][:, 0, 1, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype, run: Run) -> None:
    x, t = torch.rand(2, 5, dtype=dtype)
    d = run(lambda: derivatives(lambda x, t: x * 2 + t**2, "x", "xx", "tt", "xt")(x, t).dict())
    assert {tensor.dtype for tensor in d.values()} == {dtype}
    default = torch.get_default_dtype()
    assert default == torch.float32


def test_half_precision() -> None:
    x = torch.rand(5, dtype=torch.bfloat16)
    assert partial(lambda x: x**3, "xx")(x).dtype == torch.bfloat16


def test_the_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    x, t = torch.rand(2, 5, dtype=F64)
    d = derivatives(heat, "t", "xx", "xt")(x, t)
    assert d["tx"] is d["xt"] and d.tx is d.xt and d[(1, 1)] is d.xt and d[{"x": 2}] is d.xx
    torch.testing.assert_close(d.x, torch.exp(-t) * torch.cos(x))
    assert torch.equal(d.value, heat(x, t)) and d.u is d.value and d[""] is d.value and d["value"] is d.value and d[(0, 0)] is d.value
    assert list(d.dict()) == ["t", "xx", "xt"] and repr(d) == "Derivatives(value (5,); t, xx, xt)"
    assert {"t", "xx", "xt", "value"} <= set(dir(d))


def test_u_and_value_as_coordinates() -> None:
    u = torch.rand(5, dtype=F64)
    d = derivatives(lambda u, value: u**2 * value, "u", "value")(u, u)
    torch.testing.assert_close(d.u, 2 * u * u)
    torch.testing.assert_close(d["value"], u**2)
    torch.testing.assert_close(d.value, u**3)
