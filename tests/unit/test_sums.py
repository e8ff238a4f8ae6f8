"""Sums over parameters whose blocks keep one cotangent, against the dense rows; and that the cotangent is met once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import partials as pt
from partials import _room, _sums
from partials._blocks import Dense
from partials._factors import Outer
from partials._gather import Gather
from partials._sums import Blocks, Sums

Tensor = torch.Tensor


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layer(n: int, c: int, i: int, o: int, g: Tensor | None = None) -> Blocks:
    """A weight and its bias, whose cotangents lie as (C, N, O), which is how batched seeds leave them."""
    g = randn(c, n, o).transpose(0, 1) if g is None else g
    return {"weight": (Outer(randn(n, 1, 1, i), g[:, :, None, None], (o, i)),), "bias": (Dense(g),)}


def transposed(n: int, c: int) -> Blocks:
    g = randn(n, c, 4)
    return {"bias": (Dense(g),), "weight": (Outer(randn(n, 1, 1, 5), g.view(n, c, 1, 1, 4), (5, 4), "io"),)}


def tied(n: int, c: int) -> Blocks:
    """One weight used twice, both times with the same cotangent; another that is not shared."""
    g = randn(n, c, 1, 1, 4)
    return {"weight": (Outer(randn(n, 1, 1, 5), g, (4, 5)), Outer(randn(n, 1, 1, 5), g, (4, 5))), "bias": (Dense(g.flatten(2)),)} | {
        "other": (Dense(randn(n, c, 3)),)
    }


def recurrent(n: int, c: int) -> Blocks:
    """Both weights of a layer whose cotangents lie in the order of time, and a table that meets them position by position."""
    g, h = randn(c, 6, n, 1, 4).permute(2, 0, 1, 3, 4), randn(6, n, 1, 3).transpose(0, 1)
    first, second = Outer(randn(n, 6, 1, 7), g, (4, 7)), Outer(h, g, (4, 3))
    return {"input": (first,), "hidden": (second,), "places": (Dense(g.squeeze(3)),), "head": layer(n, c, 2, 3)["weight"]}


def table(n: int, c: int) -> Blocks:
    return {"table": (Gather(torch.randint(-1, 9, (n, 5)), randn(n, c, 5, 4), (9, 4)),), **layer(n, c, 4, 2)}


def grouped(n: int, c: int) -> Blocks:
    g = randn(n, c, 3, 2, 4)
    return {"weight": (Outer(randn(n, 3, 2, 5), g, (2, 4, 5)),), "bias": (Dense(g.view(n, c, 3, 2, 4)),)}


def biases(n: int, c: int) -> Blocks:
    g = randn(n, c, 4)
    return {"one": (Dense(g),), "two": (Dense(g),)}


def one_feature(n: int, c: int) -> Blocks:
    """An output feature alone, whose bias is a vector of one entry; another is a number."""
    g = randn(n, c, 1)
    return layer(n, c, 3, 1, g) | {"number": (Dense(g[:, :, 0]),)}


MAKERS: dict[str, Callable[[int, int], Blocks]] = {
    "wide": lambda n, c: layer(n, c, 7, 4),
    "narrow": lambda n, c: layer(n, c, 2, 5),
    **{f.__name__: f for f in (transposed, tied, recurrent, table, grouped, biases, one_feature)},
}


def rows_of(blocks: Blocks) -> Tensor:
    """(N, C, P), each block's own rows added up."""
    return torch.cat([torch.stack([block.dense() for block in group]).sum(0).unsqueeze(-1).flatten(2) for group in blocks.values()], -1)


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("room", [None, 1])
@pytest.mark.parametrize(("n", "c"), [(3, 1), (3, 2), (2, 10), (1, 1), (0, 2)])
@pytest.mark.parametrize("kind", MAKERS)
def test_every_sum(kind, n, c, room, attached):
    blocks = MAKERS[kind](n, c)
    rows, sums = rows_of(blocks), Sums(blocks, attached)
    with torch.no_grad(), _room.limited(1 if room else 2**40):
        for k in (1, 2, 7):
            v, u = randn(rows.shape[-1], k), randn(n, c, k)
            parts = v.split([torch.Size(group[0].shape).numel() for group in blocks.values()])
            by_name = {name: part.view(*group[0].shape, k) for (name, group), part in zip(blocks.items(), parts, strict=True)}
            near(sums.matmul(by_name), rows @ v)
            if k == 1 and not attached:
                near(sums.push([part.view(-1) for part in parts]), (rows @ v).squeeze(-1))
            near(sums.rmatmul(u), torch.einsum("ncp,nck->pk", rows, u))
        near(sums.squared_norms(), rows.square().sum(-1))
        near(sums.own_gram(), rows @ rows.mT)
        near(sums.gram(sums), torch.einsum("ncp,mdp->ncmd", rows, rows))


@pytest.mark.parametrize(("n", "c"), [(300, 1), (70, 3), (3, 200), (1030, 1), (0, 2)])
def test_a_gram_matrix_that_is_computed_in_strips(n, c):
    blocks = {**layer(n, c, 5, 4), **{f"{name} of two": group for name, group in layer(n, c, 3, 2).items()}}
    rows, sums = rows_of(blocks), Sums(blocks)
    near(sums.gram(sums), torch.einsum("ncp,mdp->ncmd", rows, rows))


def test_two_jacobians_of_which_one_shares():
    shared = layer(3, 2, 5, 4)
    apart: Blocks = {"weight": layer(4, 2, 5, 4)["weight"], "bias": (Dense(randn(4, 2, 4)),)}
    for left, right in ((shared, apart), (apart, shared), (shared, layer(4, 3, 5, 4))):
        near(Sums(left).gram(Sums(right)), torch.einsum("ncp,mdp->ncmd", rows_of(left), rows_of(right)))


@pytest.mark.parametrize("c", [1, 3])
def test_a_shared_cotangent_is_met_once(c, monkeypatch):
    met: list[str] = []
    for name in ("contracted", "folded", "dots"):
        inner = getattr(_sums, name)
        monkeypatch.setattr(_sums, name, lambda *args, inner=inner, name=name: (met.append(name), inner(*args))[1])
    J = pt.jacobian(torch.nn.Linear(5, c), torch.randn(6, 5))
    J @ torch.randn(J.shape[-1], 2)
    J.T @ torch.randn(*J.shape[:-1], 2)
    assert met == ["contracted", "folded"]
    J.norms()
    assert met[-2:] == ["dots", "dots"]


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the arithmetic that a tensor takes part in."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.place, self.count = tensor.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = func._schema.returns and func._schema.returns[0].alias_info is not None
        self.count += not views and any(isinstance(arg, Tensor) and arg.data_ptr() == self.place for arg in args)
        return func(*args, **(kwargs or {}))


def test_a_shared_cotangent_is_read_once():
    J = pt.jacobian(torch.nn.Linear(5, 3), torch.randn(6, 5))
    v, u, g = torch.randn(J.shape[-1]), torch.randn(J.shape[:-1]), J.blocks["weight"][0].cotangent
    for product in (lambda: J @ v, lambda: J.T @ u, J.gram):
        with Reads(g) as reads:
            product()
        assert reads.count == 1


def test_a_vector_meets_rows_where_they_are_asked_for():
    blocks = layer(4, 2, 5, 3)
    rows, v = rows_of(blocks), randn(18)
    with torch.no_grad(), pt.formulas(products="rows"):
        near(Sums(blocks).push(list(v.split([15, 3]))), rows @ v)


def test_equal_numbers_elsewhere_or_in_another_order_are_not_shared():
    g = randn(4, 4, 4)
    for other in (g.clone(), g.transpose(0, 1), g.mT, g[:, :, :3]):
        blocks: Blocks = {"one": (Dense(g),), "two": (Dense(other),)}
        assert not Sums(blocks)._together
    assert Sums({"one": (Dense(g),), "two": (Dense(g.view(4, 4, 2, 2)),)})._together == []


def test_dtypes_that_differ_are_promoted_and_halves_do_not_overflow():
    g = 300 * torch.ones(2, 1, 4, dtype=torch.float16)
    blocks: Blocks = {
        "weight": (Outer(torch.ones(2, 1, 1, 5, dtype=torch.float16), g[:, :, None, None], (4, 5)),),
        "bias": (Dense(g),),
        "wide": (Dense(torch.ones(2, 1, 3)),),
    }
    sums = Sums(blocks)
    with torch.no_grad():
        assert sums.rmatmul(torch.ones(2, 1, 1)).dtype == torch.float32
        near(sums.squared_norms().double(), torch.full((2, 1), 6 * 4 * 300.0**2 + 3).double())
        double = layer(2, 1, 4, 3)
        both = Sums({**{f"{name} in double": group for name, group in double.items()}, **blocks})
        rows = rows_of(double)
        expected = torch.full((2, 1, 2, 1), 6 * 4 * 300.0**2 + 3).double() + torch.einsum("ncp,mdp->ncmd", rows, rows)
        assert both.gram(both).dtype == torch.float64
        near(both.gram(both), expected)
        near(sums.gram(sums).double(), torch.full((2, 1, 2, 1), 6 * 4 * 300.0**2 + 3).double())
