"""Calls that come again: what is remembered of them is never stale, and f runs once."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import partials as pt
from partials import _repeated
from partials.capture.script import NAME, Names
from partials.rules import RULES, SumPart

N = 6


@pytest.fixture(autouse=True)
def nothing_known():
    _repeated.forget()
    torch.manual_seed(0)
    yield
    _repeated.forget()


def oracle(f, x, parameters):
    """Rows by a float64 loop of batches of one."""
    rows = []
    for n in range(len(x)):
        out = f(x[n : n + 1])
        for c in range(out.numel()):
            found = torch.autograd.grad(out.reshape(-1)[c], parameters, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]))
    return torch.stack(rows).reshape(len(x), -1, sum(p.numel() for p in parameters))


def same(J, f, x, parameters):
    expected = oracle(f, x, parameters)
    torch.testing.assert_close(J.dense().reshape(expected.shape), expected, rtol=1e-10, atol=1e-12)
    return True


def histories(root=None):
    found = _repeated._OF_CODE if root is None else _repeated._OF_MODULES.get(root, {})
    return [known.history for known in found.values()]


class Net(nn.Module):
    """A network whose forward a test can replace by its own."""

    def __init__(self, run):
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), nn.Parameter(torch.randn(4))
        self.run, self.calls, self.turn = run, 0, 0
        self.double()

    def forward(self, x):
        self.calls += 1
        return self.run(self, x)


def usual(self, x):
    return self.last(torch.tanh(self.first(x)) * self.scale)


def x_of(seed=0):
    return torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def recurrent(x, first, scale, *, kind=torch.rnn_tanh, reverse=False, start=0.0):
    """The last states of a layer whose time steps are the features of x, with weights made from a layer's and a scale."""
    steps = x.flip(1) if reverse else x
    weights = [first.weight[:, :1], torch.outer(scale, scale), first.bias, first.bias]
    state = (x[:, :1] * start).expand(len(x), 4)[None] if start else x.new_zeros(1, len(x), 4)
    return kind(steps[:, :, None], state.contiguous(), weights, True, 1, 0.0, False, False, True)[0][:, -1]


def rows_of(table, index):
    return nn.functional.embedding(index, table)


KEPT = {
    "products": usual,
    "relu in place": lambda self, x: self.last(nn.functional.relu(self.first(x), inplace=True)),
    "normalised": lambda self, x: self.last(nn.functional.layer_norm(self.first(x), (4,), self.scale)),
    "derived": lambda self, x: nn.functional.linear(
        torch.tanh(self.first(x)), (self.last.weight * self.scale).contiguous(), self.last.bias
    ),
    "several outputs of one operation": lambda self, x: self.last(torch.cat([p * 2 for p in self.first(x).split(2, 1)], 1)),
    "used twice": lambda self, x: self.last(self.first(x) * self.first(x)),
    "a mask made on the way": lambda self, x: self.last(self.first(x) @ torch.ones(4, 4, dtype=x.dtype).tril()),
    "attention": lambda self, x: self.last(
        nn.functional.scaled_dot_product_attention(*(self.first(x).reshape(-1, 2, 2),) * 3).reshape(-1, 4)
    ),
    "a branch on shapes": lambda self, x: self.last(self.first(x) if x.shape[1] == 3 else self.first(x) * 2),
    "other floats": lambda self, x: self.last(self.first(x) * (1.0 + self.turn)) / (2.0 + self.turn),
    "a layer over time": lambda self, x: self.last(recurrent(x, self.first, self.scale)),
    "a contraction": lambda self, x: self.last(torch.einsum("oi,ni->no", self.first.weight, x) + self.first.bias * self.scale),
    "no formula": lambda self, x: self.last(self.first(x).abs() ** self.scale),
    "a token for every sample": lambda self, x: self.last(torch.stack([self.first(x), self.scale.expand(len(x), 4)], 1)).sin().sum(1),
    "positions": lambda self, x: self.last(torch.tanh(self.first(x)[:, None] + rows_of(self.first.weight.T, torch.arange(3)))).sum(1),
    "types": lambda self, x: self.last(torch.tanh(self.first(x) + rows_of(self.first.weight.T, torch.ones(1).long().expand(len(x))))),
    "positions written out": lambda self, x: self.last(
        torch.tanh(self.first(x)[:, None] + rows_of(self.first.weight.T, torch.arange(3).repeat(len(x), 1)))
    ).sum(1),
    "other numbers of a sum": lambda self, x: self.last(torch.add(self.first(x), self.scale, alpha=1.0 + self.turn)),
    "keywords and constants": lambda self, x: self.last(torch.add(input=self.first(x), other=torch.full((4,), 2.0, dtype=x.dtype))),
    "frozen in part": lambda self, x: nn.functional.linear(torch.tanh(self.first(x)), self.last.weight.detach(), self.last.bias),
    "parameters unused": lambda self, x: self.first(x).sum(1, keepdim=True),
}


RUNNERS = {"native": {}, "vmapped": {"randomness": "different"}}
"""Options that decide which runner records f."""


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", KEPT)
def test_runs_that_keep_to_the_script(name, runner):
    net = Net(KEPT[name])
    for seed in range(5):
        net.turn = seed
        J = pt.jacobian(net, x_of(seed), check="never", **RUNNERS[runner])
        assert same(J, net, x_of(seed), list(net.parameters()))
        assert all((use.layout == "vmapped") is (runner == "vmapped") for use in J.plan.uses)
    (history,) = histories(net)
    assert (history.kept, history.missed) == (3, 0), "the first run is only counted, the second is written down, the others keep to it"


def test_f_runs_once_in_a_call_that_is_known():
    net = Net(usual)
    for _ in range(2):
        pt.jacobian(net, x_of(), check="never")
    net.calls = 0
    for _ in range(3):
        pt.jacobian(net, x_of(), check="never")
    assert net.calls == 3


class Hidden(torch.autograd.Function):
    """A use that no torch function shows."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


def _hidden(self, x):
    h = torch.tanh(self.first(x))
    return self.last(Hidden.apply(h, self.scale) if self.turn else h * self.scale)


def _written_unseen(self, x):
    h = self.first(x)
    if self.turn:
        with torch._C.DisableTorchFunction():
            h.mul_(self.scale)
    return self.last(torch.tanh(h))


def _data_unseen(self, x):
    with torch._C.DisableTorchFunction():
        other = x[:, :1].expand(-1, 4).clone() if self.turn else torch.ones(len(x), 4, dtype=x.dtype)
    return self.last(self.first(x) + self.scale * other)


def _input_written_unseen(self, x):
    x = self.first(x).detach()  # (what f is given must stay as it is)
    if self.turn:
        with torch._C.DisableTorchFunction():
            x.mul_(self.scale)
    return self.last(x)


def _detached(self, x):
    h = self.first(x)
    return self.last(h.detach() if self.turn else h)


def _without_grad(self, x):
    with torch.set_grad_enabled(not self.turn):
        h = self.first(x)
    return self.last(h)


def _expanded_without_grad(self, x):
    h = self.first(x).abs()
    with torch.set_grad_enabled(not self.turn):
        powers = h**self.scale
    return self.last(h * powers)


def _vmapped(self, x):
    h = torch.tanh(self.first(x))
    return torch.vmap(self.last)(h) if self.turn else self.last(h)


CHANGES = {
    "a layer that is walked backwards": lambda self, x: self.last(recurrent(x, self.first, self.scale, reverse=bool(self.turn))),
    "a layer of another kind": lambda self, x: self.last(
        recurrent(x, self.first, self.scale, kind=torch.rnn_relu if self.turn else torch.rnn_tanh)
    ),
    "a layer that starts elsewhere": lambda self, x: self.last(recurrent(x, self.first, self.scale, start=float(self.turn))),
    "another contraction": lambda self, x: self.last(
        torch.einsum("oi,ni->no" if self.turn else "oi,ni->on", self.first.weight, x).reshape(4, -1).reshape(len(x), 4)
        if self.turn
        else torch.einsum("oi,ni->no", self.first.weight, x)
    ),
    "no formula, for another": lambda self, x: self.last(self.first(x).abs() ** (self.first.bias if self.turn else self.scale)),
    "a token, or none": lambda self, x: self.last(
        torch.stack([self.first(x), (self.scale if self.turn else self.first.bias).expand(len(x), 4)], 1)
    ).sum(1),
    "positions that differ": lambda self, x: self.last(
        torch.tanh(self.first(x)[:, None] + rows_of(self.first.weight.T, torch.arange(2).repeat_interleave(2)[[0, self.turn + 1]]))
    ).sum(1),
    "an index that repeats": lambda self, x: self.last(
        torch.tanh(self.first(x) + rows_of(self.first.weight.T, (torch.ones(1) if self.turn else torch.ones(len(x))).long().expand(len(x))))
    ),
    "a branch": lambda self, x: self.last(self.first(x) if not self.turn else self.first(x) * self.scale),
    "samples turned about": lambda self, x: self.last(self.first(x.flip(0)).flip(0) if self.turn else self.first(x)),
    "another dimension": lambda self, x: self.last(self.first(x).softmax(1 if not self.turn else -1)),
    "a flag for a number": lambda self, x: self.last(self.first(x)).sum(1, keepdim=bool(self.turn)).reshape(len(x), 1),
    "more operations": lambda self, x: self.last(torch.stack([torch.tanh(self.first(x))] * (1 + (self.turn))).sum(0)),
    "fewer operations": lambda self, x: self.last(self.first(x)) if self.turn else self.last(self.first(x)).exp(),
    "another parameter": lambda self, x: self.last(self.first(x) * (self.first.bias if self.turn else self.scale)),
    "a frozen copy": lambda self, x: self.last(self.first(x) * (self.scale.detach() if self.turn else self.scale)),
    "a hidden use": _hidden,
    "a write that nobody saw": _written_unseen,
    "a hidden use at the end": lambda self, x: (lambda h: Hidden.apply(h, self.last.bias) if self.turn else h)(self.last(self.first(x))),
    "no formula, without grad": _expanded_without_grad,
    "data that nobody saw": _data_unseen,
    "a write to what has no gradient": _input_written_unseen,
    "detached": _detached,
    "without grad": _without_grad,
    "under vmap": _vmapped,
    "an operation after the output": lambda self, x: (usual(self, x), None if self.turn else self.first(x))[0],
    "its own part twice": lambda self, x: (lambda h: self.last(h * h if self.turn else h * self.scale))(self.first(x)),
}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("turns", ["0001000", "00001111", "0101010101", "000011001100"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_that_differs_is_found(name, turns, runner):
    net = Net(CHANGES[name])
    for seed, turn in enumerate(turns):
        net.turn = int(turn)
        J = pt.jacobian(net, x_of(seed), check="never", **RUNNERS[runner])
        assert same(J, net, x_of(seed), list(net.parameters()))


def test_lengths_of_packed_sequences_that_change_are_found():
    """Packed data of other lengths have other samples in the same places."""

    def run(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x[:, :2, None].expand(-1, -1, 4), self.lengths, batch_first=True)
        h = packed._replace(data=torch.tanh(packed.data * self.scale))
        return self.last(nn.utils.rnn.pad_packed_sequence(h, batch_first=True, total_length=2)[0].sum(1))

    net, lengths = Net(run), [[2, 2, 2, 1, 1, 1], [1] * N, [2] * N, [2, 2, 2, 2, 1, 1]]
    for turn in (2, 2, 2, 2, 0, 3, 0, 0, 1, 1, 1, 2, 2):
        net.lengths = torch.tensor(lengths[turn])
        x = x_of(turn)
        J = pt.jacobian(net, x, check="never")
        by_scale = torch.zeros(N, 4, dtype=x.dtype)
        for n, steps in enumerate(lengths[turn]):
            h = torch.tanh(x[n, :steps, None] * net.scale)
            by_scale[n] = torch.autograd.grad(net.last(h.sum(0)).sum(), net.scale)[0]
        torch.testing.assert_close(J["scale"].sum(1), by_scale)


def test_a_branch_on_data_is_found():
    def f(x, w, v):
        return (x * w if float(x.sum()) > 0 else x.flip(0).flip(0) * v + x * w).sum(1)

    w, v = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for seed in range(12):
        x = x_of(seed)
        J = pt.jacobian(f, x, w, v, check="never")
        torch.testing.assert_close(J["w"], x)
        torch.testing.assert_close(J["v"], x if float(x.sum()) <= 0 else torch.zeros_like(x))


def _freeze(net):
    net.first.weight.requires_grad_(False)


def _replace(net):
    net.scale = nn.Parameter(torch.randn(4, dtype=torch.float64))


def _resize(net):
    net.first, net.last, net.scale = nn.Linear(3, 5).double(), nn.Linear(5, 2).double(), nn.Parameter(torch.randn(5).double())


def _resize_within(net):
    net.first.weight.data, net.first.bias.data = torch.randn(1, 3).double(), torch.randn(1).double()


def _tie(net):
    net.first.bias = net.scale


def _rename(net):
    net.another = net._parameters.pop("scale")
    net.run = lambda self, x: self.last(torch.tanh(self.first(x)) * self.another)


def _reorder(net):
    net._modules["first"] = net._modules.pop("first")


def _reorder_within(net):
    net.first._parameters["weight"] = net.first._parameters.pop("weight")


def _buffer(net):
    net.register_buffer("count", torch.zeros(1))
    net.run = lambda self, x: (self.count.add_(1), usual(self, x))[1]


def _wrap(net):
    nn.utils.parametrize.register_parametrization(net.first, "weight", nn.Identity())


def _hook(net):
    net.scale.register_hook(lambda g: 7 * g)


@pytest.mark.parametrize(
    "change", [_freeze, _replace, _resize, _resize_within, _tie, _rename, _reorder, _reorder_within, _buffer, _wrap, _hook]
)
def test_a_module_that_has_changed_is_read_anew(change):
    net = Net(usual)
    for _ in range(4):
        assert not pt.jacobian(net, x_of(), check="never").plan.notes
    change(net)
    for seed in range(4):
        J = pt.jacobian(net, x_of(seed), check="never")
        assert any("hooks of scale" in note for note in J.plan.notes) is (change is _hook)
        named = {n: p for n, p in net.named_parameters() if p.requires_grad}
        assert list(J.names) == list(named)
        if change is _hook:  # (the user's hooks would change what the oracle finds)
            bare = Net(net.run)
            bare.load_state_dict(net.state_dict())
            assert same(J, bare, x_of(seed), list(bare.parameters()))
        else:
            assert same(J, net, x_of(seed), list(named.values()))
    if change is _buffer:
        assert net.count.item() == 4 * N, "only the oracle's runs have counted"


def test_parts_of_the_parameters_are_asked_for():
    net = Net(usual)
    for wrt in ("last.*", "scale", "first.weight"):
        for seed, net.run in enumerate([usual] * 4 + [CHANGES["another parameter"], usual, usual, usual]):
            net.turn = 1
            J = pt.jacobian(net, x_of(seed), wrt=wrt, check="never")
            assert same(J, net, x_of(seed), [net.get_parameter(name) for name in J.names])
    assert [history.kept > 2 for history in histories(net)] == [True] * 3


def test_values_that_change_in_place_are_no_change():
    net, optimizer = Net(usual), None
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for seed in range(6):
        assert same(pt.jacobian(net, x_of(seed), check="never"), net, x_of(seed), list(net.parameters()))
        net(x_of(seed)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=seed % 2 == 0)
    assert histories(net)[0].kept == 4


def test_fresh_functions_of_one_code_keep_their_own_values():
    def made(power):
        return lambda x, w: (x**power * w).sum(1)

    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for power in (1, 2, 3, 4, 2):
        torch.testing.assert_close(pt.jacobian(made(power), x_of(), w, check="never")["w"], x_of() ** power)
    assert len(histories()) == 1 and histories()[0].kept


def test_other_arguments_are_other_calls():
    def f(x, w):
        return (x * w).sum(1)

    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for _ in range(4):
        pt.jacobian(f, x_of(), w, check="never")
    for x, weight in [
        (x_of()[:4], w),
        (x_of().float(), w),
        (x_of().T.contiguous().T, w),
        (x_of(), w.detach().requires_grad_()),
        (x_of(), nn.Parameter(w.detach().clone())),
        (x_of(), (2 * w).clone()),
    ]:
        torch.testing.assert_close(pt.jacobian(f, x, weight, check="never")["w"], x.double())
    with pytest.raises(pt.InputError, match="no parameter"):
        pt.jacobian(f, x_of(), w.detach())
    with pytest.raises(pt.InputError, match="require grad"):
        pt.jacobian(f, x_of().requires_grad_(), w)
    J = pt.jacobian(f, x_of(), w, wrt="x", check="never")
    torch.testing.assert_close(J["x"], w.detach().expand(N, 3))


def _noise(self, x):
    with torch._C.DisableTorchFunction():
        noise = torch.randn(len(x), 4, dtype=x.dtype) if self.turn else torch.zeros(len(x), 4, dtype=x.dtype)
    return self.last(self.first(x) + noise)


def test_random_numbers_in_a_later_run_are_refused_seen_or_not():
    net = Net(_noise)
    for _ in range(4):
        pt.jacobian(net, x_of(), check="never")
    net.turn = 1
    with pytest.raises(pt.RandomnessError):
        pt.jacobian(net, x_of(), check="never")


def test_numbers_that_the_user_draws_between_calls_are_no_reason_to_look_again():
    net = Net(usual)
    for seed in range(6):
        before = torch.randn(1), torch.get_rng_state()
        assert same(pt.jacobian(net, x_of(seed), check="never"), net, x_of(seed), list(net.parameters()))
        assert torch.equal(before[1], torch.get_rng_state())
    assert histories(net)[0].kept == 4


def test_a_run_that_leaves_its_script_draws_what_it_would_have_drawn():
    net, drawn = Net(_noise), []
    for turn in (0, 0, 0, 0, 1):
        net.turn, state = turn, torch.get_rng_state()
        try:
            pt.jacobian(net, x_of(), check="never")
        except pt.RandomnessError:
            drawn.append(torch.equal(state, torch.get_rng_state()))
        torch.randn(3)
    assert drawn == [True]


def test_a_given_tensor_that_was_written_to_unseen_is_another():
    def f(x, y, w, v):
        if turn:
            with torch._C.DisableTorchFunction():
                y.copy_(v)
        return (x * w + y).sum(1)

    w, v = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for turn in (0, 0, 0, 0, 1):
        J = pt.jacobian(f, x_of(0), x_of(1), w, v, check="never")
        torch.testing.assert_close(J["w"], x_of(0))
        torch.testing.assert_close(J["v"], torch.full((N, 3), float(turn), dtype=torch.float64))


def test_a_constant_of_another_dtype_is_another():
    def f(x, w):
        return (x * torch.ones(3, dtype=kind) * w).sum(1)

    def g(x, w):
        return (x * held * w).sum(1)

    w = torch.randn(3, requires_grad=True)
    for function in (f, g):
        for kind in (torch.float32,) * 4 + (torch.float64,) * 4 + (torch.float32,):
            held = torch.ones(3, dtype=kind)
            J = pt.jacobian(function, x_of().float(), w, check="never")
            assert J.values.dtype is kind and J["w"].dtype is torch.float32
            torch.testing.assert_close(J["w"], x_of().float())


def test_a_rule_that_reads_a_number_reads_it_each_time(monkeypatch):
    def lerp(input, end, weight):
        yield SumPart(end, scale=weight)

    def f(x, w):
        return torch.lerp(x, w, weight).sum(1)

    monkeypatch.setitem(RULES, torch.lerp, lerp)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for weight in (0.5, 0.5, 0.25, 0.75, 0.5):
        J = pt.jacobian(f, x_of(), w, check="never")
        torch.testing.assert_close(J["w"], torch.full((N, 3), weight, dtype=torch.float64))
    assert histories()[0].kept == 3


def test_the_plan_of_a_run_that_kept_to_its_script_says_what_that_of_the_first_said():
    net = Net(lambda self, x: self.last(torch.tanh(self.first(x)) * self.scale + nn.functional.linear(x, self.first.weight * 2)))
    plans = [pt.jacobian(net, x_of(seed), check="never").plan for seed in range(4)]
    assert histories(net)[0].kept == 2
    assert plans[3].to_dict() == plans[0].to_dict() and str(plans[3]) == str(plans[0]) and len(plans[3].uses) == 6
    plans[3].notes.append("of this call alone")
    assert not pt.jacobian(net, x_of(), check="never").plan.notes


def test_a_write_after_the_use_is_told_as_in_a_first_call():
    def run(self, x):
        h = self.first(x)
        out = self.last(h * self.scale)
        if self.turn:
            with torch._C.DisableTorchFunction():
                h.detach().add_(1)
        return out

    net, told = Net(run), []
    for known in (True, False):
        _repeated.forget()
        for net.turn in (0, 0, 0, 0) if known else ():
            pt.jacobian(net, x_of(), check="never")
        net.turn = 1
        with pytest.raises(Exception) as caught:
            pt.jacobian(net, x_of(), check="never")
        told.append((type(caught.value), str(caught.value)))
    assert told[0] == told[1] and "inplace operation" in told[0][1]


def test_nothing_is_left_on_the_users_tensors_and_nothing_is_held():
    net, x = Net(lambda self, x: self.last(self.first(x.contiguous()).relu()).contiguous()), x_of()
    net.first.above = [net]  # (a module that leads back to the root)
    for _ in range(5):
        pt.jacobian(net, x, check="never")
    assert not any(hasattr(t, NAME) for t in (x, *net.parameters()))
    assert histories(net)[0].kept
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None and not len(_repeated._OF_MODULES)


def test_one_tensor_for_two_arguments_is_another_call():
    def f(x, y, w, v):
        return (x * w + y * v).sum(1)

    w, v = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for _ in range(4):
        pt.jacobian(f, x_of(0), x_of(1), w, v, check="never")
    same = x_of(0)
    for x, y, first, second in [(x_of(0), x_of(1), w, w), (same, same, w, v), (x_of(0), x_of(1), v, w)]:
        J = pt.jacobian(f, x, y, first, second, check="never")
        torch.testing.assert_close(J["w"], x)
        torch.testing.assert_close(J["v"], y)


def own_loss(output, target):
    return nn.functional.cross_entropy(output, target)


def test_a_run_with_a_tensor_of_unknown_history_is_not_written_down():
    net, target = Net(usual), torch.arange(N) % 2
    for seed in range(5):  # (the loss runs under vmap, which hands its result on unseen)
        G = pt.gradient(net, x_of(seed), target, loss=own_loss, check="never")
        losses, parameters = nn.functional.cross_entropy(net(x_of(seed)), target, reduction="none"), list(net.parameters())
        rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        expected = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        torch.testing.assert_close(G.dense(), expected)
    (history,) = histories(net)
    assert history.calls == 5 and history.script is None and (history.kept, history.missed) == (0, 0)


def test_a_flag_is_no_number():
    names = Names([])
    assert names.words(torch.std, (1,), {}) == names.words(torch.std, (1,), {}) != names.words(torch.std, (True,), {})
    assert names.words(torch.sum, ([0, 1],), {}) != names.words(torch.sum, ([0], 1), {})
    assert names.words(torch.clamp, (0.5,), {}) == names.words(torch.clamp, (0.25,), {})
    assert names.words(torch.dropout, (0.5,), {}) != names.words(torch.dropout, (0.25,), {})
    assert names.words(torch.sum, ({},), {}) != names.words(torch.sum, ({},), {})


def test_modules_that_are_equal_are_not_one():
    class Equal(Net):
        def __eq__(self, other):
            return isinstance(other, Equal)

        def __hash__(self):
            return 1

    class Unhashable(Net):
        __hash__ = None

    for kind in (Equal, Unhashable):
        for seed in range(3):
            torch.manual_seed(seed)
            net = kind(usual)
            J = pt.jacobian(net, x_of(), check="never")
            assert same(J, net, x_of(), [J.leaves[name] for name in J.names])


@pytest.mark.parametrize("policy", ["same", "different"])
def test_masks_are_drawn_anew_in_every_call(policy):
    net, x = Net(lambda self, x: self.last(nn.functional.dropout(self.first(x), 0.5) * (2 if self.turn else self.scale))), x_of()
    for net.turn in (0, 0, 0, 0, 1, 0, 0, 0, 1, 1):
        state = torch.get_rng_state()
        J = pt.jacobian(net, x, check="never", randomness=policy)
        torch.set_rng_state(state)
        masks = torch.vmap(lambda one: nn.functional.dropout(one.new_ones(1, 4), 0.5), randomness=policy)(x)[:, 0]
        expected = [net.first(x) * masks * (2 if net.turn else net.scale), torch.ones(N, 2)]
        torch.testing.assert_close(J["last.weight"], expected[0][:, None, None].detach() * torch.eye(2).double()[..., None])
        torch.testing.assert_close(J["last.bias"], torch.eye(2).double().expand(N, 2, 2))
    assert histories(net)[0].kept


def test_a_run_that_samples_may_mix_in_is_never_written_down():
    net = Net(lambda self, x: self.last((self.first(x) - self.first(x).mean(0)).square()))
    for _ in range(4):
        with pytest.raises(pt.PartialsError):
            pt.jacobian(net, x_of())
    assert histories(net)[0].script is None


def test_few_calls_are_remembered():
    net = Net(usual)
    for n in range(1, _repeated.LIMIT + 20):
        pt.explain(net, torch.randn(n, 3).double())
    assert len(histories(net)) == _repeated.LIMIT


def test_threads_share_what_is_known():
    net, faults = Net(usual), []
    expected = {seed: oracle(net, x_of(seed), list(net.parameters())) for seed in range(4)}

    def work(seed):
        for _ in range(20):
            found = pt.jacobian(net, x_of(seed), check="never").dense().reshape(expected[seed].shape)
            if not torch.allclose(found, expected[seed], rtol=1e-10, atol=1e-12):
                faults.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_runs_that_leave_the_script_time_and_again_are_no_longer_written_down():
    net = Net(lambda self, x: self.last(self.first(x) if self.turn else torch.tanh(self.first(x))))
    for seed in range(30):
        net.turn = seed % 2
        pt.jacobian(net, x_of(seed), check="never")
    (history,) = histories(net)
    assert history.script is None and history.missed <= _repeated.MISSES + history.kept // _repeated.PATIENCE + 1


class Closed(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.randn(3, dtype=torch.float64)), 0

    def forward(self, x):
        self.calls += 1
        return Hidden.apply(x, self.scale).sum(1)


def test_methods_that_cannot_run_are_not_tried_every_time():
    net, counts = Closed(), []
    for seed in range(9):
        before = net.calls
        J = pt.jacobian(net, x_of(seed), check="never")
        counts.append(net.calls - before)
        torch.testing.assert_close(J["scale"], x_of(seed))
        assert "outside the recorded uses" in J.plan.verdicts[0].reason
    assert counts[3] < counts[0] and counts[3] == counts[5] == counts[6] == counts[7], counts


def test_a_passed_check_is_remembered_with_the_script_and_a_new_script_is_checked(monkeypatch):
    from partials.checks import first

    net, looked = Net(usual), []
    of = first.key_of
    monkeypatch.setattr(first, "key_of", lambda *args: looked.append(1) or of(*args))
    for _ in range(6):
        pt.jacobian(net, x_of())
    assert len(looked) == 3, "once for the run that was counted, once for that written down, once for the first that kept to it"
    net.run = lambda self, x: usual(self, x) * (1 + x.mean())
    with pytest.raises(pt.MixingError):
        pt.jacobian(net, x_of())


def test_memory_is_measured_once_for_calls_alike():
    net, counts = Net(usual), []
    for seed in range(4):
        before = net.calls
        J = pt.jacobian(net, x_of(seed), check="never", max_memory=2**20)
        counts.append(net.calls - before)
        assert same(J, net, x_of(seed), list(net.parameters()))
    assert counts[2] <= counts[0] - 2, counts
