"""The notebook that this library grew from, row by row (S1 to S15): what it computed, what it tried in vain, what it got wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import partials as pt
from partials.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def f(x, a, b):
    return a * x + b


@pytest.fixture
def one():
    """x, a and b of one sample."""
    return torch.randn(1), torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True)


@pytest.fixture
def batch():
    """A thousand x, and the same a and b for all."""
    return torch.randn(1000, 1), torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True)


def is_gradient(x, rows):
    """The notebook's test: rows (..., 2) are exactly (x, 1)."""
    return bool((rows[..., 0] == x.reshape(rows.shape[:-1])).all() and (rows[..., 1] == 1).all())


def matrix(J):
    """(N, 2) of a batch, (2,) of one sample: the derivatives by a and by b side by side."""
    return J.dense().flatten(-2)


def assert_untouched(*tensors):
    assert all(t.grad is None and t.is_leaf for t in tensors)


# --- the function a x + b ----------------------------------------------------------------------------------------


def test_s1_the_three_partial_derivatives(one, batch):
    for inputs, batched in ((one, False), (batch, True)):
        x, a, b = inputs
        J = pt.jacobian(f, x, a, b, wrt=("x", "a", "b"), batched=batched)
        assert torch.equal(J["x"].flatten(), a.detach().expand(x.numel()))
        assert torch.equal(J["a"].flatten(), x.flatten())
        assert torch.equal(J["b"].flatten(), torch.ones(x.numel()))


def test_s2_the_exact_comparison_is_true_for_right_and_false_for_wrong(one, batch):
    for (x, a, b), batched in ((one, False), (batch, True)):
        rows = matrix(pt.jacobian(f, x, a, b, batched=batched))
        assert is_gradient(x, rows)
        for wrong in (rows + 1e-6, rows.flip(-1), rows * 2, torch.zeros_like(rows)):
            assert not is_gradient(x, wrong)
    swapped = matrix(pt.jacobian(f, *batch))
    swapped[[3, 4]] = swapped[[4, 3]]
    assert not is_gradient(batch[0], swapped)


def test_s3_backward_one_sample(one):
    x, a, b = one
    assert is_gradient(x, matrix(pt.jacobian(f, x, a, b, batched=False, method="backward")))
    assert_untouched(a, b)


def test_s4_backward_batch(batch):
    x, a, b = batch
    J = pt.jacobian(f, x, a, b, method="backward")
    assert J["a"].shape == J["b"].shape == (1000, 1, 1)
    assert is_gradient(x, matrix(J))
    assert_untouched(a, b)


def test_s5_grad_one_sample(one):
    x, a, b = one
    assert is_gradient(x, matrix(pt.jacobian(f, x, a, b, batched=False, method="grad")))


def test_s6_grad_batch(batch):
    x, a, b = batch
    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
        torch.autograd.grad(f(x, a, b), a)
    assert is_gradient(x, matrix(pt.jacobian(f, x, a, b, method="grad")))


# --- u(x, t) -----------------------------------------------------------------------------------------------------


def wave(x, t):
    return torch.exp(-t) * torch.sin(2 * x)


def test_s7_derivatives_of_u():
    x, t = torch.linspace(-1, 1, 100, dtype=torch.float64), torch.rand(100, dtype=torch.float64)
    d = pt.derivatives(wave, "t", "x", "xx", "xt", "xxxx", "xxtt")(x, t)
    decay, sine, cosine = torch.exp(-t), torch.sin(2 * x), torch.cos(2 * x)
    for found, expected in (
        (d.value, decay * sine),
        (d.t, -decay * sine),
        (d.x, 2 * decay * cosine),
        (d.xx, -4 * decay * sine),
        (d["xt"], -2 * decay * cosine),
        (d["xxxx"], 16 * decay * sine),
        (d["xxtt"], -4 * decay * sine),
    ):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(pt.partial(wave, "xx")(x, t), d.xx)


def test_s7_packed_coordinates_and_exact_zeros():
    points = torch.rand(50, 2, dtype=torch.float64)
    d = pt.derivatives(lambda p: wave(p[..., 0], p[..., 1]), "xx", "t", coords="xt")(points)
    separate = pt.derivatives(wave, "xx", "t")(points[:, 0], points[:, 1])
    torch.testing.assert_close(d.xx, separate.xx)
    torch.testing.assert_close(d.t, separate.t)
    plane = pt.derivatives(lambda x, t: 3 * x + t, "x", "xx", "xt")(points[:, 0], points[:, 1])
    assert torch.equal(plane.x, torch.full((50,), 3.0, dtype=torch.float64))
    assert torch.equal(plane.xx, torch.zeros(50, dtype=torch.float64)) and not plane["xt"].any()


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_s7_residual_with_u_xx_by_the_parameters_of_a_net(method):
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def u(x, t):
        return net(torch.stack([x, t], -1)).squeeze(-1)

    def residual(x, t):
        d = pt.derivatives(u, "t", "xx")(x, t)
        return d.t - 0.1 * d.xx

    x, t = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    J = pt.jacobian(residual, x, t, params=net, method=method)
    assert J.shape == (6, 25)
    parameters = list(net.parameters())
    for n in range(6):
        xn, tn = x[n].clone().requires_grad_(), t[n].clone().requires_grad_()
        u_x, u_t = torch.autograd.grad(u(xn, tn), (xn, tn), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x, xn, create_graph=True)
        rows = torch.autograd.grad(u_t - 0.1 * u_xx, parameters, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(J.dense()[n], torch.cat([row.flatten() for row in rows]))


# --- jacobian() --------------------------------------------------------------------------------------------------


def test_s8_jacobian_one_sample_all_partials(one):
    x, a, b = one
    J = pt.jacobian(f, x, a, b, wrt=("x", "a", "b"), batched=False, method="jacobian")
    theirs = torch.autograd.functional.jacobian(f, (x, a, b))
    for name, expected in zip(("x", "a", "b"), theirs, strict=True):
        assert torch.equal(J[name], expected)


def test_s9_jacobian_one_sample_parameters_only(one):
    x, a, b = one
    J = pt.jacobian(f, x, a, b, batched=False, method="jacobian")
    assert J.names == ("a", "b") and J["a"].shape == (1, 1)
    assert is_gradient(x, matrix(J))


def test_s10_jacobian_batch_all_partials(batch):
    x, a, b = batch
    J = pt.jacobian(f, x[:50], a, b, wrt=("x", "a", "b"), method="jacobian")
    assert list(J.dict()) == ["x", "a", "b"]
    assert J["x"].shape == J["a"].shape == J["b"].shape == (50, 1, 1)
    whole = torch.autograd.functional.jacobian(f, (x[:50], a, b))
    assert torch.equal(J["x"].flatten(), whole[0].reshape(50, 50).diagonal())
    assert torch.equal(J["a"], whole[1]) and torch.equal(J["b"], whole[2])


def test_s11_jacobian_batch_parameters_only(batch):
    x, a, b = batch
    J = pt.jacobian(f, x, a, b, method="jacobian")
    assert J["a"].shape == J["b"].shape == (1000, 1, 1)
    assert is_gradient(x, torch.hstack((J["a"].squeeze(2), J["b"].squeeze(2))))


# --- nn.Linear ---------------------------------------------------------------------------------------------------


def test_s12_module_one_sample():
    model, x = nn.Linear(1, 1), torch.randn(1)
    J = pt.jacobian(model, x, batched=False, method="backward")
    assert J["weight"].shape == (1, 1, 1) and J["bias"].shape == (1, 1)
    assert is_gradient(x, matrix(J))
    assert_untouched(*model.parameters())


def test_s13_module_batch_backward_is_not_zero():
    model, x = nn.Linear(1, 1), torch.randn(10, 1)
    rows = matrix(pt.jacobian(model, x, method="backward"))
    assert is_gradient(x, rows)
    assert rows.any(dim=1).all()
    assert_untouched(*model.parameters())


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_s14_module_batch_jacobian_leaves_the_module_as_it_was(method):
    model, x = nn.Linear(1, 1), torch.randn(10, 1)
    before = dict(model.named_parameters())
    J = pt.jacobian(model, x, method=method)
    assert J["weight"].shape == (10, 1, 1, 1) and J["bias"].shape == (10, 1, 1)
    assert torch.equal(J["weight"][:, 0, 0, 0], x[:, 0]) and torch.equal(J["bias"][:, 0, 0], torch.ones(10))
    after = dict(model.named_parameters())
    assert list(after) == ["weight", "bias"]
    assert all(after[name] is before[name] and isinstance(after[name], nn.Parameter) for name in after)
    assert len(torch.optim.SGD(model.parameters(), 0.1).param_groups[0]["params"]) == 2


def test_s15_timing_table(batch):
    x, a, b = batch
    table = pt.compare(f, x[:100], a, b, repeats=2)
    rows = {row.method: row for row in table.rows}
    assert set(METHODS) <= set(rows)
    for name in METHODS:
        assert rows[name].status == "ok", rows[name].reason
        assert rows[name].median > 0 and rows[name].error == 0
        assert name in str(table)
    assert table.relative(table.measured[0]) == 1
