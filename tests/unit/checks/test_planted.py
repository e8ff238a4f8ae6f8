"""Planted errors are found by the quick check, each where it is, in every parameter and dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import partials as pt
from partials._blocks import Dense
from partials.methods import METHODS
from tests.unit.checks.planted import (
    MIXING,
    PARAMETERS,
    ROWS,
    WrongProduct,
    WrongTranspose,
    correct,
    dropped_use,
    mixing,
    one_entry,
    planted,
    problem,
    swapped_samples,
    table,
    transposed,
    wrong_operation,
    wrong_row,
    wrong_values,
)

DTYPES = {"float32": torch.float32, "float64": torch.float64}

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@each_dtype
@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("error", ROWS.values(), ids=[error.__name__ for error in ROWS.values()])
def test_wrong_rows_are_found(error, name, dtype):
    J = planted(correct(dtype), name, error)
    if J is None:
        pytest.skip("changes nothing in this parameter")
    report = J.check()
    assert not report.passed
    assert {row.parameter for row in report.failures} == {name}
    with pytest.raises(pt.CheckError, match=name) as raised:
        report.raise_if_failed()
    assert raised.value.report is report


@each_dtype
def test_the_unaltered_jacobian_passes(dtype):
    report = correct(dtype).check()
    assert report.passed and report.raise_if_failed() is report
    assert {row.verdict for row in report.rows} == {"passed"}


@each_dtype
@pytest.mark.parametrize(("error", "sample", "output"), [(one_entry, 3, 1), (wrong_row, 6, 0)])
@pytest.mark.parametrize("name", ["weight", "head.weight", "head.bias"])
def test_the_place_is_found(name, error, sample, output, dtype):
    report = planted(correct(dtype), name, error).check()
    row = next(row for row in report.failures if row.check == "backward")
    assert (row.where.sample, row.where.output) == (sample, (output,))
    shape = dict(problem(dtype)[0].named_parameters())[name].shape
    assert error is wrong_row or row.where.entry == tuple(n - 1 for n in shape)
    with pytest.raises(pt.CheckError, match=rf"'backward' in '{name}' at sample {sample}, output \[{output}\]"):
        replace(report, rows=[row]).raise_if_failed()
    assert f"sample {sample}" in str(report)


@each_dtype
def test_swapped_samples_are_placed_at_one_of_them(dtype):
    rows = planted(correct(dtype), "weight", swapped_samples).check().failures
    assert next(row for row in rows if row.check == "backward").where.sample in (2, 5)


@each_dtype
@pytest.mark.parametrize("use", [0, 1])
def test_a_dropped_use_is_found(use, dtype):
    report = dropped_use(correct(dtype), dtype, use=use).check()
    assert {row.parameter for row in report.failures} == {"weight"}


@each_dtype
def test_a_block_of_another_shape_is_found(dtype):
    report = planted(correct(dtype), "head.weight", transposed).check()
    assert [(row.check, row.parameter) for row in report.failures] == [("shape", "head.weight")]
    assert "(5, 3), expected" in report.failures[0].remark


def test_a_missing_parameter_is_found():
    J = correct()
    blocks = {name: group for name, group in J.blocks.items() if name != "scale"}
    assert [row.parameter for row in replace(J, blocks=blocks).check().failures] == ["scale"]


@each_dtype
def test_wrong_values_are_found(dtype):
    report = wrong_values(correct(dtype)).check()
    assert [(row.check, row.where.sample, row.where.output) for row in report.failures] == [("values", 3, (1,))]


def test_values_of_another_shape_are_found():
    J = correct()
    assert [row.check for row in replace(J, values=J.values[:, :2]).check().failures if row.parameter == "values"] == ["values"]


@pytest.mark.parametrize(("kind", "check"), [(WrongProduct, "product"), (WrongTranspose, "backward")])
def test_a_wrong_operation_of_a_block_is_found(kind, check):
    assert check in {row.check for row in wrong_operation(correct(), kind).check().failures}


# --- errors inside a method --------------------------------------------------------------------------------------


@pytest.fixture(params=["vmap", "loop", "grad"])
def broken(request, monkeypatch):
    """A method whose rows of one parameter are 0.1 % too large; its name."""
    method = METHODS[request.param]

    def run(problem, facts, chunk):
        computed = method.run(problem, facts, chunk)
        computed.blocks["head.weight"] = (Dense(computed.blocks["head.weight"][0].dense() * 1.001),)
        return computed

    monkeypatch.setitem(METHODS, request.param, replace(method, run=run))
    return request.param


@each_dtype
@pytest.mark.parametrize("policy", ["first", "always"])
def test_a_broken_method_is_found(broken, policy, dtype):
    net, x = problem(dtype)
    for _ in range(2):  # a failure is never remembered as a success
        with pytest.raises(pt.CheckError, match=rf"by '{broken}' failed the check .* in 'head.weight' at sample \d") as raised:
            pt.jacobian(net, x, method=broken, check=policy)
    assert not raised.value.report.passed
    assert pt.jacobian(net, x, method=broken, check="never").shape == (8, 3, 44)


def test_a_broken_method_is_found_by_every_level(broken):
    net, x = problem()
    for level in ("quick", "full", "deep"):
        report = pt.check(net, x, method=broken, level=level)
        assert {row.parameter for row in report.failures} == {"head.weight"}
    full = pt.check(net, x, method="jacobian", level="full")  # one that is not chosen is seen there, too
    assert {row.check for row in full.failures} == {f"method {broken}"} | ({"loop"} if broken == "loop" else set()) or broken == "loop"


# --- functions that mix ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("method", ["auto", "grad", "backward", "jacobian"])
def test_mixing_is_refused(name, method):
    f, inputs = mixing(name)
    with pytest.raises(pt.MixingError, match="mixes samples"):
        pt.jacobian(f, *inputs, method=method)


# --- the table of the docs ---------------------------------------------------------------------------------------


def test_the_table_in_the_docs_names_what_a_run_finds():
    """Every planted error has its line (a run asserts that each is found in every seed); counts vary with the machine's rounding."""
    text = (Path(__file__).parents[3] / "docs" / "checks.md").read_text(encoding="utf-8")
    missing = [line for line in table().splitlines()[2:] if line.split(" | ")[0] not in text]
    assert not missing
