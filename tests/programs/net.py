"""A program is a short list of steps; `Net` is the module that runs it.

The state is one tensor of N samples, T positions and D features, in one of several memory orders (`orders.py`). Every step works
on it as it lies, so that linear layers, norms and convolutions meet samples along any dimension, folded into any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tests.programs.heads import HEADS
from tests.programs.steps import STEPS


@dataclass(frozen=True)
class Step:
    kind: str
    a: int = 0
    b: int = 0
    body: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Program:
    """What a failing test prints, and all that is needed to run it again."""

    steps: tuple[Step, ...]
    head: str = "mean"
    n: int = 3
    t: int = 2
    d: int = 3
    frozen: int = 0
    """Every third, fourth, ... parameter is frozen where this is 3, 4, ..."""
    dtype: str = "float64"

    def make(self):
        """(module, inputs, the wanted parameters by name), with the same numbers every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            x, tokens = torch.randn(self.n, self.t, self.d, dtype=torch.float64), torch.randint(0, 5, (self.n, self.t))
            net = Net(self, x, tokens)
        net, x = net.to(getattr(torch, self.dtype)), x.to(getattr(torch, self.dtype))
        return net, (x, tokens), {name: p for name, p in net.named_parameters() if p.requires_grad}


class Net(nn.Module):
    """Runs a program. Parameters are made by a first run, in the order in which the steps ask for them."""

    def __init__(self, program, x, tokens):
        super().__init__()
        self.program, self.parts, self.plan = program, nn.ParameterDict(), None
        builder = Builder(self)
        with torch.no_grad():
            self.run(builder, x, tokens)
        self.plan = tuple(builder.plan)
        if not self.parts:
            self.parts["only"] = nn.Parameter(torch.randn(2, dtype=x.dtype))
        for k, p in enumerate(self.parts.values()):
            p.requires_grad_(not (program.frozen >= 2 and k % program.frozen == program.frozen - 1))

    def forward(self, x, tokens):
        return self.run(Reader(self), x, tokens)

    def run(self, source, x, tokens):
        state = State(source, x, tokens)
        state.take_all(self.program.steps)
        return HEADS[self.program.head](state)


class State:
    """The tensor, its order, and where parameters come from."""

    def __init__(self, source, x, tokens):
        self.source, self.h, self.tokens, self.n, self.order = source, x, tokens, x.shape[0], "ntd"

    def take_all(self, steps):
        for step in steps:
            self.h = STEPS[step.kind](self, step)

    def parameter(self, *shape, tie=0):
        return self.source.parameter(shape, tie)


class Builder:
    """Makes parameters; with `tie`, one of the same shape that exists already is taken again."""

    def __init__(self, net):
        self.net, self.plan = net, []

    def parameter(self, shape, tie):
        same = [name for name, p in self.net.parts.items() if p.shape == shape]
        name = same[tie % len(same)] if tie and same else f"p{len(self.net.parts)}"
        if name not in self.net.parts:
            self.net.parts[name] = nn.Parameter(torch.randn(shape, dtype=torch.float64) / max(1, shape[-1] if shape else 1) ** 0.5)
        self.plan.append(name)
        return self.net.parts[name]


class Reader:
    """Hands the parameters out again in the same order."""

    def __init__(self, net):
        self.net, self.names = net, iter(net.plan)

    def parameter(self, shape, tie):
        return self.net.parts[next(self.names)]
