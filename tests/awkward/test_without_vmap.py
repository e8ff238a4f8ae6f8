"""What torch.func.vmap refuses, on the native run with a measured layout; what that cannot run either, by a method that the plan names."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import partials as pt

from .exact import exact, same

N = 5


def native(J):
    assert J.plan.method == "capture", J.plan
    assert any("dim" in use.layout for use in J.plan.uses), J.plan.uses
    return J


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)


@pytest.mark.parametrize("t", [3, N])
def test_a_branch_on_the_data(t):
    class Branch(Net):
        def forward(self, x):
            h = self.a(x)
            h = h.sin() if bool((h**2).sum() > 0) else h.cos()
            return self.b(h).sum(1)

    native(exact(Branch(), torch.randn(N, t, 4)))


def test_a_loop_over_samples():
    class Loop(Net):
        def forward(self, x):
            return torch.stack([self.b(self.a(row).sin() if float(row.sum()) > 0 else row) for row in x])

    exact(Loop(), torch.randn(N, 4))


@pytest.mark.parametrize("t", [3, N])
def test_writes_into_a_fresh_buffer(t):
    class Buffer(Net):
        def forward(self, x):
            out = torch.zeros(len(x), x.shape[1], 3)
            for step in range(x.shape[1]):
                out[:, step] = self.b(self.a(x[:, step]).sin())
            out[:, 0] *= 2
            return out.sin().sum(1)

    native(exact(Buffer(), torch.randn(N, t, 4)))


def test_writes_into_a_buffer_time_first():
    class Buffer(Net):
        def forward(self, x):
            out = torch.empty(x.shape[1], len(x), 3)
            for step in range(x.shape[1]):
                out[step] = self.b(self.a(x[:, step]).sin())
            return out.sin().sum(0)

    native(exact(Buffer(), torch.randn(N, N, 4)))


class Cube(torch.autograd.Function):
    """In the old style: no setup_context, so vmap refuses it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Product(torch.autograd.Function):
    """Takes a parameter itself."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def test_an_autograd_function_of_the_data():
    class Custom(Net):
        def forward(self, x):
            return self.b(Cube.apply(self.a(x)))

    native(exact(Custom(), torch.randn(N, 4)))


def test_an_autograd_function_of_a_parameter():
    class Custom(Net):
        def forward(self, x):
            return Product.apply(self.a(x).sin(), self.b.weight)

    J = exact(Custom(), torch.randn(N, 4))
    assert J.plan.method != "capture"


def test_an_autograd_function_of_a_parameter_alone():
    class Custom(Net):
        def forward(self, x):
            return F.linear(self.a(x).sin(), Cube.apply(self.b.weight))

    exact(Custom(), torch.randn(N, 4))


@torch.library.custom_op("awkward::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x.numpy(force=True) * 2 if False else torch.from_numpy(x.detach().numpy() * 2)


torch.library.register_autograd("awkward::twice", lambda ctx, g: g * 2)


@torch.library.custom_op("awkward::scaled", mutates_args=())
def scaled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * w


torch.library.register_autograd(
    "awkward::scaled",
    lambda ctx, g: (g * ctx.w, (g * ctx.x).reshape(-1, g.shape[-1]).sum(0)),
    setup_context=lambda ctx, inputs, output: (setattr(ctx, "x", inputs[0]), setattr(ctx, "w", inputs[1])),
)


def test_a_custom_operation_on_the_data():
    class Custom(Net):
        def forward(self, x):
            return self.b(twice(self.a(x)).sin())

    native(exact(Custom(), torch.randn(N, 4)))


def test_a_custom_operation_on_a_parameter():
    class Custom(Net):
        def forward(self, x):
            return scaled(self.b(x).sin(), self.b.bias)

    J = exact(Custom(), torch.randn(N, 4))
    assert any(use.rule == "expansion" and "scaled" in use.operation for use in J.plan.uses)


@pytest.mark.parametrize("t", [3, N])
def test_checkpointing(t):
    class Checkpointed(Net):
        def forward(self, x):
            return self.b(checkpoint(lambda h: self.a(h).sin(), x, use_reentrant=False)).sum(1)

    native(exact(Checkpointed(), torch.randn(N, t, 4)))


class Reentrant(Net):
    """What is checkpointed runs again in the reverse pass; `torch.autograd.grad` is refused there, or skips it without a word."""

    def forward(self, x):
        return self.b(checkpoint(lambda h: self.a(h).sin(), x.clone().requires_grad_(), use_reentrant=True)).sum(1)


def by_backward(model, x):
    """(N, C, P) by whole `.backward()`s on a copy of the model."""
    model, rows = copy.deepcopy(model), []
    for n in range(len(x)):
        out = model(x[n : n + 1])[0]
        for entry in out:
            model.zero_grad()
            entry.backward(retain_graph=True)
            rows.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    return torch.stack(rows).reshape(len(x), len(out), -1)


@pytest.mark.parametrize("check", ["never", "always"])
@pytest.mark.parametrize("t", [3, N])
def test_reentrant_checkpointing_by_another_method(t, check):
    model, x = Reentrant(), torch.randn(N, t, 4)
    J = pt.jacobian(model, x, check=check)
    same(J, by_backward(model, x))
    assert J.plan.method == "backward" and "reentrant" in str(J.plan)
    assert all(p.grad is None for p in model.parameters())
    assert pt.check(model, x, level="full").passed


@pytest.mark.parametrize("method", ["capture", "vmap", "forward", "jacobian", "grad", "loop"])
def test_reentrant_checkpointing_is_refused_by_methods_that_would_skip_it(method):
    with pytest.raises(pt.MethodError, match="reentrant"):
        pt.jacobian(Reentrant(), torch.randn(N, 3, 4), method=method, check="never")


def test_reentrant_checkpointing_of_a_function():
    model = Reentrant()
    with pytest.raises(pt.MethodError, match="use_reentrant=False"):
        pt.jacobian(lambda x: model(x), torch.randn(N, 3, 4), params=model)
    assert all(p.grad is None for p in model.parameters())


def test_checkpointing_with_the_activation_inside():
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(lambda h: self.b(self.a(h).sin()).sin(), x, use_reentrant=False)

    native(exact(Checkpointed(), torch.randn(N, 4)))


@pytest.mark.parametrize("t", [3, N])
def test_a_time_first_model(t):
    class TimeFirst(Net):
        def forward(self, x):
            h = self.a(x.transpose(0, 1)).sin()
            if bool(h.isnan().any()):
                h = h * 0
            return self.b(h).sin().sum(0)

    native(exact(TimeFirst(), torch.randn(N, t, 4)))


@pytest.mark.parametrize("t", [3, N])
def test_inputs_with_time_first(t):
    class TimeFirst(Net):
        def forward(self, x):
            h = self.a(x).sin()
            return self.b(h.double() if float(h.sum()) else h).sin().sum(0)

    native(exact(TimeFirst(), torch.randn(t, N, 4), dims=(1,), in_dims=1))


@pytest.mark.parametrize("t", [3, N])
@pytest.mark.parametrize("fold", ["samples outside", "samples inside", "in channels", "in three"])
def test_the_batch_folded_into_another_dimension(fold, t):
    class Folded(Net):
        def forward(self, x):
            n = len(x)
            if float(x.sum()) > 1e9:
                return x
            if fold == "samples outside":
                return self.b(self.a(x.reshape(n * t, 4)).sin()).reshape(n, t, 3).sum(1)
            if fold == "samples inside":
                return self.b(self.a(x.transpose(0, 1).reshape(t * n, 4)).sin()).reshape(t, n, 3).sum(0)
            if fold == "in three":
                h = self.a(x.reshape(n, t, 2, 2).permute(1, 0, 2, 3).reshape(t * n * 2, 2).repeat(1, 2)).sin()
                return self.b(h).reshape(t, n, 2, 3).sum((0, 2))
            h = x.transpose(0, 1).reshape(1, t, n * 4)
            return self.b(self.a(h.reshape(t, n, 4)).sin()).sum(0)

    native(exact(Folded(), torch.randn(N, t, 4)))


def test_windows_folded_with_the_batch():
    """As in shifted-window attention: (N, 4, 4, c) to (N * 4, 4, c)."""

    class Windows(Net):
        def forward(self, x):
            n = len(x)
            h = x.reshape(n, 2, 2, 2, 2, 4).transpose(2, 3).reshape(n * 4, 4, 4)
            h = self.a(h).sin()
            h = (h @ h.mT).softmax(-1) @ self.b(h)
            return h.reshape(n, 16, 3).sum(1)

    exact(Windows(), torch.randn(N, 4, 4, 4))
