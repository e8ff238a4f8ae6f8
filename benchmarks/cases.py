"""The models and batches that are timed: each is (per-sample function, inputs, the module whose parameters count)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Made = tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...], Any]


class TutorialCNN(nn.Module):
    """The network of PyTorch's CIFAR-10 tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.convs(x))


class Transformer(nn.Module):
    """d = 128, two layers, four heads, a vocabulary of 1000, mean-pooled to ten classes."""

    def __init__(self, tokens: int = 64) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(1000, 128), nn.Parameter(0.02 * torch.randn(tokens, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(128, 10)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.table(index) + self.places).mean(1))


def classified(model: nn.Module, x: torch.Tensor) -> Made:
    """The cross-entropy of each sample."""
    target = torch.randint(10, (len(x),))

    def losses(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), target, reduction="none")

    return losses, (x, target), model


def mlp() -> Made:
    net = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return classified(net, torch.randn(256, 784))


def cnn() -> Made:
    return classified(TutorialCNN(), torch.randn(64, 3, 32, 32))


def physics() -> Made:
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))
    return net, (torch.randn(4096, 2),), net


def transformer() -> Made:
    return classified(Transformer(), torch.randint(0, 1000, (64, 64)))


def line(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The notebook's function."""
    return a * x + b


CASES: dict[str, Callable[[], Made]] = {
    "MLP 784-512-512-10, N=256": mlp,
    "tutorial CNN, N=64": cnn,
    "2-64-64-1 tanh, N=4096": physics,
    "transformer d=128, T=64, N=64": transformer,
}
