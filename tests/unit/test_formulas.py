"""Formulas: each gives the oracle's numbers where it is asked for, is really taken, and shows in the plan with its estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Thread

import pytest
import torch
from torch import nn

import partials as pt
from partials import _factors, _formulas, _room
from partials._conv import Conv
from partials.testing import Call, loop
from tests.oracle import dense

Tensor = torch.Tensor


class Tokens(nn.Module):
    """One weight used at seven positions, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.tanh(self.mix(x)))).tanh().mean(1)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (Tokens(), torch.randn(4, 7, 5)),
    "conv": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Flatten(), nn.Tanh(), nn.Linear(27, 2)),
        torch.randn(4, 2, 6, 6),
    ),
    "grouped conv": lambda: (nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, dilation=2), nn.Tanh(), nn.Flatten()), torch.randn(4, 4, 6)),
}
CHOICES = [(quantity, formula) for quantity, known in _formulas.FORMULAS.items() for formula in known]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net, x = CASES[request.param]()
        yield net.double(), x.double()


@pytest.mark.parametrize(("quantity", "formula"), CHOICES)
def test_every_formula_gives_the_numbers_of_the_oracle(quantity, formula, case):
    net, x = case
    J = pt.jacobian(net, x, check="never")
    rows = dense(loop(Call(net, (x,), dict(net.named_parameters()), {}))[1], 2)
    v, u = torch.randn(rows.shape[-1], 6, dtype=x.dtype), torch.randn(*rows.shape[:-1], 6, dtype=x.dtype)
    with pt.formulas(**{quantity: formula}):
        torch.testing.assert_close(J.norms(), rows.norm(dim=-1))
        torch.testing.assert_close(J.gram(), torch.einsum("ncp,mdp->ncmd", rows, rows))
        torch.testing.assert_close(J.gram_blocks(), torch.einsum("ncp,ndp->ncd", rows, rows))
        torch.testing.assert_close(J.dense(), rows)
        torch.testing.assert_close(J.dense(out=torch.empty_like(rows)), rows)
        torch.testing.assert_close(J @ v, rows @ v)
        torch.testing.assert_close(J.T @ u, torch.einsum("ncp,nck->pk", rows, u))


def test_what_is_asked_for_is_taken(monkeypatch):
    taken: list[str] = []
    for name in ("_joined_by_pairs", "_joined_by_rows", "_gram_by_pairs", "_gram_by_dots", "_gram_by_rows"):
        inner = getattr(_factors, name)
        monkeypatch.setattr(_factors, name, lambda *args, inner=inner, name=name: (taken.append(name), inner(*args))[1])
    J = pt.jacobian(Tokens(), torch.randn(4, 7, 5), check="never")
    for norms in _formulas.FORMULAS["norms"]:
        with pt.formulas(norms=norms):
            J.norms()
        assert {*taken} == {f"_joined_by_{norms}"}
        taken.clear()
    for gram in _formulas.FORMULAS["gram"]:
        with pt.formulas(gram=gram):
            J.gram()
        assert {*taken} == {f"_gram_by_{gram}"}
        taken.clear()


def test_convolutions_take_what_is_asked_for(monkeypatch):
    seen: list[str] = []
    strips, patched = Conv._strips, Conv._patched
    monkeypatch.setattr(Conv, "_strips", lambda self: (seen.append("offsets"), strips(self))[1])
    monkeypatch.setattr(Conv, "_patched", lambda self: (seen.append("patches"), patched(self))[1])
    net, x = CASES["conv"]()
    J = pt.jacobian(net, x, check="never")
    for formula in _formulas.FORMULAS["dense"]:
        with pt.formulas(dense=formula):
            J.dense()
        assert {*seen} == {formula}
        seen.clear()


@pytest.mark.parametrize("room", [1, 2**40])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("padding", [((1, 0), (0, 2), (0, 0)), ((1, 1), (2, 2), (0, 0))])
def test_rows_of_convolutions_are_the_same_by_each_formula(padding, n, dims, room):
    """Strides, padding on one side, dilation, groups, frames and several outputs; gradients too, where memory must not be used again."""
    stride, dilation, padding, size = (2, 1, 2)[:dims], (1, 2, 1)[:dims], padding[:dims], (6, 7, 5)[:dims]
    x = torch.randn(n, 2, 4, *size, dtype=torch.float64, requires_grad=True)
    wide = [low + high + length for (low, high), length in zip(padding, size, strict=True)]
    space = [(length - gap * 2 - 1) // step + 1 for length, gap, step in zip(wide, dilation, stride, strict=True)]
    g = torch.randn(n, 3, 2, 6, *space, dtype=torch.float64, requires_grad=True)
    block = Conv(x, g, (6, 2, *(3,) * dims), stride, padding, dilation, 2)
    found, slopes, out = {}, {}, torch.randn(n, 3, 6 * 2 * 3**dims, dtype=torch.float64)
    for formula in _formulas.FORMULAS["dense"]:
        with pt.formulas(dense=formula), _room.limited(room):
            rows = block.dense()
            slopes[formula] = torch.autograd.grad(rows.square().sum(), (x, g))
            with torch.no_grad():
                found[formula] = (rows.detach(), out.clone(), out.clone(), block.squared_norms())
                block.write(found[formula][1])
                block.write(found[formula][2], add=True)
    torch.testing.assert_close(found["patches"], found["offsets"])
    torch.testing.assert_close(slopes["patches"], slopes["offsets"])
    rows, written, added, norms = found["patches"]
    v, u = torch.randn(*block.shape, 2, dtype=torch.float64), torch.randn(n, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(block.matmul(v).detach(), rows.flatten(2) @ v.flatten(0, -2))
    torch.testing.assert_close(block.rmatmul(u).detach().flatten(0, -2), torch.einsum("ncp,nck->pk", rows.flatten(2), u))
    torch.testing.assert_close((written, added - out, norms), (rows.flatten(2), rows.flatten(2), rows.flatten(2).square().sum(2)))


def test_a_choice_holds_inside_only_and_in_its_own_thread():
    def now() -> str:
        return _formulas.choice("norms", {"pairs": 1.0, "rows": 2.0})

    found: list[str] = []
    with pt.formulas(norms="rows"):
        with pt.formulas(gram="rows"):
            assert now() == "rows"
        thread = Thread(target=lambda: found.append(now()))
        thread.start()
        thread.join()
    assert (found, now()) == (["pairs"], "pairs")


def test_where_a_block_lacks_the_formula_the_cheapest_is_taken():
    with pt.formulas(gram="dots"):
        assert _formulas.choice("gram", {"pairs": 2.0, "rows": 1.0}) == "rows"


@pytest.mark.parametrize(("wanted", "words"), [({"norm": "rows"}, "norms"), ({"norms": "row"}, "'rows'")])
def test_what_does_not_exist_is_refused(wanted, words):
    with pytest.raises(pt.InputError, match=words), pt.formulas(**wanted):
        pass


def test_the_plan_shows_the_choice_and_its_estimates():
    net, x = CASES["conv"]()
    plan = pt.explain(net, x)
    use = next(use for use in plan.uses if use.rule == "conv")
    assert use.formula == min(use.costs["norms"], key=use.costs["norms"].get)
    assert set(use.costs["dense"]) == {"offsets", "patches"} and all(seconds > 0 for seconds in use.costs["dense"].values())
    assert "norms by" in str(plan) and "offsets " in str(plan) and plan.to_dict()["uses"][0]["costs"] == use.costs
    with pt.formulas(norms="pairs"):
        assert next(use for use in pt.explain(net, x).uses if use.rule == "conv").formula == "pairs"


def test_estimates_grow_with_the_work():
    costs = [_formulas.inner((n, 1, 1), (t, t), (1, 64, 64), 1, same=True) for n, t in ((8, 4), (64, 4), (64, 64))]
    for formula in ("pairs", "rows"):
        assert costs[0][formula] < costs[1][formula] < costs[2][formula]
    assert min(costs[0], key=costs[0].get) == "pairs" and min(costs[2], key=costs[2].get) == "rows"
