"""Calls at the edges: no samples, one, very many; one sample without a batch; NaN; random numbers; inputs; graphs; other dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials._blocks import Dense

LEVELS = ["quick", "full", "deep"]


def net(*more):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *more, nn.Linear(5, 3))


def altered(J, name, change):
    rows = J.blocks[name][0].dense().detach().clone()
    change(rows)
    return replace(J, blocks={**J.blocks, name: (Dense(rows),)})


def double(rows):
    rows *= 2


# --- how many samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_no_samples(level):
    report = pt.check(net(), torch.randn(0, 4), level=level)
    assert report.passed and report.samples == 0 and report.notes == ["no samples: nothing to compare"]
    assert pt.jacobian(net(), torch.randn(0, 4), check="always").shape[0] == 0


@pytest.mark.parametrize("level", LEVELS)
def test_one_sample(level):
    report = pt.check(net(), torch.randn(1, 4), level=level)
    assert report.passed and "a single sample: independence of samples cannot be seen" in report.notes
    assert {row.check for row in report.rows} >= {"values", "backward", "product"}


@pytest.mark.parametrize("level", LEVELS)
def test_one_sample_without_a_batch(level):
    f, x = net(), torch.randn(4)
    report = pt.check(f, x, batched=False, level=level)
    assert report.passed and report.worst("independence") is None
    J = pt.jacobian(f, x, batched=False, method="vmap", check="never")
    assert [row.parameter for row in altered(J, "0.bias", double).check().failures] == ["0.bias"]
    assert pt.check(f, x, batched=False, wrt="input", level=level).passed


def test_very_many_samples():
    a, b = torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True)
    J = pt.jacobian(lambda x, a, b: a * x + b, torch.randn(100_000, 1), a, b, method="vmap", check="never")
    assert J.check().passed

    def one(rows):
        rows[70_001] *= 1.01

    report = altered(J, "a", one).check()
    row = next(row for row in report.failures if row.check == "backward")
    assert row.where.sample == 70_001 and row.where.expected is not None


def test_a_tolerance_for_a_sum_of_many_rows_says_so():
    a = torch.randn(1, requires_grad=True)
    row = pt.check(lambda x, a: a * x, torch.randn(1000, 1), a, method="vmap").worst("backward")
    assert row.reason == "126 eps of float32: 4 sqrt(1000), since a sum of 1000 rows rounds by about sqrt(1000 / 2)"


# --- what is not finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_nan_and_infinity_pass_through_and_are_noted(method):
    a = torch.tensor([2.0, 3.0], requires_grad=True)
    x = torch.randn(8, 2).abs()
    x[3, 0], x[5, 1] = torch.nan, torch.inf
    J = pt.jacobian(lambda x, a: a * x, x, a, method=method, check="always")
    assert J["a"][3].isnan().any() and J["a"][5].isinf().any()
    report = J.check()
    assert report.passed
    assert any("rows of 'a' are not finite, or too large to be squared, in sample 3, 5" in note for note in report.notes)
    assert any("values are not finite in sample 3, 5" in note for note in report.notes)

    def finite(rows):
        rows[7] *= 1.01

    def repaired(rows):
        rows.nan_to_num_(0.0, 0.0, 0.0)

    assert not altered(J, "a", finite).check().passed
    assert not altered(J, "a", repaired).check().passed


@pytest.mark.parametrize("options", [{}, {"batched": False}, {"randomness": "model"}], ids=["one", "unbatched", "random"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_all_odd_are_compared_one_by_one(bad, options):
    a, x = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([[1.0, bad]])
    x = x[0] if options.get("batched") is False else x
    J = pt.jacobian(lambda x, a: a * x, x, a, method="grad", check="always", wrt="a", **options)
    assert any("only the rows of sample 0 were compared" in note for note in J.check().notes)

    def other(rows):
        rows[0, 0, 0] = 5

    assert not altered(J, "a", other).check().passed


def test_a_nan_that_only_the_jacobian_has_is_found():
    J = pt.jacobian(net(), torch.randn(6, 4), method="vmap", check="never")

    def nan(rows):
        rows[2, 1] = torch.nan

    assert not altered(J, "0.weight", nan).check().passed
    values = J.values.clone()
    values[4, 0] = torch.inf
    assert [row.check for row in replace(J, values=values).check().failures] == ["values"]


def test_a_derivative_that_is_infinite():
    a = torch.zeros(2, requires_grad=True)
    report = pt.check(lambda x, a: (a * x).abs().sqrt(), torch.ones(4, 2), a)
    assert report.passed and any("not finite" in note for note in report.notes)


def test_all_rows_zero():
    a = torch.randn(3, requires_grad=True)
    report = pt.check(lambda x, a: 0 * a * x, torch.randn(4, 3), a)
    assert report.passed and report.zeros == ["a"] and report.vacuous


def test_an_unused_parameter():
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    J = pt.jacobian(lambda x, a, b: a * x, torch.randn(4, 3), a, b, method="vmap", check="never")
    assert J.check().passed and not J.check().vacuous

    def one(rows):
        rows[0, 0, 0] = 1e-6

    assert [row.parameter for row in altered(J, "b", one).check().failures][:1] == ["b"]


# --- random numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "grad", "backward"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_models_own_random_numbers_are_drawn_again(method, level):
    f, x = net(nn.Dropout(0.5)), torch.randn(6, 4)
    report = pt.check(f, x, randomness="model", method=method, level=level)
    assert report.passed, report
    assert any('randomness="model"' in note for note in report.notes)
    J = pt.jacobian(f, x, randomness="model", method=method, check="always")
    torch.randn(10)  # (the state at the time of the call is the one that counts)
    assert J.check(level).passed
    assert not altered(J, "2.bias" if "2.bias" in J.names else "0.bias", double).check().passed


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("level", LEVELS)
def test_other_random_numbers_are_not_compared(randomness, level):
    report = pt.check(net(nn.Dropout(0.5)), torch.randn(6, 4), randomness=randomness, level=level)
    assert report.passed and {row.check for row in report.rows} == {"independence"}
    assert any(f'randomness="{randomness}": the numbers are not those of an ordinary call' in note for note in report.notes)


def test_mixing_is_seen_under_random_numbers_too():
    with pytest.raises(pt.MixingError):
        pt.check(lambda x, a: F.dropout(a * x, 0.5).softmax(0), torch.randn(6, 4), torch.randn(4, requires_grad=True), randomness="same")


# --- inputs, graphs, other tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dim", [0, 1])
def test_input_jacobians(level, dim):
    w = torch.randn(4, 3)

    def f(x, w):
        return (x if dim == 0 else x.T).matmul(w).tanh()

    x = torch.randn(6, 4) if dim == 0 else torch.randn(4, 6)
    J = pt.jacobian(f, x, w, wrt="x", in_dims={"x": dim, "w": None}, method="vmap", check="always")
    assert J.check(level).passed

    def one(rows):
        rows[4, 1] *= 1.1

    report = altered(J, "x", one).check()
    assert {(row.parameter, row.where.sample) for row in report.failures} == {("x", 4)}
    assert next(row for row in report.failures if row.check == "backward").where.output == (1,)


def test_inputs_beside_parameters():
    J = pt.jacobian(net(), torch.randn(6, 4), wrt=("input", "0.*"), check="always")
    report = J.check()
    assert report.passed and {row.parameter for row in report.rows if row.check == "backward"} == {"input", "0.weight", "0.bias"}


@pytest.mark.parametrize("level", LEVELS)
def test_jacobians_with_a_graph(level):
    f, x = net(), torch.randn(6, 4)
    J = pt.jacobian(f, x, create_graph=True, check="always")
    report = J.check(level)
    assert report.passed and J.dense().requires_grad
    assert not altered(J, "0.bias", double).check().passed


def test_gradients_of_a_loss():
    f, x, y = net(), torch.randn(6, 4), torch.randint(3, (6,))
    for level in LEVELS:
        assert pt.check(f, x, y, loss=F.cross_entropy, level=level).passed
    G = pt.gradient(f, x, y, loss=F.cross_entropy, method="vmap", check="never")
    assert not altered(G, "0.bias", double).check().passed


def test_frozen_tensors_named_by_wrt():
    f = net().requires_grad_(False)
    assert pt.check(f, torch.randn(6, 4), wrt="0.*", level="full").passed


def test_tensors_from_outside():
    w, b = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    for level in LEVELS:
        assert pt.check(lambda x: (x @ w + b).tanh(), torch.randn(6, 4), params={"w": w, "b": b}, level=level).passed


def test_a_function_that_stays_in_its_own_dtype():
    def f(x, w):
        return (x.to(torch.float32) @ w.to(torch.float32)).tanh()

    report = pt.check(f, torch.randn(6, 4), torch.randn(4, 3, requires_grad=True), level="deep")
    assert report.passed
    assert any("does not run in float64" in note for note in report.notes)
    assert any("central differences need float64" in note for note in report.notes)


def test_kinks_are_told_from_bugs_by_differences():
    """|a x| at a = 0: central differences give the mean of the two slopes, whatever the step."""
    a = torch.zeros(3, requires_grad=True)
    report = pt.check(lambda x, a: (a * x).abs(), torch.randn(5, 3), a, level="deep")
    row = report.worst("differences")
    assert report.passed and row.passed
    x, a = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64, requires_grad=True)
    wrong = pt.check(Bent.apply, x, a, level="deep", method="grad")
    assert {row.check for row in wrong.failures} == {"differences"}
    assert "a derivative inside f" in wrong.failures[0].remark


@pytest.mark.parametrize(
    ("f", "word"),
    [
        (lambda x, a: a * x + (a * x).sin().detach(), "Tensor.detach"),
        (lambda x, a: a * x * F.embedding(x[:, 0].long() * 0, a[None], padding_idx=0), "nn.functional.embedding with padding_idx"),
    ],
    ids=["detach", "padding_idx"],
)
def test_gradients_that_f_stops_are_not_held_against_it(f, word):
    report = pt.check(f, torch.randn(5, 3), torch.randn(3, requires_grad=True), level="deep")
    assert report.passed and f"not judged: f stops gradients ({word})" in report.worst("differences").remark


class Bent(torch.autograd.Function):
    """sin(a x) with a derivative that is 1e-4 too large: every reverse pass agrees, only differences see it."""

    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return torch.sin(a * x)

    @staticmethod
    def backward(ctx, g):
        x, a = ctx.saved_tensors
        slope = g * torch.cos(a * x) * 1.0001
        return slope * a, (slope * x).sum(0)


def test_a_stale_jacobian_is_refused():
    f, x = net(), torch.randn(6, 4)
    J = pt.jacobian(f, x, method="capture", check="never")
    if not J.origin.sources:
        pytest.skip("these factors read nothing again")
    with torch.no_grad():
        J.origin.sources[0][1].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        J.check()
