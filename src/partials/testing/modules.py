"""The modules of the cases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .._typing import Tensor


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def cnn() -> nn.Sequential:
    """Strides, groups, circular padding, max pooling, flattening."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", groups=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 2, 2, stride=1, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def norms() -> nn.Sequential:
    module = nn.Sequential(
        nn.LayerNorm(3),
        nn.Conv1d(4, 4, 1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.BatchNorm1d(4),
        nn.Flatten(),
        nn.RMSNorm(12),
        nn.Linear(12, 2),
    )
    norm = module[4]
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return module.eval()


class Tied(nn.Module):
    """Looks tokens up in the table that is also the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)
        self.head = nn.Linear(3, 6)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(tokens).mean(1).tanh())
        return out


class Bag(nn.Module):
    """The mean of embeddings with a padding row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, padding_idx=0)
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            self.table.weight.normal_()  # the padding row too, so that it is its derivative that is zero

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(tokens).mean(1))
        return out


class Last(nn.Module):
    """The last step of a recurrent network."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.recurrent(x)[0][:, -1]
        return out


class LowRank(nn.Module):
    """x (W + B A)^T with W frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 4), requires_grad=False)
        self.A = nn.Parameter(torch.randn(2, 4))
        self.B = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W + self.B @ self.A).tanh()


class Two(nn.Module):
    """A mapping of two inputs to a mapping of the output and something beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 2)
        self.right = nn.Linear(2, 2)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        left, right = self.left(batch["left"]), self.right(batch["right"])
        return {"y": left * right, "left": left}
