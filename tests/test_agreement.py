"""Every method on every case, in every dtype: equal to the float64 loop, or refused with a reason that is known."""

from __future__ import annotations

import pytest
import torch

import partials as pt
from partials._run import NAMES
from partials.testing import CASES
from tests.oracle import assert_rows, reference

DTYPES = {"float64": torch.float64, "float32": torch.float32}

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # torch's vmap, of operations that it loops over
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # torch's forward mode, on first use
]


@pytest.fixture(autouse=True)
def _full_precision():
    with torch.backends.cudnn.flags(allow_tf32=False):  # (torch's own test modules, once imported, allow no other way)
        yield


def assert_agrees(J, name):
    values, rows = reference(name)
    eps = torch.finfo(J.dtype).eps
    torch.testing.assert_close(J.values.double(), values, rtol=1e3 * eps, atol=1e2 * eps)
    assert_rows(J.dict(), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("name", CASES)
def test_method_agrees_with_the_loop(name, method, dtype, device):
    case = CASES[name]
    call = case.make(DTYPES[dtype], device)
    try:
        J = call.jacobian(method=method, check="never")
    except pt.MethodError as refused:
        if device.type != "cpu" and any(kernel in str(refused) for kernel in ("_thnn_fused_", "_cudnn_rnn")):
            return  # recurrent layers have other kernels there
        assert method in case.refuses
        assert case.refuses[method] in str(refused)
        return
    assert J.plan.method == method and J.dtype == DTYPES[dtype]
    assert_agrees(J, name)


@pytest.mark.parametrize("name", CASES)
def test_auto_agrees_with_the_loop(name, device):
    assert_agrees(CASES[name].make(device=device).jacobian(check="never"), name)


@pytest.mark.parametrize(("name", "method"), [(name, method) for name, case in CASES.items() for method in case.refuses])
def test_refusal_is_still_needed(name, method, device):
    """A limit that has fallen must be noticed."""
    reasons = []
    for dtype in DTYPES.values():
        try:
            CASES[name].make(dtype, device).jacobian(method=method, check="never")
        except pt.MethodError as refused:
            reasons.append(str(refused))
    assert reasons or device.type != "cpu"


def test_cases_are_the_same_every_time():
    for case in CASES.values():
        first, second = case.make(), case.make(torch.float32)
        assert list(first.parameters) == list(second.parameters)
        for name, parameter in first.parameters.items():
            assert parameter is not case.make().parameters[name]
            assert torch.equal(parameter, second.parameters[name].double())


# --- the reference is alive --------------------------------------------------------------------------------------


def entry(rows):
    rows["2.weight"][1, 2, 2, 3] *= 1.001


def scaled(rows):
    rows["0.bias"] *= 1.001


def dropped(rows):
    rows["0.weight"].zero_()


def swapped_samples(rows):
    rows["0.weight"][[0, 1]] = rows["0.weight"][[1, 0]]


def swapped_columns(rows):
    rows["2.weight"][..., [0, 1]] = rows["2.weight"][..., [1, 0]]


def renamed(rows):
    rows["weight"] = rows.pop("2.weight")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("error", [entry, scaled, dropped, swapped_samples, swapped_columns, renamed])
def test_planted_error_is_found(error, dtype):
    expected = reference("mlp")[1]
    found = {name: part.to(DTYPES[dtype], copy=True) for name, part in expected.items()}
    assert_rows(found, expected)
    error(found)
    with pytest.raises(AssertionError):
        assert_rows(found, expected)
