"""What f returns: the shapes it may have, `output=` and `aux`, keyword inputs, types, no samples and one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

import partials as pt
from partials.methods import METHODS
from partials.testing import CASES, modules
from tests.oracle import gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]
each_method = pytest.mark.parametrize("method", METHODS)


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def parameter(*shape):
    return data(*shape).requires_grad_()


def jac(f, *inputs, **options):
    return pt.jacobian(f, *inputs, **{"check": "never", **options})


# --- which tensor ------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    y: torch.Tensor
    extra: torch.Tensor
    note: str = "kept"


class Pair(NamedTuple):
    y: torch.Tensor
    extra: torch.Tensor


FORMS = {
    "key": (lambda y, e: {"y": y, "extra": e}, "y", lambda aux: aux["extra"]),
    "index": (lambda y, e: (y, e), 0, lambda aux: aux[1]),
    "last": (lambda y, e: [e, y], -1, lambda aux: aux[0]),
    "attribute": (Pair, "y", lambda aux: aux.extra),
    "dataclass": (Answer, "y", lambda aux: aux.extra),
    "callable": (lambda y, e: {"deep": [e, {"y": y}]}, lambda returned: returned["deep"][1]["y"], lambda aux: aux["deep"][0]),
}


@each_method
@pytest.mark.parametrize("form", FORMS)
def test_output_picks_and_aux_is_all_that_f_returned(form, method):
    pack, output, rest = FORMS[form]
    x, w = data(5, 3), parameter(3, 2)

    def f(x, w):
        return pack((x @ w).sin(), x * w.sum())

    J = jac(f, x, w, output=output, method=method)
    torch.testing.assert_close(J["w"], torch.einsum("nc,ni,cd->ncid", (x @ w).cos(), x, torch.eye(2).double()).detach())
    assert torch.equal(rest(J.aux), x * w.detach().sum())
    assert not rest(J.aux).requires_grad
    assert type(J.aux) is type(pack(x, x))


def test_aux_is_there_only_where_output_is_given():
    J = jac(modules.mlp().double(), data(5, 4))
    assert J.aux is None
    assert jac(lambda x, w: (x * w,), data(5, 3), parameter(3)).aux is None
    assert J[:2].aux is None


def test_aux_of_no_samples():
    J = jac(lambda x, w: {"y": x @ w, "k": 3}, data(0, 3), parameter(3), output="y")
    assert J.aux["k"] == 3 and J.aux["y"].shape == (0,)


def test_aux_has_the_same_masks_as_the_values():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5)).double()
    x = data(5, 4)
    J = jac(lambda x: {"y": model(x)}, x, params=model, output="y", randomness="model")
    assert torch.equal(J.aux["y"], J.values)


# --- keyword inputs ----------------------------------------------------------------------------------------------


def test_kwargs_for_names_that_clash_with_options():
    def f(x, method, check, w):
        return (x * method + check) @ w

    x, method, check, w = data(5, 3), data(5, 3), data(5, 3), parameter(3)
    J = jac(f, x, kwargs={"method": method, "check": check, "w": w})
    torch.testing.assert_close(J["w"], x * method + check)
    assert jac(f, x, w=w, kwargs={"method": method, "check": check}).names == ("w",)


def test_inputs_by_keyword_only():
    x, w = data(5, 3), parameter(3)
    J = jac(lambda *, x, w: x @ w, x=x, w=w)
    torch.testing.assert_close(J["w"], x)


# --- shapes and sizes --------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("size", [0, 1])
def test_no_sample_and_one_sample(size, method):
    model = modules.mlp().double()
    J = jac(model, data(size, 4), method=method)
    assert len(J) == size and J.shape == (size, 3, 43)
    assert J.values.shape == (size, 3) and J["0.weight"].shape == (size, 3, 5, 4)
    assert J.dense().shape == (size, 3, 43)


def empty():
    return jac(modules.mlp().double(), data(0, 4))


def test_quantities_of_no_samples():
    J, H, u = empty(), data(0, 3, 3), data(0, 3)
    assert (J @ data(43)).shape == (0, 3) and (J @ data(43, 2)).shape == (0, 3, 2)
    assert torch.equal(J.T @ u, torch.zeros(43).double()) and torch.equal(J.T @ data(0, 3, 2), torch.zeros(43, 2).double())
    assert J.norms().shape == (0, 3) and J.gram_blocks().shape == (0, 3, 3, 3)[:3]
    assert J.gram().shape == (0, 3, 0, 3)
    for quantity in (J.diagonal(), J.diagonal(H), J.ggn(H) @ data(43), J.solve(u, 0.1), J.solve(u, 0)):
        assert torch.equal(quantity, torch.zeros(43).double())
    assert torch.equal(J.normal(H), torch.zeros(43, 43).double())
    assert torch.equal(J.sum(), torch.zeros(3, 43).double())
    assert J.mean().isnan().all() and J.mean().shape == (3, 43)
    assert J.variance().isnan().all() and J.variance().shape == (3, 43)
    assert len(J[[]]) == 0 and "(0, 3, 43)" in repr(J)
    assert len(pt.concat([J, J])) == 0


def test_quantities_of_no_samples_of_an_input():
    J = jac(modules.mlp().double(), data(0, 4), wrt="input")
    assert J.shape == (0, 3, 4)
    assert (J @ data(0, 4)).shape == (0, 3) and (J.T @ data(0, 3)).shape == (0, 4) and J.norms().shape == (0, 3)


@each_method
def test_output_without_entries(method):
    if method == "jacobian":
        with pytest.raises(pt.MethodError, match="does not take an output without entries"):
            jac(lambda x, w: (x @ w)[:, :0], data(5, 3), parameter(3, 2), method=method)
        return
    J = jac(lambda x, w: (x @ w)[:, :0], data(5, 3), parameter(3, 2), method=method)
    assert J.shape == (5, 0, 6) and J["w"].shape == (5, 0, 3, 2) and J.dense().shape == (5, 0, 6)


@each_method
def test_output_that_depends_on_no_parameter(method):
    J = jac(lambda x, w: x.square(), data(5, 3), parameter(2), method=method)
    assert torch.equal(J["w"], torch.zeros(5, 3, 2).double())


# --- types and memory formats ------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_have_the_dtype_of_the_function(dtype, method):
    call = CASES["mlp"].make(dtype)
    J = call.jacobian(method=method, check="never")
    assert J.dtype == dtype and J.dense().dtype == dtype and J["0.bias"].dtype == dtype and J.sum().dtype == dtype


@each_method
def test_parameters_of_different_dtypes(method):
    x, w, b = data(5, 3), parameter(3, 2), torch.randn(2, requires_grad=True)
    J = jac(lambda x, w, b: x @ w + b, x, w, b, method=method)
    assert J["w"].dtype == torch.float64 and J["b"].dtype == torch.float32
    assert J.dense().dtype == torch.float64 and J.sum().dtype == torch.float64
    torch.testing.assert_close(J @ data(8).fill_(1), x.sum(1, keepdim=True).expand(5, 2) + 1)


@each_method
@pytest.mark.parametrize("form", ["transposed", "expanded", "strided", "requires_grad", "inference", "subclass"])
def test_inputs_in_any_form(form, method):
    model = modules.mlp().double()
    x = {
        "transposed": data(4, 5).T,
        "expanded": data(1, 4).expand(5, 4),
        "strided": data(10, 8)[::2, ::2],
        "requires_grad": data(5, 4).requires_grad_(),
        "subclass": nn.Parameter(data(5, 4)),
    }.get(form)
    if form == "inference":
        with torch.inference_mode():
            x = data(5, 4)
    J = jac(model, x, method=method)
    plain = x.detach().clone()
    for n in range(5):
        rows = gradients(model(plain[n : n + 1])[0], dict(model.named_parameters()))
        for name, row in rows.items():
            torch.testing.assert_close(J[name][n], row)
    assert x.grad is None


@each_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_modes_without_gradients(mode, method):
    call = CASES["mlp"].make()
    expected = call.jacobian(method="loop", check="never").dense()
    with mode():
        J = call.jacobian(method=method, check="never")
        dense, norms = J.dense(), J.norms()
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(dense, expected)
    assert not norms.requires_grad


@each_method
def test_parameters_that_are_not_leaves(method):
    w = parameter(3, 2)
    x = data(5, 3)
    J = jac(lambda x, v: x @ v, x, 2 * w, method=method)
    torch.testing.assert_close(J["v"][:, 0, :, 0], x)


def test_results_carry_no_graph_and_share_no_memory_with_the_parameters():
    call = CASES["line"].make()
    J = call.jacobian(check="never")
    for result in (J.values, J["a"], J.dense(), J.norms(), J @ data(2), J.T @ J.values, J.sum(), J.gram()):
        assert not result.requires_grad
    before = J.dense()
    with torch.no_grad():
        call.parameters["a"].add_(1)
        call.inputs[0].add_(1)
    assert torch.equal(J.dense(), before)
