"""The cases that are timed, each with what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from benchmarks import models
from benchmarks.models import line
from partials._typing import Tensor
from partials.testing import Call

__all__ = ["CASES", "Made", "Task", "line"]


@dataclass(frozen=True)
class Made:
    """A model and a batch; with a target, each sample's output is its cross-entropy."""

    model: nn.Module
    x: Tensor
    target: Tensor | None = None

    def f(self, *inputs: Tensor) -> Tensor:
        """The function whose per-sample Jacobian is wanted."""
        found: Tensor = self.model(inputs[0])
        return found if self.target is None else F.cross_entropy(found, inputs[1], reduction="none")

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.x,) if self.target is None else (self.x, self.target)

    def call(self) -> Call:
        """The same for `partials.testing`."""
        return Call(self.f, self.inputs, dict(self.model.named_parameters()), {"params": self.model})

    def factors(self, check: str = "never") -> Any:
        return pt.jacobian(self.f, *self.inputs, params=self.model, check=check)

    def step(self) -> tuple[Tensor, ...]:
        """One training step's work: forward and summed backward."""
        return torch.autograd.grad(self.f(*self.inputs).sum(), list(self.model.parameters()))


@dataclass(frozen=True)
class Task:
    """How to make a case, and whether its dense rows and its Gram matrix are of a size to be asked for."""

    make: Callable[[], Made]
    dense: bool = True
    gram: bool = True


def _classified(model: nn.Module, x: Tensor) -> Made:
    return Made(model, x, torch.randint(10, (len(x),)))


CASES: dict[str, Task] = {
    "MLP 784-512-512-10, N=256": Task(lambda: _classified(models.mlp(), torch.randn(256, 784))),
    "tutorial CNN, N=64": Task(lambda: _classified(models.tutorial_cnn(), torch.randn(64, 3, 32, 32))),
    "2-64-64-1 tanh, N=4096": Task(lambda: Made(models.physics(), torch.randn(4096, 2)), gram=False),
    "transformer d=128, T=64, N=64": Task(lambda: _classified(models.Transformer(), torch.randint(0, 1000, (64, 64)))),
    "residual CNN, N=32": Task(lambda: _classified(models.resnet(), torch.randn(32, 3, 32, 32))),
    "tiny GPT-2, T=128, N=16": Task(lambda: Made(models.TinyGPT2(), torch.randint(0, 1000, (16, 128)))),
    "LSTM H=128, T=64, N=64": Task(lambda: _classified(models.Recurrent(), torch.randn(64, 64, 64))),
    "MLP C=10, N=64": Task(lambda: Made(models.mlp(), torch.randn(64, 784))),
    "MLP C=100, N=64": Task(lambda: Made(models.mlp(100), torch.randn(64, 784)), dense=False, gram=False),
    "table of 50 000 rows, N=32": Task(lambda: _classified(models.Words(), torch.randint(0, 50_000, (32, 32)))),
}
"""By name. The seed is set by whoever makes a case."""
