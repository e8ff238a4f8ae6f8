"""Backward and parameter hooks: rows are derivatives of f; a hook that changes gradients is found, one that only looks is let be."""

import pytest
import torch
from torch import nn

import partials as pt
from partials._run import NAMES
from partials.checks.first import PASSED

from .exact import exact, loop, same, trainable

N = 5


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.parametrize("method", ["auto", *NAMES])
def test_a_parameter_hook_is_no_part_of_f(method):
    model, x = net(), torch.randn(N, 4)
    rows = loop(model, (x,), trainable(model))
    calls = []
    model[0].weight.register_hook(lambda g: calls.append(0) or g * 0)
    J = pt.jacobian(model, x, method=method, check="never")
    same(J, rows)
    assert not calls
    assert any("hooks of 0.weight were not run" in note for note in J.plan.notes)


def test_a_parameter_hook_that_changes_the_gradient_is_found():
    model = net()
    model[0].weight.register_hook(lambda g: g * 0.5)
    PASSED.clear()
    with pytest.raises(pt.CheckError, match="this tensor has hooks, which change its gradient"):
        pt.jacobian(model, torch.randn(N, 4))


def test_a_parameter_hook_that_only_looks():
    model = net()
    seen = []
    model[0].weight.register_hook(lambda g: seen.append(g.norm()))
    exact(model, torch.randn(N, 4))


def test_a_parameter_hook_and_create_graph():
    model, x = net(), torch.randn(N, 4)
    model[0].weight.register_hook(lambda g: g)
    J = pt.jacobian(model, x, create_graph=True)
    (found,) = torch.autograd.grad(J.norms().sum(), model[2].weight)
    plain = net()
    plain.load_state_dict(model.state_dict())
    (expected,) = torch.autograd.grad(pt.jacobian(plain, x, create_graph=True).norms().sum(), plain[2].weight)
    assert torch.allclose(found, expected, rtol=1e-10)


def test_hooks_after_accumulation_are_not_run():
    model = net()
    calls = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append(0))
    exact(model, torch.randn(N, 4))
    assert not calls and model[0].weight.grad is None


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_full_backward_hooks_that_only_look():
    model = net()
    seen = []
    for module in model:
        module.register_full_backward_hook(lambda module, given, out: seen.append(out[0].shape))
        module.register_full_backward_pre_hook(lambda module, out: None)
    exact(model, torch.randn(N, 4))
    assert seen


@pytest.mark.parametrize("pre", [True, False])
def test_full_backward_hooks_that_change_cotangents(pre):
    """They act on what flows through f, as a gradient-reversal layer does: rows are those that a backward of one sample gives."""
    model = net()
    if pre:
        model[1].register_full_backward_pre_hook(lambda module, out: (-2 * out[0],))
    else:
        model[1].register_full_backward_hook(lambda module, given, out: (given[0] * -2,))
    exact(model, torch.randn(N, 4))


def test_a_hook_on_an_activation():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = self.a(x)
            if h.requires_grad:
                h.register_hook(lambda g: g * -0.5)
            return self.b(h.sin())

    exact(Reversed(), torch.randn(N, 4))


def test_a_hook_that_mixes_samples_is_found():
    model = net()
    model[1].register_full_backward_hook(lambda module, given, out: (given[0] / given[0].norm(),))
    PASSED.clear()
    with pytest.raises((pt.CheckError, pt.MixingError)):
        pt.jacobian(model, torch.randn(N, 4))


def test_a_hook_that_raises():
    model = net()

    def broken(module, given, out):
        raise KeyError("mine")

    model[1].register_full_backward_hook(broken)
    with pytest.raises(KeyError, match="mine"):
        pt.jacobian(model, torch.randn(N, 4))
