"""Points where there is no derivative: both methods give what torch's reverse mode gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import partials as pt

F64 = torch.float64
AT_ZERO: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "relu": (torch.relu, 0, 0),
    "abs": (torch.abs, 0, 0),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), 0.1, 0),
    "elu": (lambda x: F.elu(x, 2.0), 2, 0),
    "celu": (lambda x: F.celu(x, 2.0), 1, 0),
    "larger of two": (lambda x: torch.maximum(3 * x, 5 * x), 4, 0),
    "larger of three": (lambda x: torch.stack([x, 2 * x, 6 * x + x**2], -1).amax(-1), 3, 2 / 3),
    "the branch taken": (lambda x: torch.where(x > 0, x**3, x**2 + 7 * x), 7, 2),
    "clamp": (lambda x: 3 * x.clamp(0, 1), 3, 0),
    "whole power": (lambda x: x**1 + x**0 + x**2, 1, 2),
    "cube of abs": (lambda x: x.abs() ** 3, 0, 0),
    "softsign": (F.softsign, 1, 0),
}


@pytest.mark.parametrize("method", ["taylor", "nested"])
@pytest.mark.parametrize("name", AT_ZERO)
def test_the_convention_at_zero(name: str, method: str) -> None:
    u, first, second = AT_ZERO[name]
    d = pt.derivatives(lambda x: u(x) + 0 * x**4, "x", "xx", method=method, check="never")(torch.zeros(3, dtype=F64))
    torch.testing.assert_close(d.x, torch.full((3,), float(first), dtype=F64))
    torch.testing.assert_close(d.xx, torch.full((3,), float(second), dtype=F64))


@pytest.mark.parametrize("method", ["taylor", "nested"])
def test_a_norm_at_zero_has_a_first_derivative_of_zero_and_no_second(method: str) -> None:
    d = pt.derivatives(lambda r: r.norm(dim=-1), "r", "rr", vectors="r", method=method, check="never")(torch.zeros(2, 3, dtype=F64))
    assert not d.r.any() and d.rr.isnan().all()


def test_extremes_beside_infinities_and_what_is_no_number() -> None:
    x = torch.tensor([0.5, 2.0], dtype=F64)
    for u in (
        lambda x: torch.maximum(torch.full_like(x, -math.inf) * x, x**2),
        lambda x: torch.minimum(math.inf * x, x**2),
        lambda x: torch.fmax(math.nan * x, x**2),
        lambda x: torch.stack([-math.inf * x, x**2], -1).amax(-1),
    ):
        d = pt.derivatives(u, "x", "xx", method="taylor", check="never")(x)
        assert torch.equal(d.value, x**2) and torch.equal(d.x, 2 * x) and torch.equal(d.xx, torch.full_like(x, 2))


def test_the_sign_of_complex_numbers_has_derivatives() -> None:
    x = torch.rand(4, dtype=F64)
    d = pt.derivatives(lambda x: torch.sgn(torch.exp((1 + 2j) * x)), "x")(x)
    torch.testing.assert_close(d.x, 2j * torch.exp(2j * x))
