"""Recurrent layers in factors: every variant of torch's, padded and packed, against one gradient for each output of each sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import partials as pt
from partials.capture import trial
from partials.capture.trace import Refused

EXACT = 1e-11
N = 4


def agrees(f, *inputs, runner="native", check="never", **options):
    R = pt.jacobian(f, *inputs, method="loop", check="never", **options)
    J = pt.jacobian(f, *inputs, method="capture", check=check, **options)
    scale = R.norms().max() + 1e-300
    assert (J.values - R.values).abs().max() <= EXACT * R.values.abs().max()
    assert (J.dense() - R.dense()).norm(dim=-1).max() <= EXACT * scale
    assert (J.norms() - R.norms()).abs().max() <= EXACT * scale
    assert (J.gram() - R.gram()).abs().max() <= EXACT * scale**2
    assert all((use.layout == "vmapped") == (runner == "vmapped") for use in J.plan.uses)
    return J


def draw(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


class Sequence(nn.Module):
    """All outputs and all final states of a recurrent layer, batch first or not."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.double()

    def forward(self, x, *state):
        first = self.layer.batch_first
        state = tuple(s.transpose(0, 1).contiguous() for s in state)
        out, last = self.layer(x if first else x.transpose(0, 1), (state if len(state) > 1 else state[0]) if state else None)
        return self.summed(out if first else out.transpose(0, 1), last)

    def summed(self, out, last):
        last = [part.transpose(0, 1).flatten(1) for part in (last if isinstance(last, tuple) else (last,))]
        return torch.cat([out.sin().sum(1), *(part.sin() for part in last)], 1)[:, ::2]


class Packed(Sequence):
    """The same of sequences with lengths, with an embedding before and a linear layer on the packed rows."""

    def __init__(self, layer, sort):
        super().__init__(layer)
        width = layer.input_size
        out = (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
        self.table, self.head, self.sort = nn.Embedding(9, width).double(), nn.Linear(out, 2).double(), sort

    def forward(self, index, lengths):
        first, x = self.layer.batch_first, self.table(index)
        packed = pack_padded_sequence(x if first else x.transpose(0, 1), lengths, batch_first=first, enforce_sorted=not self.sort)
        out, last = self.layer(packed)
        out = PackedSequence(self.head(out.data).tanh(), *out[1:])
        return self.summed(pad_packed_sequence(out, batch_first=True)[0], last)


KINDS = {
    "LSTM": lambda *a, **k: nn.LSTM(*a, **k),
    "LSTM projected": lambda *a, **k: nn.LSTM(*a, proj_size=2, **k),
    "GRU": lambda *a, **k: nn.GRU(*a, **k),
    "RNN tanh": lambda *a, **k: nn.RNN(*a, **k),
    "RNN relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}
CELLS = {
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "RNN tanh": nn.RNNCell,
    "RNN relu": lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k),
}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@given(
    n=st.integers(1, 4),
    t=st.integers(1, 4),
    i=st.integers(1, 3),
    h=st.integers(3, 4),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
)
def test_padded(kind, n, t, i, h, layers, bidirectional, batch_first, bias):
    layer = KINDS[kind](i, h, layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias)
    agrees(Sequence(layer), draw(n, t, i), check="always" if n > 1 else "never")


@each_kind
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    sort=st.booleans(),
)
def test_packed(kind, lengths, layers, bidirectional, batch_first, sort):
    lengths = torch.tensor(lengths if sort else sorted(lengths, reverse=True))
    layer = KINDS[kind](3, 4, layers, bidirectional=bidirectional, batch_first=batch_first)
    agrees(Packed(layer, sort), torch.randint(9, (len(lengths), 4)), lengths, check="always" if len(lengths) > 1 else "never")


def test_a_layout_of_equal_lengths_does_not_serve_others():
    net, index = Packed(nn.GRU(3, 4), False), torch.randint(9, (3, 4))
    for lengths in ([2, 2, 2], [3, 2, 1], [4, 1, 1], [2, 2, 2], [4, 3, 2]):
        agrees(net, index, torch.tensor(lengths))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, bias):
    cell = CELLS[kind](3, 3, bias=bias).double()

    def f(x):
        state = None
        for step in x.unbind(1):
            state = cell(step, state)
        return state[0] * state[1] if isinstance(state, tuple) else state

    agrees(f, draw(N, N, 3), params=cell)


@each_kind
def test_given_state(kind):
    layer = KINDS[kind](3, 4, 2)
    states = [draw(N, 2, layer.proj_size or 4), *([draw(N, 2, 4)] if isinstance(layer, nn.LSTM) else [])]
    J = agrees(Sequence(layer), draw(N, 3, 3), *states)
    assert {use.operation for use in J.plan.uses} == {"F.linear", "recurrent_product"}


class Learned(nn.Module):
    """First states that are parameters, one for all samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(3, 4, 2)
        self.h, self.c = nn.Parameter(torch.randn(2, 1, 4)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        state = self.h.expand(2, len(x), 4).contiguous(), self.c.unsqueeze(1).repeat(1, len(x), 1)
        out, (h, c) = self.layer(x.transpose(0, 1), state)
        return out[-1] + h[0] * c[1]


def test_learned_state():
    agrees(Learned().double(), draw(N, 3, 3))


def test_a_learned_state_of_the_batch_is_no_parameter_of_a_sample():
    layer, h = nn.GRU(3, 4).double(), draw(1, N, 4, requires_grad=True)
    with pytest.raises(pt.PartialsError):
        pt.jacobian(lambda x: layer(x.transpose(0, 1), h)[0][-1], draw(N, 3, 3), params=[h], method="capture")


def test_one_sequence_without_a_batch():
    layer = nn.GRU(3, 4).double()
    x = draw(5, 3)
    J, R = (pt.jacobian(lambda x: layer(x)[0][-1], x, batched=False, params=layer, method=m) for m in ("capture", "loop"))
    assert (J.dense() - R.dense()).norm() <= EXACT * R.dense().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_kind
def test_dropout_between_layers_draws_the_masks_of_f(kind, dtype):
    net = Sequence(KINDS[kind](3, 4, 3, dropout=0.5, bidirectional=True)).to(dtype)
    x = torch.randn(N, 3, 3, dtype=dtype)
    torch.manual_seed(5)
    out = net(x)
    rows = [torch.autograd.grad(row.sum(), list(net.parameters()), retain_graph=True) for row in out]
    expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.manual_seed(5)
    J = pt.jacobian(net, x, randomness="model", method="capture")
    close = 1e-5 if dtype == torch.float32 else EXACT
    assert (J.values - out).norm() <= close * out.norm()
    assert (J.dense().sum(1) - expected).norm() <= close * expected.norm()
    with pytest.raises(pt.RandomnessError):
        pt.jacobian(net, x)


def test_weights_computed_from_parameters():
    layer = nn.LSTM(3, 4)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parametrizations.weight_norm(layer, name)
    agrees(Sequence(layer), draw(N, 3, 3))


def test_one_layer_twice_and_some_weights_frozen():
    layer = nn.LSTM(3, 3, batch_first=True).double()
    layer.weight_hh_l0.requires_grad_(False)
    agrees(lambda x: layer(layer(x)[0].relu())[0][:, -1], draw(N, 3, 3), params={n: p for n, p in layer.named_parameters() if "bias" in n})


def test_inputs_beside_weights():
    net = Sequence(nn.GRU(3, 4, 2))
    x = draw(N, 3, 3)
    J, R = (pt.jacobian(net, x, wrt=("x", "layer.*"), method=m) for m in ("capture", "loop"))
    for name, rows in R.dict().items():
        assert (J[name] - rows).norm() <= EXACT * rows.norm()


@each_kind
def test_the_vmapped_runner_unrolls(kind, monkeypatch):
    def refuse(problem, *_):
        raise Refused("switched off for the test")

    monkeypatch.setitem(trial.RUNNERS, "native", refuse)
    agrees(Sequence(KINDS[kind](3, 4, 2, bidirectional=True)), draw(N, 3, 3), runner="vmapped")


@each_kind
def test_the_vmap_method_unrolls(kind):
    net, x = Sequence(KINDS[kind](3, 4)), draw(N, 3, 3)
    J, R = (pt.jacobian(net, x, method=m) for m in ("vmap", "loop"))
    assert (J.dense() - R.dense()).norm() <= EXACT * R.dense().norm()


@each_kind
def test_differentiable_results(kind):
    net, x = Sequence(KINDS[kind](3, 4, 2, bidirectional=True)), draw(N, 3, 3, requires_grad=True)
    found = []
    for method in ("capture", "loop"):
        J = pt.jacobian(net, x, create_graph=True, method=method)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(J.norms().square().sum(), [x, *net.parameters()])]))
        assert J.plan.method == method
    assert (found[0] - found[1]).norm() <= EXACT * found[1].norm()


def test_outputs_may_be_written_in_place():
    net = nn.GRU(3, 4).double()

    def f(x, write):
        out, h = net(x.transpose(0, 1))
        return (out.mul_(2).sum(0) + h[0].tanh_()) if write else (2 * out).sum(0) + h[0].tanh()

    x = draw(N, 3, 3)
    J = pt.jacobian(lambda x: f(x, True), x, params=net, method="capture", check="never")
    R = pt.jacobian(lambda x: f(x, False), x, params=net, method="loop")
    assert (J.dense() - R.dense()).norm() <= EXACT * R.dense().norm()


def test_samples_that_mix_through_time_are_found():
    net = nn.GRU(3, 4).double()
    with pytest.raises(pt.MixingError):
        pt.jacobian(lambda x: net(x)[0].flatten(1)[:, :2], draw(N, N, 3), params=net)  # (time and samples confused)


def test_autocast_is_left_to_another_method():
    net = nn.GRU(3, 4, batch_first=True)
    x = torch.randn(N, 3, 3)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(pt.MethodError, match="autocast rounds"):
        pt.jacobian(net, x, output=0, method="capture")
