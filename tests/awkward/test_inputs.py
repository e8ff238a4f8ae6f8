"""Inputs: non-contiguous, expanded, integer, boolean, masked, made in inference mode, and those that require grad."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt

from .exact import exact, loop, same, trainable

N = 5


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))


def ready(x):
    model = net()
    with torch.no_grad():
        model(x)
    return model


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, N, 4).transpose(0, 1),
        torch.randn(2 * N, 3, 8)[::2, :, ::2],
        torch.randn(N, 4, 3).mT,
        torch.randn(N * 3, 4).unflatten(0, (3, N)).mT.mT.transpose(0, 1),
    ],
    ids=["time first", "strided", "transposed", "folded"],
)
def test_non_contiguous_inputs(x):
    assert not x.is_contiguous()
    x = x.double()
    exact(ready(x), x)


@pytest.mark.parametrize("x", [torch.randn(1, 3, 4), torch.randn(N, 1, 4)], ids=["samples", "positions"])
def test_expanded_inputs(x):
    x = x.double().expand(N, 3, 4)
    exact(ready(x), x)


def test_two_inputs_that_share_memory():
    w = torch.randn(4, 2, requires_grad=True)
    x = torch.randn(N, 8)
    exact(lambda a, b, w: ((a * b) @ w).sin(), x[:, :4], x[:, 2:6], w)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integer_inputs(dtype):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return self.layer(x / 255).sin() + (x * self.scale)[:, :3]

    exact(Pixels(), torch.randint(0, 100, (N, 4)).to(dtype))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.gate = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x, mask):
        scores = (self.q(x) @ self.k(x).mT).masked_fill(~mask[:, None], -torch.inf)
        h = torch.where(mask[..., None], scores.softmax(-1) @ x, self.gate)
        return (h * mask[..., None]).sum(1)


@pytest.mark.parametrize("t", [3, N])
def test_boolean_masks(t):
    mask = torch.ones(N, t, dtype=torch.bool)
    mask[1, 2:] = mask[3, 1:] = False
    exact(Attention(), torch.randn(N, t, 4), mask)


def test_masked_select_within_a_sample():
    """Each sample keeps as many entries as the others, at places of its own."""
    order = torch.stack([torch.randperm(4) for _ in range(N)])
    w = torch.randn(2, 3, requires_grad=True)
    exact(lambda x, i, w: (x[i < 2].reshape(len(x), 2) @ w).sin(), torch.randn(N, 4), order, w)


def test_writing_by_a_mask():
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.missing = nn.Linear(4, 3), nn.Parameter(torch.randn(()))

        def forward(self, x, mask):
            x = x.clone()
            x[mask] = self.missing
            return self.layer(x).sin()

    exact(Filled(), torch.randn(N, 4), torch.rand(N, 4) > 0.5)


def test_inference_mode_tensors():
    with torch.inference_mode():
        x = torch.randn(N, 3, 4)
    model = ready(x)
    exact(model, x.clone())
    J = pt.jacobian(model, x)
    same(J, loop(model, (x.clone(),), trainable(model)))
    with torch.inference_mode():
        assert torch.equal(pt.jacobian(model, x).dense(), J.dense())


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    plain.load_state_dict({name: t.clone() for name, t in model.state_dict().items()})
    x = torch.randn(N, 4)
    J = pt.jacobian(model, x, wrt="*")
    assert torch.equal(J.dense(), pt.jacobian(plain, x).dense())


def test_inputs_that_require_grad_and_have_a_history():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    exact(model, torch.randn(N, 4).requires_grad_().sin())


def test_an_input_in_two_arguments():
    w = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(N, 4)
    exact(lambda a, b, w: (a @ w * b).sin(), x, x, w)


def test_inputs_changed_in_place_by_the_function():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            x = x.clone()
            x[:, 0] = 0
            x.mul_(2)
            return self.layer(x).sin()

    exact(Careless(), torch.randn(N, 4))


def test_one_hot_and_gathered_targets():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, y):
            return -self.layer(x).log_softmax(-1).gather(1, y[:, None]).squeeze(1) + (F.one_hot(y, 3) * self.layer(x)).sum(1)

    exact(Loss(), torch.randn(N, 4), torch.randint(3, (N,)))
