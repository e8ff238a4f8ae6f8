"""Sums of very many terms round by more than their parts: such networks are healthy, and faults in them are found all the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import partials as pt
from partials._blocks import Dense


class Pooled(nn.Module):
    """The mean over positions of a normalised sequence: every position adds the same number to the gradient of the norm's bias."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 6)

    def forward(self, x):
        return self.head(self.norm(self.first(x).tanh())).mean(1)


def pooled(seed, n=24, t=512):
    torch.manual_seed(seed)
    return Pooled(), torch.randn(n, t, 8)


def convolutions(seed, blocks=12, width=8, n=16, side=16):
    """A convolution and a ReLU, twelve times over, then the mean over pixels."""
    torch.manual_seed(seed)
    layers = [layer for i in range(blocks) for layer in (nn.Conv2d(width if i else 3, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)), torch.randn(n, 3, side, side)


def altered(J, name, change):
    rows = J.blocks[name][0].dense().clone()
    change(rows)
    return replace(J, blocks={**J.blocks, name: (Dense(rows),)})


@pytest.mark.parametrize("method", ["auto", "vmap"])
@pytest.mark.parametrize("make", [pooled, convolutions])
def test_healthy_networks_pass(make, method):
    explained = []
    for seed in range(4):
        net, x = make(seed)
        report = pt.jacobian(net, x, method=method, check="never").check()
        assert report.passed, f"seed {seed}\n{report}"
        explained += [row for row in report.rows if row.verdict == "explained" and row.check == "backward"]
    assert any("one in float64, to which this sum keeps" in row.remark for row in explained), "nothing rounded: no test"


@pytest.mark.parametrize(("make", "name"), [(pooled, "norm.bias"), (convolutions, "22.bias"), (convolutions, "18.bias")])
@pytest.mark.parametrize("change", ["everything", "one sample", "one output", "one entry"])
def test_an_error_of_a_hundredth_is_found(make, name, change):
    net, x = make(0)

    def wrong(rows):
        if change == "everything":
            rows *= 1.01
        elif change == "one sample":
            rows[5] *= 1.01
        elif change == "one output":
            rows[:, 2] *= 1.01
        else:
            rows[3, 1, 2] += 0.01 * rows[3, 1].norm()

    report = altered(pt.jacobian(net, x, check="never"), name, wrong).check()
    assert {row.parameter for row in report.failures} == {name}
    row = next(row for row in report.failures if row.check == "backward")
    assert change in ("everything", "one output") or row.where.sample == {"one sample": 5, "one entry": 3}[change]


@dataclass(frozen=True)
class WrongInLargeSums(Dense):
    """Right on a few samples; a thousandth too large on many."""

    def select(self, index):
        return WrongInLargeSums(self.values[index])

    def rmatmul(self, u):
        return Dense(self.values).rmatmul(u) * (1.001 if len(self.values) > 16 else 1)


@dataclass(frozen=True)
class WrongInLargeProducts(WrongInLargeSums):
    def matmul(self, v):
        return Dense(self.values).matmul(v) * (1.001 if len(self.values) > 16 else 1)

    def rmatmul(self, u):
        return Dense(self.values).rmatmul(u)


@pytest.mark.parametrize(("kind", "check"), [(WrongInLargeSums, "backward"), (WrongInLargeProducts, "product")])
def test_a_fault_of_the_sum_that_its_parts_do_not_have_is_found(kind, check):
    net, x = pooled(0)
    J = pt.jacobian(net, x, check="never")
    J = replace(J, blocks={**J.blocks, "norm.bias": (kind(J.blocks["norm.bias"][0].dense()),)})
    assert check in {row.check for row in J.check().failures if row.parameter == "norm.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_an_ordinary_backward_rounds_worse_is_judged_by_another_precision(dtype):
    """One sample of very many positions: there is no part to look at by itself."""
    for seed in range(3):
        net, x = pooled(seed, n=1, t=20_000)
        net, x = net.to(dtype), x.to(dtype)
        J = pt.jacobian(net, x, check="never")
        report = J.check()
        assert report.passed, report
        row = next(row for row in report.rows if row.parameter == "norm.bias" and row.check == "backward")
        assert ("in float64, to which this row keeps" if dtype is torch.float32 else "in float32 is as many of its eps") in row.remark

        def wrong(rows):
            rows[0, 3] *= 1.01 if dtype is torch.float32 else 1 + 1e-9

        assert {row.parameter for row in altered(J, "norm.bias", wrong).check().failures} == {"norm.bias"}
