"""The pages of `compare` and `check`: what stands in them, and what a real browser makes of them."""

from __future__ import annotations

import math
import pickle
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import partials as pt
from partials import _compare
from partials.checks.report import Report, Row, Where
from partials.html.chart import Dot, dots
from partials.html.page import page, picture
from tests import browser as browsers
from tests.unit.checks.planted import correct, one_entry, planted


class Named(nn.Module):
    """<script>alert(1)</script>"""

    def __init__(self):
        super().__init__()
        self.head = nn.ParameterDict({"<i>w&": nn.Parameter(torch.ones(3))})

    def forward(self, x):
        return x * self.head["<i>w&"]


@pytest.fixture
def compared():
    return pt.compare(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3), repeats=2)


@pytest.fixture
def failed():
    return planted(correct(), "head.weight", one_entry).check()


# --- what stands in them ---------------------------------------------------------------------------------------------------


def test_a_comparison_has_every_method_the_plan_and_the_machine(compared):
    rows = (*compared.rows[:-1], _compare.Row("loop", "refused", "a < b"))
    text = replace(compared, rows=rows).to_html()
    assert all(f"<td>{row.method}</td>" in text for row in rows)
    assert "refused: a &lt; b" in text and "The plan" in text and "F.linear" in text
    assert f"torch {torch.__version__}" in text and f"partials {pt._machine.describe(torch.device('cpu'))['partials']}" in text


def test_a_comparison_in_which_nothing_ran():
    row = _compare.Row("loop", "failed", "no")
    text = _compare.Comparison("f", 2, (), 3, "float32", (row,), "none", pt._machine.describe(torch.device("cpu"))).to_html()
    assert "no method could compute this" in text and "<img" not in text


def test_a_plan_that_would_be_refused_is_left_out():
    """Compare does what it can where a call would raise."""
    found = pt.compare(nn.Linear(3, 2), torch.randn(5, 3), methods="loop", max_memory=10, repeats=1)
    assert found.plan is None and "The plan" not in found.to_html()


def test_a_failed_report_says_where(failed):
    text = failed.to_html()
    assert "quick check FAILED" in text and "sample 3, output [1], entry [2, 4]" in text and "got " in text
    assert failed.plan is not None and failed.machine["torch"] == torch.__version__ == failed.to_dict()["machine"]["torch"]


def test_numbers_that_are_none():
    row = Row("backward", "w", math.inf, 1e-5, "", 1e-7, False, Where(0, (), (), math.nan, 1.0))
    assert "inf FAILED" in Report("f", "vmap", "quick", 1, (), "float32", 0, [row]).to_html()
    assert "quick check passed" in Report("f", "vmap", "quick", 0, (), "float32", 0).to_html()


def test_many_parameters_are_all_in_the_table_and_the_worst_in_the_picture():
    rows = [Row("backward", f"layer{n}.weight", n * 1e-8, 1e-5, "", 1e-7, True) for n in range(100)]
    text = Report("f", "vmap", "quick", 1, (), "float32", 0, rows).to_html()
    assert text.count("<td>layer") >= 100 and "the worst 40 of 100" in text


def test_names_are_text():
    text = pt.check(Named(), torch.randn(4, 3)).to_html()
    assert "<i>" not in text and "head.&lt;i&gt;w&amp;" in text


def test_a_report_travels_with_its_plan(failed):
    again = pickle.loads(pickle.dumps(failed))
    assert again.to_html() == failed.to_html()


def test_nothing_points_outside(compared, failed):
    for text in (compared.to_html(), failed.to_html()):
        assert "<script" not in text
        assert set(re.findall(r"(?:src|href)=\"(\w+:)", text)) == {"data:"} and "url(" not in text


def test_dots_on_an_axis():
    assert dots([Dot("a", 0.0, "0"), Dot("b", math.inf, "no number"), Dot("c", 3.0, "3")], "x", str, limit=1.0).count("<circle") == 3
    assert dots([Dot("a", 0.0, "0")], "x", str)


# --- in a browser ----------------------------------------------------------------------------------------------------------

NOT_SEEN = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 100 && i.naturalHeight > 50)).length"
CONTRAST = """(() => { const light = c => (([r, g, b]) => (0.3 * r + 0.6 * g + 0.1 * b) / 255)(c.match(/\\d+/g).map(Number));
  const s = getComputedStyle(document.body); return Math.abs(light(s.color) - light(s.backgroundColor)) })()"""


@pytest.fixture(scope="module")
def seen():
    command = browsers.found()
    if command is None:
        pytest.skip(browsers.MISSING)
    with browsers.browser(command) as shown:
        yield shown


def outside(seen):
    return [address for address in seen.requests if not address.startswith(("data:", "file:"))]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("which", ["compared", "failed"])
def test_a_page_in_a_browser(seen, tmp_path, request, which, dark):
    found = request.getfixturevalue(which)
    path = tmp_path / "page.html"
    path.write_text(found.to_html(), encoding="utf-8")
    seen.open(path, dark=dark)
    text = seen.value("document.body.innerText")
    assert seen.value("document.title") in text and "The plan" in text and f"torch {torch.__version__}" in text
    names = [row.method for row in found.rows] if which == "compared" else ["head.weight", "FAILED", "backward"]
    assert all(name in text for name in names)
    assert seen.value("document.images.length") >= 1 and seen.value(NOT_SEEN) == 0
    assert not outside(seen) and not seen.complaints and seen.requests[0] == path.as_uri()
    assert (
        seen.value(CONTRAST) > 0.6 and (seen.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") is not dark
    )
    assert len(seen.screenshot()) > 10_000


def test_a_page_on_a_narrow_screen(seen, tmp_path, compared):
    path = tmp_path / "page.html"
    path.write_text(compared.to_html(), encoding="utf-8")
    seen.open(path, width=420)
    assert seen.value("document.documentElement.scrollWidth") <= 420


def test_the_page_of_the_command_line(seen, tmp_path, monkeypatch):
    testing = pytest.importorskip("typer.testing")
    from partials.cli.app import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text("import torch\nnet, x = torch.nn.Linear(3, 2), torch.randn(5, 3)\n")
    for command, words in (("compare", ["--repeats", "1"]), ("check", [])):
        path = tmp_path / "pages" / f"{command}.html"
        done = testing.CliRunner().invoke(app, [command, "m.py:net", "--data", "m.py:x", "--html", str(path), *words])
        assert done.exit_code == 0 and f"page written to {path}" in done.stderr
        seen.open(path)
        assert "Linear" in seen.value("document.body.innerText") and seen.value(NOT_SEEN) == 0


def test_faults_are_noticed(seen, tmp_path):
    """The browser tells of a request to elsewhere, of a script that the policy stops, and of a picture that is none."""
    path = tmp_path / "page.html"
    path.write_text('<img src="http://localhost:9/x.png">')
    seen.open(path)
    assert outside(seen) and seen.complaints and seen.value(NOT_SEEN) == 1
    path.write_text(
        page("t", "v", True, ["<script>document.title = 'ran'</script>", '<img src="http://localhost:9/x.png">', picture("<svg", "")])
    )
    seen.open(path)
    assert seen.value("document.title") == "t" and seen.complaints and seen.value(NOT_SEEN) == 2
