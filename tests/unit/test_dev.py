"""The parts of ./dev that need no installation."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "dev"


@pytest.fixture
def dev(monkeypatch, tmp_path):
    """The script as a module, over an empty tree of its own; each module that it runs is noted instead."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = importlib.machinery.SourceFileLoader("dev_script", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\nnumpy==2.4.6\n")
    module.ROOT, module.VENV = tmp_path, tmp_path / ".venv"
    module.ran = []
    monkeypatch.setattr(module, "run", lambda *words, **variables: module.ran.append(words) or 0)
    return module


@pytest.fixture
def installed(dev, monkeypatch):
    """A tree whose .venv is there, works, and has been installed into `installed` times."""
    dev.venv_python().parent.mkdir(parents=True)
    dev.venv_python().touch()
    found = {"python": [3, 11], "torch": "2.13.0+cpu", "pip": True, "places": []}
    monkeypatch.setattr(dev, "probe", lambda python: found)
    return dev


@pytest.mark.parametrize("word", ["help", "-h", "--help"])
def test_help(dev, capsys, word):
    assert dev.main([word]) == 0
    printed = capsys.readouterr().out
    assert all(f"    {command}" in printed for command in dev.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [([], "usage: ./dev"), (["biuld"], "there is no command `biuld`"), (["lint", "src"], "`lint` takes no arguments")],
)
def test_a_wrong_call_prints_the_help_and_ends_with_2(dev, capsys, arguments, sentence):
    assert dev.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(sentence)
    assert "usage: ./dev" in printed
    assert not dev.ran


def test_an_environment_without_a_stamp_is_adopted(installed, monkeypatch):
    monkeypatch.setattr(installed, "build", lambda: pytest.fail("the environment works: no need to make another"))
    installed.environment()
    installed.environment()
    assert len(installed.ran) == 1, "the second call finds the stamp"
    assert installed.ran[0][:2] == ("pip", "install")
    assert installed.ran[0][-1] == ".[dev]"


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_file_means_a_new_installation(installed, name):
    installed.environment()
    with (installed.ROOT / name).open("a") as file:
        file.write("# changed\n")
    installed.environment()
    assert len(installed.ran) == 2


def test_each_extra_has_its_own_stamp(installed):
    installed.environment()
    installed.environment("docs")
    installed.environment("docs")
    assert [words[-1] for words in installed.ran] == [".[dev]", ".[dev,docs]"]


def test_a_failed_installation_leaves_no_stamp_and_says_so(installed, monkeypatch, capsys):
    monkeypatch.setattr(installed, "run", lambda *words, **variables: 1)
    assert installed.main(["test"]) == 1
    assert "pip could not install" in capsys.readouterr().err
    assert not list(installed.VENV.glob(".partials-*"))


@pytest.mark.parametrize("found", [{}, {"pip": False, "python": [3, 11]}, {"pip": True, "python": [3, 9]}])
def test_an_environment_that_does_not_serve_is_made_anew(installed, monkeypatch, found):
    calls = []
    monkeypatch.setattr(installed, "probe", lambda python: found)
    monkeypatch.setattr(installed, "build", lambda: calls.append("build"))
    monkeypatch.setattr(installed, "install", lambda extra: calls.append(extra))
    installed.environment()
    assert calls == ["build", "dev"]


def test_torch_that_is_there_takes_the_place_of_the_pinned_one(installed):
    installed.environment()
    assert (installed.VENV / "constraints.txt").read_text() == "torch==2.13.0\nnumpy==2.4.6\n"
    assert installed.constrain("torch==2.13.0\n", "") == "torch==2.13.0\n"


@pytest.mark.parametrize(
    ("torch", "recent"), [("", False), ("1.13.1", False), ("2.9.1", False), ("2.11.0", True), ("2.14.0a0+git12", True), ("3.0", True)]
)
def test_which_torch_is_recent_enough(dev, torch, recent):
    assert dev.recent(torch) is recent


def test_an_old_python_is_told_what_to_do(dev, monkeypatch, capsys):
    monkeypatch.setattr(dev, "probe", lambda python: {"python": [3, 9], "torch": "", "pip": True, "places": []})
    assert dev.main(["test"]) == 1
    assert "Python 3.11 or newer is needed" in capsys.readouterr().err


def test_the_named_python_is_the_one_that_is_used(dev, monkeypatch):
    monkeypatch.setenv("PARTIALS_PYTHON", sys.executable)
    monkeypatch.setenv("VIRTUAL_ENV", "/another/environment")
    assert dev.base_python()[0] == sys.executable


def test_a_python_that_does_not_run_has_nothing(dev):
    assert dev.probe("/no/such/python") == {}


def test_all_means_the_slow_tests_too(installed):
    installed.main(["test", "--all", "-k", "name"])
    assert installed.ran[-1] == ("pytest", "-n", str(installed.workers()), "--run-slow", "-k", "name")


def test_lint_runs_all_its_tools_and_ends_with_the_worst_code(installed, monkeypatch):
    installed.environment()
    monkeypatch.setattr(installed, "run", lambda *words, **variables: installed.ran.append(words) or len(installed.ran) - 2)
    assert installed.main(["lint"]) == 2
    assert [words[0] for words in installed.ran[1:]] == ["ruff", "ruff", "mypy"]


def test_clean_removes_what_was_made_and_nothing_else(installed):
    for name in ("build/docs", "src/__pycache__", ".ruff_cache"):
        (installed.ROOT / name).mkdir(parents=True)
    assert installed.main(["clean"]) == 0
    assert sorted(path.name for path in installed.ROOT.iterdir()) == ["constraints.txt", "pyproject.toml", "src"]
    assert not list((installed.ROOT / "src").iterdir())
