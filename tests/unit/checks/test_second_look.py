"""What differs by more than rounding and is right (kinks, cancellation), and what hides there and is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import partials as pt
from partials._blocks import Dense
from partials.checks.cloud import belongs
from tests.unit.checks.nets import healthy


def altered(J, name, change):
    rows = J.blocks[name][0].dense().clone()
    change(rows)
    return replace(J, blocks={**J.blocks, name: (Dense(rows),)})


class Kinked(nn.Module):
    """relu(w.x) in eight units; sample 3 has a pre-activation within rounding of zero in unit 2."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.first(x).relu())


def kinked(dtype):
    torch.manual_seed(4)
    net, x = Kinked().to(dtype), torch.randn(16, 6, dtype=dtype)
    with torch.no_grad():
        w = net.first.weight[2].double()
        x3 = x[3].double()
        x[3] = (x3 - (x3 @ w) / (w @ w) * w).to(dtype)
        assert abs(float(net.first(x)[3, 2])) < 4 * torch.finfo(dtype).eps
    return net, x


def other_side(net, x):
    """The Jacobian of sample 3 from just across the kink."""
    moved = x.clone()
    with torch.no_grad():
        step = net.first.weight[2] * (1e-3 if float(net.first(x)[3, 2]) <= 0 else -1e-3)
        moved[3] += step
    across = pt.jacobian(net, moved, method="vmap", check="never")
    near = pt.jacobian(net, x, method="vmap", check="never")
    rows = {name: near.blocks[name][0].dense().clone() for name in near.names}
    unit = torch.zeros(8, dtype=torch.bool)
    unit[2] = True
    on = bool(across["first.weight"][3, :, 2].any())
    rows["first.weight"][3, :, 2] = net.head.weight[:, 2, None].detach() * x[3] * on
    return replace(near, blocks={name: (Dense(part),) for name, part in rows.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_other_side_of_a_kink_is_explained(dtype):
    net, x = kinked(dtype)
    report = other_side(net, x).check()
    assert report.passed
    row = report.worst("backward")
    assert row.verdict == "explained" and row.error > 1e-3 and "sample 3" in row.remark and "a kink" in row.remark
    assert "explained" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sample", [3, 5])
def test_an_error_beside_a_kink_is_found(sample, dtype):
    net, x = kinked(dtype)

    def change(rows):
        unit = max((n for n in range(8) if n != 2), key=lambda n: float(rows[sample, 0, n].norm()))
        rows[sample, :, unit] *= 1.001

    J = altered(other_side(net, x), "first.weight", change)
    report = J.check()
    assert {row.parameter for row in report.failures} == {"first.weight"}
    assert next(row for row in report.failures if row.check == "backward").where.sample == sample


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_are_all_rounding_are_explained(seed):
    """The bias of attention's keys: softmax ignores it, so its rows are rounding errors, in every method others."""
    net, x = healthy("transformer", seed)
    report = pt.check(net, *x, method="vmap")
    assert report.passed
    assert {(row.parameter, row.verdict) for row in report.rows if row.verdict != "passed"} == {("block.k.bias", "explained")}


@pytest.mark.parametrize("seed", range(5))
def test_errors_among_rounding_are_found(seed):
    net, x = healthy("transformer", seed)
    J = pt.jacobian(net, *x, method="vmap", check="never")

    def change(rows):
        rows[1, 0] += 1e-4

    report = altered(J, "block.k.bias", change).check()
    assert {row.parameter for row in report.failures} == {"block.k.bias"}


@pytest.mark.parametrize("method", ["auto", "vmap", "grad"])
def test_outputs_that_cancel_are_explained_and_their_errors_found(method):
    net, x = healthy("cancelling", 1)
    J = pt.jacobian(net, *x, method=method, check="never")
    assert J.check().passed

    def change(rows):
        rows[4] *= 1.05

    assert not altered(J, "net.2.weight", change).check().passed


def test_a_cloud_in_groups():
    """Fourteen members about 0, two about 1: members of either group belong, what is between does not, nor what is beyond."""
    torch.manual_seed(0)
    members = torch.randn(16, 50, dtype=torch.float64) * 1e-6
    members[14:] += 1
    inside = torch.randn(50, dtype=torch.float64) * 1e-6
    assert belongs(inside, members, 0.0) and belongs(inside + 1, members, 0.0)
    assert not belongs(inside + 2, members, 0.0) and not belongs(inside + 10, members, 0.0)
    assert belongs(members[0], members, 0.0)


def test_a_tight_cloud():
    torch.manual_seed(0)
    members = 1 + torch.randn(16, 3, dtype=torch.float64) * 1e-7
    assert belongs(torch.ones(3, dtype=torch.float64), members, 0.0)
    assert not belongs(torch.ones(3, dtype=torch.float64) * 1.00001, members, 0.0)
    assert belongs(torch.ones(3, dtype=torch.float64) * 1.00001, members, 1e-4)


def test_numbers_that_coincide():
    """Where terms cancel in float32, few digits are left: most members are the same number."""
    quantum = 2.0**-24
    members = 2.0**-14 + torch.tensor([[0.0], [quantum]] * 3 + [[0.0]] * 10)
    assert belongs(members[0] + 2 * quantum, members, 0.0)
    assert not belongs(members[0] + 200 * quantum, members, 0.0)


def test_slopes_of_zero_and_one():
    """The derivative of a kink by its own shift: nothing between the two is right, however few the members."""
    members = torch.tensor([[0.0], [1.0]] * 8)
    assert belongs(torch.zeros(1), members, 1e-6) and belongs(torch.ones(1), members, 1e-6)
    assert not belongs(torch.tensor([1.001]), members, 1e-6) and not belongs(torch.tensor([0.5]), members, 1e-6)


# --- arithmetic that is coarser inside ---------------------------------------------------------------------------


class Coarse(nn.Linear):
    """float32 outside, bfloat16 inside."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).tanh().float().cumsum(1)


def test_coarser_arithmetic_inside_is_seen_and_said():
    net, x = Coarse(20, 6), torch.randn(16, 20)
    J = pt.jacobian(net, x, method="vmap", check="never")
    report = J.check()
    assert report.passed

    def sign(rows):
        rows[2] *= -1

    assert not altered(J, "weight", sign).check().passed


def test_a_function_that_rounds_inside():
    def f(x, a):
        return a * (x.bfloat16() * 3).float()

    a = torch.randn(5, requires_grad=True)
    J = pt.jacobian(f, torch.randn(8, 5), a, method="vmap", check="never")

    def little(rows):
        rows *= 1.0001

    report = altered(J, "a", little).check()
    assert report.passed and any("f computes in bfloat16 inside" in note for note in report.notes)
    assert next(row for row in report.rows if row.check == "backward").tolerance == 64 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    net, x = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype), torch.randn(12, 20, dtype=dtype)
    J = pt.jacobian(net, x, method="vmap", check="never")
    assert J.check().passed

    def sign(rows):
        rows[2] *= -1

    assert not altered(J, "0.weight", sign).check().passed


def test_numbers_in_steps_of_which_some_coincide():
    """Terms that cancel leave multiples of one quantum, beside rounding that is a hundredth of it: a row may be any multiple."""
    torch.manual_seed(0)
    quantum, noise = 2.0**-52, 2.0**-59
    steps = torch.tensor([0, 0, 1, 1, 2, 2, 4, 4, 5, 8, 9, 12, 15, 19, 23, 28], dtype=torch.float64)
    members = torch.ones(4, dtype=torch.float64) * steps[:, None] * quantum + noise * torch.randn(16, 4, dtype=torch.float64)
    assert belongs(6 * quantum * torch.ones(4, dtype=torch.float64), members, 0.0)
    assert not belongs(600 * quantum * torch.ones(4, dtype=torch.float64), members, 0.0)


def sure(dtype, scale):
    """A classifier that is sure of itself: of 1 - p few digits are left, or none."""
    return nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)).to(dtype), scale * torch.randn(6, 3, dtype=dtype)


class KeyBias(nn.Module):
    """Attention that is sure of itself, whose keys have a bias: every row of it is zero but for rounding."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))[:, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_terms_that_cancel_to_nothing(dtype, seed):
    torch.manual_seed(seed)
    attention = KeyBias().to(dtype)
    cases = [sure(dtype, 20), sure(dtype, 80), *[(attention, scale * torch.randn(3, 5, 4, dtype=dtype)) for scale in (1, 4, 16)]]
    for net, x in cases:
        pt.jacobian(net, x, check="always")


@pytest.mark.parametrize("factor", [1 + 1e-4, -1, 2])
def test_a_fault_where_terms_cancel(factor):
    torch.manual_seed(0)
    net, x = sure(torch.float32, 3)
    J = pt.jacobian(net, x, check="never")
    report = altered(J, "0.weight", lambda rows: rows.mul_(factor)).check()
    assert not report.passed


CHANGING = {
    "over its norm": lambda g: g / g.norm(),
    "clamped": lambda g: g.clamp(-0.1, 0.1),
    "its positive part": lambda g: g.clamp(min=0),
    "its largest entries": lambda g: g * (g.abs() >= g.abs().median()),
    "its square with a sign": lambda g: g * g.abs() / g.abs().sum(),
}


class Activated(nn.Module):
    """A hook on an activation, registered in every call."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        h = torch.tanh(x)
        h.register_hook(self.change)
        return h


class Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return ctx.change(g), None


class OwnFunction(Activated):
    def forward(self, x):
        return Passed.apply(x, self.change)


def hooked(change):
    module = nn.Tanh()
    module.register_full_backward_hook(lambda module, given, out: (change(given[0]),))
    return module


@pytest.mark.parametrize("way", [hooked, Activated, OwnFunction])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CHANGING)
def test_a_backward_that_is_not_linear_is_no_rounding(name, dtype, way):
    """Sums of backwards differ from the backward of the sum as they do by rounding, but in every precision alike."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), way(CHANGING[name]), nn.Linear(6, 2)).to(dtype)
    with pytest.raises((pt.CheckError, pt.MixingError)):
        pt.jacobian(net, torch.randn(6, 4, dtype=dtype), check="always")
