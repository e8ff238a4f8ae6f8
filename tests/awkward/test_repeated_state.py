"""Calls in a row: parameters, modes, dtypes, hooks and options that change in between. See `repeated`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import partials as pt

from .exact import EXACT, same, trainable
from .repeated import Call, N, Switched, apart, mlp, play

CASES: dict[str, Callable[[], Any]] = {}


def case(make):
    CASES[make.__name__] = make
    return make


# --- parameters ---------------------------------------------------------------------------------------------------


@case
def steps_of_an_optimizer():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(N, 3)
        yield Call(model, (x,))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        model[0].weight.zero_()
    yield Call(model, (x,))


@case
def parameters_whose_data_are_exchanged():
    model = mlp()
    x = torch.randn(N, 3)
    yield Call(model, (x,))
    model[0].weight.data = torch.randn(5, 3)
    yield Call(model, (x,))
    model[0].weight.data = torch.randn(3, 5).T
    yield Call(model, (x,))
    model[2].weight.data = torch.randn(4, 5)
    model[2].bias.data = torch.randn(4)
    yield Call(model, (x,))
    model.load_state_dict(model.state_dict() | {"0.weight": torch.randn(5, 3)}, assign=True)
    yield Call(model, (x,))


@case
def parameters_that_are_replaced_and_resized():
    model = mlp()
    x = torch.randn(N, 3)
    yield Call(model, (x,))
    model[0].weight = nn.Parameter(torch.randn(5, 3))
    yield Call(model, (x,))
    model[2] = nn.Linear(5, 7)
    yield Call(model, (x,))
    model[0].bias = None
    yield Call(model, (x,))
    model.append(nn.Linear(7, 1))
    yield Call(model, (x,))
    model[1] = nn.ReLU()
    yield Call(model, (x,))
    del model[3]
    yield Call(model, (x,))
    model[0].register_parameter("bias", nn.Parameter(torch.randn(1)))
    yield Call(model, (x,))


@case
def parameters_that_are_frozen():
    model = mlp()
    x = torch.randn(N, 3)
    for frozen in ([], ["0.weight"], ["0.weight", "0.bias"], ["2.weight"], []):
        for name, p in model.named_parameters():
            p.requires_grad_(name not in frozen)
        yield Call(model, (x,))
    for wrt in ("0.*", "2.bias", "*.weight", "0"):
        chosen = {"0.*": [0, 1], "2.bias": [3], "*.weight": [0, 2], "0": [0, 1]}[wrt]
        yield Call(model, (x,), {"wrt": wrt}, [list(model.parameters())[i] for i in chosen])
    model.requires_grad_(False)
    yield Call(model, (x,), refused=pt.InputError)
    model.requires_grad_(True)
    yield Call(model, (x,))


@case
def weights_that_are_tied_and_untied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    x = torch.randn(N, 3)
    yield Call(model, (x,))
    own, model[2].weight = model[2].weight, model[0].weight
    yield Call(model, (x,))
    model[2].weight = own
    yield Call(model, (x,))
    model[2] = model[0]
    yield Call(model, (x,))


@case
def parametrizations_that_come_and_go():
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w.tanh()

    model = mlp()
    x = torch.randn(N, 3)
    yield Call(model, (x,))
    parametrize.register_parametrization(model[0], "weight", Twice())
    yield Call(model, (x,))
    parametrize.remove_parametrizations(model[0], "weight")
    yield Call(model, (x,))
    nn.utils.parametrizations.weight_norm(model[2])
    yield Call(model, (x,))


@case
def a_module_that_is_moved_while_its_jacobian_is_held():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))
    yield Call(model, (torch.randn(N, 3),))
    model.float()
    yield Call(model, (torch.randn(N, 3, dtype=torch.float32),), bound=1e-5)
    model.double()
    yield Call(model, (torch.randn(N, 3),))
    for p in model.parameters():
        p.data = torch.randn_like(p)
    yield Call(model, (torch.randn(N, 3),))


@case
def modules_with_the_same_addresses():
    x = torch.randn(N, 4)
    for turn in range(6):
        layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
        if turn % 2:
            layers[1].weight = layers[0].weight
        if turn % 3:
            layers[0].bias.requires_grad_(False)
        yield Call(nn.Sequential(layers[0], nn.Tanh() if turn % 4 else nn.Sigmoid(), layers[1]), (x,))
        del layers
        gc.collect()


@case
def functions_with_the_same_addresses():
    x = torch.randn(3, 3, 3)
    for turn in range(6):
        w = torch.randn(3, 3, requires_grad=True)
        f = (lambda x, w: (x @ w).sin().sum(1)) if turn % 2 else (lambda x, w: (x.mT @ w).cos().sum(1))
        yield Call(f, (x, w))
        del w, f
        gc.collect()


# --- modes, types, hooks ------------------------------------------------------------------------------------------


@case
def training_and_evaluation():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    model.eval()
    x = torch.randn(N, 3)
    yield Call(model, (x,))
    model.train()
    yield Call(model, (x,), refused=pt.PartialsError)
    model[2].eval()
    yield Call(model, (x,), refused=pt.MixingError)
    model.eval()
    yield Call(model, (x,))
    model[2].train()
    yield Call(model, (x,), refused=pt.RandomnessError)
    model.eval()
    yield Call(model, (x + 1,))


@case
def mixing_that_is_switched_on():
    def apart(self, x):
        return self.b(self.a(x).tanh())

    def mixed(self, x):
        h = self.a(x)
        return self.b((h - h.mean(0)).tanh())

    model = Switched(apart, mixed)
    for model.way in (0, 1, 0, 1):
        yield Call(model, (torch.randn(N, 3),), refused=pt.MixingError if model.way else None)


@case
def mixing_without_a_gradient_that_is_switched_on():
    def forward(self, x):
        h = self.a(x)
        return self.b((h - h.mean(0).detach() if self.center else h).tanh())

    model = Switched(forward)
    for model.center in (False, True, False, True):
        yield Call(model, (torch.randn(N, 3),), refused=pt.MixingError if model.center else None, unchecked=False)


@case
def mixing_that_is_switched_on_under_a_transform():
    """Which runs samples apart, and sees none of it."""

    def forward(self, x):
        h = self.a(x)
        return self.b((h - h.mean(0, keepdim=True) if self.center else h - h.mean(1, keepdim=True)).tanh())

    model = Switched(forward)
    for model.center in (False, True, False):
        refused = pt.MixingError if model.center else None
        yield Call(model, (torch.randn(N, 3),), {"method": "vmap"}, refused=refused, unchecked=False)


@case
def mixing_by_a_constant():
    def forward(self, x):
        return self.b((self.matrix @ self.a(x)).tanh())

    model = Switched(forward)
    for model.matrix in (torch.eye(N), torch.ones(N, N) / N, torch.eye(N), torch.eye(N) + 0.1):
        mixes = bool((model.matrix != torch.eye(N)).any())
        yield Call(model, (torch.randn(N, 3),), oracle=apart(model), refused=pt.MixingError if mixes else None)


@case
def several_dtypes():
    model = mlp()
    x = torch.randn(N, 3)
    yield Call(model, (x,))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        model.to(dtype)
        yield Call(model, (x.to(dtype),), bound=64 * torch.finfo(dtype).eps if dtype is not torch.float64 else EXACT)


@case
def autocast_around():
    model = mlp().float()
    x = torch.randn(N, 3, dtype=torch.float32)
    yield Call(model, (x,), bound=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        yield Call(model, (x,), bound=3e-2)
    yield Call(model, (x,), bound=1e-5)


@case
def grad_modes_around():
    model = mlp()
    x = torch.randn(N, 3)
    rows = Call(model, (x,)).rows()
    for around in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with around():
            J = pt.jacobian(model, x)
            dense = J.dense()
        same(J, rows)
        assert ((dense.reshape(rows.shape) - rows).abs() <= EXACT * rows.norm()).all()
        yield Call(model, (x,))


@case
def hooks_that_come_and_go():
    model = mlp()
    x = torch.randn(N, 3)
    yield Call(model, (x,))
    for hook in (lambda m, i, o: o * 2, lambda m, i, o: o.flip(1), lambda m, i, o: None):
        handle = model[0].register_forward_hook(hook)
        yield Call(model, (x,))
        handle.remove()
    yield Call(model, (x,))
    model[0].forward = lambda x: F.linear(x, model[0].weight * 2, model[0].bias)
    yield Call(model, (x,))
    del model[0].forward
    yield Call(model, (x,))


@case
def errors_in_between():
    def good(self, x):
        return self.b(self.a(x).tanh())

    def late(self, x):
        self.b(self.a(x).tanh())
        raise ZeroDivisionError

    model = Switched(good, late)
    x = torch.randn(N, 3)
    for model.way in (0, 1, 0, 1):
        yield Call(model, (x,), refused=ZeroDivisionError if model.way else None)
    yield Call(model, (torch.randn(N, 2),), refused=RuntimeError)
    yield Call(model, (x.long(),), refused=RuntimeError)
    model.way = 0
    yield Call(model, (x,))


# --- other options ------------------------------------------------------------------------------------------------


@case
def dimensions_of_the_batch():
    def forward(self, x):
        return self.b(self.a(x).tanh())

    w = torch.randn(N, 2, requires_grad=True)
    x = torch.randn(N, N)

    def rows(x, w):
        return x @ w

    def columns(x, w):
        return (x.T @ w) ** 2

    yield Call(rows, (x, w))
    yield Call(columns, (x, w), {"in_dims": (1, None)}, dims=(1, None))
    yield Call(rows, (x, w))
    shared = torch.randn(N, N)
    f = lambda x, y, w: (x @ w) * (y.sum() if y.ndim < 2 else y.sum(1, keepdim=True))  # noqa: E731
    yield Call(f, (x, x.clone(), w))
    yield Call(lambda x, y, w: x @ y @ w, (x, shared, w), {"in_dims": (0, None, None)}, dims=(0, None, None))
    yield Call(f, (x, x.clone(), w))


@case
def outputs_that_are_picked():
    def forward(self, x):
        h = self.a(x).tanh()
        return {"h": h, "out": (self.b(h), h.sum(1))}

    model = Switched(forward)
    x = torch.randn(N, 3)
    for pick in (lambda r: r["h"], lambda r: r["out"][0], lambda r: r["out"][1], lambda r: r["h"] * 2):
        yield Call(model, (x,), {"output": pick}, pick=pick)
    yield Call(model, (x,), {"output": "h"}, pick=lambda r: r["h"])
    yield Call(model, (x,), refused=pt.OutputError)
    yield Call(model, (x,), {"output": "h"}, pick=lambda r: r["h"])


@case
def losses():
    model = mlp(3, 4)
    x, y = torch.randn(N, 3), torch.randint(4, (N,))
    ignored = y.clone()
    ignored[0] = 1

    def call(loss, target):
        return Call(
            lambda x: model(x),
            (x, target),
            {"loss": loss, "params": model},
            trainable(model),
            verb=pt.gradient,
            oracle=lambda x, t: loss(model(x), t),
        )

    for loss in (F.cross_entropy, lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1), nn.CrossEntropyLoss(reduction="sum")):
        yield call(loss, y)
        yield call(loss, ignored)
    yield call(F.mse_loss, torch.randn(N, 4))
    for beta in (0.1, 10.0):
        yield call(nn.SmoothL1Loss(beta=beta), torch.randn(N, 4))


@case
def methods_budgets_and_graphs():
    model = mlp()
    x = torch.randn(N, 3)
    for options in (
        {},
        {"method": "vmap"},
        {"max_memory": 60_000_000},
        {"method": "loop"},
        {"create_graph": True},
        {"method": "grad"},
        {"randomness": "same"},
        {"method": "forward"},
        {},
    ):
        yield Call(model, (x,), options)
        x = torch.randn(N, 3)


@case
def one_model_under_several_others():
    shared = nn.Linear(3, 3)
    models = [nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, nn.Tanh(), shared), nn.Sequential(shared, nn.Sigmoid())]
    for turn in range(6):
        yield Call(models[turn % 3], (torch.randn(N, 3),))
    f = lambda x: models[1](x) * 2  # noqa: E731
    yield Call(f, (torch.randn(N, 3),), {"params": shared}, trainable(shared))
    yield Call(f, (torch.randn(N, 3),), {"params": [shared.bias]}, [shared.bias])
    yield Call(shared, (torch.randn(N, 3),))


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("name", CASES)
def test_calls_in_a_row(name, check):
    play(CASES[name](), check)


def test_a_jacobian_does_not_keep_the_graph_of_its_call_alive():
    model, x = mlp(), torch.randn(N, 3)
    dead = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            ctx.kept = Kept()
            dead.append(weakref.ref(ctx.kept))
            return h * 1

        @staticmethod
        def backward(ctx, g):
            return g

    class Kept:
        pass

    model.insert(1, Last := nn.Identity())
    Last.forward = Watched.apply
    held = [
        pt.jacobian(model, x),
        pt.jacobian(model, x, output=lambda out: out[:, 0]),
        pt.gradient(lambda x: model(x).sum(1), x, params=model),
    ]
    gc.collect()
    assert len(dead) > len(held) and not any(ref() for ref in dead)


def test_quantities_within_an_autocast_region_are_those_outside():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).float()
    x = torch.randn(N, 1, 4, 4, dtype=torch.float32)
    v, r = torch.randn(69, dtype=torch.float32), torch.randn(N, 3, dtype=torch.float32)
    H = torch.eye(3, dtype=torch.float32).expand(N, 3, 3)

    def quantities(J):
        yield from (J.dense(), J.norms(), J.gram(), J.gram_blocks(), J @ v, J.T @ r, J.sum(), J.variance(), J.diagonal(H), J.normal(H))
        yield from (J.ggn(H) @ v, J.ggn(H).solve(v, 1.0), J.sketch(8), J.sketch(8, "kronecker"), J[:2].gram(J), pt.concat([J, J]).gram())
        yield from (J.solve(r, 1.0, method=method) for method in ("rows", "columns", "cg", "svd"))

    J = pt.jacobian(model, x)
    outside = list(quantities(J))
    with torch.autocast("cpu", torch.bfloat16):
        inside = list(quantities(J))
        K = pt.jacobian(model, x)
        other = list(quantities(K))
    for a, b in zip(outside, inside, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)
    for a, b, c in zip(quantities(K), other, outside, strict=True):
        assert torch.equal(a, b) and (a - c).norm() <= 0.1 * c.norm()
