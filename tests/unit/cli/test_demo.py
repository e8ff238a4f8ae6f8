"""The demonstration: every row of the notebook's table, and the digits."""

from __future__ import annotations

import json

import pytest
import torch

from partials.cli import demo, notebook

KEYS = [f"S{i}" for i in range(1, 16)]


def test_the_table_is_complete():
    assert [row.key for row in notebook.ROWS] == KEYS


@pytest.mark.parametrize("row", notebook.ROWS, ids=lambda row: row.key)
def test_every_row_is_right(row):
    state = torch.get_rng_state()
    outcome = notebook.outcome(row)
    assert outcome.right, outcome
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_row_and_a_row_that_raises_are_not_ok():
    assert not notebook.outcome(notebook.Row("S0", "wrong", lambda: notebook.Solved(False))).right
    raised = notebook.outcome(notebook.Row("S0", "raises", lambda: torch.ones(2) @ torch.ones(3)))
    assert not raised.right
    assert str(raised).startswith("S0   raises")
    assert "NOT OK" in str(raised)
    assert "RuntimeError" in raised.detail


def test_the_comparison_is_exact():
    x = torch.randn(4, 1)
    rows = {"a": x.clone(), "b": torch.ones(4, 1, 1)}
    assert notebook.is_gradient(x, rows)
    rows["a"][2] += torch.finfo(torch.float32).eps * x[2].abs()
    assert not notebook.is_gradient(x, rows)


def test_the_table_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "ROWS", notebook.ROWS[:3])
    assert demo.demonstrate(tmp_path, quick=True)
    printed = capsys.readouterr().out
    assert "3 of 3 rows right" in printed
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("S")] == KEYS[:3]
    assert not list(tmp_path.iterdir())


def test_a_wrong_row_makes_the_demonstration_fail(command, monkeypatch):
    monkeypatch.setattr(notebook, "ROWS", [notebook.Row("S1", "wrong", lambda: notebook.Solved(False))])
    result = command("demo", "--quick", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_without_its_packages_the_demonstration_says_what_to_install(command, monkeypatch, missing):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == missing else object())
    result = command("demo")
    assert result.exit_code == 2
    assert "pip install 'partials[demo]'" in result.stderr


def small_study():
    pytest.importorskip("sklearn")
    from partials.cli import digits

    some = digits.load()
    return digits.study(digits.Digits(some.images[:60], some.labels[:60]), lambda _: None, epochs=1, timed=6)


def test_a_few_digits(tmp_path):
    pytest.importorskip("matplotlib")
    from partials.cli import digits

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    studied = small_study()
    assert studied.report.passed
    assert studied.norms.shape == (60,)
    assert [float(studied.norms[n]) for n in studied.largest] == sorted(studied.norms.tolist(), reverse=True)[:10]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    digits.picture(studied, tmp_path / "new" / "digits.png")
    assert (tmp_path / "new" / "digits.png").stat().st_size > 20_000
    assert len(studied.to_dict()["largest"]) == 10


def test_the_digits_are_the_same_each_time():
    assert torch.equal(small_study().norms, small_study().norms)


@pytest.mark.slow
def test_the_whole_demonstration(command, folder):
    result = command("demo", "--out", "new", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["digits"]["digits"] == 1797
    assert told["digits"]["accuracy"] > 0.9
    assert (folder / "new" / "digits.png").read_bytes().startswith(b"\x89PNG")
