"""Healthy networks: small, of every kind that is common, with what is hard for a comparison: kinks, cancellation, zero gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def mlp_tanh():
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5)), (torch.randn(16, 20),)


def mlp_relu():
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)), (torch.randn(32, 40),)


def cnn():
    first, second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)
    pool = nn.MaxPool2d(2)
    return nn.Sequential(first, nn.ReLU(), pool, second, nn.ReLU(), pool, nn.Flatten(), nn.Linear(32, 4)), (torch.randn(8, 1, 14, 14),)


class Block(nn.Module):
    """Attention whose keys have a bias of their own: its gradient is zero but for rounding, since softmax ignores it."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        h = self.first(x)
        q, k, v = (part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    def __init__(self, width=16, words=30, length=6):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(torch.randn(length, width) / 4)
        self.block, self.norm, self.head = Block(width), nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, tokens):
        return self.head(self.norm(self.block(self.words(tokens) + self.places)).mean(1))


def transformer():
    return Transformer(), (torch.randint(30, (6, 6)),)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8, padding_idx=0), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(1).tanh())


def embedding():
    return Words(), (torch.randint(50, (12, 7)),)


class Cancelling(nn.Module):
    """The difference of two nearby values of one network: outputs, and rows, are 1e-3 of what they are made of."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))

    def forward(self, x):
        return self.net(x + 5e-4) - self.net(x - 5e-4)


def cancelling():
    return Cancelling(), (torch.randn(16, 6),)


class Residual(nn.Module):
    """u_xx + u - g: what physics-informed training brings near zero."""

    def __init__(self):
        super().__init__()
        self.u = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))

    def forward(self, x):
        x = x.requires_grad_() if x.is_leaf and not x.requires_grad else x
        u = self.u(x)
        (u_x,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        return u_xx + u - u.detach()


def residual():
    return Residual(), (torch.rand(20, 1),)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(1))

    def forward(self, x):
        return self.a * x + self.b


def line():
    return Line(), (torch.randn(1000, 1),)


HEALTHY = {make.__name__: make for make in (mlp_tanh, mlp_relu, cnn, transformer, embedding, cancelling, residual, line)}


def healthy(name, seed=0, dtype=torch.float32):
    """(module, inputs) of a healthy network, all drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, inputs = HEALTHY[name]()
    return module.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
