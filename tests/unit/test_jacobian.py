"""The Jacobian object: every quantity against the dense rows of the float64 loop, and the laws that tie them together."""

from __future__ import annotations

import math

import pytest
import torch

import partials as pt
from partials.testing import CASES
from tests.oracle import dense, reference

NAMES = ["line", "scalar_output", "matrix_output", "many_shapes", "unused_parameter", "mlp", "cnn", "tied", "embedding"]
METHODS = ["auto", "loop"]


class Made:
    """A Jacobian and its reference: D is (N, C, P), R is rows by name."""

    def __init__(self, name, method, **options):
        self.call = CASES[name].make()
        self.J = self.call.jacobian(method=method, check="never", **options)
        self.values, self.R = reference(name)
        self.out = tuple(self.values.shape[1:])
        self.n, self.c = len(self.values), math.prod(self.out)
        self.full = dense(self.R, self.values.ndim)
        self.D = self.full.reshape(self.n, self.c, -1)
        self.p = self.D.shape[-1]
        self.lead = (self.n, *self.out)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(params=NAMES)
def made(request, method):
    return Made(request.param, method)


def data(*shape):
    return torch.randn(shape, dtype=torch.float64)


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# --- rows --------------------------------------------------------------------------------------------------------


def test_facts(made, device):
    J = made.J
    near(J.values, made.values)
    assert J.shape == (*made.lead, made.p) and len(J) == made.n and J.out == made.out
    assert J.names == tuple(made.R)
    assert J.dtype == torch.float64 and J.device.type == device.type
    assert all(name in J for name in made.R) and "nothing" not in J


def test_rows_by_name(made):
    for name, rows in made.J.dict().items():
        near(rows, made.R[name])
        near(made.J[name], made.R[name])


def test_dense(made):
    near(made.J.dense(), made.full)
    out = torch.full(made.full.shape, math.nan, dtype=torch.float64)
    assert made.J.dense(out=out) is out
    near(out, made.full)
    strided = torch.full((*made.lead, 2 * made.p), math.nan, dtype=torch.float64)[..., ::2]
    assert made.J.dense(out=strided) is strided
    near(strided, made.full)


@pytest.mark.parametrize("index", [2, -1, slice(1, 3), [3, 0, 0], [], torch.tensor([1, 2]), torch.tensor([True, False, True, False]), ...])
def test_choosing_samples(made, index):
    chosen = torch.arange(made.n)[index].reshape(-1)
    J = made.J[index]
    assert len(J) == len(chosen) and J.names == made.J.names
    near(J.values, made.values[chosen])
    near(J.dense(), made.full[chosen])
    near(J.norms(), made.full[chosen].norm(dim=-1))
    near(J.sum(), made.full[chosen].sum(0))
    near(J[:1].dense(), made.full[chosen][:1])


def test_it_is_not_iterable():
    with pytest.raises(TypeError, match=r"J\.names are its parameters, J\[n\] its samples"):
        list(Made("line", "loop").J)


# --- products ----------------------------------------------------------------------------------------------------


def test_matmul(made):
    v, V = data(made.p), data(made.p, 3)
    near(made.J @ v, (made.D @ v).reshape(made.lead))
    near(made.J @ V, (made.D @ V).reshape(*made.lead, 3))
    near(made.J @ made.J.unflatten(v), made.J @ v)


def test_transposed_matmul(made):
    u, U = data(*made.lead), data(*made.lead, 3)
    flat = made.D.flatten(0, 1)
    near(made.J.T @ u, flat.T @ u.reshape(-1))
    near(made.J.T @ U, flat.T @ U.reshape(-1, 3))
    near(made.J.H @ u, made.J.T @ u)
    assert made.J.T.shape == (made.p, *made.lead)


def test_products_under_vmap(made):
    U, V = data(3, *made.lead), data(3, made.p)
    near(torch.vmap(lambda u: made.J.T @ u)(U), U.flatten(1) @ made.D.flatten(0, 1))
    near(torch.vmap(lambda v: made.J @ v)(V), (V @ made.D.flatten(0, 1).T).reshape(3, *made.lead))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["auto", "loop", "vmap"])
def test_who_writes_to_rows_changes_no_jacobian(name, method):
    if method in CASES[name].refuses:
        pytest.skip(CASES[name].refuses[method])
    J = CASES[name].make().jacobian(check="never", method=method)
    before = J.dense()
    for rows in J.dict().values():
        rows.fill_(torch.nan)
    assert torch.equal(J.dense(), before)


def test_unflatten(made):
    v = data(made.p)
    parts = made.J.unflatten(v)
    assert {name: part.shape for name, part in parts.items()} == {name: p.shape for name, p in made.call.parameters.items()}
    assert torch.equal(torch.cat([part.reshape(-1) for part in parts.values()]), v)
    columns = made.J.unflatten(data(made.p, 2))
    assert all(part.shape == (*parts[name].shape, 2) for name, part in columns.items())


def test_adjoint(made):
    u, v = data(*made.lead), data(made.p)
    near((u * (made.J @ v)).sum(), (made.J.T @ u) @ v)


# --- norms and kernels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 1, math.inf, 3])
def test_norms(made, order):
    near(made.J.norms(order), torch.linalg.vector_norm(made.full, order, dim=-1))


def test_gram(made):
    rows = made.D.flatten(0, 1)
    near(made.J.gram(), (rows @ rows.T).reshape(*made.lead, *made.lead))
    other = made.J[:2]
    near(made.J.gram(other), (rows @ made.D[:2].flatten(0, 1).T).reshape(*made.lead, 2, *made.out))
    near(other.gram(made.J), (made.D[:2].flatten(0, 1) @ rows.T).reshape(2, *made.out, *made.lead))


def test_gram_blocks(made):
    near(made.J.gram_blocks(), (made.D @ made.D.mT).reshape(*made.lead, *made.out))


# --- curvature ---------------------------------------------------------------------------------------------------


def test_diagonal_normal_and_ggn(made):
    root = data(made.n, made.c, made.c)
    for H in (None, root @ root.mT, root):
        full = torch.einsum("ncp,ncd,ndq->pq", made.D, torch.eye(made.c).double().expand(made.n, -1, -1) if H is None else H, made.D)
        near(made.J.diagonal(H), full.diagonal())
        near(made.J.normal(H), full)
        v, V = data(made.p), data(made.p, 2)
        near(made.J.ggn(H) @ v, full @ v)
        near(made.J.ggn(H) @ V, full @ V)
        near(made.J.ggn(H) @ made.J.unflatten(v), full @ v)


# --- sums over samples -------------------------------------------------------------------------------------------


def test_sum_mean_and_variance(made):
    weights = data(made.n)
    near(made.J.sum(), made.full.sum(0))
    near(made.J.sum(weights), torch.einsum("n,n...->...", weights, made.full))
    near(made.J.mean(), made.full.mean(0))
    near(made.J.variance(), made.full.var(0))
    near(made.J.variance(correction=0), made.full.var(0, correction=0))


def test_variance_does_not_cancel():
    x = data(50, 3)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    J = pt.jacobian(lambda x, w: (x + 1e6) @ w, x, w, check="never")
    torch.testing.assert_close(J.variance(), (x + 1e6).var(0), rtol=1e-8, atol=0)


def test_variance_of_one_sample_is_nan():
    assert Made("mlp", "loop").J[:1].variance().isnan().all()


def test_sum_of_rows_is_one_backward(made):
    weights = data(made.n)
    call = made.call
    out = call.pick(call.f(*call.inputs, **call.kwargs))
    for c in range(made.c):
        scalar = (weights * out.reshape(made.n, made.c)[:, c]).sum()
        grads = torch.autograd.grad(scalar, list(call.parameters.values()), retain_graph=True, allow_unused=True)
        parts = made.J.unflatten(made.J.sum(weights).reshape(made.c, -1)[c])
        for (name, p), g in zip(call.parameters.items(), grads, strict=True):
            near(parts[name], torch.zeros_like(p) if g is None else g)


# --- clipping ----------------------------------------------------------------------------------------------------


@pytest.fixture
def scalar(method):
    return Made("scalar_output", method)


def clipped(rows, limit):
    rows = rows.reshape(len(rows), -1)
    norms = rows.norm(dim=1)
    return (limit / norms).clamp(max=1) @ rows, norms


def test_clipped_sum(scalar):
    for limit in (0.1, 1.0, 100.0):
        expected, norms = clipped(scalar.full, limit)
        near(scalar.J.clipped_sum(limit), expected)
        total, found = scalar.J.clipped_sum(limit, return_norms=True)
        near(total, expected)
        near(found, norms)


def test_clipped_sum_per_parameter(scalar):
    total, found = scalar.J.clipped_sum(0.5, per="parameter", return_norms=True)
    parts = {name: clipped(rows, 0.5) for name, rows in scalar.R.items()}
    near(total, torch.cat([part for part, _ in parts.values()]))
    assert list(found) == list(parts)
    for name, (_, norms) in parts.items():
        near(found[name], norms)


def test_clipped_sum_with_a_bound_for_each_parameter(scalar):
    bounds = {name: 0.1 * (i + 1) for i, name in enumerate(scalar.R)}
    expected = [
        (bounds[name] / (norms + 0.01)).clamp(max=1) @ rows.reshape(len(rows), -1)
        for name, rows in scalar.R.items()
        for norms in [rows.reshape(len(rows), -1).norm(dim=1)]
    ]
    near(scalar.J.clipped_sum(bounds, per="parameter", epsilon=0.01), torch.cat(expected))
    rows, norms = scalar.full.reshape(len(scalar.full), -1), scalar.J.norms().reshape(-1)
    near(scalar.J.clipped_sum(0.5, epsilon=0.01), (0.5 / (norms + 0.01)).clamp(max=1) @ rows)


def test_clipped_sum_of_zero_rows(method):
    w = data(3).requires_grad_()
    J = pt.jacobian(lambda x, w: (x * 0) @ w, data(4, 3), w, method=method, check="never")
    assert torch.equal(J.clipped_sum(1.0), torch.zeros(3).double())


def test_clipped_sum_refuses_rows_that_are_not_finite(method):
    x, w = data(4, 3), data(3).requires_grad_()
    x[2, 0] = math.inf
    J = pt.jacobian(lambda x, w: x @ w, x, w, method=method, check="never")
    with pytest.raises(pt.InputError) as error:
        J.clipped_sum(1.0)
    assert str(error.value) == (
        "clipped_sum met rows that are not finite\n"
        "  got       samples 2 of 'w'\n"
        "  expected  finite gradients\n"
        "  try       drop these samples: J[mask]"
    )
    near(J[[0, 1, 3]].clipped_sum(1.0), clipped(x[[0, 1, 3]], 1.0)[0])


# --- least squares -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["line", "mlp", "matrix_output", "many_shapes", "unused_parameter"])
@pytest.mark.parametrize("damping", [0, 1e-3, 2.0])
def test_solve(name, damping, method):
    made = Made(name, method)
    r = data(*made.lead)
    rows = made.D.flatten(0, 1)
    if damping:
        expected = torch.linalg.solve(rows.T @ rows + damping * torch.eye(made.p).double(), rows.T @ r.reshape(-1))
    else:
        expected = torch.linalg.lstsq(rows, r.reshape(-1, 1), driver="gelsd").solution.squeeze(1)
    torch.testing.assert_close(made.J.solve(r, damping), expected, rtol=1e-6, atol=1e-8)


# --- the user's .grad --------------------------------------------------------------------------------------------


def test_accumulate_grad(scalar):
    weights = data(scalar.n)
    expected = torch.einsum("n,np->p", weights, scalar.full)
    w, b = scalar.call.parameters["w"], scalar.call.parameters["b"]
    scalar.J.accumulate_grad(weights)
    near(torch.cat([w.grad, b.grad.reshape(1)]), expected)
    kept = w.grad
    scalar.J.accumulate_grad(weights)
    assert w.grad is kept or not kept.requires_grad
    near(torch.cat([w.grad, b.grad.reshape(1)]), 2 * expected)
    scalar.J.accumulate_grad()
    near(w.grad, (2 * expected + scalar.full.sum(0))[:3])


# --- stacking ----------------------------------------------------------------------------------------------------


def test_concat_of_halves_is_the_whole(made):
    J = pt.concat([made.J[:1], made.J[1:]])
    rows = made.D.flatten(0, 1)
    v, u, weights, H = data(made.p), data(*made.lead), data(made.n), data(made.n, made.c, made.c)
    near(J.dense(), made.full)
    near(J.values, made.values)
    near(J @ v, made.J @ v)
    near(J.T @ u, made.J.T @ u)
    near(J.norms(), made.J.norms())
    near(J.norms(1), made.J.norms(1))
    near(J.gram(), (rows @ rows.T).reshape(*made.lead, *made.lead))
    near(J.gram(made.J), J.gram())
    near(made.J.gram(J), J.gram())
    near(J.gram_blocks(), made.J.gram_blocks())
    near(J.sum(weights), made.J.sum(weights))
    near(J.variance(), made.J.variance())
    near(J.diagonal(H), made.J.diagonal(H))
    near(J.normal(H), made.J.normal(H))
    near(J.ggn(H) @ v, made.J.ggn(H) @ v)
    near(J.solve(u, 0.1), made.J.solve(u, 0.1))
    near(J[[3, 0, 2]].dense(), made.full[[3, 0, 2]])
    near(pt.concat([J, made.J])[made.n :].dense(), made.full)


def test_concat_with_weights(made):
    weights = [0.5, 2.0]
    J = pt.concat([made.J[:1], made.J[1:]], weights=weights)
    factors = torch.tensor([0.5, 2.0, 2.0, 2.0]).double()
    scaled = made.D * factors[:, None, None]
    near(J.dense(), scaled.reshape(made.full.shape))
    near(J.values, made.values * factors.reshape(-1, *(1,) * len(made.out)))
    near(J.gram(), (scaled.flatten(0, 1) @ scaled.flatten(0, 1).T).reshape(*made.lead, *made.lead))
    near(J.sum(), scaled.sum(0).reshape(*made.out, -1))


# --- what it says ------------------------------------------------------------------------------------------------


def test_repr_is_one_screen():
    layers = [layer for _ in range(30) for layer in (torch.nn.Linear(2, 2), torch.nn.Tanh())]
    J = pt.jacobian(torch.nn.Sequential(*layers), torch.randn(3, 2), check="never", method="loop")
    lines = repr(J).splitlines()
    assert len(lines) <= 20 and all(len(line) <= 140 for line in lines)
    assert lines[0].startswith(f"Jacobian (3, 2, 180) torch.float32 on {J.device}:")
    assert lines[-2:] == ["  ... and 48 more", "  by loop"]
    J = Made("line", "loop").J
    assert repr(J) == (
        f"Jacobian (4, 1, 2) torch.float64 on {J.device}: 64 B held, 64 B dense\n"
        "  a                                (1,)\n"
        "  b                                (1,)\n"
        "  by loop"
    )
