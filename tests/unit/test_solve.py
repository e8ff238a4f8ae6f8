"""Least squares, curvature systems and SciPy's solvers, against dense linear algebra in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import partials as pt
from partials import _blocks, _room, _solve
from partials._blocks import Dense
from partials._factors import Outer
from partials._pullback import Pullback
from partials.testing import CASES

METHODS = list(_solve.LEAST_SQUARES)
SHAPES = {"wide": (4, 30), "tall": (40, 3)}


def linear(n, features, rank=None, condition=None, dtype=torch.float64):
    """A Jacobian with respect to w of x @ w, whose rows are x: of any rank and condition."""
    torch.manual_seed(n)
    left, values, right = torch.linalg.svd(torch.randn(n, features, dtype=torch.float64), full_matrices=False)
    if condition is not None:
        values = torch.logspace(0, -float(np.log10(condition)), len(values), dtype=torch.float64)
    if rank is not None:
        values[rank:] = 0
    x = (left @ values.diag() @ right).to(dtype)
    return pt.jacobian(lambda x, w: x @ w, x, torch.randn(features, dtype=dtype, requires_grad=True), check="never"), x.double()


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("damping", [0, 1e-3, 10.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_least_squares(shape, damping, rank, method):
    J, D = linear(*SHAPES[shape], rank=rank)
    r = torch.randn(len(D), dtype=torch.float64)
    if damping:
        stacked = torch.cat([D, damping**0.5 * torch.eye(D.shape[1], dtype=torch.float64)])
        expected = torch.linalg.lstsq(stacked, torch.cat([r, r.new_zeros(D.shape[1])]).unsqueeze(1)).solution.squeeze(1)
    else:
        expected = torch.linalg.pinv(D) @ r
    found = J.solve(r, damping, method=method, tolerance=1e-13)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_ill_conditioned(method):
    """Condition 1e6: J^T J has 1e12, which float64 holds with a little damping."""
    J, D = linear(12, 8, condition=1e6)
    r = torch.randn(12, dtype=torch.float64)
    left, values, right = torch.linalg.svd(D, full_matrices=False)
    expected = right.mT @ ((left.mT @ r) * values / (values.square() + 1e-9))
    found = J.solve(r, 1e-9, method=method, tolerance=1e-12, max_iter=5000)
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_float64_on_request():
    J, D = linear(12, 8, condition=1e3, dtype=torch.float32)
    r = torch.randn(12)
    expected = torch.linalg.solve(D.T @ D + 1e-7 * torch.eye(8).double(), D.T @ r.double())
    for method in METHODS:
        found = J.solve(r, 1e-7, method=method, dtype=torch.float64, tolerance=1e-13)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    single = J.solve(r, 1e-7, method="rows")
    assert single.dtype == torch.float32
    assert (single - expected).norm() > 1e-4 * expected.norm()  # what was asked for was needed
    assert J.dtype == torch.float32


def test_the_smaller_side_is_taken(monkeypatch):
    taken = []
    for name in METHODS:
        monkeypatch.setitem(_solve.LEAST_SQUARES, name, lambda J, r, damping, how, name=name: taken.append(name))
    for shape, damping in (("wide", 1.0), ("tall", 1.0), ("tall", 0)):
        J, D = linear(*SHAPES[shape])
        J.solve(torch.zeros(len(D)), damping)
    monkeypatch.setattr(_solve, "SIDE", 2)
    monkeypatch.setattr(_solve, "DENSE", 10)
    J.solve(torch.zeros(len(D)), 1.0)
    J.solve(torch.zeros(len(D)), 0)
    assert taken == ["rows", "columns", "svd", "cg", "cg"]


def test_conjugate_gradients_say_where_they_stopped():
    J, D = linear(12, 8, condition=1e6)
    with pytest.raises(pt.MethodError, match=r"have not converged\n  got       a residual of .* after 3 steps"):
        J.solve(D[:, 0], 1e-9, method="cg", max_iter=3)
    assert torch.equal(J.solve(torch.zeros(12), 0, method="cg"), torch.zeros(8, dtype=torch.float64))
    with pytest.raises(pt.MethodError, match="have not converged"):
        J.solve(torch.full((12,), torch.nan), 1.0, method="cg")


def test_refusals():
    J, D = linear(4, 3)
    with pytest.raises(pt.InputError, match="one of: auto, rows, columns, svd, cg"):
        J.solve(D[:, 0], 1.0, method="lu")
    with pytest.raises(pt.InputError, match="one of: auto, rows, columns, cg"):
        J.ggn().solve(D[0], 1.0, method="svd")
    with pytest.raises(pt.InputError, match="damping is not understood"):
        J.solve(D[:, 0], float("nan"))
    with pytest.raises(pt.InputError, match="divides by the damping"):
        J.ggn().solve(D[0], 0, method="rows")
    with pytest.raises(pt.InputError, match=r"expected  shape \(3,\)"):
        J.ggn().solve(D[:, 0], 1)


@pytest.fixture(params=["mlp", "tied", "cnn"])
def made(request):
    torch.manual_seed(0)
    J = CASES[request.param].make().jacobian(check="never")
    H = torch.randn(len(J), *[J.values[0].numel()] * 2, dtype=torch.float64)
    return J, H @ H.mT, J.dense().reshape(len(J), H.shape[1], -1)


@pytest.mark.parametrize("method", ["auto", *_solve.SYSTEMS])
def test_natural_gradient(made, method):
    J, H, D = made
    b = torch.randn(D.shape[-1], dtype=torch.float64)
    for matrix, full in ((None, D.flatten(0, 1).T @ D.flatten(0, 1)), (H, torch.einsum("ncp,ncd,ndq->pq", D, H, D))):
        expected = torch.linalg.solve(full + 0.1 * torch.eye(len(b)).double(), b)
        found = J.ggn(matrix).solve(b, 0.1, method=method, tolerance=1e-12)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(J.normal(matrix), full)
    assert J.ggn(H).shape == (len(b), len(b))


def test_curvature_without_damping():
    """Fewer rows than parameters: the shortest of the least-squares solutions."""
    torch.manual_seed(0)
    J = pt.jacobian(nn.Linear(4, 2).double(), torch.randn(3, 4, dtype=torch.float64), check="never")
    H = torch.eye(2, dtype=torch.float64) + torch.ones(3, 2, 2, dtype=torch.float64)
    D = J.dense()
    full = torch.einsum("ncp,ncd,ndq->pq", D, H, D)
    b = torch.randn(len(full), dtype=torch.float64)
    torch.testing.assert_close(J.ggn(H).solve(b, 0), torch.linalg.pinv(full, hermitian=True) @ b, rtol=1e-6, atol=1e-8)
    b = full @ b
    torch.testing.assert_close(
        J.ggn(H).solve(b, 0, method="cg", tolerance=1e-12), torch.linalg.pinv(full, hermitian=True) @ b, rtol=1e-6, atol=1e-8
    )


def test_solve_is_differentiable():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    J = pt.jacobian(model, x, create_graph=True, check="never")
    r = torch.randn(5, 2, dtype=torch.float64)
    slopes = [
        torch.autograd.grad(J.solve(r, 0.5, method=m, tolerance=1e-14).square().sum(), x, retain_graph=True)[0]
        for m in ("rows", "columns", "cg")
    ]
    for slope in slopes[1:]:
        torch.testing.assert_close(slope, slopes[0], rtol=1e-6, atol=1e-9)


# --- rows that are formed a few samples at a time ----------------------------------------------------------------


def test_pieces_change_nothing(made, monkeypatch):
    J, H, _ = made
    asked = {
        "normal": lambda: J.normal(H),
        "variance": lambda: J.variance(),
        "l1": lambda: J.norms(1),
        "gram": lambda: J.gram(),
        "gram of formed rows": lambda: _blocks.Block.gram(*[J.blocks[J.names[0]][0]] * 2),
    }
    before = {name: ask() for name, ask in asked.items()}
    monkeypatch.setattr(_room, "rows", lambda: 1)
    for name, ask in asked.items():
        torch.testing.assert_close(ask(), before[name], rtol=1e-10, atol=1e-12)
    one = J.blocks[J.names[0]][0]
    assert J[:0].norms(1).shape == (0, *J.out)
    assert _blocks.Block.gram(one.select(torch.arange(0)), one).shape[:1] == (0,)
    assert _blocks.Block.gram(one, one.select(torch.arange(0))).shape[2:3] == (0,)


class Mixed(nn.Module):
    """A float32 and a float64 use of one float32 weight, beside a float64 layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2).double()
        self.square = nn.Parameter(torch.randn(2, 2))

    def forward(self, x):
        z = self.last(torch.tanh(self.first(x)).double())
        return z + (z.float() @ (self.square * self.square)).double() + z @ self.square.double()


def test_parameters_of_several_dtypes():
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(5, 3)
    J = pt.jacobian(model, x, check="never")
    assert J.plan.method == "capture" and any(isinstance(block, Pullback) for block in J.blocks["square"])
    D, H, r = J.dense(), torch.randn(5, 2, 2), torch.randn(5, 2)
    H = H @ H.mT
    flat = D.flatten(0, 1)
    near = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(J.gram().reshape(10, 10), flat @ flat.T, **near)
    torch.testing.assert_close(J.gram_blocks(), D @ D.mT, **near)
    torch.testing.assert_close(J.normal(H), torch.einsum("ncp,ncd,ndq->pq", D, H.double(), D), **near)
    torch.testing.assert_close(J.diagonal(H), J.normal(H).diagonal(), **near)
    v = torch.randn(D.shape[-1])
    torch.testing.assert_close(J.ggn(H) @ v, J.normal(H) @ v.double(), **near)
    assert J.solve(r, 1.0).dtype == J.ggn(H).solve(v, 1.0).dtype == torch.float64
    left, right = Outer(torch.randn(3, 2, 1, 4), torch.randn(3, 2, 2, 1, 5), (5, 4)), Dense(torch.randn(3, 2, 5, 4).double())
    for quantity in ("gram", "own_gram", "inner"):
        for a, b in ((left, right), (right, left)):
            assert getattr(a, quantity)(b).dtype == torch.float64


def test_accumulate_grad_adds_in_place():
    """Optimisers and reducers hold `p.grad`: backward adds to that very tensor."""
    model, x = nn.Linear(3, 1), torch.randn(5, 3)
    G = pt.gradient(lambda x: model(x).squeeze(1), x, params=model, check="never")
    G.accumulate_grad()
    held = {name: p.grad for name, p in model.named_parameters()}
    once = {name: grad.clone() for name, grad in held.items()}
    assert held["weight"].untyped_storage().data_ptr() != held["bias"].untyped_storage().data_ptr()
    G.accumulate_grad(torch.full((5,), 2.0))
    for name, p in model.named_parameters():
        assert p.grad is held[name]
        torch.testing.assert_close(p.grad, 3 * once[name])


# --- SciPy -------------------------------------------------------------------------------------------------------

linalg = pytest.importorskip("scipy.sparse.linalg")


def test_linear_operator(made):
    J, H, D = made
    A, flat = J.as_linear_operator(), D.flatten(0, 1).numpy()
    rows, width = flat.shape
    assert A.shape == (rows, width) and A.dtype == np.float64
    v, u = np.random.default_rng(0).standard_normal((width, 3)), np.random.default_rng(1).standard_normal((rows, 2))
    for found, expected in (
        (A.matvec(v[:, 0]), flat @ v[:, 0]),
        (A.matvec(v[:, :1]), flat @ v[:, :1]),
        (A.matmat(v), flat @ v),
        (A.rmatvec(u[:, 0]), flat.T @ u[:, 0]),
        (A.rmatmat(u), flat.T @ u),
        (A.T @ u, flat.T @ u),
        ((A.H @ A) @ v[:, 0], flat.T @ (flat @ v[:, 0])),
        (J.ggn(H).as_linear_operator() @ v, J.normal(H).numpy() @ v),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        assert found.shape == expected.shape and found.dtype == np.float64


def test_scipy_solvers(made):
    J, _, D = made
    A, flat = J.as_linear_operator(), D.flatten(0, 1).numpy()
    r = np.random.default_rng(2).standard_normal(len(flat))
    expected = J.solve(torch.from_numpy(r).view(J.values.shape), 1e-2).numpy()
    for solver, limit in ((linalg.lsqr, "iter_lim"), (linalg.lsmr, "maxiter")):
        found = solver(A, r, damp=0.1, atol=1e-13, btol=1e-13, conlim=0, **{limit: 2000})[0]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    normal = J.ggn().as_linear_operator() + 1e-2 * linalg.aslinearoperator(np.eye(flat.shape[1]))
    found, info = linalg.cg(normal, flat.T @ r, rtol=1e-12, maxiter=2000)
    assert info == 0
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    values = linalg.svds(A, k=3, return_singular_vectors=False, random_state=0)
    np.testing.assert_allclose(np.sort(values)[::-1], np.linalg.svd(flat, compute_uv=False)[:3], rtol=1e-8)
    top = linalg.eigsh(J.ggn().as_linear_operator(), k=1, return_eigenvectors=False, v0=np.ones(flat.shape[1]))
    np.testing.assert_allclose(top[0], np.linalg.norm(flat, 2) ** 2, rtol=1e-8)


@pytest.mark.parametrize(("dtype", "numpy"), [(torch.float32, np.float32), (torch.bfloat16, np.float32)])
def test_linear_operators_in_other_dtypes(dtype, numpy):
    J = pt.jacobian(nn.Linear(3, 2).to(dtype), torch.randn(5, 3, dtype=dtype), check="never")
    A = J.as_linear_operator()
    assert A.dtype == numpy and (A @ np.ones(8)).dtype == numpy and A.shape == (10, 8)


def test_joined_jacobians_are_solved_as_one():
    J, D = linear(40, 3, dtype=torch.float32)
    halves, r = pt.concat([J[:15], J[15:]]), torch.randn(40)
    for method in METHODS:
        found, expected = (x.solve(r, 0.1, method=method, dtype=torch.float64, tolerance=1e-12) for x in (halves, J))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(halves.as_linear_operator() @ np.ones(3), D.sum(1).numpy(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["no samples", "narrowed", "weighted", "tied", "mixed", "several outputs"])
def test_linear_operators_of_awkward_jacobians(kind):
    """Each against NumPy in float64 on its dense rows; complex columns are a real operator's, part by part."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), torch.randn(6, 3, dtype=torch.float64)
    if kind == "tied":
        net[2].weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        net.append(nn.Linear(3, 4, dtype=torch.float64))
        net[3].weight = net[0].weight
    made = {
        "no samples": lambda: pt.jacobian(net, x[:0], check="never"),
        "narrowed": lambda: pt.jacobian(net, x, wrt="2.*", check="never"),
        "weighted": lambda: pt.concat([pt.jacobian(net, x[:2], check="never"), pt.jacobian(net, x[2:], check="never")], weights=[2.0, 0.5]),
        "tied": lambda: pt.jacobian(net, x, check="never"),
        "mixed": lambda: pt.jacobian(lambda x: net(x).float(), x, params=net, check="never"),
        "several outputs": lambda: pt.jacobian(lambda x: net(x).reshape(-1, 3, 1), x, params=net, check="never"),
    }
    J = made[kind]()
    flat = J.dense().reshape(J.values.numel(), J.shape[-1]).double().numpy()
    A, near = J.as_linear_operator(), {"rtol": 1e-9, "atol": 1e-9} if kind != "mixed" else {"rtol": 1e-5, "atol": 1e-5}
    rng = np.random.default_rng(0)
    rows, width = flat.shape
    assert A.shape == flat.shape and A.dtype == np.float64
    for v, u in (
        (rng.standard_normal(width), rng.standard_normal(rows)),
        (rng.standard_normal(width) + 1j * rng.standard_normal(width), rng.standard_normal(rows) * 1j),
        (np.arange(width), np.arange(rows)),
    ):
        np.testing.assert_allclose(A @ v, flat @ v, **near)
        np.testing.assert_allclose(A.rmatvec(u), flat.T @ u, **near)
        np.testing.assert_allclose(J.ggn().as_linear_operator() @ v, flat.T @ (flat @ v), **near)
    np.testing.assert_allclose(J.gram().reshape(rows, rows), flat @ flat.T, **near)
    r = torch.from_numpy(rng.standard_normal(rows)).view(J.values.shape)
    expected = np.linalg.solve(flat.T @ flat + 0.1 * np.eye(width), flat.T @ r.numpy().reshape(-1))
    for method in METHODS:
        np.testing.assert_allclose(J.solve(r, 0.1, method=method, dtype=torch.float64, tolerance=1e-10), expected, rtol=1e-5, atol=1e-5)
    if rows:
        np.testing.assert_allclose(
            linalg.lsqr(A, r.numpy().reshape(-1), damp=0.1**0.5, atol=1e-12, btol=1e-12)[0], expected, rtol=1e-4, atol=1e-5
        )
        top = linalg.svds(A, k=1, return_singular_vectors=False, random_state=0)
        np.testing.assert_allclose(top[0], np.linalg.norm(flat, 2), rtol=1e-5)
