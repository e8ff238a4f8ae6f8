"""The networks that are timed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from partials._typing import Tensor


def mlp(outputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, outputs))


def physics() -> nn.Module:
    """A field u(x, t), as physics-informed networks have it."""
    return nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))


def tutorial_cnn() -> nn.Module:
    """The network of PyTorch's CIFAR-10 tutorial."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(8, after), nn.ReLU()),
            *(nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.GroupNorm(8, after)),
        )
        self.across = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.across(x))


def resnet() -> nn.Module:
    """Residual blocks of 16, 32 and 64 channels with group norm, on 32 x 32 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(8, 16), nn.ReLU()),
        *(_Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def resnet18(width: int = 64) -> nn.Module:
    """ResNet-18's eight blocks for 32 x 32 pixels, with group norm; 11 million parameters at its own width of 64."""
    sizes = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
    blocks = [_Residual(a, b, 1 if a == b else 2) for a, b in zip([width, *sizes], sizes, strict=False)]
    stem = (nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


class Transformer(nn.Module):
    """d = 128, two layers, four heads, a vocabulary of 1000, mean-pooled to ten classes."""

    def __init__(self, tokens: int = 64) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(1000, 128), nn.Parameter(0.02 * torch.randn(tokens, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(128, 10)

    def forward(self, index: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.table(index) + self.places).mean(1))
        return out


class _Causal(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.first, self.second = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.packed, self.out, self.wide, self.narrow = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, h: Tensor) -> Tensor:
        n, t, d = h.shape
        q, k, v = self.packed(self.first(h)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind()
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, d))
        out: Tensor = h + self.narrow(F.gelu(self.wide(self.second(h)), approximate="tanh"))
        return out


class TinyGPT2(nn.Module):
    """GPT-2's form: causal attention, learned positions, a head that is the table of tokens. Returns each sequence's mean loss."""

    def __init__(self, tokens: int = 128, d: int = 128, vocabulary: int = 1000, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(vocabulary, d), nn.Embedding(tokens, d)
        self.layers, self.norm = nn.Sequential(*[_Causal(d, heads) for _ in range(layers)]), nn.LayerNorm(d)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, index: Tensor) -> Tensor:
        h = self.layers(self.table(index) + self.places(torch.arange(index.shape[1], device=index.device)))
        logits = F.linear(self.norm(h), self.table.weight)
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), index[:, 1:], reduction="none").mean(1)


class Recurrent(nn.Module):
    """One LSTM layer of 128 units on 64 features; the last state to ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


class Words(nn.Module):
    """The mean of 32 rows of a table of 50 000, to ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50_000, 64), nn.Linear(64, 10)

    def forward(self, index: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(index).mean(1))
        return out


def line(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The notebook's function."""
    return a * x + b
