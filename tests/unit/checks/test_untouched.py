"""Checks leave no trace: random state, buffers, .grad, hooks, gradient mode, training flags; also where they fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import partials as pt
from partials._blocks import Dense

LEVELS = ["quick", "full", "deep"]


def state_of(net):
    return {
        "rng": torch.get_rng_state().clone(),
        "tensors": [t.detach().clone() for t in net.state_dict().values()],
        "ids": [id(t) for t in (*net.parameters(), *net.buffers())],
        "versions": [t._version for t in net.parameters()],
        "grads": [p.grad for p in net.parameters()],
        "flags": [p.requires_grad for p in net.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._backward_hooks), m.training) for m in net.modules()],
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before, after):
    for key, value in before.items():
        if key in ("rng", "tensors"):
            torch.testing.assert_close(after[key], value, rtol=0, atol=0)
        else:
            assert after[key] == value, key


class Norm(nn.Module):
    """Batch norm in training mode for one batch per sample: it does not mix, and writes its buffers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.Linear(6, 2)

    def forward(self, x):
        h = self.first(x).unflatten(1, (2, 3))
        return self.head(self.norm(h).flatten(1))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("method", ["grad", "loop"])
def test_nothing_is_touched(level, method):
    net, x = Norm(), torch.randn(5, 4)
    net.first.register_forward_hook(lambda *_: None)
    net.head.weight.grad = torch.ones(2, 6)
    before = state_of(net)
    with torch.no_grad():
        assert pt.check(net, x, level=level, method=method).passed
        assert not torch.is_grad_enabled()
    assert_same(before, state_of(net))
    assert x.grad is None and not x.requires_grad


def test_nothing_is_touched_by_a_failure():
    net, x = Norm(), torch.randn(5, 4)
    J = pt.jacobian(net, x, method="grad", check="never")
    wrong = replace(J, blocks={**J.blocks, "head.bias": (Dense(J["head.bias"] * 2),)})
    before = state_of(net)
    assert not wrong.check().passed
    assert_same(before, state_of(net))


def test_nothing_is_touched_by_mixing():
    net, x = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.randn(5, 4)
    before = state_of(net)
    with pytest.raises(pt.MixingError):
        pt.jacobian(net, x, method="grad")
    assert_same(before, state_of(net))


class Fragile(nn.Linear):
    """Raises the user's own error in its n-th call."""

    def __init__(self, nth):
        super().__init__(4, 2)
        self.left = nth

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError("the user's own error")
        return super().forward(x)


def test_errors_of_f_come_through_and_leave_no_trace():
    quiet = Fragile(10**9)
    pt.jacobian(quiet, torch.randn(5, 4), method="grad")
    calls = 10**9 - quiet.left
    seen = 0
    for nth in range(1, calls + 1):
        net = Fragile(nth)
        before = state_of(net)
        try:
            pt.jacobian(net, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), method="grad", check="always")
        except ZeroDivisionError as error:
            seen += 1
            assert any("partials was" in note for note in error.__notes__)
        assert_same(before, state_of(net))
    assert seen


def test_the_random_state_moves_as_it_would_without_a_check():
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)), torch.randn(5, 4)
    states = []
    for policy in ("never", "always"):
        torch.manual_seed(3)
        pt.jacobian(net, x, randomness="model", check=policy)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_hooks_of_the_user_are_named_where_they_change_gradients():
    net, x = nn.Linear(4, 2), torch.randn(5, 4)
    net.weight.register_hook(lambda g: 2 * g)
    report = pt.check(net, x, method="vmap")
    assert not report.passed
    assert {row.remark for row in report.failures} == {
        "this tensor has hooks, which change its gradient in an ordinary backward; rows are derivatives of f without them"
    }
