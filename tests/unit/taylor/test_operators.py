"""Operators against analytic values, and against torch.func in reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partials._errors import InputError, OutputError
from partials.taylor import biharmonic, curl, directional, divergence, hessian, laplacian, partial

Run = Callable[[Callable[[], Any]], Any]
F64 = torch.float64


@pytest.fixture
def space() -> Tensor:
    return torch.rand(6, 3, dtype=F64, generator=torch.Generator().manual_seed(2))


def polynomial(X: Tensor) -> Tensor:
    x, y, z = X.unbind(-1)
    return x**4 + x**2 * y**2 + z * y


def reference(u: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(torch.func.jacrev(u)))(points)


def test_hessian(space: Tensor, run: Run) -> None:
    torch.testing.assert_close(run(lambda: hessian(polynomial)(space)), reference(polynomial, space))


@pytest.mark.parametrize("batch", [(), (2, 2)])
def test_hessian_of_any_batch(batch: tuple[int, ...]) -> None:
    points = torch.rand(*batch, 3, dtype=F64)
    assert hessian(polynomial)(points).shape == (*batch, 3, 3)
    assert hessian(lambda X: torch.stack([X[..., 0] ** 2, X[..., 1]], -1))(points).shape == (*batch, 2, 3, 3)


def test_hessian_over_some_coordinates_and_over_several_inputs(space: Tensor) -> None:
    whole = reference(polynomial, space)
    torch.testing.assert_close(hessian(polynomial, over=(2, 1))(space), whole[:, [2, 1]][:, :, [2, 1]])
    torch.testing.assert_close(hessian(polynomial, over="yx", coords="xyz")(space), whole[:, [1, 0]][:, :, [1, 0]])
    apart = hessian(lambda x, y, z: polynomial(torch.stack([x, y, z], -1)))(*space.unbind(-1))
    torch.testing.assert_close(apart, whole)


def test_laplacian(space: Tensor, run: Run) -> None:
    x, y, _ = space.unbind(-1)
    torch.testing.assert_close(run(lambda: laplacian(polynomial)(space)), 14 * x**2 + 2 * y**2)
    torch.testing.assert_close(run(lambda: laplacian(polynomial, over=(0,))(space)), 12 * x**2 + 2 * y**2)
    torch.testing.assert_close(run(lambda: laplacian(polynomial, over=(-2, 2))(space)), 2 * x**2)
    torch.testing.assert_close(run(lambda: laplacian(polynomial, "xz", coords="xyz")(space)), 12 * x**2 + 2 * y**2)


def test_laplacian_over_named_inputs(space: Tensor) -> None:
    x, y, t = space.unbind(-1)
    found = laplacian(lambda x, y, t: torch.sin(x) * torch.cos(2 * y) * t**3, over="xy")(x, y, t)
    torch.testing.assert_close(found, -5 * torch.sin(x) * torch.cos(2 * y) * t**3)
    block = laplacian(lambda r, t: (r**2).sum(-1) * t, "r", vectors="r")(space, t)
    torch.testing.assert_close(block, 6 * t)


def test_laplacian_with_aux(space: Tensor, run: Run) -> None:
    value, gradient, total = run(lambda: laplacian(polynomial, aux=True)(space))
    torch.testing.assert_close(value, polynomial(space))
    torch.testing.assert_close(gradient, torch.func.vmap(torch.func.grad(polynomial))(space))
    torch.testing.assert_close(total, laplacian(polynomial)(space))


def test_laplacian_with_weight(space: Tensor, run: Run) -> None:
    matrix = torch.tensor([[1.0, 2.0, 0.0], [5.0, -1.0, 3.0], [0.5, 0.0, 4.0]], dtype=F64)
    whole = reference(polynomial, space)
    torch.testing.assert_close(run(lambda: laplacian(polynomial, weight=matrix)(space)), torch.einsum("ij,nji->n", matrix, whole))
    torch.testing.assert_close(run(lambda: laplacian(polynomial, weight=matrix[0])(space)), torch.einsum("i,nii->n", matrix[0], whole))
    torch.testing.assert_close(laplacian(polynomial, weight=torch.eye(3, dtype=F64))(space), laplacian(polynomial)(space))
    value, gradient, _ = laplacian(polynomial, weight=matrix, aux=True)(space)
    assert value.shape == (6,) and gradient.shape == (6, 3)


def test_laplacian_of_a_vector_output_with_weight(space: Tensor) -> None:
    matrix = torch.rand(3, 3, dtype=F64)

    def v(X: Tensor) -> Tensor:
        return torch.stack([polynomial(X), X.prod(-1)], -1)

    torch.testing.assert_close(laplacian(v, weight=matrix)(space), torch.einsum("ij,ncji->nc", matrix, reference(v, space)))


def test_laplacian_of_a_linear_function_is_exactly_zero(space: Tensor, run: Run) -> None:
    value, gradient, total = run(lambda: laplacian(lambda X: 2 * X[..., 0] - X[..., 2], aux=True)(space))
    assert torch.equal(total, torch.zeros_like(value))
    assert torch.equal(gradient, torch.tensor([2.0, 0.0, -1.0], dtype=F64).expand(6, 3))


def test_gradient_of_the_weight(space: Tensor) -> None:
    weight = torch.ones(3, dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(laplacian(polynomial, weight=weight)(space).sum(), weight)
    torch.testing.assert_close(found, reference(polynomial, space).diagonal(dim1=1, dim2=2).sum(0))


def rotation(X: Tensor) -> Tensor:
    x, y, z = X.unbind(-1)
    return torch.stack([x * y - z**2, y**3 * z, x**2 + y * z], -1)


def test_divergence(space: Tensor, run: Run) -> None:
    _, y, z = space.unbind(-1)
    torch.testing.assert_close(run(lambda: divergence(rotation)(space)), y + 3 * y**2 * z + y)
    assert divergence(rotation)(space[0]).shape == ()


def test_curl(space: Tensor, run: Run) -> None:
    x, y, z = space.unbind(-1)
    torch.testing.assert_close(run(lambda: curl(rotation)(space)), torch.stack([z - y**3, -2 * z - 2 * x, -x], -1))
    plane = space[:, :2]
    torch.testing.assert_close(run(lambda: curl(lambda X: torch.stack([-(X[..., 1] ** 2), X[..., 0] ** 3], -1))(plane)), 3 * x**2 + 2 * y)


def test_divergence_of_a_curl_and_curl_of_a_gradient_vanish(space: Tensor) -> None:
    torch.testing.assert_close(divergence(curl(rotation))(space), torch.zeros(6, dtype=F64))
    torch.testing.assert_close(curl(partial(polynomial, "X", vectors="X"))(space), torch.zeros(6, 3, dtype=F64))


def test_divergence_of_the_gradient_is_the_laplacian(space: Tensor) -> None:
    torch.testing.assert_close(divergence(partial(polynomial, "X", vectors="X"))(space), laplacian(polynomial)(space))


def test_divergence_in_space_of_a_field_in_time(space: Tensor) -> None:
    time = torch.rand(6, 1, dtype=F64)

    def flow(X: Tensor) -> Tensor:
        return rotation(X[..., :3]) * X[..., 3:]

    found = divergence(flow, over="xyz", coords="xyzt")(torch.cat([space, time], -1))
    torch.testing.assert_close(found, divergence(rotation)(space) * time[:, 0])


def test_biharmonic(space: Tensor, run: Run) -> None:
    torch.testing.assert_close(run(lambda: biharmonic(polynomial)(space)), torch.full((6,), 32.0, dtype=F64))
    plane = space[:, :2]
    wave = run(lambda: biharmonic(lambda X: torch.sin(X[..., 0]) * torch.exp(2 * X[..., 1]))(plane))
    torch.testing.assert_close(wave, 9 * torch.sin(plane[:, 0]) * torch.exp(2 * plane[:, 1]))
    torch.testing.assert_close(laplacian(laplacian(polynomial))(space), biharmonic(polynomial)(space))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(3,), (6, 3), (1, 3), ()])
def test_directional(space: Tensor, run: Run, order: int, shape: tuple[int, ...]) -> None:
    v = torch.rand(shape, dtype=F64)

    def along(point: Tensor, direction: Tensor) -> Tensor:
        derivative = lambda s: polynomial(point + s * direction)  # noqa: E731
        for _ in range(order):
            derivative = torch.func.grad(derivative)
        return derivative(torch.zeros((), dtype=F64))

    expected = torch.func.vmap(along)(space, v.expand(6, 3))
    torch.testing.assert_close(run(lambda: directional(polynomial, v, order)(space)), expected)


def test_directional_passes_other_inputs_on_and_follows_the_graph(space: Tensor) -> None:
    v = torch.rand(3, dtype=F64, requires_grad=True)
    scale = torch.rand(6, dtype=F64)
    found = directional(lambda X, scale: polynomial(X) * scale, v, order=2)(space, scale)
    (by_v,) = torch.autograd.grad(found.sum(), v)
    torch.testing.assert_close(by_v, 2 * torch.einsum("n,nij,j->i", scale, reference(polynomial, space), v.detach()))


def test_network(space: Tensor, run: Run) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    expected = reference(model, space).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(run(lambda: laplacian(model)(space)), expected)


@pytest.mark.parametrize("weight", [torch.ones(2), torch.ones(3, 2), torch.ones(1, 3, 3), 3.0])
def test_weight_that_does_not_fit(space: Tensor, weight: Any) -> None:
    with pytest.raises(InputError, match="the weight of the Laplacian does not fit") as error:
        laplacian(polynomial, weight=weight)(space)
    assert "expected  a tensor of shape (3,) or (3, 3)" in str(error.value)


@pytest.mark.parametrize("over", [(3,), (0, 0), (-4,), (0, -3)])
def test_over_with_numbers_that_name_no_coordinate(space: Tensor, over: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="`over` has numbers that name no coordinate, or one twice"):
        laplacian(polynomial, over=over)(space)


def test_over_with_unknown_names(space: Tensor) -> None:
    with pytest.raises(InputError, match="'q'"):
        laplacian(polynomial, over="xq", coords="xyz")(space)


def test_fields_and_coordinates_must_match(space: Tensor) -> None:
    with pytest.raises(OutputError, match="does not have a component for each coordinate"):
        divergence(polynomial)(space)
    with pytest.raises(InputError, match="two and three dimensions"):
        curl(lambda X: X)(torch.rand(5, 4))


@pytest.mark.parametrize("order", [0, -1, 1.5, True])
def test_order_of_a_direction(order: Any) -> None:
    with pytest.raises(InputError, match="order of 1 or more"):
        directional(polynomial, torch.ones(3), order)


def test_direction_that_does_not_fit(space: Tensor) -> None:
    with pytest.raises(InputError, match="does not broadcast to the input"):
        directional(polynomial, torch.ones(4))(space)
    with pytest.raises(InputError, match="no packed input"):
        directional(polynomial, torch.ones(3))(torch.tensor(1.0))
