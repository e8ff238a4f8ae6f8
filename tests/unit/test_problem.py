"""What is differentiated: every rule about parameters, names, inputs and one sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import partials as pt
from partials.testing import modules
from tests.oracle import gradients

METHODS = ["loop", "grad", "jacobian", "vmap"]


def line(x, a, b):
    return a * x + b


def tensors(*shapes, grad=True):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=grad) for shape in shapes]


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def jac(f, *inputs, **options):
    return pt.jacobian(f, *inputs, **{"check": "never", **options})


# --- parameters of a module --------------------------------------------------------------------------------------


def test_trainable_parameters_of_a_module_in_their_order():
    model = modules.mlp().double()
    model[0].bias.requires_grad_(False)
    J = jac(model, data(5, 4))
    assert J.names == ("0.weight", "2.weight", "2.bias")
    assert J.shape == (5, 3, 20 + 15 + 3)
    assert torch.equal(J.dense()[:, :, :20], J["0.weight"].flatten(2))


def test_tied_parameter_has_its_first_name_and_the_others_as_aliases():
    model = modules.Tied().double()
    tokens = torch.randint(6, (3, 2))
    J = jac(model, tokens)
    assert J.names == ("table.weight", "head.bias")
    assert torch.equal(J["head.weight"], J["table.weight"])
    assert "head.weight" in J and "head.nothing" not in J
    named = jac(model, tokens, wrt="head.weight")
    assert named.names == ("table.weight",)
    assert torch.equal(named["head.weight"], J["table.weight"])


def test_frozen_parameter_can_be_named():
    model = modules.LowRank().double()
    x = data(5, 4)
    J = jac(model, x, wrt=("W", "A"))
    assert J.names == ("W", "A")
    assert not model.W.requires_grad
    model.W.requires_grad_()
    torch.testing.assert_close(J["W"], jac(model, x)["W"])


@pytest.mark.parametrize(
    ("wrt", "names"),
    [
        ("0.weight", ("0.weight",)),
        ("*.weight", ("0.weight", "2.weight")),
        (("2.bias", "0.*"), ("0.weight", "0.bias", "2.bias")),
        (["2"], ("2.weight", "2.bias")),
    ],
)
def test_wrt_takes_names_globs_and_prefixes(wrt, names):
    model = modules.mlp().double()
    x = data(5, 4)
    J, full = jac(model, x, wrt=wrt), jac(model, x)
    assert J.names == names
    for name in names:
        torch.testing.assert_close(J[name], full[name])


# --- arguments of a function -------------------------------------------------------------------------------------


def test_arguments_that_require_grad_are_the_parameters():
    a, b = tensors((1,), (1,))
    x = data(6, 1)
    J = jac(line, x, a, b)
    assert J.names == ("a", "b")
    assert torch.equal(J["a"], x.unsqueeze(-1)) and torch.equal(J["b"], torch.ones(6, 1, 1, dtype=x.dtype))


def test_wrt_ignores_requires_grad():
    a, b = tensors((1,), (1,), grad=False)
    x = data(6, 1).requires_grad_()
    J = jac(line, x, a, b, wrt=("a", "b"))
    assert J.names == ("a", "b")
    assert torch.equal(J["a"], x.detach().unsqueeze(-1))


def test_parameters_by_keyword_and_in_a_mapping():
    def f(x, weights, *, b):
        return x @ weights["w"] + b

    w, b = tensors((3, 2), (2,))
    x = data(5, 3)
    J = jac(f, x, {"w": w}, b=b)
    assert J.names == ("weights.w", "b")
    assert jac(f, x, {"w": w}, b=b, wrt="weights", in_dims={"b": None}).names == ("weights.w",)
    torch.testing.assert_close(J["weights.w"][:, 1, :, 1], x)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_tensor_as_two_arguments_is_two_parameters(method):
    (a,) = tensors((1,))
    x = data(6, 1)
    J = jac(line, x, a, a, method=method)
    assert J.names == ("a", "b")
    assert torch.equal(J["a"], x.unsqueeze(-1)) and torch.equal(J["b"], torch.ones(6, 1, 1, dtype=x.dtype))


def test_functions_without_a_signature_number_their_arguments():
    x, w = data(5, 3), tensors((3,))[0]
    J = jac(torch.mul, x, w, in_dims=(0, None))
    assert J.names == ("1",)
    torch.testing.assert_close(J["1"].diagonal(dim1=1, dim2=2), x)


# --- tensors from outside ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["sequence", "mapping", "module", "tensor"])
def test_params_from_outside(form, method):
    w, b = tensors((3, 2), (2,))
    net = nn.Linear(3, 2, dtype=torch.float64)
    x = data(5, 3)

    def f(x):
        return net(x).sin() if form == "module" else (x @ w + b).sin()

    params, names = {
        "sequence": ((w, b), ("0", "1")),
        "mapping": ({"slope": w, "shift": b}, ("slope", "shift")),
        "module": (net, ("weight", "bias")),
        "tensor": (w, ("0",)),
    }[form]
    J = jac(f, x, params=params, method=method)
    assert J.names == names
    expected = {"sequence": [w, b], "mapping": [w, b], "module": [net.weight, net.bias], "tensor": [w]}[form]
    for n in range(5):
        rows = gradients(f(x[n : n + 1])[0], dict(zip(names, expected, strict=True)))
        for name in names:
            torch.testing.assert_close(J[name][n], rows[name])


@pytest.mark.parametrize("method", METHODS)
def test_params_that_are_arguments_too(method):
    a, b = tensors((1,), (1,))
    x = data(6, 1)
    J = jac(line, x, a, b, params=[a, b], method=method)
    assert J.names == ("0", "1")
    assert torch.equal(J["0"], x.unsqueeze(-1)) and torch.equal(J["1"], torch.ones(6, 1, 1, dtype=x.dtype))


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_given_whatever_they_were_computed_from(method):
    encoder, decoder = nn.Linear(3, 2, dtype=torch.float64), nn.Linear(2, 2, dtype=torch.float64)
    both = nn.ModuleList([encoder, decoder])
    J = jac(lambda h: decoder(h), encoder(data(5, 3)), params=both, method=method)
    assert not J["0.weight"].any()
    assert J["1.weight"].any()


# --- inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "loop", "grad", "backward", "jacobian", "vmap", "forward"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_input_jacobian_of_a_module(method):
    model = modules.mlp().double()
    x = data(5, 4)
    J = jac(model, x, wrt="input", method=method)
    assert isinstance(J, pt.InputJacobian)
    assert J.names == ("input",) and J.shape == (5, 3, 4)
    expected = torch.stack([torch.autograd.functional.jacobian(model, row) for row in x])
    torch.testing.assert_close(J["input"], expected)
    v, u = data(5, 4), data(5, 3)
    torch.testing.assert_close(J @ v, torch.einsum("nci,ni->nc", expected, v))
    torch.testing.assert_close(J @ {"input": v}, J @ v)
    torch.testing.assert_close(J.T @ u, torch.einsum("nci,nc->ni", expected, u))
    torch.testing.assert_close(J.norms(), expected.norm(dim=2))
    torch.testing.assert_close(J.gram_blocks(), expected @ expected.mT)
    torch.testing.assert_close(J[1:3].dense(), expected[1:3])


@pytest.mark.parametrize("method", METHODS)
def test_two_inputs_of_which_one_has_time_first(method):
    def f(x, y):
        return torch.einsum("tni,nj->nij", x.sin(), y.cos())

    x, y = data(2, 5, 3), data(5, 4)
    J = jac(f, x, y, wrt=("x", "y"), in_dims={"x": 1, "y": 0}, method=method)
    assert J["x"].shape == (5, 3, 4, 2, 3) and J["y"].shape == (5, 3, 4, 4)
    torch.testing.assert_close(J["y"][2], torch.autograd.functional.jacobian(lambda v: f(x[:, 2:3], v[None])[0], y[2]))
    torch.testing.assert_close(J["x"][2], torch.autograd.functional.jacobian(lambda v: f(v[:, None], y[2:3])[0], x[:, 2]))
    u = data(5, 3, 4)
    found = J.columns.split(J.T @ u, 1)
    torch.testing.assert_close(found["y"], torch.einsum("nijk,nij->nk", J["y"], u))


@pytest.mark.parametrize("name", pt._input_jacobian.REFUSED)
def test_input_jacobian_refuses_quantities_over_samples(name):
    J = jac(modules.mlp().double(), data(5, 4), wrt="input")
    with pytest.raises(pt.InputError, match=f"{name} is a quantity over shared parameters"):
        getattr(J, name)()


@pytest.mark.parametrize("flags", [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_and_parameters_in_one_call(method, flags):
    a, b = tensors((1,), (1,), grad=flags[1])
    x = data(6, 1).requires_grad_(flags[0])
    options = {} if flags == (False, True) else {"in_dims": {"x": 0}}
    J = jac(line, x, a, b, wrt=("x", "a", "b"), method=method, **options)
    assert isinstance(J, pt.Jacobian)
    assert J["x"].shape == (6, 1, 1)
    assert torch.equal(J["x"].flatten(), a.detach().expand(6))
    assert list(J.dict()) == ["x", "a", "b"]
    assert J.names == ("a", "b") and J.shape == (6, 1, 2) and J.dense().shape == (6, 1, 2)
    torch.testing.assert_close(J.sum(), torch.stack([x.detach().sum(), torch.tensor(6.0).double()]).reshape(1, 2))


@pytest.mark.parametrize("method", METHODS)
def test_input_of_one_number_for_each_sample(method):
    x, w = data(6), tensors((3,))[0]
    J = jac(lambda x, w: x[:, None].sin() * w, x, w, wrt="x", method=method)
    assert J.shape == (6, 3, 1) and J["x"].shape == (6, 3)
    torch.testing.assert_close(J["x"], (x.cos()[:, None] * w).detach())
    v, u = data(6), data(6, 3)
    torch.testing.assert_close(J @ v, J["x"] * v[:, None])
    torch.testing.assert_close(J @ v[:, None], J @ v)
    torch.testing.assert_close(J.T @ u, (J["x"] * u).sum(1, keepdim=True))


@pytest.mark.parametrize("v", [data(7, 4), data(6, 5), data(24), {"input": data(6, 5)}, {}])
def test_input_jacobian_refuses_vectors_of_another_shape(v):
    J = jac(modules.mlp().double(), data(6, 4), wrt="input")
    with pytest.raises(pt.InputError, match="another shape"):
        J @ v
    with pytest.raises(pt.InputError, match="another shape"):
        J.T @ data(7, 3)


def test_module_input_and_parameter_in_one_call():
    model = nn.Linear(3, 2, dtype=torch.float64)
    J = jac(model, data(5, 3), wrt=("input", "weight"))
    assert torch.equal(J["input"], model.weight.detach().expand(5, 2, 3))
    assert J.names == ("weight",)


def test_chosen_samples_keep_their_inputs():
    a, b = tensors((1,), (1,))
    J = jac(lambda x, a, b: a * x**2 + b, x := data(6, 1), a, b, wrt=("x", "a", "b"))
    torch.testing.assert_close(J[2:4]["x"].flatten(), (2 * a * x[2:4, 0]).detach())
    assert list(J[2:4].dict()) == ["x", "a", "b"]


# --- sample dimensions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_dims", [(1, None, None), {"x": 1}, {"x": -2, "w": None}])
@pytest.mark.parametrize("method", METHODS)
def test_in_dims_by_position_and_by_name(in_dims, method):
    def f(x, w, b):
        return torch.einsum("tni,io->no", x, w) + b

    w, b = tensors((3, 2), (2,))
    x = data(5, 5, 3)
    J = jac(f, x, w, b, in_dims=in_dims, method=method)
    assert len(J) == 5
    torch.testing.assert_close(J["w"][:, 0, :, 0], x.sum(0))


@pytest.mark.parametrize("method", METHODS)
def test_in_dims_of_keywords_and_shared_inputs(method):
    def f(x, *, scale, mask, w):
        return (x * scale * mask.T) @ w

    (w,) = tensors((3,))
    x, scale, mask = data(5, 3), data(3), data(3, 5)
    J = jac(f, x, scale=scale, mask=mask, w=w, in_dims={"scale": None, "mask": 1}, method=method)
    torch.testing.assert_close(J["w"], x * scale * mask.T)


def test_in_dims_of_a_container():
    (w,) = tensors((3,))
    pair = (data(5, 3), data(3, 5))
    J = jac(lambda pair, w: (pair[0] * pair[1].T) @ w, pair, w, in_dims=((0, 1), None))
    torch.testing.assert_close(J["w"], pair[0] * pair[1].T)


def test_zero_dimensional_inputs_and_numbers_are_shared():
    (w,) = tensors((3,))
    x = data(5, 3)
    J = jac(lambda x, scale, power, w: (x * scale) ** power @ w, x, torch.tensor(2.0).double(), 2, w)
    torch.testing.assert_close(J["w"], (2 * x) ** 2)


# --- one sample --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["loop", "grad", "backward", "jacobian", "vmap", "forward"])
@pytest.mark.parametrize("out", [(), (2,), (2, 3)])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_one_sample_has_no_sample_dimension(method, out):
    def f(x, w, b):
        return (x @ w).sin().sum() + b if not out else (x @ w).sin().expand(out) * b if len(out) == 1 else (x @ w)[:, None] * b

    shapes = {(): ((3, 2), ()), (2,): ((3, 2), (2,)), (2, 3): ((3, 2), (3,))}[out]
    w, b = tensors(*shapes)
    x = data(3)
    J = jac(f, x, w, b, batched=False, method=method)
    expected = gradients(f(x, w, b), {"w": w, "b": b})
    assert J.values.shape == out and J["w"].shape == (*out, 3, 2)
    assert J.shape == (*out, 6 + b.numel()) and len(J) == 1
    for name in "wb":
        torch.testing.assert_close(J[name], expected[name])
    width = J.shape[-1]
    dense = torch.cat([expected[name].reshape(*out, -1) for name in "wb"], -1)
    torch.testing.assert_close(J.dense(), dense)
    v, u = data(width), data(*out)
    torch.testing.assert_close(J @ v, dense @ v)
    torch.testing.assert_close(J.T @ u, torch.tensordot(u, dense, len(out)))
    torch.testing.assert_close(J.norms(), dense.norm(dim=-1))
    torch.testing.assert_close(J.gram(), torch.tensordot(dense, dense, ([-1], [-1])))
    assert J.gram_blocks().shape == (*out, *out)
    assert J.unflatten(v)["w"].shape == (3, 2)


def test_one_sample_of_a_module_and_its_input():
    model = modules.mlp().double()
    x = data(4)
    J = jac(model, x, batched=False)
    assert J["0.weight"].shape == (3, 5, 4)
    X = jac(model, x, wrt="input", batched=False)
    assert X["input"].shape == (3, 4) and X.shape == (3, 4)
    torch.testing.assert_close(X["input"], torch.autograd.functional.jacobian(model, x))
    u, v = data(3), data(4)
    torch.testing.assert_close(X.T @ u, X["input"].T @ u)
    torch.testing.assert_close(X @ v, X["input"] @ v)
