"""Names of arguments, whatever is called: partials, bound methods, callables, *args; and what `wrt` and `params` make of them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import partials as pt

METHODS = ["auto", "loop", "vmap"]
each_method = pytest.mark.parametrize("method", METHODS)


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def parameter(*shape):
    return data(*shape).requires_grad_()


def jac(f, *inputs, **options):
    return pt.jacobian(f, *inputs, **{"check": "never", **options})


def affine(x, w, b):
    return x @ w + b


class Affine:
    def __call__(self, x, w, b):
        return affine(x, w, b)

    def method(self, x, w, b):
        return affine(x, w, b)

    @classmethod
    def of_class(cls, x, w, b):
        return affine(x, w, b)

    @staticmethod
    def static(x, w, b):
        return affine(x, w, b)


@functools.wraps(affine)
def decorated(*args, **kwargs):
    return affine(*args, **kwargs)


@each_method
@pytest.mark.parametrize("f", [affine, Affine(), Affine().method, Affine.of_class, Affine.static, decorated, functools.partial(affine)])
def test_names_come_from_the_signature(f, method):
    x, w, b = data(5, 3), parameter(3, 2), parameter(2)
    J = jac(f, x, w, b, method=method)
    assert J.names == ("w", "b")
    torch.testing.assert_close(J["w"][:, 1, :, 1], x)


def test_keywords_bound_by_partial_are_from_outside():
    x, w, b = data(5, 3), parameter(3, 2), parameter(2)
    assert jac(functools.partial(affine, b=b), x, w).names == ("w",)
    assert jac(functools.partial(affine, w=w, b=b), x, params={"w": w, "b": b}).names == ("w", "b")


@each_method
def test_starred_arguments_are_numbered(method):
    def f(x, *rest, **named):
        return x * rest[0] + rest[1] * named["c"]

    x, a, b, c = data(5, 3), parameter(3), parameter(3), parameter(3)
    J = jac(f, x, a, b, c=c, method=method)
    assert J.names == ("rest[0]", "rest[1]", "c")
    torch.testing.assert_close(J["c"].diagonal(dim1=1, dim2=2), b.detach().expand(5, 3))
    assert jac(f, x, a, b, c=c, wrt="rest[1]", in_dims={"rest[0]": None, "c": None}, method=method).names == ("rest[1]",)


def test_order_is_that_of_the_call():
    x, w, b = data(5, 3), parameter(3, 2), parameter(2)
    assert jac(affine, x, b=b, w=w).names == ("b", "w")
    assert jac(lambda x: affine(x, w, b), x, params={"b": b, "w": w}).names == ("b", "w")


# --- wrt and params together -------------------------------------------------------------------------------------


@each_method
def test_wrt_chooses_among_params(method):
    x, w, b = data(5, 3), parameter(3, 2), parameter(2)

    def f(x):
        return affine(x, w, b).sin()

    params = {"w": w, "b": b}
    full = jac(f, x, params=params, method="loop")
    assert jac(f, x, params=params, wrt="b", method=method).names == ("b",)
    torch.testing.assert_close(jac(f, x, params=params, wrt="b", method=method)["b"], full["b"])
    J = jac(f, x, params=params, wrt=("x", "w"), method=method)
    assert list(J.dict()) == ["x", "w"] and J.names == ("w",)
    torch.testing.assert_close(J["w"], full["w"])
    torch.testing.assert_close(J["x"], (affine(x, w, b).cos()[:, :, None] * w.T).detach())


@each_method
@pytest.mark.parametrize("flags", [(False, False, False), (True, True, True), (False, True, True)])
def test_all_arguments_named_means_the_first_is_the_input(flags, method):
    x, w, b = (tensor.requires_grad_(flag) for tensor, flag in zip((data(5, 3), data(3, 2), data(2)), flags, strict=True))
    J = jac(affine, x, w, b, wrt=("x", "w", "b"), method=method)
    assert J["x"].shape == (5, 2, 3) and J["w"].shape == (5, 2, 3, 2) and J.names == ("w", "b")


@each_method
def test_an_input_named_alone(method):
    x, w, b = data(5, 3), parameter(3, 2), parameter(2)
    J = jac(affine, x, w, b, wrt="x", method=method)
    assert isinstance(J, pt.InputJacobian)
    torch.testing.assert_close(J["x"], w.detach().T.expand(5, 2, 3))
    given = jac(affine, x, w.detach(), b.detach(), wrt="x", in_dims=(0, None, None), method=method)
    torch.testing.assert_close(given["x"], J["x"])


def test_a_name_that_is_both_is_refused():
    w = parameter(3)
    with pytest.raises(pt.InputError) as error:
        jac(lambda x: x * w, data(5, 3), params={"x": w}, wrt="x")
    assert str(error.value) == (
        "wrt is ambiguous: x names both a parameter and an input\n  expected  different names\n  try       rename the input"
    )


@each_method
def test_module_called_with_keywords(method):
    model = nn.Bilinear(3, 2, 4, dtype=torch.float64)
    left, right = data(5, 3), data(5, 2)
    J = jac(model, left, input2=right, method=method)
    torch.testing.assert_close(J["weight"][:, 1, 1], torch.einsum("ni,nj->nij", left, right))
    X = jac(model, left, input2=right, wrt="input2", method=method)
    torch.testing.assert_close(X["input2"], torch.einsum("ni,oij->noj", left, model.weight).detach())
