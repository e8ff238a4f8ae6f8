"""Functions that write in place, or hand out a tensor twice: the derivatives are those of reverse mode, whichever method runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import partials as pt
from partials.taylor.table import JET_RULES

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(5, 3, dtype=F64, generator=GENERATOR)
W = torch.rand(3, 3, dtype=F64, generator=GENERATOR) - 0.5
ONES = torch.ones(3, dtype=F64)
Function = Callable[[Tensor], Tensor]


def twice(again: Function) -> Function:
    """z, a tensor that may be z itself, and a write to either."""

    def u(x: Tensor) -> Tensor:
        z = x @ W
        y = again(z)
        y.mul_(x)
        return z * y.sin()

    return u


def shifted(x: Tensor) -> Tensor:
    z = x @ W
    y = z + ONES
    z.mul_(x)
    return y * z


def written_later(x: Tensor) -> Tensor:
    z = x @ W
    d = z.detach()
    z.mul_(x)
    return z * d


def activated(activation: Function) -> Function:
    def u(x: Tensor) -> Tensor:
        z = F.linear(x, W, -0.1 * ONES)
        y = activation(z)
        return y * z * x

    return u


def augmented(x: Tensor) -> Tensor:
    z = x[:, 0] * x[:, 1]
    z += x[:, 2] ** 2
    z *= 2
    z /= x[:, 0] + 1
    z -= 1
    z **= 2
    return z


WRITES: dict[str, Function] = {
    "contiguous": twice(lambda z: z.contiguous()),
    "to": twice(lambda z: z.to(F64)),
    "double": twice(lambda z: z.double()),
    "plus": twice(lambda z: +z),
    "dropout in evaluation": twice(lambda z: F.dropout(z, training=False)),
    "real": twice(torch.real),
    "view": twice(lambda z: z.view(-1, 3)),
    "clone": twice(torch.clone),
    "added constant": shifted,
    "detached": written_later,
    "augmented": augmented,
    "relu": activated(lambda z: F.relu(z, inplace=True)),
    "relu_": activated(torch.relu_),
    "silu": activated(lambda z: F.silu(z, inplace=True)),
    "mish": activated(lambda z: F.mish(z, inplace=True)),
    "elu": activated(lambda z: F.elu(z, 0.7, inplace=True)),
    "leaky relu": activated(lambda z: F.leaky_relu(z, 0.1, inplace=True)),
    "hardtanh": activated(lambda z: F.hardtanh(z, -0.2, 0.2, inplace=True)),
    "hardswish": activated(lambda z: F.hardswish(z, inplace=True)),
}


def same_by_both(u: Function, method: str = "auto") -> pt.Derivatives:
    specs = ("x", "xy", "xxz", "xxyy")
    ours = pt.derivatives(u, *specs, coords="xyz", method=method, check="never")(X)
    right = pt.derivatives(u, *specs, coords="xyz", method="nested", check="never")(X)
    for spec in ("value", *specs):
        torch.testing.assert_close(ours[spec], right[spec], atol=1e-12, rtol=1e-10)
    return ours


@pytest.mark.parametrize("name", WRITES)
def test_a_write_reaches_every_name_of_a_tensor(name: str) -> None:
    same_by_both(WRITES[name])


@pytest.mark.parametrize("name", ["clone", "added constant", "augmented", "relu", "silu", "hardtanh"])
def test_taylor_mode_writes_where_one_name_is_left(name: str) -> None:
    assert same_by_both(WRITES[name], "taylor").plan.method == "taylor"


def test_arguments_by_keyword() -> None:
    def u(x: Tensor) -> Tensor:
        return torch.add(torch.mul(input=x, other=torch.tanh(input=x)), other=torch.pow(input=x, exponent=3), alpha=2)

    same_by_both(u, "taylor")


def test_arguments_that_no_rule_takes_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JET_RULES, torch.tanh, lambda f, *, option: f)
    d = pt.derivatives(lambda x: torch.tanh(x @ W), "xxxx", coords="xyz")(X)
    assert d.plan.method == "nested" and "tanh with these arguments" in d.plan.reason


def test_an_error_of_the_function_is_seen_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pt.laplacian(lambda x: x @ torch.ones(4, 4, dtype=F64))(X)
    with pytest.raises(TypeError, match="lin"):
        pt.laplacian(lambda x: torch.tanh(x, lin=3))(X)  # type: ignore[call-arg]
