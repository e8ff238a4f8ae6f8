"""Layouts are measured once for a function and remembered, unless data decide where samples go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import partials as pt
from partials.capture import engine


@pytest.fixture
def measured(monkeypatch):
    """The measurements, as they happen."""
    found, measure = [], engine._measure

    def counted(*args, **kwargs):
        found.append(args)
        return measure(*args, **kwargs)

    monkeypatch.setattr(engine, "_measure", counted)
    return found


def test_a_transformer_with_a_padding_mask_is_measured_once(measured):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask).logits.logsumexp(-1).mul(mask).sum(1)

    scores = Scores()
    for lengths in ([7, 5, 3, 6], [7, 5, 3, 6], [2, 7, 4, 1]):
        mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
        J = pt.jacobian(scores, torch.randint(50, (4, 7)), mask)
        assert J.plan.method == "capture"
    assert len(measured) == 1


def test_samples_sorted_by_data_are_measured_each_time(measured):
    linear = nn.Linear(3, 2).double()

    def f(x):
        order = x[:, 0].argsort()
        back = nn.functional.one_hot(order, len(x)).to(x.dtype)  # (a permutation that no indexing shows)
        return back.T @ linear(x[order]).tanh()

    for _ in range(3):
        x = torch.randn(5, 3, dtype=torch.float64)
        J, R = (pt.jacobian(f, x, params=linear, method=method) for method in ("capture", "loop"))
        torch.testing.assert_close(J.dense(), R.dense())
    assert len(measured) >= 3


class Last(nn.Module):
    """The last state of a recurrence."""

    def __init__(self, kind):
        super().__init__()
        self.inner = kind(4, 8, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0][:, -1].sum(1)


class Masked(nn.Module):
    """Attention by hand, with a mask of ones."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, x):
        scores = self.q(x) @ self.k(x).mT
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
        return (scores.softmax(-1) @ x).sum((1, 2))


@pytest.mark.parametrize("made", [lambda: Last(nn.LSTM), lambda: Last(nn.GRU), lambda: Last(nn.RNN), Masked])
def test_constants_that_are_made_in_every_call_place_no_samples(measured, made):
    """Sizes are multiples of N, so that they could."""
    net = made().double()
    for _ in range(3):
        x = torch.randn(4, 8, 4, dtype=torch.float64)
        J, R = (pt.jacobian(net, x, method=method, check="never") for method in ("capture", "loop"))
        torch.testing.assert_close(J.dense(), R.dense(), rtol=1e-10, atol=1e-12)
    assert len(measured) == 1


def _set(matrix, order):
    matrix[torch.arange(len(order)), order] = 1


def _set_data(matrix, order):
    matrix.data[torch.arange(len(order)), order] = 1


def _set_numpy(matrix, order):
    matrix.numpy()[range(len(order)), order] = 1


def _scatter(matrix, order):
    torch.scatter(matrix, 1, order[:, None], 1.0, out=matrix)


@pytest.mark.parametrize("write", [_set, _set_data, _set_numpy, _scatter])
def test_zeros_that_were_written_to_are_no_zeros(write):
    """A permutation matrix that f makes from zeros: the samples lie in another order in every call."""
    linear, orders = nn.Linear(3, 2).double(), [torch.tensor(order) for order in ([0, 1, 2, 3], [1, 2, 3, 0], [3, 2, 1, 0])]

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            matrix = torch.zeros(4, 4, dtype=x.dtype)
            write(matrix, self.order)
            return matrix.T @ self.linear(matrix @ x).tanh()

    net = Turned()
    for order in orders:
        net.order, x = order, torch.randn(4, 3, dtype=torch.float64)
        J = pt.jacobian(net, x, method="capture", check="never")
        torch.testing.assert_close(J.dense(), pt.jacobian(lambda x: linear(x).tanh(), x, params=net, method="loop").dense())
