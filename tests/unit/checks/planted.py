"""Planted errors: Jacobians that are wrong in one way each, and the table of which check sees which.

`python -m tests.unit.checks.planted` (with src on the path) prints the table of docs/checks.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials._blocks import Dense
from partials.checks import draws

N, WIDTH = 8, 5
CHECKS = ("shape", "independence", "values", "backward", "product", "alone")


class Twice(nn.Module):
    """A square weight that is used twice, and a head; every parameter's rows differ between samples."""

    def __init__(self, keep: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        self.keep = keep
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        self.scale = nn.Parameter(torch.rand(()) + 0.5)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        first, second = (self.weight if kept else self.weight.detach() for kept in self.keep)
        return torch.tanh(self.scale * self.head(torch.tanh(F.linear(torch.tanh(F.linear(x, first)), second))))


PARAMETERS = ("weight", "scale", "head.weight", "head.bias")


def problem(dtype=torch.float32, seed=0):
    """(module, inputs)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Twice().to(dtype), torch.randn(N, WIDTH, dtype=dtype)


def correct(dtype=torch.float32, seed=0, method="vmap"):
    net, x = problem(dtype, seed)
    return pt.jacobian(net, x, method=method, check="never")


# --- errors in the rows of one parameter: (N, C, *shape) -> the same, wrong ----------------------------------------


def too_large(rows):
    return rows * 1.001


def sign(rows):
    return -rows


def missing(rows):
    return torch.zeros_like(rows)


def swapped_samples(rows):
    return rows[[0, 1, 5, 3, 4, 2, 6, 7]]


def swapped_columns(rows):
    flat = rows.reshape(*rows.shape[:2], -1).clone()
    flat[:, :, [0, -1]] = flat[:, :, [-1, 0]]
    return flat.reshape(rows.shape)


def swapped_outputs(rows):
    return rows[:, [1, 0, 2]]


def one_entry(rows):
    """1e-2 of the row's norm in float32, 1e-6 in float64."""
    flat = rows.reshape(*rows.shape[:2], -1).clone()
    flat[3, 1, -1] += flat[3, 1].norm() * (1e-2 if rows.dtype is torch.float32 else 1e-6)
    return flat.reshape(rows.shape)


def leaking(rows):
    out = rows.clone()
    out[2] += 0.01 * rows[5]
    return out


def wrong_row(rows):
    out = rows.clone()
    out[6, 0] *= 1.01
    return out


def zero_sample(rows):
    out = rows.clone()
    out[4] = 0
    return out


def transposed(rows):
    return rows.mT.contiguous()


ROWS: dict[str, Callable] = {
    "rows 0.1 % too large": too_large,
    "rows of the other sign": sign,
    "rows missing (zeros)": missing,
    "two samples swapped": swapped_samples,
    "two columns swapped": swapped_columns,
    "two outputs swapped": swapped_outputs,
    "one entry off by 1 % of its row": one_entry,
    "1 % of one sample in another": leaking,
    "one row of one sample 1 % off": wrong_row,
    "one sample's rows zero": zero_sample,
    "transposed": transposed,
}


def planted(J, name, error):
    """J with the rows of one parameter wrong; None where the error changes nothing (one entry has no columns to swap)."""
    rows = J.blocks[name][0].dense()
    if error is transposed and rows.ndim != 4:
        return None
    wrong = error(rows)
    if wrong.shape == rows.shape and torch.equal(wrong, rows):
        return None
    return replace(J, blocks={**J.blocks, name: (Dense(wrong),)})


def dropped_use(J, dtype=torch.float32, seed=0, use=0):
    """J whose rows of `weight` lack one of its two uses."""
    net, x = problem(dtype, seed)
    part = Twice((use != 0, use != 1)).to(dtype)
    part.load_state_dict(net.state_dict())
    other = pt.jacobian(part, x, method="vmap", check="never")
    return replace(J, blocks={**J.blocks, "weight": other.blocks["weight"]})


def wrong_values(J):
    values = J.values.clone()
    values[3, 1] += 1e-3
    return replace(J, values=values)


# --- errors in one operation of a block --------------------------------------------------------------------------


@dataclass(frozen=True)
class WrongProduct(Dense):
    """J v forgets the last column."""

    def matmul(self, v):
        flat = self.values.flatten(2)
        return flat[..., :-1] @ v.reshape(-1, v.shape[-1])[:-1]


@dataclass(frozen=True)
class WrongTranspose(Dense):
    """J^T u forgets the last sample."""

    def rmatmul(self, u):
        return Dense(self.values[:-1]).rmatmul(u[:-1])


def wrong_operation(J, kind, name="weight"):
    return replace(J, blocks={**J.blocks, name: (kind(J.blocks[name][0].dense()),)})


# --- functions that mix samples ----------------------------------------------------------------------------------

MIXING: dict[str, Callable] = {
    "x - x.mean(0)": lambda x, a: a * (x - x.mean(0)),
    "x - x.mean(0).detach()": lambda x, a: a * (x - x.mean(0).detach()),
    "softmax over the batch": lambda x, a: (a * x).softmax(0),
    "cumsum over the batch": lambda x, a: a * x.cumsum(0),
    "one sample in another": lambda x, a: a * (x + 0.01 * x[2].sum() * F.one_hot(torch.tensor(5), len(x)).to(x)[:, None]),
    "train-mode batch norm": None,
    "integer input, embedded, centred": None,
}


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        h = self.table(tokens).mean(1)
        return self.head(h - h.mean(0))


def mixing(name, seed=0):
    """(f, inputs) of a function that mixes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "train-mode batch norm":
            return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), (torch.randn(N, 4),)
        if name == "integer input, embedded, centred":
            return Centred(), (torch.randint(7, (N, 3)),)
        return MIXING[name], (torch.randn(N, 4), torch.randn(4, requires_grad=True))


# --- the table ---------------------------------------------------------------------------------------------------

SEEDS = range(10)


def seen_by(J, seed) -> set[str]:
    """The checks that failed."""
    original = draws.fresh_seed
    draws.fresh_seed = lambda: seed
    try:
        return {row.check for row in J.check().failures}
    finally:
        draws.fresh_seed = original


def mixing_seen_by(name, method, seed) -> str:
    """The check behind the MixingError."""
    original = draws.fresh_seed
    draws.fresh_seed = lambda: seed
    f, inputs = mixing(name)
    try:
        pt.check(f, *inputs, method=method)
    except pt.MixingError as error:
        if "derivative" in error.got:
            return "independence"
        return "alone" if method == "grad" else "values"
    finally:
        draws.fresh_seed = original
    return ""


def table() -> str:
    """For each planted error, in how many of 10 seeds each check sees it."""
    lines = [f"| planted error | {' | '.join(f'`{check}`' for check in CHECKS)} |", "| --- |" + " ---: |" * len(CHECKS)]

    def line(words, found):
        counts = [sum(check in seen for seen in found) for check in CHECKS]
        assert all(found), words
        lines.append(f"| {words} | {' | '.join(str(count) if count else '' for count in counts)} |")

    J = correct()
    for words, error in ROWS.items():
        line(words, [seen_by(planted(J, "weight", error), seed) for seed in SEEDS])
    line("transposed, of another shape", [seen_by(planted(J, "head.weight", transposed), seed) for seed in SEEDS])
    line("one of two uses of a weight dropped", [seen_by(dropped_use(J), seed) for seed in SEEDS])
    line("one value off by 1e-3", [seen_by(wrong_values(J), seed) for seed in SEEDS])
    line("`J @ v` forgets a column", [seen_by(wrong_operation(J, WrongProduct), seed) for seed in SEEDS])
    line("`J.T @ u` forgets a sample", [seen_by(wrong_operation(J, WrongTranspose), seed) for seed in SEEDS])
    for name in MIXING:
        line(f"f mixes: {name}", [{mixing_seen_by(name, "grad", seed)} for seed in SEEDS])
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
