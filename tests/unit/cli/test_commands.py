"""The commands on a user's model file: what they print, and their exit codes."""

from __future__ import annotations

import json

import pytest

import partials
from partials.checks.report import Report


def test_help_names_every_command(command):
    result = command("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("demo", "compare", "check", "explain", "Exit codes"))


def test_version(command):
    assert command("--version").stdout.startswith(f"partials {partials.__version__}, torch 2.")


def test_an_unknown_command_is_answered_with_a_near_one(command):
    result = command("comapre")
    assert result.exit_code == 2
    assert "Did you mean 'compare'?" in result.stderr


# --- explain --------------------------------------------------------------------------------------------------------------


def test_explain(command):
    result = command("explain", "model.py:net", "--data", "model.py:x")
    assert result.exit_code == 0
    assert result.stdout.startswith("Jacobian of 2 outputs w.r.t. 26 entries of 4 tensors, 5 samples, float32")
    assert result.stderr == ""


def test_explain_as_json(command):
    plan = json.loads(command("explain", "model.py:net", "--data", "model.py:x", "--json", "--method", "loop").stdout)
    assert (plan["method"], plan["samples"], plan["outputs"]) == ("loop", 5, [2])


def test_data_are_cast_to_the_models_type_and_that_is_said(command):
    result = command("explain", "model.py:net", "--data", "x.npy")
    assert "data of torch.float64 are cast to torch.float32" in result.stderr
    assert "float32" in result.stdout


def test_dtype_casts_model_and_data(command):
    result = command("explain", "model.py:net", "--data", "x.npy", "--dtype", "float64")
    assert result.stdout.splitlines()[0].endswith("float64")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.py:net", "--data", "model.py:x", "--limit", "3"], {"samples": 3}),
        (["model.py:net", "--data", "model.py:x", "--limit", "30"], {"samples": 5}),
        (["model.py:net", "--data", "model.py:one", "--single"], {"samples": 1}),
        (["model.py:net", "--data", "model.py:x", "--wrt", "0.*"], {"parameters": {"0.weight": [4, 3], "0.bias": [4]}}),
        (["model.py:line", "--data", "model.py:line_data"], {"parameters": {"a": [1], "b": [1]}}),
        (["model.py:line", "--data", "model.py:line_data", "--wrt", "a", "--wrt", "x"], {"parameters": {"x": [1], "a": [1]}}),
        (["model.py:outside", "--data", "model.py:x", "--params", "model.py:net"], {"outputs": []}),
        (["model.py:two", "--data", "model.py:x", "--params", "model.py:two.__globals__", "--output", "left"], None),
        (["model.py:net", "--data", "model.py:x", "--in-dims", "input=0"], {"samples": 5}),
        (["model.py:net", "--data", "model.py:x", "--in-dims", "0"], {"samples": 5}),
        (["model.py:net", "--data", "model.py:x", "--target", "model.py:y", "--loss", "cross_entropy"], {"outputs": []}),
        (["model.py:net", "--data", "both.npz:images", "--data", "both.npz:labels", "--loss", "F.cross_entropy"], {"outputs": []}),
        (["model.py:net", "--data", "model.py:x", "--target", "model.py:y", "--loss", "model.py:loss"], {"outputs": []}),
        (["model.py:net", "--data", "model.py:x", "--target", "model.py:y", "--loss", "model.py:Loss"], {"outputs": []}),
        (["model.py:dropping", "--data", "model.py:x", "--eval"], {"samples": 5}),
        (["model.py:dropping", "--data", "model.py:x", "--train", "--randomness", "model"], {"samples": 5}),
        (["model.py:net", "--data", "model.py:x", "--device", "cpu", "--max-memory", "1GiB"], {"samples": 5}),
    ],
)
def test_options(command, words, expected):
    result = command("explain", "--json", *words)
    if expected is None:  # a mapping that holds more than tensors is the user's mistake
        assert result.exit_code == 2
        return
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert {name: plan[name] for name in expected} == expected


@pytest.mark.parametrize("left", ["left", "right"])
def test_an_output_is_picked_by_its_key(command, folder, left):
    (folder / "more.py").write_text("from model import two, weight\nweights = {'weight': weight}\n")
    result = command("explain", "more.py:two", "--data", "model.py:x", "--params", "more.py:weights", "--output", left, "--json")
    assert json.loads(result.stdout)["outputs"] == [3]


# --- check ----------------------------------------------------------------------------------------------------------------


def test_check(command):
    result = command("check", "model.py:net", "--data", "model.py:x")
    assert result.exit_code == 0, result.output
    assert "passed" in result.stdout
    assert result.stderr == "partials: checking (quick)\n"


def test_check_as_json(command):
    result = command("check", "model.py:net", "--data", "model.py:x", "--method", "vmap", "--json")
    assert (json.loads(result.stdout)["passed"], json.loads(result.stdout)["method"]) == (True, "vmap")


def test_a_failed_check_ends_with_1(command, monkeypatch):
    monkeypatch.setattr(Report, "passed", False)
    assert command("check", "model.py:net", "--data", "model.py:x", "--json").exit_code == 1


def test_an_unknown_level_is_answered_with_a_near_one(command):
    result = command("check", "model.py:net", "--data", "model.py:x", "--level", "quik")
    assert result.exit_code == 2
    assert "did you mean 'quick'?" in result.stderr


# --- compare --------------------------------------------------------------------------------------------------------------


def test_compare(command):
    result = command("compare", "model.py:net", "--data", "model.py:x", "--methods", "vmap,loop", "--repeats", "1")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[1:4]] == ["method", "vmap", "loop"]
    assert "partials: vmap: warming up" in result.stderr


def test_compare_as_json_and_into_files(command, folder):
    pytest.importorskip("matplotlib")
    words = ["--methods", "loop", "--methods", "grad", "--repeats", "1", "--json", "--markdown", "new/t.md", "--plot", "new/t.png"]
    result = command("compare", "model.py:net", "--data", "model.py:x", *words)
    assert [row["method"] for row in json.loads(result.stdout)["rows"]] == ["loop", "grad"]
    assert "| `loop` |" in (folder / "new/t.md").read_text()
    assert (folder / "new/t.png").read_bytes().startswith(b"\x89PNG")


def test_compare_ends_with_3_where_nothing_ran(command):
    result = command("compare", "model.py:net", "--data", "model.py:x", "--max-memory", "10B", "--json")
    assert result.exit_code == 3
    assert {row["status"] for row in json.loads(result.stdout)["rows"]} == {"refused"}


def test_a_plot_without_matplotlib_is_refused_before_measuring(command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = command("compare", "model.py:net", "--data", "model.py:x", "--plot", "t.png")
    assert result.exit_code == 2
    assert "pip install 'partials[plot]'" in result.stderr


# --- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["explain", "model.py:dropping"], "here      --eval, or --randomness model"),
        (["check", "model.py:net", "--method", "capture", "--max-memory", "10B"], "max_memory"),
        (["explain", "model.py:dropping", "--randomness", "same", "--method", "grad"], "method='grad' cannot run here"),
    ],
)
def test_what_the_library_refuses_ends_with_3(command, words, sentence):
    result = command(*words, "--data", "model.py:x")
    assert result.exit_code == 3, result.output
    assert sentence in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method", "vamp"], "did you mean 'vmap'?"),
        (["--loss", "cros_entropy"], "did you mean 'cross_entropy'"),
        (["--loss", "model.py:number"], "is no loss"),
        (["--target", "model.py:y"], "a target is compared by a loss"),
        (["--target", "model.py:pair", "--loss", "mse_loss"], "is not one tensor"),
        (["--wrt", "0.weihgt"], "did you mean '0.weight'"),
        (["--in-dims", "x"], "--in-dims is not understood"),
        (["--in-dims", ","], "--in-dims is not understood"),
        (["--dtype", "float46"], "did you mean 'float64'"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
        (["--max-memory", "lots"], "is not an amount of memory"),
        (["--randomness", "some"], "randomness='some' is unknown"),
        (["--limit", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_options_end_with_2(command, words, sentence):
    result = command("explain", "model.py:net", "--data", "model.py:x", *words)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_a_mode_is_for_modules(command):
    result = command("explain", "model.py:line", "--data", "model.py:line_data", "--eval")
    assert result.exit_code == 2
    assert "--eval sets the mode of a module" in result.stderr
