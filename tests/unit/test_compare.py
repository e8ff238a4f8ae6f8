"""`pt.compare`: what stands in the table, what is refused, skipped or failed, and what errors are measured against."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials import _compare, _machine, _reference
from partials._api import _problem
from partials._probe import look
from partials._run import NAMES
from partials.methods import METHODS

COLUMNS = ("method", "median", "IQR", "min", "runs", "relative", "worst error", "peak memory")


def line(x, a, b):
    return a * x + b


@pytest.fixture
def arguments():
    return torch.randn(20, 1), torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True)


@pytest.fixture
def found(arguments):
    return pt.compare(line, *arguments, repeats=3)


def by_name(comparison):
    return {row.method: row for row in comparison.rows}


# --- the table -----------------------------------------------------------------------------------------------------------


def test_every_method_has_a_row_and_is_exact(found):
    assert [row.method for row in found.rows] == NAMES
    assert [(row.status, row.error, len(row.seconds), row.warm) for row in found.rows] == [("ok", 0.0, 3, True)] * len(NAMES)


def test_the_fastest_is_the_unit_of_the_others(found):
    fastest = by_name(found)[found.fastest]
    assert found.relative(fastest) == 1
    assert all(found.relative(row) >= 1 for row in found.rows)
    assert [row.method for row in found.measured] == sorted(NAMES, key=lambda name: by_name(found)[name].median)


def test_the_text_has_a_line_for_each_method_and_says_where_it_was_measured(found):
    lines = str(found).splitlines()
    assert lines[0] == "line: 1 output w.r.t. 2 entries, 20 samples, float32"
    assert all(column in lines[1] for column in COLUMNS)
    assert [text.split()[0] for text in lines[2 : 2 + len(NAMES)]] == NAMES
    assert "the loop in float64 on all 20 samples" in lines[-2]
    assert f"torch {torch.__version__}" in lines[-1]
    assert repr(found) == str(found)


def test_median_and_spread_of_the_runs():
    row = _compare.Row("loop", "ok", seconds=(1.0, 2.0, 3.0, 4.0, 9.0))
    assert (row.median, row.spread) == (3.0, 2.0)
    assert replace(row, seconds=(1.0,)).spread is None


def test_named_methods_only(arguments):
    assert [row.method for row in pt.compare(line, *arguments, methods="loop", repeats=1).rows] == ["loop"]
    assert [row.method for row in pt.compare(line, *arguments, methods=["loop", "vmap", "loop"], repeats=1).rows] == ["loop", "vmap"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"methods": ["vamp"]}, "did you mean 'vmap'"),
        ({"methods": ["auto"]}, "methods are given by name"),
        ({"methods": []}, "methods are given by name"),
        ({"repeats": 0}, "repeats is not a number of runs"),
        ({"wrt": "c"}, "wrt='c' matches nothing"),
    ],
)
def test_wrong_options(arguments, options, sentence):
    with pytest.raises(pt.InputError, match=sentence):
        pt.compare(line, *arguments, **options)


def test_progress_is_told_in_words(arguments):
    told = []
    pt.compare(line, *arguments, methods=["loop"], repeats=2, progress=told.append)
    assert told == ["checking that samples stay apart", "computing the reference", "loop: warming up", "loop: timing 2 runs"]


def test_a_single_sample(arguments):
    x, a, b = arguments
    found = pt.compare(line, x[0], a, b, batched=False, repeats=1)
    assert {(row.status, row.error) for row in found.rows if row.method != "capture"} == {("ok", 0.0)}
    assert found.samples == 1


def test_a_loss(device):
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    found = pt.compare(model, x, y, loss=F.cross_entropy, repeats=1)
    assert all(row.status == "ok" and row.error < 1e-5 for row in found.rows)
    assert found.outputs == ()


def test_no_samples():
    found = pt.compare(nn.Linear(3, 2), torch.randn(0, 3), repeats=1)
    assert {(row.status, row.error) for row in found.rows} == {("ok", 0.0)}


# --- methods that do not run ----------------------------------------------------------------------------------------------


def test_refusals_are_rows_with_their_reasons():
    net = nn.Linear(3, 4)

    def crowd(x):
        assert len(x) > 1, "never alone"
        return net(x)

    found = pt.compare(crowd, torch.randn(5, 3), params=net, methods=["vmap", "grad", "loop"], repeats=1)
    assert [row.status for row in found.rows] == ["refused", "ok", "refused"]
    assert by_name(found)["loop"].reason == "f cannot be called with one sample (AssertionError: never alone)"
    assert "loop      refused: f cannot be called" in str(found)
    assert found.reference.startswith("method 'grad' in float64")


def test_a_function_that_mixes_samples_is_refused_as_a_whole():
    with pytest.raises(pt.MixingError):
        pt.compare(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(5, 3), methods=["grad"])


def test_the_budget_refuses(arguments):
    found = pt.compare(line, *arguments, max_memory="10B", repeats=1)
    assert {row.status for row in found.rows} == {"refused"}
    assert "more than max_memory" in found.rows[0].reason
    assert found.fastest is None
    assert "no method ran" not in str(found)


def test_a_method_that_breaks_is_a_row_too(arguments, monkeypatch):
    def broken(problem, facts, chunk):
        raise ZeroDivisionError("in the method")

    monkeypatch.setitem(METHODS, "vmap", replace(METHODS["vmap"], run=broken))
    row = by_name(pt.compare(line, *arguments, methods=["vmap", "loop"], repeats=1))["vmap"]
    assert (row.status, row.reason) == ("failed", "ZeroDivisionError: in the method")


def test_a_wrong_method_is_seen_by_its_error(arguments, monkeypatch):
    right = METHODS["vmap"].run

    def wrong(problem, facts, chunk):
        computed = right(problem, facts, chunk)
        computed.blocks["a"][0].values[-1] *= 1.5
        return computed

    monkeypatch.setitem(METHODS, "vmap", replace(METHODS["vmap"], run=wrong))
    x = arguments[0][-1].item()
    error = by_name(pt.compare(line, *arguments, methods=["vmap"], repeats=1))["vmap"].error
    assert error == pytest.approx(0.5 * abs(x) / (1 + x * x) ** 0.5, rel=1e-5)


def test_a_slow_method_is_run_once(arguments, monkeypatch):
    monkeypatch.setattr(_compare, "ENOUGH", 0.0)
    found = pt.compare(line, *arguments, methods=["loop"], repeats=5)
    assert (len(found.rows[0].seconds), found.rows[0].warm, found.rows[0].spread) == (1, False, None)
    assert " 1* " in str(found)
    assert "* one run, without a warm-up" in str(found)


def test_a_very_slow_method_is_left_out_unless_it_is_named(arguments, monkeypatch):
    monkeypatch.setattr(_compare, "TOO_LONG", 0.0)
    left_out = by_name(pt.compare(line, *arguments, repeats=1))["grad"]
    assert left_out.status == "skipped"
    assert "name the method to run it all the same" in left_out.reason
    assert pt.compare(line, *arguments, methods=["grad"], repeats=1).rows[0].status == "ok"


@pytest.mark.parametrize(("seconds", "words"), [(31, "31 seconds"), (600, "10 minutes"), (3 * 3600, "3 hours"), (9 * 86400, "9 days")])
def test_long_times_in_words(seconds, words):
    assert _compare._long(seconds) == words


# --- random functions -----------------------------------------------------------------------------------------------------


def test_random_functions_need_a_policy_and_leave_the_random_state():
    model, x = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2)), torch.randn(6, 3)
    with pytest.raises(pt.RandomnessError):
        pt.compare(model, x)
    state = torch.get_rng_state()
    found = pt.compare(model, x, randomness="model", methods=["grad", "backward", "loop"], repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(row.status, row.error) for row in found.rows] == [("ok", 0.0), ("ok", 0.0), ("refused", None)]
    assert "from the same random state" in found.reference


def test_different_masks_have_no_reference():
    model, x = nn.Sequential(nn.Linear(3, 8), nn.Dropout()), torch.randn(6, 3)
    found = pt.compare(model, x, randomness="different", methods=["vmap"], repeats=1)
    assert (found.rows[0].status, found.rows[0].error) == ("ok", None)
    assert found.reference.startswith("none")


# --- what is written ------------------------------------------------------------------------------------------------------


def test_json(found):
    told = json.loads(found.to_json())
    assert told == json.loads(json.dumps(found.to_dict()))
    assert told["fastest"] == found.fastest
    assert told["machine"]["torch"] == torch.__version__
    assert [row["method"] for row in told["rows"]] == NAMES
    assert {"median", "iqr", "min", "runs", "error", "memory", "relative", "seconds"} <= set(told["rows"][0])


def test_json_has_no_infinity(found):
    infinite = replace(found, rows=(replace(found.rows[0], error=float("inf")),))
    assert json.loads(infinite.to_json())["rows"][0]["error"] == "inf"


def test_markdown(found):
    refused = replace(found, rows=(*found.rows[:2], _compare.Row("loop", "refused", "a | b")))
    lines = refused.to_markdown().splitlines()
    table = [text for text in lines if text.startswith("|")]
    assert len(table) == 5
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == list(COLUMNS)
    assert len({text.replace("\\|", "").count("|") for text in table}) == 1
    assert "refused: a \\| b" in table[-1]


def test_plot(found, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "times.png"
    figure = replace(found, rows=(*found.rows, _compare.Row("other", "refused", "because " * 40))).plot(path)
    assert path.stat().st_size > 5000
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [row.method for row in found.measured[::-1]]
    assert "other refused: because" in figure._supxlabel.get_text()


def test_plot_of_nothing(found, tmp_path):
    pytest.importorskip("matplotlib")
    replace(found, rows=()).plot(tmp_path / "nothing.svg")
    assert (tmp_path / "nothing.svg").exists()


def test_plot_without_matplotlib_says_what_to_install(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'partials\[plot\]'"):
        found.plot()


# --- memory and machine ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_memory_is_the_growth_at_its_highest():
    cpu = torch.device("cpu")
    if _machine._reset(cpu) is None:
        pytest.skip("this system does not let a process reset its high-water mark")

    def peak():
        return len([torch.ones(8 * 2**20)]) + torch.ones(2 * 2**20).numel()

    measured = [_machine.measured(peak, cpu)[2] for _ in range(3)]
    assert all(31 * 2**20 <= growth <= 48 * 2**20 for growth in measured), measured


def test_memory_that_cannot_be_measured_is_a_dash(arguments, monkeypatch):
    monkeypatch.setattr(_machine, "_reset", lambda device: None)
    found = pt.compare(line, *arguments, methods=["loop"], repeats=1)
    assert found.rows[0].memory is None
    assert str(found).splitlines()[2].endswith(" -")


def test_the_machine_in_one_line():
    machine = _machine.describe(torch.device("cpu"))
    assert machine["threads"] == torch.get_num_threads()
    sentence = _machine.sentence(machine | {"gpu": "a card"})
    assert sentence.startswith("a card, ")
    assert "\n" not in sentence


# --- the reference --------------------------------------------------------------------------------------------------------


def problem_of(f, *inputs, **options):
    return _problem(f, inputs, options)


def test_the_reference_is_float64_and_the_users_module_is_not_touched():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).eval(), torch.randn(5, 3)
    before = {name: (tensor, tensor.dtype) for name, tensor in model.state_dict(keep_vars=True).items()}
    problem = problem_of(model, x)
    trusted = _reference.reference(problem, look(problem))
    assert {rows.dtype for rows in trusted.rows.values()} == {torch.float64}
    assert 0 < trusted.worst_error(_reference.dense_rows(problem, "loop")) < 1e-6
    assert all(model.state_dict(keep_vars=True)[name] is tensor and tensor.dtype is dtype for name, (tensor, dtype) in before.items())


def test_float64_reaches_parameters_from_outside():
    net, scale = nn.Linear(3, 2), torch.randn(2, requires_grad=True)
    problem = problem_of(lambda x: scale * net(x), torch.randn(4, 3), params={"w": net.weight, "b": net.bias, "s": scale})
    double = _reference.doubled(problem)
    assert double.values().dtype is torch.float64
    assert torch.allclose(double.values().float(), problem.values())


def test_a_function_that_does_not_run_in_float64_keeps_its_dtype():
    net = nn.Linear(3, 2)
    problem = problem_of(lambda x: net(x.float()), torch.randn(4, 3), params=net)
    assert "does not run in float64 (RuntimeError" in _reference.reference(problem, look(problem)).words
    problem = problem_of(lambda x, a: (a * x).float(), torch.randn(4, 1), torch.randn(1, requires_grad=True))
    assert "its output stays float32" in _reference.reference(problem, look(problem)).words


def test_many_samples_are_compared_in_part(monkeypatch):
    monkeypatch.setattr(_reference, "ROOM", 8 * 8 * 3)  # three rows of eight entries
    found = pt.compare(nn.Linear(7, 1), torch.randn(9, 7), methods=["vmap"], repeats=1)
    assert "on 3 of 9 samples" in found.reference
    assert found.rows[0].error < 1e-6


def test_a_part_of_the_samples_along_any_dimension():
    x, shift = torch.randn(3, 6), torch.randn(3)
    problem = problem_of(
        lambda x, shift, w: w @ (x.T + shift).T, x, shift, torch.randn(3, 3, requires_grad=True), in_dims={"x": 1, "shift": None}
    )
    problem = replace(problem, function=lambda x, shift, w: (x.T + shift) @ w)
    few = _reference.part(problem, torch.tensor([4, 1]))
    assert few.size == 2
    assert torch.allclose(few.values(), problem.values()[[4, 1]])


def test_equal_infinities_agree_and_others_do_not():
    rows = torch.tensor([[[torch.nan, 1.0]], [[torch.inf, 2.0]], [[0.0, 0.0]]])
    trusted = _reference.Reference("", {"p": rows.double()})
    assert trusted.worst_error({"p": rows}) == 0
    assert trusted.worst_error({"p": rows.nan_to_num(3.0)}) == torch.inf
    assert trusted.worst_error({"p": rows + torch.tensor([0.0, 1.0])}) == torch.inf, "a row that is zero in the reference only"
