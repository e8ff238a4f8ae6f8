"""No false alarm: healthy networks pass at every level, whatever the seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import partials as pt
from partials.checks.tolerance import WORST
from tests.unit.checks.nets import HEALTHY, healthy

METHODS = ["auto", "vmap"]
ORDINARY = ["mlp_tanh", "mlp_relu", "cnn", "transformer", "embedding"]
"""Where nothing cancels, apart from the bias of the transformer's keys."""


def checked(name, seed, method, dtype=torch.float32):
    """The report of one healthy network; None where the method refuses it."""
    net, inputs = healthy(name, seed, dtype)
    try:
        J = pt.jacobian(net, *inputs, method=method, check="never")
    except pt.MethodError:
        return None
    return J.check()


def worst_of(name, seeds, method, dtype=torch.float32):
    """The worst error by check, in eps, of the rows that passed by their numbers; fails at the first row that did not pass."""
    worst = {}
    for seed in seeds:
        report = checked(name, seed, method, dtype)
        if report is None:
            return {}
        assert report.passed, f"seed {seed}\n{report}"
        for row in report.rows:
            if row.verdict == "passed":
                worst[row.check] = max(worst.get(row.check, 0.0), row.error / row.eps)
    return worst


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HEALTHY)
def test_forty_seeds(name, method):
    seeds = range(40) if name not in ("transformer", "cancelling") else range(8)
    found = worst_of(name, seeds, method)
    if name in ORDINARY:
        assert all(found[check] <= WORST[check] for check in found), found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HEALTHY)
def test_seeds_in_turn(name, method, turn, request):
    count = request.config.getoption("--seeds")
    found = worst_of(name, range(turn * count, (turn + 1) * count), method)
    if name in ORDINARY:
        assert all(found[check] <= WORST[check] for check in found), found


@pytest.mark.parametrize("name", HEALTHY)
def test_float64(name):
    worst_of(name, range(5), "auto", torch.float64)


@pytest.mark.parametrize("level", ["full", "deep"])
@pytest.mark.parametrize("name", HEALTHY)
def test_every_level_passes(name, level):
    net, inputs = healthy(name, 3)
    if name in ("transformer", "cnn"):
        net.requires_grad_(False)
        for parameter in list(net.parameters())[-6:]:
            parameter.requires_grad_(True)
    report = pt.check(net, *(x[:6] for x in inputs), level=level)
    assert report.passed, report
    checks = {row.check.split()[0] for row in report.rows}
    assert checks >= {"independence", "values", "backward", "product", "alone", "loop", "method"}
    assert level == "full" or checks >= {"differences", "repeat", "permuted", "doubled"}


@pytest.mark.parametrize("level", ["quick", "full", "deep"])
def test_the_notebook(level):
    a, b = torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True)
    report = pt.check(lambda x, a, b: a * x + b, torch.randn(50, 1), a, b, level=level)
    assert report.passed and {row.verdict for row in report.rows} == {"passed"}


def test_differences_fall_by_four():
    net, inputs = healthy("mlp_tanh", 0, torch.float64)
    note = next(note for note in pt.check(net, *inputs, level="deep").notes if "fell by" in note)
    assert abs(float(note.split("fell by ")[1].split()[0]) - 4) < 0.1


def test_the_docs_show_the_worst():
    text = (Path(__file__).parents[3] / "docs" / "checks.md").read_text(encoding="utf-8")
    columns = ([f"`{name}`" for name in WORST], ["---:"] * len(WORST), [str(worst) for worst in WORST.values()])
    assert "\n".join(f"| {' | '.join(cells)} |" for cells in columns) in text
