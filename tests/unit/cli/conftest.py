"""A folder with a user's model files and data, and a way to run commands in it."""

from __future__ import annotations

import sys

import numpy
import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

MODEL = """
import numpy, torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
dropping = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
x, y, one = torch.randn(5, 3), torch.arange(5) % 2, torch.randn(3)
array, pair, named = numpy.ones((5, 3)), (torch.ones(5, 1), torch.ones(5, 1)), {"input": torch.ones(5, 3)}
line_data = (torch.randn(5, 1), torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True))
number = 3


def build():
    return nn.Linear(3, 2)


def batch():
    return torch.ones(4, 3)


def line(x, a, b):
    return a * x + b


def outside(x):
    return net(x).sum(1)


def two(x):
    return {"left": x * weight, "right": x + weight}


weight = torch.ones(3, requires_grad=True)


def mixing(x):
    return net(x) - net(x).mean(0)


def loss(output, target):
    return (output.sum(1) - target).square()


class Loss(nn.Module):
    def forward(self, output, target):
        return loss(output, target)


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 1)

    def forward(self, x):
        return self.inner(x)


class space:
    inner = net
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of the commands: model.py, and data in every format."""
    (tmp_path / "model.py").write_text(MODEL)
    numpy.save(tmp_path / "x.npy", numpy.linspace(-1, 1, 15).reshape(5, 3))
    numpy.savez(tmp_path / "both.npz", images=numpy.ones((5, 3), "float32"), labels=numpy.arange(5) % 2)
    numpy.savez(tmp_path / "one.npz", input=numpy.ones((5, 3), "float32"))
    numpy.save(tmp_path / "pickled.npy", numpy.array([{}], dtype=object))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def command(folder):
    """Run a command line: the result has exit_code, stdout and stderr."""
    from partials.cli.app import app

    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])
