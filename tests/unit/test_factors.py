"""Factored blocks against the rows themselves, formed by the dumbest loop or einsum that there is, in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from partials import _factors, _gather, _room
from partials._blocks import Block, Dense
from partials._factors import Outer
from partials._gather import Gather

Tensor = torch.Tensor
BUDGETS = [None, 1, 500]


def entries(block: Any) -> dict[str, Any]:
    return {field.name: getattr(block, field.name) for field in fields(block)}


def reference(block: Block) -> Tensor:
    """The rows (N, C, p)."""
    if isinstance(block, Outer):
        stored = "ncgoi" if block.layout == "oi" else "ncgio"
        return torch.einsum(f"nctgo,ntgi->{stored}", block.g, block.a).reshape(*block.rows, prod(block.shape))
    if isinstance(block, Gather):
        rows = []
        for n, samples in enumerate(block.g):
            for g in samples:
                table = [torch.zeros(block.shape[1], dtype=g.dtype) for _ in range(block.shape[0])]
                for t, v in enumerate(block.index[n].tolist()):
                    if v >= 0:
                        table[v] = table[v] + g[t]
                rows.append(torch.cat(table))
        return torch.stack(rows).view(*block.rows, -1) if rows else torch.zeros(*block.rows, prod(block.shape), dtype=block.g.dtype)
    assert isinstance(block, Dense)
    return block.values.flatten(2)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def budget_of(size: int | None) -> AbstractContextManager[None]:
    """Temporaries of `size` bytes, so that small blocks are cut into chunks as large ones are."""
    return nullcontext() if size is None else _room.limited(size)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


KINDS = ["oi", "io", "grouped", "gather", "dense"]


def make(kind: str, shape: tuple[int, int], n: int, c: int, t: int) -> Block:
    """A random block of the parameter of `shape`, (V, E)."""
    v, e = shape
    match kind:
        case "oi":
            return Outer(randn(n, t, 1, e), randn(n, c, t, 1, v), shape)
        case "io":
            return Outer(randn(n, t, 1, v), randn(n, c, t, 1, e), shape, "io")
        case "grouped":
            groups = next(k for k in (3, 2, 1) if v % k == 0)
            return Outer(randn(n, t, groups, e), randn(n, c, t, groups, v // groups), shape)
        case "gather":
            return Gather(torch.randint(-1, v, (n, t)), randn(n, c, t, e), shape)
        case _:
            return Dense(randn(n, c, v, e))


few = st.integers(1, 4)
samples = st.integers(0, 4)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 4))


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """One block: also of a convolution's weight, with groups in both layouts."""
    n, c, t = draw(samples), draw(few), draw(few)
    if draw(st.booleans()):
        return make(draw(st.sampled_from(KINDS[:4])), draw(shapes), n, c, t)
    groups, i, o = draw(few), draw(few), draw(few)
    layout = draw(st.sampled_from(["oi", "io"]))
    shape = (groups * o, i, 1) if layout == "oi" else (groups, i, o)
    return Outer(randn(n, t, groups, i), randn(n, c, t, groups, o), shape, layout)


@given(blocks(), st.integers(0, 3), st.sampled_from(BUDGETS))
def test_rows_and_products_with_matrices(block: Block, k: int, size: int | None) -> None:
    rows, shape = reference(block), block.shape
    v, u = randn(*shape, k), randn(*block.rows, k)
    with budget_of(size):
        close(block.dense(), rows.view(*block.rows, *shape))
        close(block.matmul(v), rows @ v.reshape(rows.shape[-1], k))
        close(block.rmatmul(u), torch.einsum("ncp,nck->pk", rows, u).view(*shape, k))
        close(block.squared_norms(), rows.square().sum(-1))
        close(block.gram(block), torch.einsum("ncp,mdp->ncmd", rows, rows))
        close(block.own_gram(block), torch.einsum("ncp,ndp->ncd", rows, rows))
        weights, matrix = randn(*block.rows), randn(block.rows[0], 3, block.rows[1])
        close(block.weighted_sum(weights[:, 0]), torch.einsum("ncp,n->cp", rows, weights[:, 0]).view(-1, *shape))
        close(reference(block.scaled(weights)), rows * weights.unsqueeze(-1))
        close(reference(block.mixed(matrix)), matrix @ rows)
    for shape_of in (block.dense().shape[2:], block.rmatmul(u).shape[:-1]):
        assert shape_of == torch.Size(shape)
    assert block.nbytes() == sum(x.numel() * x.element_size() for x in entries(block).values() if isinstance(x, Tensor))


@given(st.sampled_from(KINDS), st.sampled_from(KINDS), shapes, samples, samples, few, few, few, few, st.sampled_from(BUDGETS))
def test_products_of_two_blocks(
    one: str, two: str, shape: tuple[int, int], n: int, m: int, c: int, d: int, t: int, s: int, size: int | None
) -> None:
    left, same, own, any_ = make(one, shape, n, c, t), make(two, shape, n, c, s), make(two, shape, n, d, s), make(two, shape, m, d, s)
    rows, weights = reference(left), randn(n)
    with budget_of(size):
        close(left.inner(same), (rows * reference(same)).sum(-1))
        close(left.products(same, weights).flatten(1), torch.einsum("n,ncp,ncp->cp", weights, rows, reference(same)))
        close(left.own_gram(own), torch.einsum("ncp,ndp->ncd", rows, reference(own)))
        close(left.gram(any_), torch.einsum("ncp,mdp->ncmd", rows, reference(any_)))


@pytest.mark.parametrize("size", BUDGETS)
@pytest.mark.parametrize("layout", ["oi", "io"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 4), (5, 3)])
def test_both_formulas_of_outer(t: int, s: int, groups: int, layout: Any, size: int | None) -> None:
    n, m, c, d, i, o = 3, 4, 2, 5, 7, 6
    shape = (groups * o, i) if layout == "oi" else (groups * i, o)
    left = Outer(randn(n, t, groups, i), randn(n, c, t, groups, o), shape, layout)
    same = Outer(randn(n, s, groups, i), randn(n, c, s, groups, o), shape, layout)
    own = Outer(same.a, randn(n, d, s, groups, o), shape, layout)
    other = Outer(randn(m, s, groups, i), randn(m, d, s, groups, o), shape, layout)
    rows = reference(left)
    with budget_of(size):
        for joined in (_factors._joined_by_pairs, _factors._joined_by_rows):
            close(joined(left, left, _gather.each), rows.square().sum(-1))
            close(joined(left, same, _gather.each), (rows * reference(same)).sum(-1))
            close(joined(left, own, _gather.own), torch.einsum("ncp,ndp->ncd", rows, reference(own)))
        for gram in (_factors._gram_by_pairs, _factors._gram_by_rows, *([_factors._gram_by_dots] if groups == 1 else [])):
            close(gram(left, left), torch.einsum("ncp,mdp->ncmd", rows, rows))
            close(gram(left, other), torch.einsum("ncp,mdp->ncmd", rows, reference(other)))


@pytest.mark.parametrize("size", BUDGETS)
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 4), (5, 3)])
def test_both_formulas_of_gather(t: int, s: int, size: int | None) -> None:
    left, right = make("gather", (6, 3), 3, 2, t), make("gather", (6, 3), 4, 5, s)
    assert isinstance(left, Gather)
    assert isinstance(right, Gather)
    expected = torch.einsum("ncp,mdp->ncmd", reference(left), reference(right))
    with budget_of(size):
        close(_gather._gram_by_pairs(left, right), expected)
        for strip in (1, 2, 3):
            close(_gather._gram_by_rows(left, right, strip), expected)


@pytest.mark.parametrize("forms", [True, False])
@pytest.mark.parametrize("kind", ["oi", "io", "grouped"])
@pytest.mark.parametrize("size", BUDGETS)
def test_both_formulas_of_matrix_products(kind: str, forms: bool, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outer, "_forms_for", lambda self, k: forms)
    block, k = make(kind, (6, 5), 3, 2, 4), 7
    v, u, rows = randn(6, 5, k), randn(3, 2, k), reference(block)
    with budget_of(size):
        close(block.matmul(v), rows @ v.reshape(rows.shape[-1], k))
        close(block.rmatmul(u), torch.einsum("ncp,nck->pk", rows, u).view(6, 5, k))


def test_the_cheaper_formula_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("_joined_by_pairs", "_joined_by_rows", "_gram_by_pairs", "_gram_by_dots", "_gram_by_rows"):
        monkeypatch.setattr(_factors, name, lambda *args, name=name: taken.append(name))
    short = Outer(torch.empty(8, 2, 1, 64), torch.empty(8, 3, 2, 1, 64), (64, 64))
    wide = Outer(torch.empty(8, 4, 1, 64), torch.empty(8, 30, 4, 1, 64), (64, 64))
    long = Outer(torch.empty(8, 64, 1, 4), torch.empty(8, 3, 64, 1, 4), (4, 4))
    for block in (short, long):
        block.squared_norms()
        block.own_gram(block)
        block.gram(block)
    wide.gram(wide)
    assert taken == [*["_joined_by_pairs"] * 2, "_gram_by_dots", *["_joined_by_rows"] * 2, "_gram_by_rows", "_gram_by_pairs"]


@given(blocks(), st.lists(st.integers(0, 3), max_size=5))
def test_select(block: Block, picked: list[int]) -> None:
    index = torch.tensor([i for i in picked if i < block.rows[0]], dtype=torch.int64)
    close(reference(block.select(index)), reference(block)[index])


@given(blocks(), st.booleans())
def test_write_into_columns_of_a_wider_matrix(block: Block, add: bool) -> None:
    (n, c), p = block.rows, prod(block.shape)
    whole = torch.full((n, c, p + 5), 7.0, dtype=torch.float64)
    block.write(whole[..., 2 : 2 + p], add=add)
    close(whole[..., 2 : 2 + p], reference(block) + (7 if add else 0))
    assert (whole[..., :2] == 7).all()
    assert (whole[..., 2 + p :] == 7).all()


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("add", [True, False])
class TestWrite:
    def test_in_another_dtype(self, kind: str, t: int, add: bool) -> None:
        block = make(kind, (4, 3), 2, 3, t)
        out = torch.ones(2, 3, 12, dtype=torch.float32)
        block.write(out, add=add)
        torch.testing.assert_close(out, (reference(block) + add).float())

    def test_is_differentiable_where_gradients_are_tracked(self, kind: str, t: int, add: bool) -> None:
        block = make(kind, (4, 3), 2, 3, t)
        (leaf,) = leaves_of(block)[-1:]
        out, weights = torch.ones(2, 3, 12, dtype=torch.float64), randn(2, 3, 12)
        block.write(out, add=add)
        got = torch.autograd.grad(out, leaf, weights)
        close(got[0], torch.autograd.grad(reference(block), leaf, weights)[0])


def leaves_of(block: Block) -> list[Tensor]:
    """The floating tensors of a block, from now on with gradients."""
    return [x.requires_grad_() for x in entries(block).values() if isinstance(x, Tensor) and x.is_floating_point()]


QUANTITIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "dense": (lambda x, y, v, u: x.dense().flatten(2), lambda x, y, v, u: x),
    "matmul": (lambda x, y, v, u: x.matmul(v), lambda x, y, v, u: x @ v.flatten(0, 1)),
    "rmatmul": (lambda x, y, v, u: x.rmatmul(u).flatten(0, 1), lambda x, y, v, u: torch.einsum("ncp,nck->pk", x, u)),
    "weighted_sum": (lambda x, y, v, u: x.weighted_sum(u[:, 0, 0]).flatten(1), lambda x, y, v, u: torch.einsum("ncp,n->cp", x, u[:, 0, 0])),
    "products": (
        lambda x, y, v, u: x.products(y, u[:, 0, 0]).flatten(1),
        lambda x, y, v, u: torch.einsum("ncp,ncp,n->cp", x, y, u[:, 0, 0]),
    ),
    "squared_norms": (lambda x, y, v, u: x.squared_norms(), lambda x, y, v, u: x.square().sum(-1)),
    "inner": (lambda x, y, v, u: x.inner(y), lambda x, y, v, u: (x * y).sum(-1)),
    "own_gram": (lambda x, y, v, u: x.own_gram(y), lambda x, y, v, u: torch.einsum("ncp,ndp->ncd", x, y)),
    "gram": (lambda x, y, v, u: x.gram(y), lambda x, y, v, u: torch.einsum("ncp,mdp->ncmd", x, y)),
}


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize(("t", "k"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("two", ["oi", "gather"])
@pytest.mark.parametrize("one", KINDS[:4])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_first_and_second_derivatives(quantity: str, one: str, two: str, t: int, k: int, size: int | None) -> None:
    by_block, by_rows = QUANTITIES[quantity]
    left, right = make(one, (4, 3), 3, 2, t), make(two, (4, 3), 3, 2, 2)
    leaves = [*leaves_of(left), *leaves_of(right), randn(4, 3, k).requires_grad_(), randn(3, 2, k).requires_grad_()]
    with budget_of(size):
        got = by_block(left, right, *leaves[-2:])
        weights = torch.randn_like(got)
        expected = by_rows(reference(left), reference(right), *leaves[-2:])
        close(got, expected)
        slopes = [torch.autograd.grad(x, leaves, weights, create_graph=True, materialize_grads=True) for x in (got, expected)]
        for first, second in zip(*slopes, strict=True):
            close(first, second)
        curvatures = [torch.autograd.grad(sum(x.pow(2).sum() for x in slope), leaves, materialize_grads=True) for slope in slopes]
        for first, second in zip(*curvatures, strict=True):
            close(first, second)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("one", KINDS[:4])
@pytest.mark.parametrize("t", [1, 3])
def test_a_planted_error_is_seen(one: str, quantity: str, t: int) -> None:
    by_block, by_rows = QUANTITIES[quantity]
    left, right, v, u = make(one, (4, 3), 3, 2, t), make("dense", (4, 3), 3, 2, 2), randn(4, 3, 1), randn(3, 2, 1)
    if isinstance(left, Gather):
        left.index.clamp_(min=0)
    expected = by_rows(reference(left), reference(right), v, u)
    close(by_block(left, right, v, u), expected)
    left.g[1, 1, 0] *= 1 + 1e-6
    with pytest.raises(AssertionError):
        close(by_block(left, right, v, u), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("one", KINDS[:4])
def test_half_precision_is_summed_in_float32(one: str, t: int, dtype: torch.dtype) -> None:
    def half(block: Block) -> Any:
        return type(block)(**{k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in entries(block).items()})

    def wide(block: Any) -> Any:
        return type(block)(**{k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in entries(block).items()})

    left = half(make(one, (4, 3), 3, 2, t))
    left.g.mul_(300)  # whose square is no float16
    for two in ("oi", "io", "gather"):
        right = half(make(two, (4, 3), 3, 2, 2))
        for name in ("inner", "own_gram", "gram"):
            got = getattr(left, name)(right)
            if got.dtype == torch.float32:
                torch.testing.assert_close(got.double(), getattr(wide(left), name)(wide(right)), rtol=1e-5, atol=1e-2)
            else:
                assert isinstance(left, Outer)
                assert not left._fits(right)  # rows of another structure: whatever the rows' own dtype gives
    assert left.squared_norms().dtype == torch.float32
    torch.testing.assert_close(left.squared_norms().double(), wide(left).squared_norms(), rtol=1e-5, atol=0)
    kept = left.scaled(randn(3, 2)).mixed(randn(3, 2, 2))
    for got in (kept.dense(), kept.matmul(randn(4, 3, 2)), kept.rmatmul(randn(3, 2, 2)), kept.weighted_sum(randn(3))):
        assert got.dtype == dtype


@given(st.sampled_from(["oi", "io", "gather"]), st.sampled_from([1, 3]))
def test_strided_and_expanded_factors(kind: str, t: int) -> None:
    block = make(kind, (4, 3), 3, 2, t)
    shared: Any = block
    strided = {
        name: x.mT.contiguous().mT if x.dim() > 2 else x.T.contiguous().T for name, x in entries(block).items() if isinstance(x, Tensor)
    }
    expanded = {name: x[:1].expand_as(x) for name, x in strided.items()}
    for tensors in (strided, expanded):
        shared = type(block)(**{**entries(block), **tensors})
        rows, out = reference(shared), torch.empty(3, 2, 12, dtype=torch.float64)
        shared.write(out)
        close(out, rows)
        for by_block, by_rows in QUANTITIES.values():
            v, u = randn(4, 3, 2), randn(3, 2, 2)
            close(by_block(shared, shared, v, u), by_rows(rows, rows, v, u))


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor with memory of its own that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("quantity", ["squared_norms", "inner", "own_gram", "gram", "write"])
@pytest.mark.parametrize("kind", ["oi", "io"])
@pytest.mark.parametrize("t", [1, 8, 40])
def test_outer_keeps_to_its_budget(kind: str, quantity: str, t: int) -> None:
    left, right, out = make(kind, (30, 20), 16, 2, t), make(kind, (30, 20), 16, 2, 8), randn(16, 2, 600)
    with torch.no_grad(), budget_of(2**15), Largest() as seen:
        left.write(out) if quantity == "write" else QUANTITIES[quantity][0](left, right, None, None)
    given_ = max(x.nbytes for block in (left, right) for x in entries(block).values() if isinstance(x, Tensor))
    result = out.untyped_storage().nbytes() if quantity == "write" else 0
    assert seen.nbytes <= max(given_, result, 2 * 2**15)
    assert seen.nbytes < 16 * 2 * 600 * 8 or seen.nbytes <= max(given_, result)


@pytest.mark.parametrize("quantity", ["matmul", "squared_norms", "inner", "own_gram", "gram"])
@pytest.mark.parametrize("two", ["oi", "io", "gather"])
def test_gather_never_forms_its_table(two: str, quantity: str) -> None:
    left, right = make("gather", (5000, 4), 3, 2, 6), make(two, (5000, 4), 3, 2, 2)
    v, u = randn(5000, 4, 1), randn(3, 2, 1)
    given_ = max(x.nbytes for block in (left, right) for x in entries(block).values() if isinstance(x, Tensor))
    with torch.no_grad(), Largest() as seen:
        QUANTITIES[quantity][0](left, right, v, u)
    assert seen.nbytes <= max(given_, v.nbytes) < 3 * 2 * 5000 * 4 * 8
