"""The report: readable on one screen, data, and an error that says all that is needed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import partials as pt
from partials.checks.report import ABOUT, Report, Row, Where
from tests.unit.checks.planted import correct, one_entry, planted, too_large


@pytest.fixture
def failed():
    return planted(correct(), "head.weight", one_entry).check()


def test_a_passed_report_on_one_screen():
    text = str(pt.check(nn.Sequential(*(nn.Linear(3, 3) for _ in range(30))), torch.randn(5, 3), level="deep"))
    lines = text.splitlines()
    assert lines[0] == "Jacobian of Sequential by 'capture', 5 samples, 3 outputs, float32: deep check passed"
    assert len(lines) < 40 and all(len(line) < 200 for line in lines)


def test_a_failed_report_shows_where(failed):
    text = str(failed)
    assert "quick check FAILED" in text
    assert "backward, head.weight at sample 3, output [1], entry [2, 4]: sum u J against one ordinary backward" in text
    assert "got " in text and ", expected " in text and "error over its row" in text and "64 eps of float32" in text


def test_many_failures_are_counted_not_listed():
    J = correct()
    for name in J.names:
        J = planted(J, name, too_large)
    text = str(J.check())
    assert "more" in text and len(text.splitlines()) < 40


def test_the_error_names_check_parameter_sample_and_size(failed):
    with pytest.raises(pt.CheckError) as raised:
        failed.raise_if_failed()
    error = raised.value
    assert error.report is failed
    assert "the Jacobian of Twice by 'vmap' failed the check" in error.what and "'head.weight' at sample 3" in error.what
    assert "% of the row" in error.got and "eps" in error.got and "expected" in error.got
    assert "64 eps of float32: healthy networks stay within" in error.expected
    assert isinstance(error, RuntimeError)


def test_notes_travel_with_the_error(failed):
    failed.note("something to know")
    with pytest.raises(pt.CheckError) as raised:
        failed.raise_if_failed()
    assert raised.value.__notes__ == ["note: something to know"]


def test_json(failed):
    found = json.loads(json.dumps(failed.to_dict(), allow_nan=False))
    assert found["passed"] is False and found["method"] == "vmap" and found["samples"] == 8 and found["outputs"] == [3]
    row = next(row for row in found["rows"] if row["verdict"] == "FAILED" and row["check"] == "backward")
    assert row["parameter"] == "head.weight" and row["where"]["sample"] == 3 and row["where"]["entry"] == [2, 4]
    assert row["error"] > row["tolerance"] and row["reason"]


def test_numbers_that_json_lacks():
    row = Row("backward", "w", math.inf, 1e-5, "", 1e-7, False, Where(0, (), (), math.nan, 1.0))
    report = Report("f", "vmap", "quick", 1, (), "float32", 0, [row])
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["rows"][0]["error"] == "inf"
    assert "inf" in str(report)
    with pytest.raises(pt.CheckError, match="more than the whole of the row"):
        report.raise_if_failed()


def test_every_check_is_described():
    report = pt.check(nn.Linear(3, 2), torch.randn(4, 3), level="deep")
    assert {row.check.split()[0] for row in report.rows} <= set(ABOUT)


def test_a_report_repeats_with_its_seed(monkeypatch):
    from partials.checks import draws

    J = correct()
    first = J.check()
    monkeypatch.setattr(draws, "fresh_seed", lambda: first.seed)
    assert J.check().to_dict() == first.to_dict()
    assert "seed" in first.to_dict()
