"""The notebook's table, row by row: f(x; a, b) = a x + b, then nn.Linear, each solved with the library and checked.

A row is a function that solves and says whether what it found is right. Where the mathematics is exact (products with one,
sums of one term), right means equal to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import partials as pt
from partials._plan import human_time

Tensor = torch.Tensor
SAMPLES = 1000
RECORDED = {
    "backward(), a loop over the batch": 0.173,
    "jacobian(), all partial derivatives": 0.0356,
    "jacobian(), parameters only": 0.0305,
}
"""Wall times of the notebook's batch cells, on its author's machine."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what is solved, and the function that solves it."""

    key: str
    what: str
    solve: Callable[[], Solved]


@dataclass(frozen=True)
class Solved:
    """Whether a row came out right, and what there is to say beside it."""

    right: bool
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """A row, solved or not, with its time."""

    key: str
    what: str
    right: bool
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        first, *more = self.detail.splitlines() or [""]
        head = f"{self.key:<4} {self.what:<74} {'ok' if self.right else 'NOT OK':<6} {human_time(self.seconds):>8}  {first}"
        return "\n".join([head.rstrip(), *(f"     {line}" for line in more)])


ROWS: list[Row] = []


def row(key: str, what: str) -> Callable[[Callable[[], Solved]], Callable[[], Solved]]:
    """Put a function into the table."""

    def put(solve: Callable[[], Solved]) -> Callable[[], Solved]:
        ROWS.append(Row(key, what, solve))
        return solve

    return put


def outcome(line: Row) -> Outcome:
    """Solve a row from a fixed seed, leaving the random state as it was; the time is that of a second run, all warm."""
    with torch.random.fork_rng(devices=[]):
        start = 0.0
        for _ in range(2):
            torch.manual_seed(0)
            start = time.perf_counter()
            try:
                solved = line.solve()
            except Exception as error:
                words = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                return Outcome(line.key, line.what, False, time.perf_counter() - start, words)
            if time.perf_counter() - start > 1:
                break
        return Outcome(line.key, line.what, solved.right, time.perf_counter() - start, solved.detail)


# --- the function of the notebook, and what is known about it ----------------------------------------------------------


def linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a * x + b


def parameters() -> tuple[Tensor, Tensor]:
    return torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True)


def is_gradient(x: Tensor, rows: dict[str, Tensor]) -> bool:
    """Whether rows by name are the partial derivatives of a x + b by a and b, exactly: x and 1."""
    first, second = rows.values()
    return torch.equal(first.flatten(), x.flatten()) and torch.equal(second.flatten(), torch.ones(x.numel()))


def untouched(*tensors: Tensor) -> bool:
    return all(tensor.grad is None for tensor in tensors)


# --- the rows -----------------------------------------------------------------------------------------------------------


@row("S1", "f(x; a, b) = a x + b: its three partial derivatives, exactly a, x and 1")
def three_partials() -> Solved:
    (a, b), x = parameters(), torch.randn(1)
    J = pt.jacobian(linear, x, a, b, wrt=("x", "a", "b"), batched=False)
    found = {name: rows.item() for name, rows in J.dict().items()}
    return Solved(found == {"x": a.item(), "a": x.item(), "b": 1.0})


@row("S2", "exact comparison with x and 1: one sample, a batch, and False if wrong")
def comparison() -> Solved:
    (a, b), x, one = parameters(), torch.randn(SAMPLES, 1), torch.randn(1)
    batch, single = pt.jacobian(linear, x, a, b).dict(), pt.jacobian(linear, one, a, b, batched=False).dict()
    wrong = {name: rows.clone() for name, rows in batch.items()}
    wrong["a"][7] = wrong["a"][7].nextafter(torch.tensor(torch.inf))
    refused = not is_gradient(x, wrong) and not is_gradient(one, {"a": one + 1, "b": torch.ones(1)})
    return Solved(is_gradient(x, batch) and is_gradient(one, single) and refused, "one bit off in one of 1000 samples is noticed")


@row("S3", "backward(), one sample")
def backward_of_one() -> Solved:
    return _single("backward")


@row("S4", "backward(), a batch of 1000")
def backward_of_batch() -> Solved:
    return _batch("backward")


@row("S5", "grad(), one sample")
def grad_of_one() -> Solved:
    return _single("grad")


@row("S6", "grad(), a batch of 1000, where the notebook's call raised an error")
def grad_of_batch() -> Solved:
    return _batch("grad")


@row("S7", "u(x, t): u_t, u_x, u_xx, and a residual with u_xx by a net's parameters")
def second_derivatives() -> Solved:
    x, t = torch.rand(100, 1, dtype=torch.float64), torch.rand(100, 1, dtype=torch.float64)

    def wave(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x) * torch.exp(-t)

    d = pt.derivatives(wave, "t", "x", "xx")(x, t)
    u = wave(x, t)
    known = {"t": -u, "x": 2 * torch.cos(2 * x) * torch.exp(-t), "xx": -4 * u}
    worst = max(float((d[name].reshape(u.shape) - value).abs().max()) for name, value in known.items())
    alone = float((pt.partial(wave, "xx")(x, t).reshape(u.shape) - known["xx"]).abs().max())

    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    def residual(x: Tensor, t: Tensor) -> Tensor:
        d = pt.derivatives(lambda x, t: net(torch.cat([x, t], -1)), "t", "xx")(x, t)
        return d["t"] - d["xx"]

    J = pt.jacobian(residual, x, t, params=net)
    by_hand = _residual_rows(net, x[:1], t[:1])
    apart = float((J[0].dense().flatten() - by_hand).norm() / by_hand.norm())
    return Solved(max(worst, alone) < 1e-13 and apart < 1e-12 and len(J) == 100, f"errors {max(worst, alone):.0g} and {apart:.0e}")


@row("S8", "jacobian(), one sample, all partial derivatives")
def jacobian_of_one() -> Solved:
    return _single("jacobian", everything=True)


@row("S9", "jacobian(), one sample, parameters only")
def jacobian_of_one_by_parameters() -> Solved:
    return _single("jacobian")


@row("S10", "jacobian(), a batch of 1000, all partial derivatives")
def jacobian_of_batch() -> Solved:
    return _batch("jacobian", everything=True)


@row("S11", "jacobian(), a batch of 1000, parameters only")
def jacobian_of_batch_by_parameters() -> Solved:
    return _batch("jacobian")


@row("S12", "nn.Linear, one sample")
def module_of_one() -> Solved:
    model, x = nn.Linear(1, 1), torch.randn(1)
    return Solved(is_gradient(x, pt.jacobian(model, x, batched=False).dict()) and untouched(*model.parameters()))


@row("S13", "nn.Linear, a batch of 10, where the notebook's matrix was all zeros")
def module_of_batch() -> Solved:
    model, x = nn.Linear(1, 1), torch.randn(10, 1)
    J = pt.jacobian(model, x, method="backward")
    matrix = torch.stack([rows.flatten() for rows in J.dict().values()], 1)
    return Solved(torch.equal(matrix, torch.cat([x, torch.ones(10, 1)], 1)) and untouched(*model.parameters()))


@row("S14", "nn.Linear, a batch of 10, jacobian(): same shapes, model untouched")
def module_by_jacobian() -> Solved:
    model, x = nn.Linear(1, 1), torch.randn(10, 1)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    rows = pt.jacobian(model, x, method="jacobian").dict()
    same = all(parameter is before[name][0] and torch.equal(parameter, before[name][1]) for name, parameter in model.named_parameters())
    shapes = [tuple(part.shape) for part in rows.values()]
    right = is_gradient(x, rows) and same and untouched(*model.parameters()) and shapes == [(10, 1, 1, 1), (10, 1, 1)]
    return Solved(right, " and ".join(map(str, shapes)))


@row("S15", "the notebook's times for a batch of 1000, beside ours")
def times() -> Solved:
    (a, b), x = parameters(), torch.randn(SAMPLES, 1)
    found = pt.compare(linear, x, a, b, repeats=5)
    exact = all(line.error == 0 for line in found.measured)
    lines = ["  in the notebook, on its author's machine", *(_timing(what, seconds) for what, seconds in RECORDED.items())]
    lines += [f"  here, {'every one exact' if exact else 'NOT ALL EXACT'}", *(_timing(line.method, line.median) for line in found.measured)]
    return Solved(bool(found.measured) and exact, "\n".join(["", *lines]))


# --- shared by rows -----------------------------------------------------------------------------------------------------


def _single(method: str, *, everything: bool = False) -> Solved:
    (a, b), x = parameters(), torch.randn(1)
    return _solved(pt.jacobian(linear, x, a, b, method=method, batched=False, wrt=("x", "a", "b") if everything else None).dict(), x, a, b)


def _batch(method: str, *, everything: bool = False) -> Solved:
    (a, b), x = parameters(), torch.randn(SAMPLES, 1)
    return _solved(pt.jacobian(linear, x, a, b, method=method, wrt=("x", "a", "b") if everything else None).dict(), x, a, b)


def _solved(rows: dict[str, Tensor], x: Tensor, a: Tensor, b: Tensor) -> Solved:
    by_input = rows.pop("x", None)
    exact = by_input is None or torch.equal(by_input.flatten(), a.detach().expand(x.numel()))
    shapes = all(part.shape == (*x.shape, 1) for part in rows.values())
    return Solved(exact and shapes and is_gradient(x, rows) and untouched(a, b))


def _timing(what: str, seconds: float) -> str:
    return f"    {what:<40}{human_time(seconds):>9}"


def _residual_rows(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """u_t - u_xx of one point by torch.autograd, differentiated by every parameter: (P,)."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    u = net(torch.cat([x, t], -1))
    u_t, u_x = torch.autograd.grad(u.sum(), (t, x), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    rows = torch.autograd.grad((u_t - u_xx).sum(), list(net.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(rows, net.parameters(), strict=True)])
