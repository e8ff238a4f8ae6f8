"""Private names and their public stand-ins give the same answers, and what a capture cannot do without them it refuses."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

import partials as pt
from partials import _compat


@pytest.fixture(params=[True, False], ids=["private", "public"])
def private(request, monkeypatch):
    if request.param and not _compat.PRIVATE:
        pytest.skip("this torch has no such names")
    monkeypatch.setattr(_compat, "PRIVATE", request.param)
    return request.param


def test_a_running_transform_is_seen(private):
    seen = []
    assert not _compat.inside_transform()
    vmap(lambda x: seen.append(_compat.inside_transform()) or x)(torch.zeros(2))
    grad(lambda x: seen.append(_compat.inside_transform()) or x)(torch.tensor(1.0))
    assert seen == [True, True]
    assert not _compat.inside_transform()


def test_wrapped_tensors_are_told_apart(private):
    seen = []
    assert _compat.transform_of(torch.zeros(2)) == ""
    assert _compat.transform_of(nn.Parameter(torch.zeros(2))) == ""
    vmap(lambda x: seen.append(_compat.transform_of(x)) or x)(torch.zeros(2))
    grad(lambda x: seen.append(_compat.transform_of(x)) or x)(torch.tensor(1.0))
    assert seen == ["vmap", "other"]


@pytest.mark.parametrize("f", ["plain", "vmapped", "no rule"])
def test_jacobians_are_right_either_way(private, f):
    torch.manual_seed(0)
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    axis = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    function, x, p = {
        "plain": (lambda x: (x @ w.T).sin(), torch.randn(5, 4).double(), w),
        "vmapped": (torch.vmap(lambda x: (w @ x).sin()), torch.randn(5, 4).double(), w),
        "no rule": (lambda x: torch.linalg.cross(x, axis).sin(), torch.randn(5, 3).double(), axis),
    }[f]
    J = pt.jacobian(function, x, params=[p])
    torch.testing.assert_close(J.dense(), pt.jacobian(function, x, params=[p], method="loop").dense(), rtol=1e-11, atol=1e-12)
    assert (J.plan.method == "capture") == (private or f == "plain")


def test_what_is_plain_is_its_own_batch(private):
    seen, x = [], torch.zeros(2, 3)
    assert _compat.first_mapped(x) is x
    vmap(lambda t: seen.append(_compat.first_mapped(t)) or t)(x)
    vmap(lambda t: seen.append(_compat.first_mapped(t)) or t, in_dims=1)(x)
    assert seen[1] is None and (seen[0] is not None and torch.equal(seen[0], x)) is private


@pytest.mark.parametrize("below", ["private", "public"])
def test_samples_that_run_apart_with_torch_decomposing_or_not(below, monkeypatch):
    if not _compat.PRIVATE:
        pytest.skip("this torch has no such names")
    if below == "public":
        monkeypatch.setattr(_compat, "Below", nullcontext)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = pt.jacobian(net, x, method="loop").dense()
    for _ in range(4):
        torch.testing.assert_close(pt.jacobian(net, x, randomness="same").dense(), expected, rtol=1e-11, atol=1e-12)


def test_batch_dimensions_are_found_through_two_levels():
    x = torch.arange(24.0).reshape(2, 3, 4)
    found = []

    def inner(t):
        raw, order = _compat.unwrapped(t)
        found.append(raw.permute(order))
        return t

    vmap(vmap(inner, in_dims=1), in_dims=1)(x)
    assert torch.equal(found[0], x.permute(1, 2, 0))


def test_a_body_without_its_override_check_computes_the_same():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    body = _compat.body_of(torch.nn.functional.multi_head_attention_forward)
    args = (x.transpose(0, 1),) * 3 + (8, 2, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0)
    rest = (attention.out_proj.weight, attention.out_proj.bias)
    plain = torch.nn.functional.multi_head_attention_forward(*args, *rest)[0]
    assert torch.equal(body(*args, *rest)[0], plain)
    assert _compat.body_of(torch.add) is None


def test_what_was_compiled_is_known(private):
    """Nothing is, until something is; with public names alone, the loading of torch's compiler counts."""
    if not private:
        assert _compat.compiled_somewhere() == ("torch._dynamo" in sys.modules)
        return
    torch.compile(lambda x: x + 1, backend="eager")
    assert _compat.compiled_somewhere()
    code = "import torch; from partials import _compat; torch.vmap(torch.sin)(torch.ones(2)); assert not _compat.compiled_somewhere()"
    environment = {**os.environ, "PYTHONPATH": str(Path(_compat.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_a_default_device_watches_nothing():
    """`torch.set_default_device` is a function mode too; it does not look at operations, so it decides nothing about a method."""
    assert not _compat.watched()
    torch.set_default_device("cpu")
    try:
        assert _compat.watched() == (_compat._modes is None)
        with torch.overrides.BaseTorchFunctionMode():
            assert _compat.watched()
    finally:
        torch.set_default_device(None)
    assert not _compat.watched()
