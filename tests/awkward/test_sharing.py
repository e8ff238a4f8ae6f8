"""What is shared, and between whom: tied weights, parameters by themselves, broadcast tensors, sizes that are equal by chance."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .exact import exact

N = 5


# --- weights in several places -----------------------------------------------------------------------------------


def test_one_weight_in_two_modules():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    J = exact(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(4, 2)), torch.randn(N, 3, 4))
    assert "2.weight" not in J.names and torch.equal(J["2.weight"], J["0.weight"])


class Language(nn.Module):
    def __init__(self, by_module):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.by_module = by_module

    def forward(self, tokens):
        h = self.table(tokens).tanh()
        return (self.head(h) if self.by_module else h @ self.table.weight.T).mean(1)


@pytest.mark.parametrize("by_module", [True, False])
def test_embedding_tied_to_the_head(by_module):
    exact(Language(by_module), torch.randint(7, (N, 6)))


def test_a_module_applied_twice():
    layer = nn.Linear(4, 4)
    exact(nn.Sequential(layer, nn.Tanh(), layer, nn.Sigmoid(), layer), torch.randn(N, 3, 4))


def test_the_weight_of_a_child_used_by_its_parent():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(4, 3)

        def forward(self, x):
            return F.linear(x.sin(), self.child.weight) + self.child(x) + F.linear(x, self.child.weight[:, :4], self.child.bias)

    exact(Parent(), torch.randn(N, 4))


class Sizes(nn.Module):
    """A module called on the batch, on the batch folded with positions, and on something that all samples share."""

    def __init__(self):
        super().__init__()
        self.layer, self.query = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        n, t, _ = x.shape
        each = self.layer(x.reshape(n * t, 4)).sin().reshape(n, t, 4)
        whole = self.layer(x.mean(1)).cos()
        shared = self.layer(self.query).tanh()
        return (each @ shared.T).sum(1) * whole[:, :3]


@pytest.mark.parametrize("t", [2, N, 7])
def test_a_module_called_with_other_batch_sizes_inside(t):
    exact(Sizes(), torch.randn(N, t, 4))


def test_a_module_called_on_a_part_of_each_sample():
    class Crops(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return torch.stack([self.layer(part).sin() for part in (x[:, 0], x[:, 1:].flatten(0, 1).reshape(-1, 2, 4)[:, 1])]).sum(0)

    exact(Crops(), torch.randn(N, 3, 4))


# --- tensors that broadcast --------------------------------------------------------------------------------------


class Places(nn.Module):
    """Position ids of batch size one, a learned query and a class token."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.places, self.mix = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.token, self.query = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 2, 4))
        self.register_buffer("ids", torch.arange(9)[None])

    def forward(self, x):
        if self.how == "position ids":
            return self.mix(x + self.places(self.ids[:, : x.shape[1]])).sin().sum(1)
        if self.how == "learned queries":
            return ((self.mix(self.query) @ self.mix(x).mT).softmax(-1) @ x).flatten(1)
        if self.how == "expanded queries":
            query = self.mix(self.query.expand(len(x), -1, -1))
            return F.scaled_dot_product_attention(query, x, x).flatten(1)
        if self.how == "repeated queries":
            return (self.query.repeat(len(x), 1, 1) * x[:, :2]).sin().flatten(1)
        return self.mix(torch.cat([self.token.expand(len(x), -1, -1), x], 1)).sin()[:, 0]


@pytest.mark.parametrize("t", [3, N])
@pytest.mark.parametrize("how", ["position ids", "learned queries", "expanded queries", "repeated queries", "class token"])
def test_tensors_of_batch_size_one(how, t):
    exact(Places(how), torch.randn(N, t, 4))


def test_free_parameters():
    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift, self.table = (
                nn.Parameter(torch.randn(4)),
                nn.Parameter(torch.randn(3, 1)),
                nn.Parameter(torch.randn(4, 2)),
            )

        def forward(self, x):
            return ((x * self.scale + self.shift) @ self.table).sin().sum(1)

    exact(Free(), torch.randn(N, 3, 4))


# --- kinds of parameters -----------------------------------------------------------------------------------------


def test_scalar_empty_and_unused_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scalar, self.empty, self.unused = (
                nn.Parameter(torch.randn(())),
                nn.Parameter(torch.zeros(0, 3)),
                nn.Parameter(torch.randn(2)),
            )

        def forward(self, x):
            return (x * self.scalar.exp()).sin() + self.empty.sum()

    J = exact(Odd(), torch.randn(N, 4))
    assert J["scalar"].shape == (N, 4) and J["empty"].shape == (N, 4, 0, 3) and not J["unused"].any()


def test_a_parameter_that_is_also_an_input():
    layer = nn.Linear(4, 4)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, w):
            return F.linear(self.layer(x).sin(), w)

    exact(Two(), torch.randn(N, 4), layer.weight)


@pytest.mark.parametrize("kind", ["list", "dict", "plain list"])
def test_collections_of_parameters(kind):
    class Collected(nn.Module):
        def __init__(self):
            super().__init__()
            tensors = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))]
            self.held = nn.ParameterList(tensors) if kind != "dict" else nn.ParameterDict(dict(zip("ab", tensors, strict=True)))

        def forward(self, x):
            w, b = self.held.values() if kind == "dict" else list(self.held)
            return (x @ w + b).sin()

    exact(Collected(), torch.randn(N, 4))


def test_buffers_used_as_weights():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("features", torch.randn(6, 4))
            self.register_buffer("mask", (torch.rand(3, 6) > 0.5).to(torch.float64))
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return F.linear(F.linear(x, self.features).cos(), self.head.weight * self.mask, self.head.bias)

    exact(Random(), torch.randn(N, 4))


# --- sizes that are equal by chance ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("first", [True, False])
def test_a_batch_as_large_as_something_else(n, first):
    """4 time steps, 3 channels, 6 features, 2 outputs: each is the batch size once."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lift, self.scale, self.head = (
                nn.Conv1d(3, 3, 1),
                nn.Linear(3, 6),
                nn.Parameter(torch.randn(4, 1)),
                nn.Linear(6, 2),
            )

        def forward(self, x):
            h = self.conv(x).mT  # (n, 4, 3)
            h = h if first else h.transpose(0, 1).contiguous()
            h = self.lift(h).tanh()
            h = h * self.scale if first else h * self.scale[:, None]
            return self.head(h).sum(1 if first else 0)

    exact(Mixed(), torch.randn(n, 3, 4))
