"""Sketches: J S against the rows times the whole S; S itself fixed by seed, name and entry; inner products right on average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import partials as pt
from partials import _random, _sketch
from partials._random import Projection, key_of, matrix, words
from partials.testing import CASES
from tests.oracle import dense, reference

KINDS = list(_sketch.KINDS)
NAMES = [
    "line",
    "scalar_output",
    "matrix_output",
    "many_shapes",
    "unused_parameter",
    "mlp",
    "cnn",
    "tied",
    "embedding",
    "attention",
    "lora",
]


def whole(kind, k, seed, name, shape):
    """S of one parameter: (entries, k)."""
    entries, rows = torch.Size(shape).numel(), shape[0] if shape else 1
    vector = min(rows, torch.Size(shape[1:]).numel()) < 2
    if kind == "sparse" or (kind == "kronecker" and vector):
        return _sketch._poured(
            torch.eye(entries, dtype=torch.float64)[None], *_sketch._destinations(key_of(seed, name), k, torch.arange(entries)), k
        )[0]
    if kind == "kronecker":
        left, right = _sketch.sides(k)
        like = torch.empty(0, dtype=torch.float64)
        return torch.kron(matrix(seed, f"{name}\0rows", rows, left, like), matrix(seed, f"{name}\0columns", entries // rows, right, like))
    return Projection(key_of(seed, name), k, kind).rows(torch.arange(entries), slice(0, k), torch.float64)


def expected(kind, k, seed, rows, values):
    """{name: (N, *out, *shape)} times S."""
    parts = {name: part.reshape(*values.shape, part[(0,) * values.ndim].numel()) for name, part in rows.items()}
    shapes = {name: tuple(part.shape[values.ndim :]) for name, part in rows.items()}
    return sum(part @ whole(kind, k, seed, name, shapes[name]) for name, part in parts.items())


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


# --- J S ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [_sketch.TILE, 300])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_case(name, kind, tile, monkeypatch):
    monkeypatch.setattr(_sketch, "TILE", tile)
    J = CASES[name].make().jacobian(check="never")
    values, rows = reference(name)
    for k in (1, 6, 100):
        found = J.sketch(k, kind, seed=3)
        assert found.shape == (*values.shape, k)
        near(found, expected(kind, k, 3, rows, values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tied", "cnn", "embedding"])
def test_rows_without_factors_give_the_same(name, kind):
    found = [CASES[name].make().jacobian(method=method, check="never").sketch(12, kind) for method in ("auto", "loop")]
    near(*found)


class Awkward(nn.Module):
    """A table used to look up and to multiply, a grouped convolution, a weight in slices and transposed, one computed from another."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, groups=2, padding=1, stride=2)
        self.packed = nn.Parameter(torch.randn(9, 6))
        self.square = nn.Parameter(torch.randn(6, 4))

    def forward(self, ids):
        x = self.table(ids)  # (N, T, 4)
        x = torch.tanh(self.conv(x.mT).mT)
        q, _, v = self.packed.chunk(3)
        x = torch.cat([nn.functional.linear(x, q), x @ v.t()], -1) @ self.square
        x = x + nn.functional.linear(x @ (self.square * self.square).t(), self.square.t())
        return nn.functional.linear(x, self.table.weight).mean(1)[:, :3]


@pytest.fixture
def awkward():
    torch.manual_seed(0)
    ids = torch.randint(7, (5, 6))
    return pt.jacobian(Awkward().double(), ids, check="never")


@pytest.mark.parametrize("kind", KINDS)
def test_several_blocks_of_one_parameter(awkward, kind):
    assert awkward.plan.method == "capture"
    near(awkward.sketch(12, kind, seed=5), expected(kind, 12, 5, awkward.dict(), awkward.values))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_joined_jacobians(awkward, kind):
    all_at_once = awkward.sketch(8, kind)
    near(torch.cat([awkward[:2].sketch(8, kind), awkward[2:].sketch(8, kind)]), all_at_once)
    near(pt.concat([awkward[3:], awkward[:3]], weights=[2.0, 1.0]).sketch(8, kind), torch.cat([2 * all_at_once[3:], all_at_once[:3]]))
    assert awkward[:0].sketch(8, kind).shape == (0, 3, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_parameters_keeps_its_projection(kind):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3, dtype=torch.float64)
    parts = [pt.jacobian(model, x, wrt=glob, check="never").sketch(8, kind) for glob in ("0.*", "2.*", "*")]
    near(parts[0] + parts[1], parts[2])


@pytest.mark.parametrize("kind", KINDS)
def test_single_samples_and_graphs(kind):
    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    J = pt.jacobian(model, x, create_graph=True, check="never")
    found = J.sketch(8, kind)
    one = pt.jacobian(model, x.detach()[0], batched=False, check="never")
    assert one.sketch(8, kind).shape == (2, 8)
    near(one.sketch(8, kind), found[0].detach())
    (slope,) = torch.autograd.grad(found.square().sum(), x)
    rows = torch.cat([J["weight"].flatten(2), J["bias"].flatten(2)], -1)
    S = torch.cat([whole(kind, 8, 0, "weight", (2, 3)), whole(kind, 8, 0, "bias", (2,))])
    near(slope, torch.autograd.grad((rows @ S).square().sum(), x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_summed_in_float32(kind):
    model = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(24, 3))
    ids = torch.randint(9, (4, 3))
    exact = pt.jacobian(model.bfloat16().double(), ids, check="never").sketch(16, kind)
    found = pt.jacobian(model.bfloat16(), ids, check="never").sketch(16, kind)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.02 * exact.norm()  # the rows themselves are rounded


@pytest.mark.parametrize(
    ("k", "kind", "seed", "words"),
    [
        (0, "gaussian", 0, "k is not understood"),
        (2.0, "gaussian", 0, "k is not"),
        (2, "fjlt", 0, "one of: 'gaussian'"),
        (2, "sparse", None, "seed is"),
    ],
)
def test_refusals(k, kind, seed, words):
    J = pt.jacobian(nn.Linear(3, 2), torch.randn(5, 3), check="never")
    with pytest.raises(pt.InputError, match=words):
        J.sketch(k, kind, seed)


def test_the_projection_is_never_whole(monkeypatch):
    """A table of 5000 x 32 with 40 rows looked up, k = 4096: S would hold 655 million numbers."""
    made = []
    rows = Projection.rows

    def counted(self, entries, columns, dtype):
        made.append(len(entries) * (columns.stop - columns.start))
        return rows(self, entries, columns, dtype)

    monkeypatch.setattr(Projection, "rows", counted)
    model = nn.Sequential(nn.Embedding(5000, 32), nn.Flatten(), nn.Linear(32 * 5, 40))
    J = pt.jacobian(model, torch.randint(5000, (8, 5)), wrt="*weight", check="never")
    J.sketch(4096)
    assert max(made) * 4 <= 2 * _sketch.TILE
    assert 40 * 160 * 4096 <= sum(made) <= (40 * 160 + 40 * 32) * 4096


# --- S -----------------------------------------------------------------------------------------------------------


def test_the_generator_is_splitmix64():
    assert [word % 2**64 for word in words(1234567, torch.arange(3)).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("kind", _random.NUMBERS)
def test_numbers_depend_on_seed_name_and_entry_alone(kind):
    S = Projection(key_of(1, "a"), 200, kind)
    all_ = S.rows(torch.arange(30), slice(0, 200), torch.float32)
    assert torch.equal(S.rows(torch.tensor([7, 3]), slice(64, 131), torch.float32), all_[[7, 3], 64:131])
    assert torch.equal(S.at(torch.tensor([9, 7, 3])).rows(torch.tensor([1, 2]), slice(0, 200), torch.float32), all_[[7, 3]])
    torch.testing.assert_close(S.rows(torch.arange(30), slice(0, 200), torch.float64).float(), all_)
    others = [Projection(key_of(*of), 200, kind).rows(torch.arange(30), slice(0, 200), torch.float32) for of in [(2, "a"), (1, "b")]]
    for other in others:
        assert abs(float((all_ * other).mean())) * 200 < 0.06


@pytest.mark.parametrize("kind", _random.NUMBERS)
def test_numbers_are_random(kind):
    x = Projection(key_of(0, "w"), 1024, kind).rows(torch.arange(1000), slice(0, 1024), torch.float64) * 32
    error = 5 / 1000  # of a mean of a million
    assert abs(float(x.mean())) < error
    assert abs(float(x.square().mean()) - 1) < 2 * error
    assert abs(float(x.pow(4).mean()) - (3 if kind == "gaussian" else 1)) < 10 * error
    for other in (x.roll(1, 0), x.roll(1, 1), x.roll(2, 1), x.roll((1, 1), (0, 1))):
        assert abs(float((x * other).mean())) < error
        assert abs(float((x.square() * other.square()).mean()) - 1) < 3 * error
    if kind == "gaussian":
        sorted_ = x.flatten().sort().values
        grid = torch.special.ndtr(sorted_) - torch.arange(1, x.numel() + 1) / x.numel()
        assert float(grid.abs().max()) < 2 / 1000  # Kolmogorov and Smirnov


# --- inner products ----------------------------------------------------------------------------------------------


def variance(kind, k, X, Y):
    """Of <Sx, Sy> for one matrix parameter."""
    x, y = X.flatten(), Y.flatten()
    square, both = (x @ x) * (y @ y), (x @ y) ** 2
    if kind == "kronecker":
        left, right = _sketch.sides(k)
        inner, outer = X.T @ Y, X @ Y.T
        apart = (inner.square().sum() + (inner @ inner).trace()) / right + (outer.square().sum() + (outer @ outer).trace()) / left
        bound = apart + (inner.square().sum() + outer.square().sum() + square + both) / k
        assert bound <= (2 / left + 2 / right + 4 / k) * square * (1 + 1e-12)
        return bound - _less_by_signs(X, Y, inner.diagonal(), outer.diagonal(), left, right)
    return (square + both - (0 if kind == "gaussian" else 2 * (x.square() @ y.square()))) / k


def _less_by_signs(X, Y, inner, outer, left, right):
    """What a fourth moment of 1 in place of 3 takes off: sum_j C_jj^2 for C = X'Y, and E W_ii^2 for W = X B B' Y'."""
    columns, rows = (X.square().sum(d) @ Y.square().sum(d) for d in (0, 1))
    squares = outer.square().sum() + (rows + outer.square().sum() - 2 * (X.square() * Y.square()).sum()) / right
    return 2 * inner.square().sum() / right + 2 * (squares + (columns + inner.square().sum()) / right) / left


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_with_the_stated_variance(kind):
    torch.manual_seed(1)
    model, x, seeds, k = nn.Linear(5, 4, bias=False).double(), torch.randn(3, 5, 5, dtype=torch.float64), 4000, 12
    G = pt.gradient(lambda x: (torch.tanh(model(x)) ** 2).sum((1, 2)), x, params=model, check="never")
    rows, kernel = G["weight"], G.gram()
    found = torch.stack([s @ s.T for s in (G.sketch(k, kind, seed) for seed in range(seeds))])
    stated = torch.stack([torch.stack([variance(kind, k, a, b) for b in rows]) for a in rows])
    off = (found.mean(0) - kernel).abs()
    assert (off < 4.5 * (stated / seeds).sqrt()).all()
    torch.testing.assert_close(found.var(0), stated, rtol=0.2, atol=0.0)
    assert dense({"weight": rows}, 1).shape == (3, 20)


def test_variance_of_several_parameters():
    """The cross terms of the two-sided sketch: (|x_p|^2 |y_q|^2 + <x_p,y_p><x_q,y_q>) / k for every pair of different parameters."""
    torch.manual_seed(2)
    model, seeds, k = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double(), 4000, 9
    G = pt.gradient(lambda x: model(x).square().sum((1, 2)), torch.randn(2, 3, 3, dtype=torch.float64), params=model, check="never")
    found = torch.stack([s[0] @ s[1] for s in (G.sketch(k, "kronecker", seed) for seed in range(seeds))])
    pairs = [G[name] for name in G.names]
    stated = sum(variance("kronecker", k, *pair) for pair in pairs)
    for p, q in ((0, 1), (1, 0)):
        (xp, yp), (xq, yq) = pairs[p].flatten(1), pairs[q].flatten(1)
        stated = stated + ((xp @ xp) * (yq @ yq) + (xp @ yp) * (xq @ yq)) / k
    torch.testing.assert_close(found.var(), stated, rtol=0.15, atol=0.0)
    assert abs(float(found.mean() - G.gram()[0, 1])) < 4.5 * float(stated / seeds) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 7, 64, 67])
def test_awkward_widths_of_awkward_jacobians(kind, k):
    """One column, primes, more columns than parameters; no samples, tied, narrowed, weighted, several dtypes: rows times S."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double(), torch.randn(4, 3, dtype=torch.float64)
    net[2].weight = nn.Parameter(net[0].weight.detach().T.contiguous())
    made = [
        pt.jacobian(net, x[:0], check="never"),
        pt.jacobian(net, x, wrt="0.*", check="never"),
        pt.concat([pt.jacobian(net, x[:1], check="never"), pt.jacobian(net, x[1:], check="never")], weights=[3.0, -1.0]),
        pt.jacobian(lambda x: net(x).float().reshape(-1, 1, 3), x, params=net, check="never"),
    ]
    for J in made:
        found = J.sketch(k, kind, seed=-4)
        assert found.shape == (*J.values.shape, k)
        if not len(J):
            continue
        wanted = expected(kind, k, -4, {name: rows.double() for name, rows in J.dict().items()}, J.values)
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-6, atol=1e-6)
