"""The whole text of each error: what, got, expected, try."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partials._errors import InputError, MethodError, OutputError
from partials.taylor import derivatives, partial


def u(x: Tensor, t: Tensor) -> Tensor:
    return x * t


X = torch.rand(5)
CASES: list[tuple[str, Callable[[], Any], str]] = [
    (
        "no specs",
        lambda: derivatives(u),
        """no derivative is asked for
  expected  at least one
  try       derivatives(u, "x", "xx")""",
    ),
    (
        "order 0",
        lambda: partial(u, (0, 0))(X, X),
        """a derivative of order 0 is asked for
  got       (0, 0)
  expected  order 1 or more
  try       the value itself: it is always there as d.value""",
    ),
    (
        "unknown letter",
        lambda: partial(u, "xz")(X, X),
        """the derivative 'xz' names no coordinate with 'z'
  got       'z'
  expected  coordinates: x, t
  try       coords="xt" to name the features of a packed input""",
    ),
    (
        "near name",
        lambda: partial(lambda theta, phi: theta, "thta")(X, X),
        """the derivative 'thta' names no coordinate with 'thta'
  got       'thta'
  expected  coordinates: theta, phi
  try       did you mean 'theta'?""",
    ),
    (
        "a number for a coordinate",
        lambda: partial(u, "xt")(X, 0.5),
        """the derivative 'xt' names no coordinate with 't'
  got       't', which is no tensor in this call
  expected  coordinates: x
  try       t as a tensor""",
    ),
    (
        "unknown key",
        lambda: partial(u, {"y": 1})(X, X),
        """the derivative {'y': 1} names no coordinate with 'y'
  got       'y'
  expected  coordinates: x, t
  try       coords="xt" to name the features of a packed input""",
    ),
    (
        "negative order",
        lambda: partial(u, {"x": -1})(X, X),
        """the derivative {'x': -1} has an order that is not a count
  got       -1 for x
  expected  0, 1, 2, ...""",
    ),
    (
        "orders of another length",
        lambda: partial(u, (1, 0, 0))(X, X),
        """the derivative (1, 0, 0) has another number of orders than there are coordinates
  got       3 orders
  expected  2, one for each of x, t
  try       names, such as "xx", or coords= to name the features of a packed input""",
    ),
    (
        "integer coordinates",
        lambda: partial(u, "xt")(X, torch.arange(5)),
        """the coordinate 't' is not real
  got       torch.int64
  expected  a floating-point dtype
  try       t.to(torch.get_default_dtype())""",
    ),
    (
        "shapes that do not broadcast",
        lambda: partial(u, "xt")(torch.rand(100), torch.rand(2)),
        """the coordinates do not broadcast against each other
  got       x (100,), t (2,)
  expected  equal sizes or 1 in every dimension, counted from the last
  try       vectors=("r",) for an input whose last dimension is a vector, or coords= to name only the coordinates""",
    ),
    (
        "no tensor",
        lambda: partial(u, "x")(1.0, 2.0),
        """there is no tensor among the inputs to differentiate by
  expected  coordinate tensors such as x, t, or a packed X""",
    ),
    (
        "no tensor output",
        lambda: partial(lambda x: [x], "x")(X),
        """the function returned no tensor
  got       list
  expected  one real or complex tensor""",
    ),
    (
        "integer output",
        lambda: partial(lambda x: x.long(), "x")(X),
        """the function returned a tensor that has no derivatives
  got       torch.int64
  expected  a floating-point or complex dtype""",
    ),
    (
        "reduced output",
        lambda: partial(lambda x: x.sum(), "x")(X),
        """the output does not keep the shape of the points in front
  got       output ()
  expected  (5,) and then the shape of one point's output
  try       a function that returns one value for each point, without reductions over points""",
    ),
    (
        "empty output",
        lambda: partial(lambda x: x[:, None][:, :0], "x")(X),
        """the output has no entries for a point
  got       output (5, 0)
  expected  at least one entry for each point""",
    ),
    (
        "coords of another length",
        lambda: partial(nn.Linear(2, 1), "x", coords="xyt")(torch.rand(5, 2)),
        """`coords` does not name each feature of 'input' once
  got       3 names (x, y, t) for shape (5, 2)
  expected  as many names as the last dimension has entries""",
    ),
    (
        "coords twice",
        lambda: partial(nn.Linear(2, 1), "x", coords="xx")(torch.rand(5, 2)),
        """`coords` names 'x' twice
  got       x, x
  expected  each name once""",
    ),
    (
        "coords that are no names",
        lambda: partial(nn.Linear(2, 1), "x", coords=("x", "a.b"))(torch.rand(5, 2)),
        """`coords` holds something that is not a name
  got       'a.b'
  expected  names, such as "xyt" or ("x", "theta")""",
    ),
    (
        "coords that are partly inputs",
        lambda: partial(u, "x", coords=("t", "q"))(X, X),
        """`coords` names 'q', which is no tensor input
  got       t, q
  expected  x, t
  try       one of: x, t""",
    ),
    (
        "unknown vector",
        lambda: partial(u, "x", vectors=("r",))(X, X),
        """`vectors` names 'r', which is no tensor input
  got       r
  expected  x, t
  try       one of: x, t""",
    ),
    (
        "vector without a dimension",
        lambda: partial(u, "x", vectors=("x",))(torch.tensor(1.0), X),
        """`vectors` names 'x', which has no dimension to be a vector over
  got       shape ()
  expected  shape (..., D)""",
    ),
    (
        "coords and vectors",
        lambda: partial(lambda r: r, "x", coords="xy", vectors="r")(torch.rand(5, 2)),
        """`coords` names the features of a packed input and `vectors` names whole inputs
  got       coords x, y; vectors r
  expected  one of them""",
    ),
    (
        "a dot between scalars",
        lambda: partial(u, "x.x")(X, X),
        """the derivative 'x.x' has a dot that does not join a vector block with itself
  got       x . x
  expected  a block named in `vectors` on both sides (none)
  try       "r.r" with vectors=("r",), or "xx" for a scalar coordinate""",
    ),
    (
        "too many inputs",
        lambda: partial(u, "x")(X, X, X),
        """the function takes 2 positional inputs
  got       3 inputs
  expected  x, t""",
    ),
    (
        "a weight that was taken for a coordinate",
        lambda: partial(lambda x, w: x * w.sum(), "x")(torch.rand(4), torch.rand(1)),
        """the function gives another value when its coordinates are expanded against each other
  got       output (4,) as given, (4,) expanded
  expected  one sample for every entry of a coordinate
  try       coords=("x",) to name only the coordinates, vectors=("r",) for an input that is one vector""",
    ),
    (
        "unknown in the bundle",
        lambda: derivatives(u, "xt", "tt")(X, X)["xx"],
        """the derivative 'xx' was not asked for
  got       'xx'
  expected  one of: xt, tt, value
  try       did you mean 'xt'?""",
    ),
]


@pytest.mark.parametrize(("call", "text"), [pytest.param(call, text, id=name) for name, call, text in CASES])
def test_whole_text(call: Callable[[], Any], text: str) -> None:
    with pytest.raises((InputError, OutputError)) as error:
        call()
    assert str(error.value) == text


def test_bundle_errors_are_what_python_expects() -> None:
    d = derivatives(u, "xt")(X, X)
    with pytest.raises(KeyError):
        d["xx"]
    with pytest.raises(AttributeError):
        _ = d.xx
    with pytest.raises(InputError, match="names no coordinate"):
        d["q"]
    assert not hasattr(d, "q") and not hasattr(d, "__array__") and getattr(d, "tt", None) is None


def test_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="no derivative"):
        derivatives(u)
    with pytest.raises(ValueError, match="returned no tensor"):
        partial(lambda x: None, "x")(X)


def test_an_operation_without_a_second_derivative_is_named() -> None:
    X = torch.rand(5, 3)
    at = partial(lambda x: torch.heaviside(x, torch.tensor(0.5)) * x, "xx")
    with pytest.raises(MethodError, match="cannot be differentiated again") as error:
        at(X)
    assert "heaviside" in error.value.got


@pytest.mark.parametrize("method", ["nested", "taylor"])
def test_attention_needs_no_other_kernel(method: str) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    X = torch.rand(5, 3, dtype=torch.float64)

    def u(x: torch.Tensor) -> torch.Tensor:
        return layer(torch.stack([x, x**2, x.sin(), x.cos()], -1))[..., 0]

    found = partial(u, "xx", coords="x", vectors="x", method=method)(X)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (first,) = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda x: u(x[None])[0])))(X)[None]
    torch.testing.assert_close(found, first)


def test_missing_arguments_are_the_functions_own_error() -> None:
    with pytest.raises(TypeError):
        partial(u, "x")(X)
