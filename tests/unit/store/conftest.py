"""A folder with a model and data, and runs into a store as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.store.making import PATIENCE

SRC = Path(__file__).parents[3] / "src"
MODEL = """
import os, time
import torch

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
x, y, more = torch.randn(90, 3), torch.randint(2, (90,)), torch.randn(90, 3)


PAUSE = float(os.environ.get("PAUSE", "0.02"))


def slow(x, weight=net[0].weight):
    time.sleep(PAUSE)
    return torch.tanh(x @ weight.T)


class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net

    def forward(self, x):
        time.sleep(PAUSE)
        return self.net(x)


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 90

    def __getitem__(self, n):
        return x[n]


items, slowly = Items(), Slow()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def environment():
    paths = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture
def start(folder, environment):
    """Start `partials run` on the folder's model: a process."""

    def started(*words, model="model.py:net", data="model.py:x", out="store", block=8, python=(), **more):
        command = [sys.executable, *python, "-m", "partials", "run", model, "--data", data, "--out", out, "--block", str(block)]
        options = {"env": environment | more, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, *map(str, words)], **options)

    return started


@pytest.fixture
def run(start):
    """Run it to its end: (exit code, stdout, stderr)."""

    def ran(*words, **options):
        process = start(*words, **options)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err

    return ran


@pytest.fixture
def files():
    """The bytes of every shard below a store, by path."""

    def read(store):
        return {str(p.relative_to(store)): p.read_bytes() for p in sorted(Path(store).rglob("c/**/*")) if p.is_file()}

    return read
