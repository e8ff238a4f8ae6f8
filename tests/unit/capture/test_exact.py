"""Capture is exact: every model, every quantity, against one torch.autograd.grad for each output of each batch of one."""

import pytest
import torch

import partials as pt
from tests.oracle import gradients
from tests.unit.capture.models import MODELS, N

EXACT = 1e-11
"""Of the row's norm, in float64."""


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def made(name):
    torch.manual_seed(2)
    f, inputs, parameters = MODELS[name]()
    if any(torch.nn.parameter.is_lazy(p) for p in parameters.values()):
        with torch.no_grad():
            f(*inputs)
        parameters = {n: p for n, p in f.named_parameters() if p.requires_grad}
    return f, inputs, parameters


def options(f, parameters):
    return {"params": list(parameters.values())} if list(parameters) == ["0"] else {}


def expected_rows(f, inputs, parameters):
    """(N, C, P) by the loop."""
    rows = []
    for n in range(N):
        out = f(*(x if any(x is p for p in parameters.values()) else x[n : n + 1] for x in inputs))[0]
        rows.append(torch.cat([g.reshape(max(out.numel(), 1), -1) for g in gradients(out, parameters).values()], 1))
    return torch.stack(rows)


def assert_close(got, expected, scale=None):
    scale = expected.norm() if scale is None else scale
    assert (got - expected).norm() <= EXACT * scale + 1e-300


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.mark.parametrize("name", MODELS)
def test_rows_and_quantities(name):
    f, inputs, parameters = made(name)
    rows = expected_rows(f, inputs, parameters)
    J = pt.jacobian(f, *inputs, method="capture", check="never", **options(f, parameters))
    n, c, p = rows.shape
    assert J.plan.method == "capture"
    dense = J.dense().reshape(n, c, p)
    norms = rows.norm(dim=-1)
    assert ((dense - rows).norm(dim=-1) <= EXACT * norms.clamp_min(1e-3 * norms.max())).all()
    u, v = torch.randn(n, c), torch.randn(p)
    assert_close(J.norms().reshape(n, c), norms)
    assert_close((J @ v).reshape(n, c), rows @ v)
    assert_close(J.T @ u.reshape(J.values.shape), torch.einsum("nc,ncp->p", u, rows))
    flat = rows.reshape(n * c, p)
    assert_close(J.gram().reshape(n * c, n * c), flat @ flat.T)
    assert_close(J.gram_blocks().reshape(n, c, c), rows @ rows.mT)
    assert_close(J.diagonal(), flat.square().sum(0))
    assert_close(J.sum().reshape(c, p), rows.sum(0))
    assert_close(J.variance().reshape(c, p), rows.var(0), rows.square().sum(0).norm())
    chosen = J[torch.tensor([3, 1])]
    assert_close(chosen.dense().reshape(2, c, p), rows[[3, 1]])
    assert_close(J.gram(chosen).reshape(n * c, 2 * c), flat @ rows[[3, 1]].reshape(-1, p).T)
    out = torch.empty(n, *J.out, p)
    assert_close(J.dense(out=out).reshape(n, c, p), rows)


@pytest.mark.parametrize("name", MODELS)
def test_the_vmapped_runner_gives_the_same(name, monkeypatch):
    from partials.capture import trial

    f, inputs, parameters = made(name)
    monkeypatch.setitem(trial.RUNNERS, "native", lambda *_: refuse())
    try:
        J = pt.jacobian(f, *inputs, method="capture", check="never", **options(f, parameters))
    except pt.MethodError as error:
        assert name in ("in place",), error
        return
    rows = expected_rows(f, inputs, parameters)
    assert_close(J.dense().reshape(rows.shape), rows)
    assert_close(J.norms().reshape(rows.shape[:2]), rows.norm(dim=-1))


def refuse():
    from partials.capture.trace import Refused

    raise Refused("switched off for the test")


@pytest.mark.parametrize("n", [0, 1])
def test_no_sample_and_one_sample(n):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    x = torch.randn(n, 4)
    J = pt.jacobian(net, x)
    assert J.shape == (n, 3, 51)
    if n:
        assert_close(J.dense()[0], expected_single(net, x))
    assert J.norms().shape == (n, 3)
    assert J.gram().shape == (n, 3, n, 3)


def expected_single(net, x):
    out = net(x)[0]
    return torch.cat([g.reshape(3, -1) for g in gradients(out, dict(net.named_parameters())).values()], 1)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_output_shapes(shape):
    w = torch.randn(4, 6, requires_grad=True)

    def f(x, w):
        return (x @ w).sin().reshape(len(x), 6)[:, : max(1, torch.Size(shape).numel())].reshape(len(x), *shape)

    x = torch.randn(N, 4)
    J = pt.jacobian(f, x, w, method="capture")
    assert J.shape == (N, *shape, 24)
    assert_close(J.dense(), pt.jacobian(f, x, w, method="loop").dense())


def test_a_single_sample_without_a_batch_dimension():
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    x = torch.randn(4)
    J = pt.jacobian(net, x, batched=False, method="capture")
    assert J.shape == (3, 51)
    assert_close(J.dense(), pt.jacobian(net, x, batched=False, method="loop").dense())


def test_a_frozen_parameter_named_in_wrt():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    net[0].weight.requires_grad_(False)
    x = torch.randn(N, 4)
    J = pt.jacobian(net, x, wrt="0.weight", method="capture")
    assert J.names == ("0.weight",)
    assert_close(J.dense(), pt.jacobian(net, x, wrt="0.weight", method="loop").dense())
    assert net[0].weight.grad is None
    assert not net[0].weight.requires_grad


def test_inputs_beside_parameters():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    x = torch.randn(N, 4)
    J = pt.jacobian(net, x, wrt=("input", "0.*"), method="capture")
    R = pt.jacobian(net, x, wrt=("input", "0.*"), method="loop")
    assert set(J.dict()) == {"input", "0.weight", "0.bias"}
    for name, rows in R.dict().items():
        assert_close(J[name], rows)
