"""Errors: whose they are, what is said, and how the command ends."""

from __future__ import annotations

import io
import sys

import pytest

from partials import CheckError, InputError, MethodError, OutputError, StoreError
from partials.cli import console, faults


def explain(command, spec, *words):
    return command("explain", spec, "--data", "model.py:x", *words)


@pytest.mark.parametrize(
    ("code", "spec", "sentences"),
    [
        (
            "import os\nimport tensorflw.keras\n",
            "theirs.py:net",
            ["ModuleNotFoundError while loading theirs.py", "theirs.py, line 2: import tensorflw.keras", "'tensorflw' is not installed"],
        ),
        ("import tensorflw\n", "theirs:net", ["ModuleNotFoundError while importing theirs", "theirs.py, line 1"]),
        ("x = 1\ndef f(:\n", "theirs.py:f", ["SyntaxError while loading theirs.py", "theirs.py, line 2"]),
        ("1 / 0\n", "theirs.py:f", ["ZeroDivisionError while loading theirs.py", "theirs.py, line 1: 1 / 0"]),
        ("raise SystemExit('bye')\n", "theirs.py:f", ["SystemExit while loading theirs.py"]),
        (
            "def build():\n    return inner()\n\n\ndef inner():\n    raise ValueError('no weights')\n",
            "theirs.py:build",
            ["ValueError while calling theirs.py:build", "theirs.py, line 6", "ValueError: no weights", "in build"],
        ),
        (
            "from model import net\n\ndef f(x):\n    return {}['no such key'] + net(x)\n",
            "theirs.py:f",
            ["KeyError while calling theirs.py:f", "theirs.py, line 4", "KeyError: 'no such key'"],
        ),
    ],
    ids=["import in a file", "import in a module", "syntax", "at import", "exit at import", "constructor", "forward"],
)
def test_their_errors_are_told_apart_from_ours(command, folder, code, spec, sentences):
    (folder / "theirs.py").write_text(code)
    words = ["--params", "model.py:net"] if "def f(x)" in code else []
    result = explain(command, spec, *words)
    assert result.exit_code == faults.USAGE
    assert result.stdout == ""
    for sentence in [*sentences, "not in partials", "their traceback ends with"]:
        assert sentence in result.stderr
    assert "could not import module" not in result.stderr
    assert "partials/" not in result.stderr, "no frame of ours in their traceback"


def test_data_that_do_not_fit_the_model(command, folder):
    import numpy

    numpy.save(folder / "wide.npy", numpy.ones((5, 4), "float32"))
    result = command("explain", "model.py:net", "--data", "wide.npy")
    assert result.exit_code == faults.USAGE
    assert "RuntimeError while calling model.py:net" in result.stderr
    assert "where     torch/nn/modules/linear.py" in result.stderr
    assert "_call_impl" not in result.stderr


def test_an_error_in_their_backward(command, folder):
    (folder / "theirs.py").write_text(
        "import torch\n"
        "from model import net\n\n\n"
        "class Odd(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x):\n"
        "        return x.clone()\n\n"
        "    @staticmethod\n"
        "    def backward(ctx, g):\n"
        "        raise ArithmeticError('odd')\n\n\n"
        "def f(x):\n"
        "    return Odd.apply(net(x))\n"
    )
    result = command("check", "theirs.py:f", "--data", "model.py:x", "--params", "model.py:net", "--method", "loop")
    assert result.exit_code == faults.USAGE, result.output
    assert "ArithmeticError while running the model" in result.stderr
    assert "theirs.py, line 12: raise ArithmeticError('odd')" in result.stderr


def test_our_own_fault_is_not_blamed_on_the_model(command, monkeypatch):
    monkeypatch.setattr("partials._run.look", None)
    result = explain(command, "model.py:net", "--method", "loop")
    assert result.exit_code == faults.INTERNAL
    assert "this is a fault of partials itself" in result.stderr
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("words", [["check"], ["compare", "--methods", "grad"]])
def test_a_mixing_model_is_refused(command, words):
    result = command(*words, "model.py:mixing", "--data", "model.py:x", "--params", "model.py:net")
    assert result.exit_code == faults.REFUSED, result.output
    assert "mixes samples" in result.stderr


def test_an_interrupt_ends_with_130(command, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("partials.cli.loading.model", interrupted)
    result = explain(command, "model.py:net")
    assert result.exit_code == 130
    assert result.stderr == "partials: interrupted\n"


def test_an_interrupt_in_their_file_is_an_interrupt(command, folder):
    (folder / "theirs.py").write_text("raise KeyboardInterrupt\n")
    assert explain(command, "theirs.py:net").exit_code == 130


@pytest.mark.parametrize(("kind", "code"), [(CheckError, 1), (InputError, 2), (OutputError, 2), (MethodError, 3), (StoreError, 3)])
def test_codes(kind, code):
    assert faults.code_of(kind("a sentence")) == code


def test_progress_on_a_terminal_is_one_line_that_is_written_over(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.progress() as say:
        say("half way")
    written = sys.stderr.getvalue()
    assert "partials: " not in written
    assert "\x1b[3" not in written, "no colours"


def test_progress_elsewhere_is_plain_lines(capsys):
    with console.progress() as say:
        say("half way")
    assert capsys.readouterr().err == "partials: half way\n"
