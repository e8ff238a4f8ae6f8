"""With `create_graph=True` every quantity is differentiable in parameters and inputs: against torch.autograd.grad, differentiated again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

import partials as pt
from partials._run import NAMES
from partials.testing import CASES
from tests.oracle import dense, gradients, loop

DIFFERENTIABLE = [name for name in NAMES if name not in ("backward", "forward")]
EXAMPLES = ["line", "matrix_output", "tied", "norms"]

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def data(*shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


QUANTITIES = {
    "dense": (lambda J: J.dense(), lambda D: D),
    "norms": (lambda J: J.norms(), lambda D: D.norm(dim=-1)),
    "gram": (lambda J: J.gram(), lambda D: torch.tensordot(D, D, ([-1], [-1]))),
    "gram_blocks": (
        lambda J: J.gram_blocks().flatten(),
        lambda D: (D.flatten(1, -2) @ D.flatten(1, -2).mT if D.ndim > 2 else D.square().sum(1)).flatten(),
    ),
    "sum": (lambda J: J.sum(data(len(J))), lambda D: torch.einsum("n,n...->...", data(len(D)), D)),
    "variance": (lambda J: J.variance(), lambda D: D.var(0)),
    "matmul": (lambda J: J @ data(J.shape[-1]), lambda D: D @ data(D.shape[-1])),
    "rmatmul": (lambda J: J.T @ data(*J.shape[:-1]), lambda D: torch.tensordot(data(*D.shape[:-1]), D, D.ndim - 1)),
    "diagonal": (lambda J: J.diagonal(), lambda D: D.square().flatten(0, -2).sum(0)),
    "rows": (lambda J: torch.cat([r.flatten() for r in J.dict().values()]).square().sum(), lambda D: D.square().sum()),
}


def second(quantity, leaves):
    return torch.autograd.grad(quantity.sin().sum(), leaves, retain_graph=True, allow_unused=True)


def leaves_of(call):
    inputs = [
        x
        for x in call.inputs
        if isinstance(x, torch.Tensor) and x.is_floating_point() and not any(x is p for p in call.parameters.values())
    ]
    return [*call.parameters.values(), *(x.requires_grad_() for x in inputs)]


def assert_same(found, expected):
    for left, right in zip(found, expected, strict=True):
        zero = torch.zeros(()).double()
        torch.testing.assert_close(
            *torch.broadcast_tensors(zero if left is None else left, zero if right is None else right), rtol=1e-8, atol=1e-10
        )


@pytest.mark.parametrize("method", DIFFERENTIABLE)
@pytest.mark.parametrize("name", EXAMPLES)
def test_second_derivatives_equal_those_of_a_loop(name, method):
    call = CASES[name].make()
    wrt = {} if "params" in call.options or isinstance(call.f, nn.Module) else {"wrt": tuple(call.parameters), "in_dims": {"x": 0}}
    leaves = leaves_of(call)
    J = call.jacobian(method=method, check="never", create_graph=True, **wrt)
    values, rows = loop(call, create_graph=True)
    D = dense(rows, values.ndim)
    assert J.values.requires_grad
    for ours, reference in QUANTITIES.values():
        assert_same(second(ours(J), leaves), second(reference(D), leaves))


@pytest.mark.parametrize("method", DIFFERENTIABLE)
def test_norms_of_zero_rows_have_zero_derivative(method):
    w = data(3).requires_grad_()
    x = data(4, 3)
    x[1] = 0
    J = pt.jacobian(lambda x, w: (x @ w).square() / 2, x, w, method=method, check="never", create_graph=True)
    (slope,) = torch.autograd.grad(J.norms().sum(), w)
    rows = (x @ w).unsqueeze(1) * x
    (expected,) = torch.autograd.grad(rows[[0, 2, 3]].norm(dim=1).sum(), w)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("method", DIFFERENTIABLE)
def test_input_rows_are_differentiable(method):
    call = CASES["mlp"].make()
    x = call.inputs[0].requires_grad_()
    leaves = [x, *call.parameters.values()]
    J = pt.jacobian(call.f, x, wrt="input", method=method, check="never", create_graph=True)
    rows = torch.stack([torch.autograd.functional.jacobian(call.f, row, create_graph=True) for row in x])
    assert_same(second(J["input"], leaves), second(rows, leaves))
    assert_same(second(J.norms(), leaves), second(rows.norm(dim=2), leaves))


@pytest.mark.parametrize(("method", "reason"), [("backward", "reference cycle"), ("forward", "silently wrong in torch for layer_norm")])
def test_methods_that_cannot_say_so(method, reason):
    with pytest.raises(pt.MethodError, match=reason):
        CASES["mlp"].make().jacobian(method=method, create_graph=True)


@pytest.mark.parametrize("method", DIFFERENTIABLE)
def test_an_input_that_was_computed_from_a_parameter_is_given(method):
    w = data(3).requires_grad_()
    x = (data(4, 3) * w).sin()

    def f(x):
        return (x * w) @ w

    try:
        J = pt.jacobian(f, x, params=[w], method=method, check="never", create_graph=True)
    except pt.MethodError as refused:
        assert "input 'x' was computed from 0, and create_graph=True would differentiate that too" in str(refused) or method == "capture"
        return
    torch.testing.assert_close(J["0"], 2 * x * w)
    expected = torch.autograd.grad((2 * x * w).sin().sum(), w, retain_graph=True)
    assert_same(second(J["0"], [w]), expected)


# --- torch's second derivative of a vectorised normalisation is wrong, ours is not ---------------------------------

NORMS = {
    "layer_norm": (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)), (4,)),
    "instance_norm": (
        nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(15, 1)),
        (2, 5),
    ),
}


def slopes(norms, leaves):
    """The gradient of the sum of norms of per-sample gradients: a gradient penalty's."""
    return torch.autograd.grad(norms.sum(), leaves, allow_unused=True, materialize_grads=True)


def off(found, expected):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True) if b.norm() > 1e-9)


@pytest.mark.parametrize("name", NORMS)
def test_gradient_penalty_of_normalisations(name):
    torch.manual_seed(0)
    model, shape = NORMS[name]
    model = model.double()
    x = data(5, *shape)
    parameters = dict(model.named_parameters())
    leaves = list(parameters.values())
    rows = [gradients(model(x[n : n + 1])[0, 0], parameters, create_graph=True) for n in range(5)]
    expected = slopes(torch.stack([torch.cat([r.flatten() for r in row.values()]) for row in rows]).norm(dim=1), leaves)

    def one(parameters, x):
        return functional_call(model, parameters, x[None]).squeeze()

    theirs = vmap(grad(one), in_dims=(None, 0))(parameters, x)
    theirs = slopes(torch.cat([r.flatten(1) for r in theirs.values()], 1).norm(dim=1), leaves)
    for method in DIFFERENTIABLE:
        J = pt.jacobian(model, x, method=method, check="never", create_graph=True)
        assert off(slopes(J.norms(), leaves), expected) < 1e-9, method
    if torch.__version__.startswith("2.13."):
        assert off(theirs, expected) > 1e-6, "torch has mended vmap(grad) of this normalisation: the composite formula can go"


def test_composite_formulas_equal_torch():
    from partials.methods._composite import instance_norm, layer_norm

    x, weight, bias = data(3, 4, 5), data(4, 5), data(4, 5)
    torch.testing.assert_close(layer_norm(x, (4, 5), weight, bias, 1e-3), F.layer_norm(x, (4, 5), weight, bias, 1e-3))
    torch.testing.assert_close(layer_norm(x, 5), F.layer_norm(x, (5,)))
    torch.testing.assert_close(
        instance_norm(x, weight=weight[:, 0], bias=bias[:, 0]), F.instance_norm(x, weight=weight[:, 0], bias=bias[:, 0])
    )
    mean, var = data(4), data(4).exp()
    torch.testing.assert_close(instance_norm(x, mean, var, use_input_stats=False), F.instance_norm(x, mean, var, use_input_stats=False))
