"""An exception anywhere leaves module, buffers, random state, grad mode, `.grad` and hooks as they were.

A mode beneath all others counts the torch functions that are called, the user's and the library's, and raises at the k-th. Only
what puts things back is not itself made to fail.
"""

import gc
import sys

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import partials as pt
from partials import _state
from partials._run import NAMES
from partials.capture.known import LAYOUTS
from partials.checks.first import PASSED
from partials.rules import RULES

N = 3
STATE = _state.__file__
STEPS = 30
"""Positions of the exception in the default run; more in the slow one, others every day."""


class Planted(Exception):
    pass


def cleaning():
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != STATE:
        frame = frame.f_back
    return frame is not None


class Bomb(TorchFunctionMode):
    """Raises in the place of the k-th call of a torch function, whoever makes it."""

    def __init__(self, at):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._C._set_grad_enabled or cleaning():
            return func(*args, **(kwargs or {}))
        self.count += 1
        if self.count == self.at:
            raise Planted(self.at)
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    def __init__(self, checkpointed=False, plain=False):
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 2)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.checkpointed, self.plain = checkpointed, plain

    def forward(self, x):
        if not self.plain:
            self.calls += 1
        h = self.norm(self.first(x))
        if self.checkpointed:
            h = checkpoint(self.frozen, h, use_reentrant=False)
        return self.last(self.drop(h.sin()).relu_())


def net(**options):
    torch.manual_seed(0)
    model = Net(**options)
    model.norm.eval()
    model.first.register_forward_hook(lambda module, args, out: out * 2)
    if not model.plain:  # (torch.func refuses backward hooks, and buffers that are written)
        model.last.register_full_backward_hook(lambda module, given, out: None)
    model.first.weight.register_hook(lambda g: g)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    return model


def snapshot(model):
    """All that could be left changed, as comparable values."""
    state = {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "random": torch.get_rng_state().tolist(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "math attention": torch.backends.cuda.math_sdp_enabled(),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "modes": len(torch.overrides._get_current_function_mode_stack()),
        "transforms": torch._C._functorch.maybe_current_level(),
    }
    for name, module in model.named_modules():
        hooks = {hook: list(getattr(module, hook)) for hook in vars(module) if hook.endswith("_hooks")}
        state[name] = (sorted(vars(module)), module.training, hooks)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        grad = None if t.grad is None else (id(t.grad), t.grad._version, t.grad.tolist())
        state[name, "tensor"] = (id(t), t.data_ptr(), t.requires_grad, t.tolist(), len(t._backward_hooks or ()), grad, sorted(t.__dict__))
    return state


def explode(call, model, steps):
    """Run `call` with an exception at each of some positions, comparing what is left behind with what was there.

    `steps`: how many, from the first to the last; or (how many, whose turn it is).
    """
    expected = snapshot(model)
    with Bomb(0) as bomb:
        call()
    assert snapshot(model) == expected
    positions = range(1, bomb.count + 1)
    if isinstance(steps, tuple):
        stride = max(1, bomb.count // steps[0])
        positions = range(1 + steps[1] % stride, bomb.count + 1, stride)
    elif len(positions) > steps:
        positions = [1 + i * (bomb.count - 1) // (steps - 1) for i in range(steps)]
    raised = 0
    for at in positions:
        LAYOUTS.clear()
        PASSED.clear()
        try:
            with Bomb(at):
                call()
        except Planted:
            raised += 1
        except Exception as error:  # another error, said because of the planted one
            causes = []
            while error is not None:
                causes.append(type(error))
                error = error.__cause__ or error.__context__
            assert Planted in causes or pt.PartialsError in causes[0].__mro__, causes
            raised += 1
        assert snapshot(model) == expected, at
    assert raised > len(list(positions)) // 4
    call()
    assert snapshot(model) == expected


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "more"])
def steps(request, turn):
    return (request.config.getoption("--positions"), turn) if request.param else STEPS


@pytest.fixture(autouse=True)
def nothing_remembered():
    LAYOUTS.clear()
    PASSED.clear()
    yield
    gc.collect()


def data():
    return torch.linspace(-1, 1, 4 * N).reshape(N, 4)


@pytest.mark.parametrize("method", ["auto", *NAMES])
def test_anywhere_in_a_call(method, steps):
    model, x = net(plain=method in ("vmap", "forward")).eval(), data()
    explode(lambda: pt.jacobian(model, x, method=method, check="always").dense(), model, steps)


def test_in_training_with_the_models_own_masks(steps):
    model, x = net().train(), data()
    model.norm.eval()

    def call():
        state = torch.get_rng_state()
        try:
            pt.jacobian(model, x, randomness="model", check="always").norms()
        finally:
            torch.set_rng_state(state)

    explode(call, model, steps)


def test_in_every_quantity(steps):
    model, x = net(checkpointed=True).eval(), data()

    def call():
        J = pt.jacobian(model, x, check="never")
        J.norms()
        J.gram()
        J.T @ J.values
        J.variance()
        J.solve(J.values, 0.1)
        J.diagonal()

    explode(call, model, steps)


def test_in_differentiable_results(steps):
    model, x = net().eval(), data()
    explode(lambda: pt.jacobian(model, x, create_graph=True, check="never").norms(), model, steps)


def test_in_a_full_check(steps):
    model, x = net().eval(), data()
    explode(lambda: pt.check(model, x, level="full"), model, 15 if steps == STEPS else steps)


def test_while_a_culprit_is_looked_for(steps):
    model, x = net().eval(), data()
    model.norm.train()

    def call():
        try:
            pt.jacobian(model, x, check="always")
        except pt.MixingError as error:
            assert error.culprit is not None or isinstance(torch.overrides._get_current_function_mode(), Bomb)

    with pytest.raises(pt.MixingError):
        pt.jacobian(model, x, check="always")
    explode(call, model, steps)


def test_in_a_rule(monkeypatch):
    model, x = net().eval(), data()
    expected = snapshot(model)

    def broken(*args, **kwargs):
        raise Planted

    monkeypatch.setitem(RULES, torch.nn.functional.linear, broken)
    with pytest.raises(Planted):
        pt.jacobian(model, x)
    assert snapshot(model) == expected


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise Planted


@pytest.mark.parametrize("method", ["auto", "capture", "grad", "backward", "loop", "jacobian"])
def test_in_the_reverse_pass(method):
    model, x = net().eval(), data()
    model.last.register_forward_hook(lambda module, args, out: Backwards.apply(out))
    expected = snapshot(model)
    with pytest.raises((Planted, pt.MethodError)):
        pt.jacobian(model, x, method=method)
    assert snapshot(model) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_of_every_kind(error):
    model, x = net().eval(), data()
    expected = snapshot(model)
    calls = []

    def strike(module, args, out):
        calls.append(0)
        if len(calls) == 2:
            raise error

    handle = model.last.register_forward_hook(strike)
    with pytest.raises(error):
        pt.jacobian(model, x, check="always")
    handle.remove()
    assert snapshot(model) == expected
