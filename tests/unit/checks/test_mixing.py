"""What is mixing and what is not: errors that say which samples and why, and no false alarms."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt

METHODS = ["auto", "grad", "vmap"]
a = torch.randn(3, requires_grad=True)


def test_the_message_names_the_samples():
    def f(x, a):
        return a * (x + 0.5 * x[2] * (torch.arange(len(x)) == 4)[:, None])

    with pytest.raises(pt.MixingError, match="the output of sample 4 depends on input 'x' of sample 2") as raised:
        pt.check(f, torch.randn(6, 3), a, method="grad")
    assert "derivative across samples" in raised.value.got
    assert "batched=False" in raised.value.hint


@pytest.mark.parametrize(("samples", "pair"), [(40, (17, 33)), (400, (0, 399))])
def test_one_pair_among_many_is_found(samples, pair):
    def f(x, a):
        return a * (x + 1e-3 * x[pair[0]] * (torch.arange(len(x)) == pair[1])[:, None])

    with pytest.raises(pt.MixingError, match=f"sample {pair[1]} depends on input 'x' of sample {pair[0]}"):
        pt.check(f, torch.randn(samples, 3), a, method="grad")


def test_batch_norm_is_named():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(pt.MixingError, match=re.escape("batch statistics in 1 (BatchNorm1d)")) as raised:
        pt.jacobian(net, torch.randn(5, 3), method="grad")
    assert "module.eval()" in raised.value.hint
    assert pt.check(net.eval(), torch.randn(5, 3)).passed


def test_batch_norm_without_running_statistics_is_named_in_eval_too():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(pt.MixingError, match="BatchNorm1d"):
        pt.jacobian(net, torch.randn(5, 3), method="grad")


@pytest.mark.parametrize("method", METHODS)
def test_detached_statistics_are_seen_by_values(method):
    with pytest.raises(pt.MixingError, match="has another value alone than in the batch") as raised:
        pt.check(lambda x, a: a * (x - x.mean(0).detach()), torch.randn(6, 3), a, method=method)
    assert "% apart" in raised.value.got


class Tokens(nn.Module):
    def __init__(self, then, first=None):
        super().__init__()
        self.table, self.then, self.first = nn.Embedding(9, 3), then, first or (lambda tokens: tokens)

    def forward(self, tokens):
        return self.then(self.table(self.first(tokens)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "f",
    [
        Tokens(lambda h: (h - h.mean(0)).sum(1)),
        Tokens(lambda h: h.sum(1).softmax(0)),
        Tokens(lambda h: (h - h.mean((0, 1))).flatten(1), lambda tokens: tokens + 1),
    ],
    ids=["centred", "softmax", "shifted first"],
)
def test_integer_inputs_are_read_behind_the_embedding(f, method):
    with pytest.raises(pt.MixingError, match=r"depends on input 'tokens' \(read behind nn.functional.embedding\)"):
        pt.jacobian(f, torch.randint(8, (6, 4)), method=method)


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.float(),
        lambda x: F.one_hot(x, 9).to(torch.float32).flatten(1),
        lambda x: x / 255,
        lambda x: torch.zeros(len(x), 9).scatter_(1, x, 1.0),
    ],
    ids=["float", "one_hot", "division", "scatter_"],
)
def test_integer_inputs_are_read_behind_a_cast(cast):
    x = torch.randint(9, (6, 2))
    w = torch.randn(cast(x).shape[1], 3, requires_grad=True)
    assert pt.check(lambda x, w: cast(x) @ w, x, w, method="grad").worst("independence").passed
    with pytest.raises(pt.MixingError, match="input 'x'"):
        pt.check(lambda x, w: (cast(x) @ w).softmax(0), x, w, method="grad")


def test_in_place_arithmetic_on_a_cast_is_allowed():
    def f(x, w):
        x = x.float()
        x -= 4
        x /= 3
        return x @ w

    report = pt.check(f, torch.randint(9, (6, 2)), torch.randn(2, 3, requires_grad=True), method="grad")
    assert report.passed and report.worst("independence") is not None


def test_in_place_arithmetic_on_an_input_is_allowed():
    x = torch.randn(6, 3)
    kept = x.clone()

    def f(x, a):
        x = x.clone() if x.is_leaf else x
        x[:, 0] = 0
        return a * x

    assert pt.check(f, x, a, method="grad").passed
    assert torch.equal(x, kept)


# --- no false alarms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [6, 4])
def test_time_first_inside_is_no_mixing(length):
    """Six samples and six steps: which dimension of the embedding holds the samples is found, not guessed."""
    f = Tokens(lambda h: h.tanh().sum(0), lambda tokens: tokens.T)
    assert pt.check(f, torch.randint(8, (6, length))).passed


def test_folded_samples_are_no_mixing():
    f = Tokens(lambda h: h.tanh().unflatten(0, (6, -1)).sum(1), lambda tokens: tokens.flatten())
    assert pt.check(f, torch.randint(8, (6, 4)), method="grad").worst("independence").error < 1e-5


def test_a_shift_that_cancels_is_no_mixing():
    """The maximum of the whole batch, for the stability of exp: it reaches every sample, and changes none."""

    def f(x, a):
        m = x.max()
        return a * ((x - m).exp().sum(-1, keepdim=True).log() + m)

    for seed in range(20):
        torch.manual_seed(seed)
        assert pt.check(f, torch.randn(6, 3), a, method="grad").passed


def test_samples_along_another_dimension():
    def f(x, a):
        return (a[:, None] * x).sum(0)[:, None]

    assert pt.check(f, torch.randn(3, 5), a, in_dims={"x": 1}).passed
    with pytest.raises(pt.MixingError):
        pt.check(lambda x, a: f(x.softmax(1), a), torch.randn(3, 5), a, in_dims={"x": 1}, method="grad")


def test_shared_inputs_are_not_read():
    table = torch.randn(4, 3)
    report = pt.check(lambda x, t, a: a * (x + t.sum(0)), torch.randn(4, 3), table, a, in_dims=(0, None, None))
    assert report.passed and [row.parameter for row in report.rows if row.check == "independence"] == ["x"]


def test_a_batch_of_one_may_be_refused():
    class Two(nn.Linear):
        def forward(self, x):
            if len(x) < 2:
                raise ValueError("at least two, please")
            return super().forward(x).tanh()

    report = pt.check(Two(3, 2), torch.randn(6, 3), method="grad")
    assert report.passed and report.worst("alone") is not None
    assert "f refuses a batch of 1 (ValueError: at least two, please)" in report.notes
    with pytest.raises(pt.MixingError):
        pt.check(lambda x, a: F.batch_norm(x, None, None, training=True) * a, torch.randn(6, 3), a, method="grad")


def test_a_function_that_does_not_run_on_inputs_that_require_grad():
    def f(x, a):
        return a * torch.as_tensor(x.numpy())

    report = pt.check(f, torch.randn(6, 3), a, method="grad")
    assert report.passed and any("independence could not be read" in note for note in report.notes)


def test_a_function_without_derivatives_by_its_inputs():
    report = pt.check(lambda x, a: a * x.detach(), torch.randn(6, 3), a, method="grad")
    assert report.passed and any("no derivative by its inputs" in note for note in report.notes)
    with pytest.raises(pt.MixingError):
        pt.check(lambda x, a: a * (x - x.mean(0)).detach(), torch.randn(6, 3), a, method="grad")


@pytest.mark.parametrize("seed", range(10))
def test_a_branch_on_the_whole_batch_that_few_samples_notice(seed):
    """How often a layer is applied depends on the norm of the batch: two random samples alone may say nothing, all of them do."""
    torch.manual_seed(seed)
    layer, x = torch.nn.Linear(4, 4), torch.randn(5, 4)
    x[3] *= 0.01

    def f(x):
        h, steps = x, 0
        while float(h.detach().norm()) > 0.3 and steps < 3:
            h, steps = torch.tanh(layer(h)), steps + 1
        return h

    with pytest.raises(pt.MixingError, match="another value alone than in the batch"):
        pt.jacobian(f, x, params=layer, check="always")
