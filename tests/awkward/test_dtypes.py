"""Low precision, autocast, and complex numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import partials as pt
from partials._run import NAMES

from .exact import exact, loop, same, trainable

N = 5


def net(dtype):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def close(J, rows, eps):
    """Each row within so many eps of the dtype of its norm."""
    n, c, p = rows.shape
    dense = J.dense().reshape(n, c, p).double()
    norms = rows.double().norm(dim=-1)
    assert ((dense - rows.double()).norm(dim=-1) <= eps * norms).all()
    assert ((J.norms().reshape(n, c).double() - norms).abs() <= eps * norms).all()
    flat = rows.reshape(n * c, p).double()
    scale = norms.reshape(-1, 1) * norms.reshape(1, -1)
    assert ((J.gram().reshape(n * c, n * c).double() - flat @ flat.T).abs() <= eps * scale).all()


@pytest.mark.parametrize("shape", [(4,), (6, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_of_low_precision(dtype, shape):
    model, x = net(dtype), torch.randn(N, *shape).to(dtype)
    rows = loop(model, (x,), trainable(model))
    wide = loop(model.double(), (x.double(),), trainable(model))
    model = net(dtype)
    for check in ("never", "always"):
        J = pt.jacobian(model, x, check=check)
        assert J.dense().dtype == dtype
        close(J, rows, 16 * torch.finfo(dtype).eps)
        close(J, wide, 64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(4,), (6, 4)])
def test_autocast_with_parameters_of_float32(shape):
    model, x = net(torch.float32), torch.randn(N, *shape, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rows = loop(model, (x,), trainable(model))
        for check in ("never", "always"):
            J = pt.jacobian(model, x, check=check)
    assert J.dense().dtype == torch.float32 and J.plan.method == "capture"
    close(J, rows, 8 * torch.finfo(torch.bfloat16).eps)


def test_autocast_inside_the_model():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = net(torch.float32), nn.Linear(3, 2, dtype=torch.float32)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                h = self.inner(x)
            return self.head(h.float())

    model, x = Cast(), torch.randn(N, 4, dtype=torch.float32)
    close(pt.jacobian(model, x), loop(model, (x,), trainable(model)), 8 * torch.finfo(torch.bfloat16).eps)


def test_parameters_of_several_dtypes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6, dtype=torch.float32), nn.Linear(6, 2, dtype=torch.float64)

        def forward(self, x):
            return self.b(self.a(x).double().sin())

    model, x = Mixed(), torch.randn(N, 4, dtype=torch.float32)
    rows = loop(model, (x,), trainable(model))
    J = pt.jacobian(model, x)
    assert J["a.weight"].dtype == torch.float32 and J["b.weight"].dtype == torch.float64
    close(J, rows, 64 * torch.finfo(torch.float32).eps)


# --- complex numbers: pairs of real ones -------------------------------------------------------------------------


class Spectral(nn.Module):
    """A layer as in Fourier neural operators: complex weights between a transform and its inverse."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 4, dtype=torch.complex128))
        self.bias, self.head = nn.Parameter(torch.randn(2, 1)), nn.Linear(8, 2)

    def forward(self, x):
        h = torch.fft.rfft(x)[..., :4]
        h = torch.einsum("nit,iot->not", h, self.weight)
        return self.head((torch.fft.irfft(h, n=8) + self.bias).sin()).sum(1)


def real_loop(model, x):
    """(N, C, P) with the real and imaginary parts of complex parameters side by side."""
    parameters, rows = trainable(model), []
    for n in range(len(x)):
        for entry in model(x[n : n + 1]).reshape(-1):
            found = torch.autograd.grad(entry, parameters, retain_graph=True)
            rows.append(torch.cat([(torch.view_as_real(g) if g.is_complex() else g).reshape(-1) for g in found]))
    return torch.stack(rows).reshape(len(x), -1, len(rows[0]))


@pytest.mark.parametrize("method", ["auto", *NAMES])
def test_complex_parameters_as_pairs_of_real_numbers(method):
    model, x = Spectral(), torch.randn(N, 3, 8)
    rows = real_loop(model, x)
    if method == "capture":
        with pytest.raises(pt.MethodError, match="complex arithmetic"):
            pt.jacobian(model, x, method=method)
        return
    for check in ("never", "always"):
        J = pt.jacobian(model, x, method=method, check=check)
        same(J, rows)
    assert J["weight"].shape == (N, 2, 3, 2, 4, 2)
    assert any("real and imaginary part" in note for note in J.plan.notes)


def test_the_gradient_of_a_complex_parameter_is_torchs():
    model, x = Spectral(), torch.randn(N, 3, 8)
    J = pt.gradient(lambda x: model(x).square().sum(1), x, params=model)
    J.accumulate_grad()
    expected = torch.autograd.grad(model(x).square().sum(), trainable(model))
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-10)


def test_a_complex_argument():
    w = torch.randn(4, 3, dtype=torch.complex128, requires_grad=True)
    x = torch.randn(N, 4)

    def f(x, w):
        return (x.to(torch.complex128) @ w).abs()

    J = pt.jacobian(f, x, w)
    h = 1e-6
    for part, unit in enumerate((1.0, 1j)):
        moved = w.detach().clone()
        moved[1, 2] += h * unit
        back = w.detach().clone()
        back[1, 2] -= h * unit
        assert torch.allclose(J["w"][..., 1, 2, part], (f(x, moved) - f(x, back)) / (2 * h), atol=1e-7)
    assert pt.check(f, x, w, level="full").passed


def test_complex_arithmetic_with_real_parameters():
    w = torch.randn(4, 3, requires_grad=True)
    x = torch.randn(N, 4, dtype=torch.complex128)
    exact(lambda x, w: (x @ w.to(torch.complex128)).abs(), x, w)
    exact(lambda x, w: torch.fft.ifft(torch.fft.fft(x) * torch.complex(w[:, 0], w[:, 1])).real, x, w)
    exact(lambda x, w: F.linear(torch.view_as_real(x).flatten(1), w.repeat(2, 1).T), x, w)


def test_complex_outputs_are_refused():
    w = torch.randn(4, 3, dtype=torch.complex128, requires_grad=True)
    with pytest.raises(pt.OutputError, match="returned complex numbers"):
        pt.jacobian(lambda x, w: x @ w, torch.randn(N, 4, dtype=torch.complex128), w)
