"""What the quick check leaves out, it still finds: norms of rows, rows of single samples, the first layer's inputs, rows of a table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import GradientEdge

import partials as pt
from partials._api import _problem
from partials._blocks import Dense
from partials._gather import Gather
from partials.checks.call import call, gradients_of
from partials.checks.cloud import belongs
from partials.checks.subject import Subject
from partials.checks.tables import looked_up
from partials.checks.tolerance import dot


def altered(J, name, change):
    rows = J.blocks[name][0].dense().clone()
    change(rows)
    return replace(J, blocks={**J.blocks, name: (Dense(rows),)})


# --- norms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_norms_of_all_rows_are_asked_for_only_where_a_sum_is_off(monkeypatch, scale):
    asked, squares = [], Subject.squares
    monkeypatch.setattr(Subject, "squares", lambda subject, name: asked.append(name) or squares(subject, name))
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)), torch.randn(70, 1, 6, 6)
    J = pt.jacobian(lambda x: scale * net(x), x, params=net, check="never")
    assert J.check().passed and "0.weight" not in asked

    def one(rows):
        rows[5, 1] *= 1.01

    assert {row.parameter for row in altered(J, "0.weight", one).check().failures} == {"0.weight"}
    assert "0.weight" in asked


def test_rows_that_overflow_when_they_are_squared_are_compared():
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    J = pt.jacobian(lambda x, a: a * x, 1e25 * torch.randn(6, 2), a, method="vmap", check="never")
    assert J.check().passed

    def one(rows):
        rows[3] *= 1.01

    assert {row.parameter for row in altered(J, "a", one).check().failures} == {"a"}


# --- products and rows of single samples -------------------------------------------------------------------------


@dataclass(frozen=True)
class WrongProduct(Dense):
    """J v forgets the last column."""

    def select(self, index):
        return WrongProduct(self.values[index])

    def matmul(self, v):
        flat = self.values.flatten(2)
        return flat[..., :-1] @ v.reshape(-1, v.shape[-1])[:-1]


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "refused"])
@pytest.mark.parametrize("samples", [8, 100])
def test_a_wrong_product_is_found_in_small_and_large_batches(samples, alone):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def f(x):
        assert alone or len(x) > 2
        return net(x)

    J = pt.jacobian(f, torch.randn(samples, 4), params=net, method="grad", check="never")
    assert J.check().passed and {row.parameter for row in J.check().rows if row.check == "product"} == set(J.names)
    wrong = replace(J, blocks={**J.blocks, "0.weight": (WrongProduct(J.blocks["0.weight"][0].dense()),)})
    assert {(row.check, row.parameter) for row in wrong.check().failures} >= {("product", "0.weight")}


class Own(torch.autograd.Function):
    """x, with a derivative that depends on the size of the batch."""

    @staticmethod
    def forward(ctx, x):
        ctx.samples = len(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * (1 + 1 / ctx.samples)


def test_rows_that_are_others_alone_are_found():
    net = nn.Linear(4, 3)
    J = pt.jacobian(lambda x: Own.apply(net(x)), torch.randn(12, 4), params=net, method="grad", check="never")
    assert {row.check for row in J.check().failures} == {"alone"}


def test_gradients_of_several_calls_in_one_backward():
    net, x = nn.Linear(4, 3), torch.randn(3, 4)
    calls = [call(_problem(net, (x[n : n + 1],), {})) for n in range(3)]
    seeds = [torch.randn(1, 3) for _ in calls]
    own = [c.gradients(u) for c, u in zip(calls, seeds, strict=True)]
    for name, gradient in gradients_of(calls, seeds).items():
        torch.testing.assert_close(gradient, sum(g[name] for g in own))


# --- independence behind the first layer -------------------------------------------------------------------------


def place_of(f, *inputs, **options):
    return call(_problem(f, inputs, options), reading=True).places[0]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(4, 3), (6, 4)), (nn.Linear(4, 3, bias=False), (6, 4)), (nn.Conv2d(2, 3, 3), (6, 2, 5, 5)), (nn.Conv1d(2, 3, 3), (6, 2, 5))],
    ids=lambda found: type(found).__name__,
)
def test_an_input_that_one_layer_reads_is_read_behind_it(layer, shape):
    assert isinstance(place_of(layer, torch.randn(shape)).at, GradientEdge)

    def mixing(x):
        h = layer(x)
        return (h - 0.1 * h.roll(1, 0)).flatten(1)

    with pytest.raises(pt.MixingError, match="depends on input 'x' of sample"):
        pt.check(mixing, torch.randn(shape), params=layer, method="grad")


@pytest.mark.parametrize("before", [False, True])
def test_an_input_that_is_read_elsewhere_too_is_read_itself(before):
    layer = nn.Linear(4, 3)

    def f(x):
        other = x[:, :3] * 1
        if before:
            x.mul_(2)
        return layer(x) + 0.01 * other.roll(1, 0)

    assert not isinstance(place_of(f, torch.randn(6, 4), params=layer).at, GradientEdge)
    with pytest.raises(pt.MixingError):
        pt.check(f, torch.randn(6, 4), params=layer, method="grad")


def test_a_weight_times_samples_in_columns_is_read_at_the_input():
    w = torch.randn(3, 4, requires_grad=True)
    assert not isinstance(place_of(lambda x, w: (w @ x).T, torch.randn(4, 6), w, in_dims={"x": 1, "w": None}).at, GradientEdge)


# --- tables ------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5000, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head((self.table(tokens) + self.table(tokens + 7)).mean(1))


@pytest.mark.parametrize("change", ["one index", "one use", "one entry", "padding"])
def test_a_wrong_row_of_a_large_table_is_found(change):
    net, tokens = Words(), torch.randint(1, 4000, (40, 5))
    tokens[3, 2] = 0
    J = pt.jacobian(net, tokens, check="never")
    group = J.blocks["table.weight"]
    assert len(group) == 2 and looked_up(group) is not None and J.check().passed
    first, second = group
    index, g = first.index.clone(), first.g.clone()
    if change == "one index":
        index[3, 1] += 1
    elif change == "one entry":
        g[3, 1, 1] *= 1.5
    elif change == "padding":
        index[3, 2] = 4999
    wrong = (second,) if change == "one use" else (replace(first, index=index, g=g), second)
    failures = replace(J, blocks={**J.blocks, "table.weight": wrong}).check().failures
    assert {row.parameter for row in failures} == {"table.weight"}
    assert change == "one use" or next(row for row in failures if row.check == "backward").where.sample == 3


def test_a_small_table_is_compared_whole():
    block = Gather(torch.tensor([[1, 2], [2, 3]]), torch.randn(2, 1, 2, 4), (6, 4))
    assert looked_up((block,)) is None and looked_up((block, Dense(torch.zeros(2, 1, 6, 4)))) is None


def test_products_with_a_vector_whose_rows_overlap():
    v, own = torch.randn(5003).as_strided((5000, 4), (1, 1)), torch.randn(5000, 4)
    torch.testing.assert_close(dot(own, v), (own.double() * v.double()).sum(), rtol=1e-5, atol=1e-3)
    index = torch.randint(0, 5000, (3, 2))
    torch.testing.assert_close(F.embedding(index, v), F.embedding(index, v.contiguous()))


# --- numbers that cancel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_that_nobody_is_on(dtype):
    """Every member shares its step with another, but for what the last operation moved it: the steps between are of the same group."""
    torch.manual_seed(0)
    eps = torch.finfo(dtype).eps
    steps = torch.tensor([0, 0, 1, 1, 3, 3, 5, 5, 5, 8, 8, 9, 9, 12, 12, 12], dtype=dtype)[:, None]
    members = (1 + steps * 1000 * eps) * (1 + eps * torch.randn(16, 1, dtype=dtype))
    assert belongs(1 + 6 * 1000 * eps * torch.ones(1, dtype=dtype), members, 0.0)
    assert not belongs(1 + 400 * 1000 * eps * torch.ones(1, dtype=dtype), members, 0.0)


def test_two_sides_of_a_kink_are_no_steps():
    torch.manual_seed(0)
    eps = torch.finfo(torch.float32).eps
    members = (1 + torch.tensor([0.0, 1.0])[:, None].repeat(8, 1) * 0.01) * (1 + eps * torch.randn(16, 1))
    assert belongs(torch.tensor([1.0]), members, 0.0) and belongs(torch.tensor([1.01]), members, 0.0)
    assert not belongs(torch.tensor([1.005]), members, 0.0)
