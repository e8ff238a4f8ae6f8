"""Calls in a row: other data, other sizes, and other decisions by data, settings and constants. See `repeated`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import partials as pt
from partials.capture.known import LAYOUTS

from .repeated import Call, N, Switched, apart, mlp, play, straight

CASES: dict[str, Callable[[], Any]] = {}


def case(make):
    CASES[make.__name__] = make
    return make


# --- other data, other sizes --------------------------------------------------------------------------------------


@case
def other_data():
    model = mlp()
    for scale in (1, 1e-3, 1e3, 0, 1):
        yield Call(model, (scale * torch.randn(N, 3),))


class Trainer:
    """What holds a model and a loss: the function that is differentiated is a method of it."""

    def __init__(self, net):
        self.net, self.power, self.shift = net, 2, 0.0

    def loss(self, x, y):
        found = self.net(x)
        return ((found - y + self.shift) ** self.power).sum(-1) if self.power else (found - y).abs().sum(-1)


class Product(Trainer):
    def loss(self, x, y):
        return (self.net(x) * y).sum(-1)


@case
def methods_of_objects_that_change():
    model, x, y = mlp(), torch.randn(N, 3), torch.randn(N, 2)
    first, second, product = Trainer(model), Trainer(model), Product(model)

    def call(trainer):
        return Call(trainer.loss, (x, y), {"params": model}, list(model.parameters()))

    for _ in range(4):
        yield call(first)
    second.shift, second.power = 0.5, 3
    for trainer in (second, first, product, second, product):
        yield call(trainer)
    first.power = 0
    for _ in range(3):
        yield call(first)
    second.net = mlp()  # not the module that is asked about
    for _ in range(2):
        yield call(second)
    yield call(first)


@case
def the_same_tensor_with_other_values():
    model, x = mlp(), torch.randn(N, 3)
    for _ in range(3):
        yield Call(model, (x,))
        x.normal_()


@case
def other_batch_sizes():
    model = mlp()
    for n in (4, 1, 7, 5, 2, 3, 1, 4, 15):
        yield Call(model, (torch.randn(n, 3),))


@case
def a_single_sample_first():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x):
            return self.lin(x.transpose(0, 1)).tanh().sum(0)

    model = TimeFirst()
    for n, t in ((1, 1), (1, 4), (4, 1), (4, 4), (4, 8), (8, 4), (1, 8), (2, 2)):
        yield Call(model, (torch.randn(n, t, 3),))


@case
def no_sample_in_between():
    model = mlp()
    for n in (4, 0, 4, 0, 1):
        if n:
            yield Call(model, (torch.randn(n, 3),))
        else:
            assert pt.jacobian(model, torch.randn(0, 3)).dense().shape == (0, 2, 32)


@case
def other_lengths():
    model = nn.Sequential(nn.Embedding(11, 6), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0), nn.Linear(6, 2))
    for n, t in ((4, 4), (4, 3), (3, 4), (2, 8), (8, 2), (1, 5), (4, 4)):
        yield Call(model, (torch.randint(11, (n, t)),))


@case
def other_image_sizes():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    for n, size in ((4, 6), (4, 4), (2, 7), (3, 6), (1, 4)):
        yield Call(model, (torch.randn(n, 2, size, size + 1),))


@case
def recurrent_layers_of_other_lengths():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, bidirectional=True, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model = Net()
    for n, t in ((4, 4), (4, 2), (2, 4), (1, 3), (4, 4)):
        yield Call(model, (torch.randn(n, t, 3),))


@case
def recurrent_layers_that_come_again():
    class Net(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.rnn, self.head, self.way = kind(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2), "as usual"

        def forward(self, x):
            if self.way == "started by data":
                state = x[:, 0, :1].expand(2, -1, -1).repeat(1, 1, 4)
                return self.head(self.rnn(x, (state, state) if isinstance(self.rnn, nn.LSTM) else state)[0][:, -1])
            out, _ = self.rnn(x.flip(1) if self.way == "backwards" else x)
            return self.head(out.detach() if self.way == "cut" else out)[:, -1]

    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        model = Net(kind)
        for model.way in (*["as usual"] * 4, "backwards", "as usual", "started by data", "as usual", "cut", *["as usual"] * 3):
            yield Call(model, (torch.randn(N, N, 3),))


@case
def attention_that_comes_again():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places, self.head = nn.Embedding(11, 6), nn.Embedding(9, 6), nn.Linear(6, 2)
            self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
            self.causal, self.first, self.written = False, 0, False

        def forward(self, x):
            t = x.shape[1]
            places = torch.arange(self.first, self.first + t)
            h = self.tokens(x) + self.places(places.repeat(len(x), 1) if self.written else places)
            mask = nn.Transformer.generate_square_subsequent_mask(t) if self.causal else None
            return self.head(self.layer(h, src_mask=mask, is_causal=self.causal)[:, -1])

    model = Net()
    usual, shifted = (False, 0, False), (False, 3, False)
    for way in (*[usual] * 4, (True, 0, False), usual, shifted, (True, 0, True), (True, 0, True), (True, 3, True), (True, 0, True), usual):
        model.causal, model.first, model.written = way
        yield Call(model, (torch.randint(11, (N, N)),))


@case
def parts_of_the_parameters():
    model, x = mlp(), torch.randn(N, 3)
    for wrt in ("0.weight", "2.*", "*.bias", "0.weight", "2.*"):
        for _ in range(4):
            wanted = [p for name, p in model.named_parameters() if fnmatch(name, wrt)]
            yield Call(model, (x.normal_(),), {"wrt": wrt}, wanted)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(-1.5)


@case
def samples_run_apart():
    """Under vmap, whatever f does not draw."""
    ways = (lambda m, x: m.b(m.a(x).tanh()), lambda m, x: m.b(m.a(x.flip(1)).sin()), lambda m, x: m.b(m.a(x).tanh().detach()))
    model = Switched(*ways)
    for model.way in (0, 0, 0, 0, 1, 0, 2, 0, 0, 1, 1, 1, 2, 2, 2):
        for policy in ("different", "same"):
            yield Call(model, (torch.randn(N, 3),), {"randomness": policy})


@case
def packed_sequences_of_other_lengths():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.rnn, self.head = nn.Linear(3, 3), nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(self.inside(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
            out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
            return self.head(out).sum(1)

    model = Net()
    for lengths in ([4, 4, 4, 4], [1, 2, 3, 4], [4, 3, 2, 1], [2, 4, 1, 1], [4, 3, 2, 1]):
        yield Call(model, (torch.randn(4, 4, 3), torch.tensor(lengths)))


@case
def other_kinds_of_memory():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(N, 2, 3, 3)
    yield Call(model, (x,))
    yield Call(model, (x.to(memory_format=torch.channels_last),))
    yield Call(model, (torch.randn(1, 2, 3, 3).expand(N, -1, -1, -1),))
    yield Call(model, (torch.randn(3, 3, 2, N).permute(3, 2, 0, 1),))
    yield Call(model, (torch.randn(2 * N, 2, 3, 3)[::2],))
    yield Call(model, (x.requires_grad_(),))
    yield Call(model, (x * 2,))
    with torch.inference_mode():
        y = torch.randn(N, 2, 3, 3)
    yield Call(model, (y.clone(),))


@case
def other_arguments():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)

        def forward(self, x, mask=None, scale=1.0, flip=False, extra=None):
            h = self.lin(x if extra is None else x + extra["more"])
            h = h if mask is None else h.masked_fill(mask, 0)
            return (h.flip(1) if flip else h).tanh() * scale

    model, x = Net(), torch.randn(N, 3)
    mask = torch.rand(N, 3) > 0.5

    def call(*more, **keywords):
        return Call(model, (x, *more), keywords, oracle=lambda x, *more: model(x, *more, **keywords))

    yield call()
    yield call(mask)
    yield call(~mask)
    yield call(scale=2.0)
    yield call(scale=-3.0)
    yield call(flip=True)
    yield call(None, 0.5, True)
    yield Call(model, (x,), {"extra": {"more": torch.ones(1)}, "in_dims": {"extra": None}}, oracle=lambda x: model(x + 1))
    yield call()


# --- decisions by data, settings and constants --------------------------------------------------------------------


@case
def a_branch_on_data():
    def forward(self, x):
        h = self.a(x)
        return self.b(h.tanh()) if float(x.detach().sum()) > 0 else self.b(h.sin() * 2) ** 2

    model = Switched(forward)
    for shift in (5, -5, 5, -5):
        calls = torch.randn(N, 3).abs() * shift
        yield Call(model, (calls,))


@case
def a_loop_until_converged():
    def forward(self, x):
        h, steps = self.a(x), 0
        while float(h.detach().abs().max()) > 1e-1 and steps < 20:
            h, steps = 0.5 * h.tanh(), steps + 1
        return self.b(h)

    class Each(Switched):
        def forward(self, x):  # each sample takes the steps that it needs
            return torch.cat([forward(self, x[n : n + 1]) for n in range(len(x))])

    model = Each()
    for scale in (1, 0.01, 10, 1):
        yield Call(model, (scale * torch.randn(N, 3),))


@case
def time_first_or_not_by_a_setting():
    def plain(self, x):
        return self.b(self.a(x).tanh()).sum(1)

    def time_first(self, x):
        return self.b(self.a(x.transpose(0, 1)).tanh()).sum(0)

    model = Switched(plain, time_first)
    for way in (0, 1, 0, 1, 1, 0):
        model.way = way
        yield Call(model, (torch.randn(N, N, 3),))


@case
def folds_by_a_setting():
    def forward(self, x):  # (N, T, F) -> time first -> (p, q, F) and back
        h = self.a(x.transpose(0, 1).reshape(self.p, self.q, 3)).tanh()
        return self.b(h).reshape(x.shape[1], x.shape[0], 2).sum(0)

    for n, t, pairs in (
        (2, 4, [(4, 2), (2, 4), (8, 1), (1, 8), (4, 2)]),
        (2, 8, [(4, 4), (2, 8), (8, 2), (4, 4)]),
        (3, 3, [(9, 1), (3, 3)]),
    ):
        model = Switched(forward)
        for model.p, model.q in pairs:
            for x in (torch.randn(n, t, 3), torch.randn(n, t, 3)):
                if model.q % n == 0 or model.p * model.q == n * t:
                    yield Call(model, (x,), oracle=straight(model))


@case
def positions_that_were_dead_at_first():
    def forward(self, x):
        return self.b(self.a(x.transpose(0, 1)).relu()).sum(0)

    model = Switched(forward)
    with torch.no_grad():
        model.a.bias.zero_()
        model.a.weight.abs_()
    dead = -torch.rand(N, N, 3)
    dead[range(N), range(N)] *= -1  # (only position n of sample n is alive: time first or not cannot be told)
    yield Call(model, (dead,))
    yield Call(model, (torch.rand(N, N, 3),))
    yield Call(model, (torch.randn(N, N, 3),))
    yield Call(model, (-torch.rand(N, N, 3),))
    yield Call(model, (torch.rand(N, N, 3),))


@case
def samples_of_very_different_weight():
    """Beside the largest cotangent all others are nothing; whose they are must be told all the same."""

    def f(x, k, w):
        return ((x.transpose(0, 1) @ w).tanh() * k.T[:, :, None]).sum(0)

    w = torch.randn(N, 3, requires_grad=True)
    one, diagonal = torch.full((N, N), 1e-12), torch.full((N, N), 1e-11)
    one[0, 0] = 1
    diagonal.fill_diagonal_(1)
    for weights in (one, diagonal, torch.ones(N, N), one, torch.rand(N, N) * 10.0 ** -torch.arange(0, 4 * N, 4)[:, None]):
        yield Call(f, (torch.randn(N, N, N), weights, w))


@case
def samples_in_an_order_that_data_or_constants_decide():
    """Into another order, through a layer, and back: by indices and by matrices, from the data and from outside."""
    for move in MOVES.values():

        def forward(self, x, move=move):
            order = x[:, 0].detach().argsort() if self.order is None else self.order
            matrix = torch.eye(len(x))[order] if self.order is None else self.matrix
            return move(self.b(move(self.a(x), order, matrix).tanh()), order.argsort(), matrix.T)

        model = Switched(forward)
        for order in (range(N), None, [1, 3, 0, 2], [3, 2, 1, 0], None, range(N)):
            model.order = None if order is None else torch.tensor(order)
            model.matrix = None if order is None else torch.eye(N)[model.order]
            yield Call(model, (torch.randn(N, 3),), oracle=apart(model))


def _written(x, order, matrix):
    out = torch.zeros_like(x)
    for i, j in enumerate(order.tolist()):
        out[i] = x[j]
    return out


MOVES = {
    "list": lambda x, order, matrix: x[order.tolist()],
    "index": lambda x, order, matrix: x[order],
    "index_select": lambda x, order, matrix: x.index_select(0, order),
    "aten": lambda x, order, matrix: torch.ops.aten.index_select(x, 0, order),
    "gather": lambda x, order, matrix: x.gather(0, order[:, None].expand(-1, x.shape[1])),
    "stack": lambda x, order, matrix: torch.stack([x[i] for i in order.tolist()]),
    "unbind": lambda x, order, matrix: torch.stack([x.unbind()[i] for i in order.tolist()]),
    "embedding": lambda x, order, matrix: F.embedding(order, x),
    "matrix": lambda x, order, matrix: matrix @ x,
    "mm": lambda x, order, matrix: torch.mm(matrix, x),
    "einsum": lambda x, order, matrix: torch.einsum("nm,mf->nf", matrix, x),
    "linear": lambda x, order, matrix: F.linear(x.T, matrix).T,
    "bmm": lambda x, order, matrix: torch.bmm(matrix[None], x[None])[0],
    "tensordot": lambda x, order, matrix: torch.tensordot(matrix, x, 1),
    "addmm": lambda x, order, matrix: torch.addmm(torch.zeros(1), matrix, x),
    "put": lambda x, order, matrix: torch.zeros_like(x).index_put((order.argsort(),), x),
    "add": lambda x, order, matrix: torch.zeros_like(x).index_add(0, order.argsort(), x),
    "write": _written,
    "sum": lambda x, order, matrix: (matrix[:, :, None] * x[None]).sum(1),
    "where": lambda x, order, matrix: torch.stack([torch.where((order == i)[:, None], x[i], 0.0) for i in range(len(x))]).sum(0),
    "sparse": lambda x, order, matrix: torch.sparse.mm(matrix.to_sparse(), x),
}
"""Ways to take rows of x in an order: an index, and the same as a permutation matrix."""


@case
def a_permutation_that_is_written_into_a_buffer():
    """The matrix is one tensor all the time."""

    class Net(Switched):
        def forward(self, x):
            return self.order.T @ self.b((self.order @ self.a(x)).tanh())

    model = Net()
    model.register_buffer("order", torch.eye(N))
    for order in (range(N), [1, 3, 0, 2], [3, 2, 1, 0], range(N)):
        model.order.copy_(torch.eye(N)[torch.tensor(order)])
        yield Call(model, (torch.randn(N, 3),), oracle=apart(model))


@case
def dispatch_by_one_hot_products():
    """Rows of samples are put into the slots of experts, in the order of their arrival: at first all with one expert."""

    class Dispatch(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.w = nn.Linear(3, 2), nn.Parameter(torch.randn(2, 3, 5))

        def forward(self, x):
            score = self.gate(x).softmax(-1)
            top, chosen = score.max(-1)
            mask = F.one_hot(chosen, 2).to(x)
            slot = (mask.cumsum(0) - 1) * mask
            place = F.one_hot(slot.long(), self.slots).to(x) * mask[..., None]
            h = torch.einsum("ecm,emd->ecd", torch.einsum("nec,nm->ecm", place, x), self.w).tanh()
            return torch.einsum("nec,ecd->nd", place * top[:, None, None], h)

    model = Dispatch()
    for shift, model.slots in ((1.0, N), (0.0, N), (-1.0, N), (0.0, N), (1.0, 2 * N), (0.0, 2 * N)):
        with torch.no_grad():
            model.gate.bias.copy_(torch.tensor([shift, -shift]))
        yield Call(model, (0.3 * torch.randn(N, 3),))


@case
def experts_by_data():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(3, 3), nn.ModuleList(nn.Linear(3, 2) for _ in range(3))

        def forward(self, x):
            score, chosen = self.gate(x).softmax(-1).topk(2, -1)
            out = x.new_zeros(len(x), 2)
            for e, expert in enumerate(self.experts):
                row, slot = (chosen == e).nonzero(as_tuple=True)
                if len(row):
                    out.index_add_(0, row, expert(x[row]) * score[row, slot, None])
            return out

    model = Mixture()
    for _ in range(4):
        yield Call(model, (torch.randn(5, 3),))


@case
def constants_of_a_setting():
    def forward(self, x):
        return self.b(self.a(x * self.scale + self.shift).pow(self.power))

    model = Switched(forward, scale=1.0, shift=0, power=2)
    for model.scale, model.shift, model.power in ((1.0, 0, 2), (2.0, 0, 2), (2.0, 1, 2), (2.0, 1, 3), (0, 1, 1), (1.0, 0, 2)):
        yield Call(model, (torch.randn(N, 3),))


@case
def strides_and_axes_of_a_setting():
    conv = nn.Conv1d(2, 4, 3, padding=2)
    model = nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool1d(2), nn.Flatten())
    for conv.stride, conv.padding, conv.dilation in (((1,), (2,), (1,)), ((2,), (2,), (1,)), ((1,), (1,), (1,)), ((1,), (2,), (2,))):
        yield Call(model, (torch.randn(N, 2, 6),))
    softmax = nn.Softmax(1)
    model = nn.Sequential(nn.Linear(3, 3), softmax, nn.Linear(3, 2))
    for softmax.dim in (1, 2, -1, 1):
        yield Call(model, (torch.randn(N, 3, 3),))


@case
def closures_of_the_same_code():
    w = torch.randn(3, 3, requires_grad=True)

    def make(k, fold, function):
        def f(x, w):
            h = x.transpose(0, 1) if fold else x
            return (function(h @ w).sum(0 if fold else 1) * k).sin()

        return f

    for k, fold, function in ((1, 0, torch.sin), (2, 1, torch.sin), (1, 0, torch.exp), (3, 1, torch.tanh), (1, 0, torch.sin)):
        yield Call(make(k, fold, function), (torch.randn(3, 3, 3), w))


SETTING = {"fold": False, "k": 1.0}


@case
def globals_and_defaults():
    w = torch.randn(3, 3, requires_grad=True)

    def f(x, w, fold=False):
        h = x.transpose(0, 1) if SETTING["fold"] or fold else x
        return torch.tanh(h @ w).sum(0 if SETTING["fold"] or fold else 1) * SETTING["k"]

    for SETTING["fold"], SETTING["k"] in ((False, 1.0), (True, 1.0), (True, 2.0), (False, 2.0), (False, 1.0)):
        yield Call(f, (torch.randn(3, 3, 3), w))
    f.__defaults__ = (True,)
    yield Call(f, (torch.randn(3, 3, 3), w))
    f.__code__ = (lambda x, w, fold=False: (x @ w).cos().sum(1)).__code__
    yield Call(f, (torch.randn(3, 3, 3), w))


@case
def buffers_that_change():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)
            self.register_buffer("scale", torch.ones(3))
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.lin(x) * self.scale)

    model = Net().eval()
    x = torch.randn(N, 3)
    yield Call(model, (x,))
    model.scale.mul_(3)
    yield Call(model, (x,))
    model.scale = torch.randn(3)
    yield Call(model, (x,))
    model.norm.running_var.fill_(4)
    yield Call(model, (x,))
    model.norm.eps = 1.0
    yield Call(model, (x,))
    model.scale = torch.tensor(2.0)
    yield Call(model, (x,))


@pytest.mark.parametrize("check", ["first", "never"])
@pytest.mark.parametrize("name", CASES)
def test_calls_in_a_row(name, check):
    play(CASES[name](), check)


GATES = {
    "a number": float,
    "a switch": lambda g: torch.tensor(bool(g)),
    "a tensor": lambda g: torch.tensor(float(g)),
}


def _gated(g, one, other):
    return torch.where(g, one, other) if isinstance(g, torch.Tensor) and g.dtype is torch.bool else g * one + (1 - g) * other


@pytest.mark.parametrize("check", ["never", "first"])
@pytest.mark.parametrize("kind", GATES)
def test_gates_between_two_orders(kind, check):
    """Behind a gate that is shut every layout fits: what was measured says nothing of the other one."""
    torch.manual_seed(0)
    LAYOUTS.clear()
    layer, x = nn.Linear(3, 5), torch.randn(N, 3)
    for opened in (1, 1, 1, 0, 0, 0, 1):
        g = GATES[kind](opened)

        def f(x, g=g):
            y = torch.tanh(layer(_gated(g, x, x.flip(0))))
            return _gated(g, y, y.flip(0))

        J = pt.jacobian(f, x, params=layer, check=check)
        for i in range(N):
            expected = torch.autograd.grad(layer(x[i : i + 1]).tanh()[0, 1], layer.weight)[0]
            torch.testing.assert_close(J["weight"][i, 1], expected)


def _ends(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


def _members(lengths):
    return torch.as_tensor(np.repeat(np.arange(N), lengths)[None] == np.arange(N)[:, None])


def _attended(y, lengths):
    queries = torch.zeros(1, N, y.shape[1])
    return F.scaled_dot_product_attention(queries, y[None], y[None], _members(lengths)[None])[0] * torch.as_tensor(lengths)[:, None]


POOLS = {
    "bounds of numpy": lambda y, n: torch.stack([y[a:b].sum(0) for a, b in itertools.pairwise(_ends(n))]),
    "bounds of tensors": lambda y, n: torch.stack([y[a:b].sum(0) for a, b in itertools.pairwise(torch.as_tensor(_ends(n)))]),
    "narrow": lambda y, n: torch.stack([y.narrow(0, a, b - a).sum(0) for a, b in itertools.pairwise(_ends(n))]),
    "split": lambda y, n: torch.stack([part.sum(0) for part in y.split(list(np.array(n)))]),
    "a mask of numpy": lambda y, n: torch.stack([y[mask].sum(0) for mask in _members(n).numpy()]),
    "segments": lambda y, n: torch.segment_reduce(y, "sum", lengths=torch.as_tensor(n), axis=0),
    "expanded": lambda y, n: (y[None].expand(N, -1, -1) * _members(n)[..., None]).sum(1),
    "filled": lambda y, n: y[None].repeat(N, 1, 1).masked_fill(~_members(n)[..., None], 0.0).sum(1),
    "attention": _attended,
}
"""Sums over the tokens of each of N samples, of the lengths n; there are 2 N tokens whatever the lengths are."""


@pytest.mark.parametrize("check", ["never", "first"])
@pytest.mark.parametrize("name", POOLS)
def test_samples_of_other_lengths(name, check):
    torch.manual_seed(0)
    LAYOUTS.clear()
    layer = nn.Linear(3, 5)
    for lengths in ([2, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2], [1, 3, 2, 2], [3, 1, 1, 3], [2, 2, 2, 2]):
        x, own = torch.randn(N, 4, 3), torch.arange(4)[None] < torch.tensor(lengths)[:, None]
        J = pt.jacobian(lambda x, own=own, lengths=lengths: POOLS[name](layer(x[own]).tanh(), lengths), x, params=layer, check=check)
        for i in range(N):
            expected = torch.autograd.grad(layer(x[i][own[i]]).tanh().sum(0)[1], layer.weight)[0]
            torch.testing.assert_close(J["weight"][i, 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("check", ["never", "first"])
def test_inference_that_ends(check):
    torch.manual_seed(0)
    model, x, frozen = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3), True

    def f(x):
        with torch.inference_mode(frozen):
            h = torch.tanh(model[0](x))
        return model[1](h.clone())

    for turn in range(6):
        frozen = turn < 3
        J = pt.jacobian(f, x, params=model, check=check)
        if frozen:
            assert not J["0.weight"].any()
        else:
            expected = torch.autograd.grad(f(x)[2, 1], model[0].weight)[0]
            torch.testing.assert_close(J["0.weight"][2, 1], expected)
