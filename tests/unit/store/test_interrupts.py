"""A run as a process of its own: how it tells how far it is, and how it ends when it is told to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

import partials as pt
from partials.store.verify import verify
from tests.unit.store.making import PATIENCE

pytest.importorskip("typer")
ONE_LONG_BLOCK = """
import os, time, torch
torch.manual_seed(0)
net = torch.nn.Linear(3, 2)


class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net

    def forward(self, x):
        time.sleep(float(os.environ.get("PAUSE", "0")) * len(x))
        return self.net(x)


slow, x = Slow(), torch.randn(400, 3)
"""
FAILING = """
import sys, torch
net, x = torch.nn.Linear(3, 2), torch.ones(90, 3)
torch.nn.init.ones_(net.weight), torch.nn.init.ones_(net.bias)


def f(x):
    if "default_worker" in sys.argv[0]:
        raise OSError("no such luck")
    return net(x)
"""
SHORT = """
import sys
from partials.cli import storing
from partials.store import work
storing.EVERY, work.BLOCK_BYTES, work.TOGETHER = 0.3, 1, 4
from partials.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture
def long(folder, environment):
    """Start a run of one block of four hundred slow samples, computed four at a time."""
    (folder / "long.py").write_text(ONE_LONG_BLOCK)

    def started(*words, model="long.py:slow", pause=0.0):
        command = [sys.executable, "-c", SHORT, "run", model, "--data", "long.py:x", "--out", "s", "--block", "400", *words]
        return subprocess.Popen(command, env=environment | {"PAUSE": str(pause)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return started


def lines_until(process, words):
    """The lines of stderr up to one that has the words."""
    seen = []
    while (line := process.stderr.readline()) and not re.search(words, line):
        seen.append(line)
    return [*seen, line]


def test_a_line_every_few_seconds_also_within_a_block(long):
    process = long("--limit", "150", pause=0.02)
    seen = lines_until(process, r"0 of 1 blocks, [1-9]\d* of 150 samples, [\d.]+ samples/s, \d+ s left")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert seen[-1] and "150 samples in 1 blocks" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_the_first_block(long, number):
    """It is dropped where it would take long, and nothing half-written is left."""
    process = long(pause=0.05)
    lines_until(process, r"\d+ of 400 samples")
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and f"{number.name}: stopping" in err
    assert "go on with\n  partials run long.py:slow" in err and "--resume" in err
    assert not pt.open("s").entries and verify("s").passed and not verify("s").remarks
    done = long("--resume", model="long.py:slow")
    _, err = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, err
    assert pt.open("s").complete


def test_a_second_interrupt_ends_it_at_once(long):
    process = long(pause=0.05)
    lines_until(process, r"\d+ of 400 samples")
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "go on with" in err and "Traceback" not in err
    assert verify("s").passed


@pytest.mark.slow
def test_ranks_that_draw_their_own_weights_are_refused(start, folder):
    """Without a seed each process makes another model: all but one are told so, even when they start at the same moment."""
    (folder / "unseeded.py").write_text("import torch\nnet = torch.nn.Linear(3, 2)\nx = torch.ones(90, 3)\n")
    both = [
        start(model="unseeded.py:net", data="unseeded.py:x", out="u", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        for rank in (0, 1)
    ]
    ends = [process.communicate(timeout=PATIENCE) for process in both]
    assert sorted(process.returncode for process in both) == [0, 3]
    assert any("belongs to another run: its parameters differ" in err for _, err in ends)
    assert not pt.open("u").complete and verify("u").passed


@pytest.mark.slow
def test_ray_workers_that_draw_their_own_weights_are_refused(start, folder):
    pytest.importorskip("ray")
    (folder / "unseeded.py").write_text("import torch\nnet = torch.nn.Linear(3, 2)\nx = torch.ones(90, 3)\n")
    process = start("--engine", "ray", model="unseeded.py:net", data="unseeded.py:x", out="u")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3 and "its parameters differ" in err, err
    assert not pt.open("u").entries


@pytest.mark.slow
def test_ray_tells_what_failed_in_a_worker(start, folder):
    pytest.importorskip("ray")
    (folder / "failing.py").write_text(FAILING)
    process = start("--engine", "ray", "--params", "failing.py:net", model="failing.py:f", data="failing.py:x", out="u")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3 and "no such luck" in err and "fault of partials" not in err, err
    process = start("--engine", "ray", "--address", "127.0.0.1:1", out="w")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and "there is no Ray cluster to be had at 127.0.0.1:1" in err, err
