"""What a dry run says of time and memory: put together from a part of one block, which is computed and thrown away."""

from __future__ import annotations

import json

import pytest
import torch

import partials as pt
from partials.distribute import job as jobs
from partials.store.data import of_arrays

pytest.importorskip("typer")
from partials.cli.outlook import outlook


@pytest.mark.parametrize("what", ["jacobian", "norms", "sum", "gram", "sketch:5"])
def test_an_outlook_writes_nothing_and_counts_the_bytes(tmp_path, what):
    model, x = torch.nn.Linear(6, 2), torch.randn(50, 6)
    one = jobs.job(tmp_path / "s", what, lambda i: pt.jacobian(model, *i[0]), of_arrays([x], {}), None, {}, {}, block=13)
    said = json.loads(outlook(one, True))
    assert list(tmp_path.iterdir()) == []
    assert said["blocks"] == 4 and said["samples in a block"] == 13 and said["bytes"] == one.bytes()
    assert said["seconds"] > 0 and said["peak memory"] > 0
    words = outlook(one, False)
    assert "peak memory" in words and "by one worker" in words


def test_the_disk_is_tried_where_much_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("partials.cli.outlook.MUCH", 0)
    model, x = torch.nn.Linear(6, 2), torch.randn(50, 6)
    one = jobs.job(tmp_path / "a/b/s", "norms", lambda i: pt.jacobian(model, *i[0]), of_arrays([x], {}), None, {}, {})
    assert "if the disk writes" in outlook(one, False) and list(tmp_path.iterdir()) == []


def test_a_slow_function_is_tried_on_few_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("partials.cli.outlook.LONG", 0.0)
    model, x = torch.nn.Linear(6, 2), torch.randn(50, 6)
    one = jobs.job(tmp_path / "s", "gram", lambda i: pt.jacobian(model, *i[0]), of_arrays([x], {}), None, {}, {})
    assert "from 8 samples" in outlook(one, False)
