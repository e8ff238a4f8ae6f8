"""The user's module, tensors, `.grad`, grad mode, random state and hooks are as they were: after success, after failure, under threads."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from torch import nn

import partials as pt
from partials._run import NAMES
from tests.failures import FAILURES, net, x

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def snapshot(model):
    """All that a call could leave changed, as comparable values."""
    state = {"grad mode": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled(), "random": torch.get_rng_state().tolist()}
    for name, module in model.named_modules():
        state[name, "attributes"] = sorted(vars(module))
        state[name, "training"] = module.training
        state[name, "forward"] = module.forward.__func__
        state |= {(name, hooks): list(getattr(module, hooks)) for hooks in HOOKS}
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            version = tensor._version if kind == "parameter" else None  # (a buffer is written and written back)
            state[kind, name] = (id(tensor), tensor.data_ptr(), version, tensor.requires_grad, tensor.tolist())
            state[kind, name, "hooks"] = len(tensor._backward_hooks or ())
            state[kind, name, "grad"] = None if tensor.grad is None else (id(tensor.grad), tensor.grad._version, tensor.grad.tolist())
    return state


def test_a_snapshot_sees_changes():
    changes = [
        lambda m: m.first.bias.data.add_(1),
        lambda m: m.count.add_(1),
        lambda m: setattr(m.last.weight, "grad", None),
        lambda m: m.last.weight.grad.add_(1),
        lambda m: m.frozen.requires_grad_(True),
        lambda m: m.drop.train(not m.drop.training),
        lambda m: m.first.register_forward_hook(print),
        lambda m: m.first.weight.register_hook(print),
        lambda m: setattr(m, "other", 1),
        lambda m: setattr(m.first, "weight", nn.Parameter(m.first.weight.detach().clone())),
        lambda m: torch.rand(1),
    ]
    for change in changes:
        model = net()
        before = snapshot(model)
        change(model)
        assert snapshot(model) != before


@pytest.mark.parametrize("name", FAILURES)
def test_after_failure(name):
    call, kind, _ = FAILURES[name]
    model = net()
    if name == "dropout_without_a_policy":
        model.drop.p = 0.5
    model.broken = name == "f_raises"
    before = snapshot(model)
    with pytest.raises(kind):
        call(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("method", ["auto", *NAMES])
def test_after_mixing(method):
    model = net(mixing=True)
    before = snapshot(model)
    with pytest.raises((pt.MixingError, pt.MethodError)):
        pt.jacobian(model, x(), method=method)
    assert snapshot(model) == before


@pytest.mark.parametrize("method", ["auto", *NAMES])
def test_after_an_error_half_way(method):
    """The module runs once, and raises when it is run again."""

    class Tired(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()
            self.calls = [0]

        def forward(self, x):
            self.calls[0] += 1
            out = self.inner(x)
            if self.calls[0] > 1:
                raise OSError("tired")
            return out

    model = Tired()
    before = snapshot(model)
    with pytest.raises((OSError, pt.PartialsError)):
        for _ in range(2):
            pt.jacobian(model, x(), method=method, check="always")
    assert snapshot(model) == before


@pytest.mark.parametrize("check", ["never", "always"])
@pytest.mark.parametrize("method", ["auto", *NAMES])
def test_after_success(method, check):
    model = net()
    before = snapshot(model)
    data = x().requires_grad_()
    J = pt.jacobian(model, data, method=method, check=check)
    for quantity in (J.dense, J.norms, J.sum, J.gram, J.variance, J.diagonal, lambda: J.T @ J.values, lambda: J.solve(J.values, 0.1)):
        assert quantity().isfinite().all()
    assert snapshot(model) == before
    assert data.grad is None and data.requires_grad and data.is_leaf


@pytest.mark.parametrize("method", [name for name in NAMES if name not in ("vmap", "capture")])
def test_batch_statistics_of_training_are_restored(method):
    """A module in training mode writes buffers whenever it runs: here a counter and running statistics that do not mix samples."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2, dtype=torch.float64)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.seen += len(x)
            return self.linear(x)

    model = Counting()
    pt.jacobian(model, x(), method=method, check="always")
    assert float(model.seen) == 0


def test_grad_mode_of_the_user():
    model = net()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            with pytest.raises(KeyError):
                model.broken = True
                pt.jacobian(model, x())
            assert not torch.is_grad_enabled()
        model.broken = False
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("method", NAMES)
def test_the_graph_of_the_user_is_not_freed(method):
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    h = x() * w
    v = w.exp()
    pt.jacobian(lambda h, v: (h * v).sin(), h, v, wrt="v", method=method, check="never")
    (h.sum() + v.sum()).backward()
    assert w.grad is not None


@pytest.mark.parametrize("method", NAMES)
def test_nothing_is_kept_alive(method):
    model = nn.Linear(3, 2, dtype=torch.float64)
    J = pt.jacobian(model, x(), method=method, check="never")
    model.weight.grad = None
    gone = weakref.ref(J)
    del J
    assert gone() is None


# --- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "capture", "vmap", "loop"])
def test_four_threads_on_one_module(method):
    model = net()
    batches = [x() + i for i in range(4)]
    expected = [pt.jacobian(model, batch, method="loop", check="never").dense() for batch in batches]
    before = snapshot(model)
    wrong, errors = [], []
    barrier = threading.Barrier(4)

    def work(i):
        try:
            barrier.wait()
            for _ in range(5):
                found = pt.jacobian(model, batches[i], method=method, check="never").dense()
                if not torch.allclose(found, expected[i], rtol=1e-10, atol=1e-10):
                    wrong.append(i)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not errors
    after = snapshot(model)
    assert {key for key in before if before[key] != after[key]} == set()
