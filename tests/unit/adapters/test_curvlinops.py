"""Our Jacobians as operators of curvlinops: its conventions, its own operators, and its solvers and estimators on top."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops asks for BackPACK and so for torchvision: no part of the dev extra")

from partials.adapters.curvlinops import GGNOperator, JacobianOperator, TransposedJacobianOperator, output_hessians  # noqa: E402

N, C = 6, 3
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def plain():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)).double()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, C)

    def forward(self, x):
        return self.head(self.gru(x.reshape(-1, 2, 2))[0][:, -1])


def data(kind="classification"):
    torch.manual_seed(2)
    return torch.randn(N, 4).double(), torch.randint(C, (N,)) if kind == "classification" else torch.randn(N, C).double()


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def operators():
    """(ours, curvlinops's own, or the dense matrix where it cannot)"""
    model, (x, y) = plain(), data()
    params, batches = list(model.parameters()), [(x, y)]
    J, G = pt.jacobian(model, x), pt.gradient(model, x, y, loss=F.cross_entropy)
    ce, mse, target = nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum"), data("regression")[1]
    off = {"check_deterministic": False}
    return {
        "jacobian": (JacobianOperator(J), curvlinops.JacobianLinearOperator(model, params, batches, **off)),
        "transposed": (TransposedJacobianOperator(J), curvlinops.TransposedJacobianLinearOperator(model, params, batches, **off)),
        "ggn of a mean": (
            GGNOperator(J, output_hessians(ce, J.values, y), scale=1 / N),
            curvlinops.GGNLinearOperator(model, ce, params, batches, **off),
        ),
        "ggn of a sum": (
            GGNOperator(J, output_hessians(mse, J.values, target)),
            curvlinops.GGNLinearOperator(model, mse, params, [(x, target)], **off),
        ),
        "empirical fisher": (GGNOperator(G, scale=1 / N), curvlinops.EFLinearOperator(model, ce, params, batches, **off)),
    }


NAMES = ("jacobian", "transposed", "ggn of a mean", "ggn of a sum", "empirical fisher")


@pytest.mark.parametrize("name", NAMES)
def test_as_its_own(name):
    ours, theirs = operators()[name]
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device == theirs.device
    V = torch.randn(ours.shape[1], 4).double()
    near(ours @ V, theirs @ V)
    near(ours @ V[:, 0], theirs @ V[:, 0])
    parts = [v.reshape(*shape, 4) for v, shape in zip(V.split(ours._in_shape_flat), ours._in_shape, strict=True)]
    for found, expected in zip(ours @ parts, theirs @ parts, strict=True):
        near(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_adjoint(name):
    A = operators()[name][0]
    u, v = torch.randn(A.shape[0]).double(), torch.randn(A.shape[1]).double()
    near(u @ (A @ v), (A.adjoint() @ u) @ v)
    assert A.adjoint().shape == A.shape[::-1]


def test_scipy():
    ours, theirs = operators()["ggn of a mean"]
    v = torch.randn(ours.shape[1]).double().numpy()
    near(torch.from_numpy(ours.to_scipy() @ v), torch.from_numpy(theirs.to_scipy() @ v))


def test_its_sums_inverses_and_estimates():
    model, (x, y) = plain(), data()
    J = pt.jacobian(model, x)
    H = output_hessians(nn.CrossEntropyLoss(), J.values, y)
    A, dense = GGNOperator(J, H), J.normal(H)
    v = torch.randn(len(dense)).double()
    near((2.0 * A + A) @ v, 3 * dense @ v)
    near((JacobianOperator(J).adjoint() @ JacobianOperator(J)) @ v, J.normal() @ v)
    eye = torch.eye(len(dense)).double()
    damped = A + curvlinops_identity(A)
    found = curvlinops.LSMRInverseLinearOperator(damped, atol=1e-12, btol=1e-12) @ v
    torch.testing.assert_close(found, torch.linalg.solve(dense + eye, v), rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    assert abs(curvlinops.hutchpp_trace(A, 30) - dense.trace()) < 0.05 * dense.trace()
    torch.testing.assert_close(curvlinops.xdiag(A, 40), dense.diagonal(), rtol=0.1, atol=0.05)
    near(curvlinops.SubmatrixLinearOperator(A, [0, 5], [1, 2, 3]) @ torch.eye(3).double(), dense[[0, 5]][:, [1, 2, 3]])


def curvlinops_identity(A):
    from curvlinops.examples import IdentityLinearOperator

    return IdentityLinearOperator([tuple(s) for s in A._in_shape], A.device, A.dtype)


def test_a_recurrent_model():
    torch.manual_seed(1)
    model, (x, _) = Recurrent().double(), data()
    J = pt.jacobian(model, x)
    V = torch.randn(J.shape[-1], 2).double()
    near(JacobianOperator(J) @ V, J.dense().flatten(0, 1) @ V)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss(), nn.SmoothL1Loss()])
def test_output_hessians(loss):
    kind = "classification" if isinstance(loss, nn.CrossEntropyLoss) else "regression"
    f, y = torch.randn(N, C).double(), data(kind)[1]
    found = output_hessians(loss, f, y)
    expected = torch.stack([torch.autograd.functional.hessian(lambda v, n=n: loss(v[None], y[n : n + 1]), f[n]) for n in range(N)])
    near(found, expected)


def test_output_hessians_of_none():
    assert output_hessians(nn.CrossEntropyLoss(), torch.empty(0, C), torch.empty(0, dtype=torch.int64)).shape == (0, C, C)


def test_outputs_of_two_dimensions():
    model, x = plain(), torch.randn(N, 2, 4).double()
    J, y = pt.jacobian(model, x), torch.randn(N, 2, C).double()
    loss = nn.MSELoss(reduction="sum")
    H = output_hessians(loss, J.values, y)
    assert H.shape == (N, 2 * C, 2 * C)
    V = torch.randn(J.shape[-1], 2).double()
    theirs = curvlinops.GGNLinearOperator(model, loss, list(model.parameters()), [(x, y)], check_deterministic=False)
    near(GGNOperator(J, H) @ V, theirs @ V)
    near(JacobianOperator(J) @ V, (J @ V).reshape(N * 2 * C, 2))
