"""Every module of torch's database and what it lacks: exact, or refused for a reason in the list. By default a share, all if slow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import partials as pt
from tests.coverage import extra, judge, modules, page, survey

NAMES = Path(__file__).with_name("modules.txt")
KNOWN = NAMES.read_text().split()
"""The names in the database when this was last looked at."""

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about its database


@pytest.fixture(scope="module")
def database():
    """The modules by name. Private to torch: skipped where it cannot be imported."""
    pytest.importorskip("expecttest", reason="torch's database of modules needs expecttest")
    try:
        return {info.name: info for info in modules.database()}
    except ImportError as error:
        pytest.skip(f"this torch has no database of modules where it was ({error})")


def test_the_database_has_not_shrunk(database):
    assert set(KNOWN) <= set(database)


def check(line: survey.Line):
    assert not line.faults, "\n".join(line.faults)
    assert line.cases
    said, worst = page.read()[line.module]
    on_page = set(said.split(", "))
    found = line.how or {"refused"}
    assert found <= on_page, f"done by {found}, on the page {said}: python -m tests.coverage.page"
    assert line.worst <= max(100 * worst, 1e-14)


@pytest.mark.parametrize("name", KNOWN)
def test_a_share_of_the_module_is_exact_or_rightly_refused(database, name):
    check(survey.of_database(database[name], whole=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_all_of_the_module_is_exact_or_rightly_refused(database, name):
    line = survey.of_database(database[name], whole=True)
    check(line)
    assert line.said() == page.read()[name][0], "python -m tests.coverage.page"


@pytest.mark.parametrize("name", extra.EXTRA)
def test_what_the_database_lacks(name):
    line = survey.of_extra(name)
    check(line)
    assert line.said() == page.read()[name][0], "python -m tests.coverage.page"


def test_the_page_has_every_module_and_rules_for_most_that_have_parameters():
    rows = page.read()
    assert set(rows) == {*KNOWN, *extra.EXTRA}
    text = page.PAGE.read_text()
    with_parameters = text.split("## Modules with parameters")[1].split("## Modules without")[0]
    hows = [row.split("|")[2].strip() for row in with_parameters.splitlines() if row.startswith(("| nn.", "| containers"))]
    assert sum(how == "rule" for how in hows) >= 0.85 * len(hows) > 30
    assert all(worst <= judge.EXACT for _, worst in rows.values())


def test_ctc_loss_with_the_targets_one_after_the_other():
    """No dimension of them holds samples: refused as an input that has some, exact as one that all share."""
    torch.manual_seed(0)
    n, steps, lengths = 4, 6, torch.tensor([2, 3, 1, 3])
    targets, model = torch.randint(1, 5, (int(lengths.sum()),)), torch.nn.Linear(3, 5).double()
    x = torch.randn(n, steps, 3, dtype=torch.float64)
    padded = torch.nn.utils.rnn.pad_sequence(targets.split(lengths.tolist()), batch_first=True)

    def loss(x, targets, lengths):
        given = torch.full((len(x),), steps)
        return torch.nn.functional.ctc_loss(model(x).log_softmax(-1).transpose(0, 1), targets, given, lengths, reduction="none")

    with pytest.raises(pt.InputError, match="targets"):
        pt.jacobian(loss, x, targets, lengths, params=model)
    J = pt.jacobian(loss, x, targets, lengths, params=model, in_dims={"targets": None, "lengths": None}, check="always")
    expected = pt.jacobian(loss, x, padded, lengths, params=model, method="loop")
    torch.testing.assert_close(J.dense(), expected.dense(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", [*extra.RANDOM, torch.nn.FractionalMaxPool2d])
def test_random_modules_ask_for_a_policy(kind):
    random = kind(2, output_size=2) if kind is torch.nn.FractionalMaxPool2d else kind()
    module = torch.nn.Sequential(torch.nn.PReLU(), random)
    with pytest.raises(pt.RandomnessError, match="draws random numbers"):
        pt.jacobian(module, torch.randn(3, 2, 4) if kind is torch.nn.Dropout1d else torch.randn(3, 2, 4, 4))


# --- the run is alive -----------------------------------------------------------------------------------------------


def planted(rows):
    return {name: part * (1 + 1e-9) for name, part in rows.items()}


def swapped(rows):
    return {name: part.flip(0) for name, part in rows.items()}


@pytest.mark.parametrize("error", [planted, swapped])
def test_a_planted_error_is_found(database, monkeypatch, error):
    true = judge.expected
    monkeypatch.setattr(judge, "expected", lambda call: (lambda values, rows: (values, error(rows)))(*true(call)))
    assert any("WRONG" in fault for fault in survey.of_database(database["nn.Linear"], whole=False).faults)


def test_a_new_refusal_and_one_that_fell_are_found(database, monkeypatch):
    monkeypatch.setattr(survey, "reason_of", lambda *_: None)
    assert any("not in the list" in fault for fault in survey.of_database(database["nn.BatchNorm1d"], whole=False).faults)
    reason = survey.Reason("none", "MixingError: ", lambda *_: True)
    monkeypatch.setattr(survey, "reason_of", lambda *_: reason)
    assert any("exact, though" in fault for fault in survey.of_database(database["nn.Linear"], whole=False).faults)
