"""Modules that are wrapped, compiled or scripted; hooks; threads inside f; in-place operations after a use."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt

from .exact import exact, loop, same, trainable

N = 5
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


# --- wrapped -----------------------------------------------------------------------------------------------------


def test_data_parallel():
    J = exact(nn.DataParallel(net()), torch.randn(N, 4))
    assert J.names[0] == "module.0.weight"


def test_compiled_modules_run_as_they_were_before():
    model = net()
    x = torch.randn(N, 4)
    J = pt.jacobian(torch.compile(model, backend="eager"), x)
    same(J, loop(model, (x,), trainable(model)))
    assert J.plan.method == "capture" and any("compiled" in note for note in J.plan.notes)


def test_a_compiled_part_of_a_module():
    inner = net()
    x = torch.randn(N, 4)
    model = nn.Sequential(torch.compile(inner, backend="eager"), nn.Linear(2, 2))
    plain = nn.Sequential(inner, model[1])
    J = pt.jacobian(model, x)
    same(J, loop(plain, (x,), trainable(plain)))


def test_compiled_functions():
    w = torch.randn(4, 2, requires_grad=True)
    x = torch.randn(N, 4)

    def f(x, w):
        return (x @ w).sin()

    J = pt.jacobian(torch.compile(f, backend="eager"), x, w)
    same(J, loop(f, (x, w), [w]))


@pytest.mark.parametrize("made", ["script", "trace"])
def test_jit_modules(made):
    model = net()
    x = torch.randn(N, 4)
    scripted = torch.jit.script(model) if made == "script" else torch.jit.trace(model, torch.randn(2, 4))
    exact(scripted, x)


def test_a_scripted_part_of_a_module():
    exact(nn.Sequential(nn.Linear(4, 4), torch.jit.script(net()), nn.Linear(2, 2)), torch.randn(N, 4))


def test_scripted_functions():
    @torch.jit.script
    def f(x, w):
        return (x @ w).sin()

    exact(f, torch.randn(N, 4), torch.randn(4, 2, requires_grad=True))


# --- hooks -------------------------------------------------------------------------------------------------------


def test_forward_hooks_that_change_the_output():
    model = net()
    model[0].register_forward_hook(lambda module, args, out: out * 2 + module.bias)
    model[2].register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    model.register_forward_hook(lambda module, args, kwargs, out: out.cos(), with_kwargs=True)
    exact(model, torch.randn(N, 4))


def test_forward_hooks_of_all_modules():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out * 1.5)
    try:
        exact(net(), torch.randn(N, 4))
    finally:
        handle.remove()


def test_forward_hooks_that_only_look():
    seen = []
    model = net()
    model[0].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    exact(model, torch.randn(N, 4))
    assert (N, 6) in seen


# --- in place ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [F.relu_, torch.tanh_, lambda h: h.mul_(2).add_(1), lambda h: F.leaky_relu(h, 0.1, inplace=True)])
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_in_place_activations_after_a_use(act, shape):
    class Inplace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4))

        def forward(self, x):
            h = act(self.a(x))
            h = act(self.b(h.sin()))
            return act(h * self.c)

    exact(Inplace(), torch.randn(N, *shape))


def test_an_input_changed_in_place_after_a_frozen_use():
    """The data that a rule has recorded is overwritten: with a frozen weight autograd itself says nothing."""

    class Overwritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.scale = nn.Linear(4, 4).requires_grad_(False), nn.Parameter(torch.randn(4))

        def forward(self, x):
            h = self.frozen(x)
            out = h + self.scale
            h.mul_(2)
            return out * h

    exact(Overwritten(), torch.randn(N, 4))


# --- threads inside f --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Exception in thread")
@pytest.mark.parametrize("both", [True, False])
def test_threads_started_inside(both):
    class Threaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            found = [None, None]

            def work(i, layer):
                with torch.enable_grad():
                    found[i] = layer(x).sin()

            jobs = [threading.Thread(target=work, args=(i, layer)) for i, layer in enumerate((self.a, self.b)) if both or i]
            for job in jobs:
                job.start()
            for job in jobs:
                job.join()
            if not both:
                found[0] = self.a(x)
            return found[0] * found[1]

    model, x = Threaded(), torch.randn(N, 4)
    J = exact(model, x)
    assert J.plan.method not in ("capture", "vmap", "forward")
    with pytest.raises(pt.MethodError, match="another derivative than reverse mode"):  # it loses the tangents without a word
        pt.jacobian(model, x, method="forward", check="never")
