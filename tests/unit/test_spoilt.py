"""One sample whose value or derivative is not finite: the rows of the others are exact, whatever the method, or there is an error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import partials as pt

METHODS = ("auto", "loop", "grad", "backward", "jacobian", "vmap", "forward", "capture")


def draw(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(grad)


def finite_rows(call, finite):
    """The rows of finite samples by the given call, None where it refuses."""
    try:
        return call().dense()[finite]
    except pt.MethodError:
        return None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", ["value", "derivative"])
def test_rows_of_finite_samples_are_exact_or_refused(method, bad):
    x, w = draw(4, 3).abs() + 0.5, draw(3, grad=True)
    x[2] = 0
    f = (lambda x, w: (x * w).square().sum(1).log()) if bad == "value" else (lambda x, w: (x * w).square().sum(1).sqrt())
    finite = torch.tensor([0, 1, 3])
    expected = torch.stack([torch.autograd.grad(f(x[n : n + 1], w).squeeze(), w)[0] for n in finite])
    found = finite_rows(lambda: pt.jacobian(f, x, w, method=method), finite)
    if found is None:
        assert method not in ("auto", "loop", "capture")
    else:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_sample_whose_targets_are_all_ignored_by_a_fused_mean():
    options = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options").LinearCrossEntropyOptions(
        batch_chunk_size=2, allow_retain_graph=True
    )
    x, w = draw(3, 2, 3), draw(4, 3, grad=True)
    t = torch.randint(0, 4, (3, 2), generator=torch.Generator().manual_seed(1))
    t[1] = -100

    def f(x, t, w):
        return torch.stack([F.linear_cross_entropy(a, w, b, options=options) for a, b in zip(x, t, strict=True)])

    expected = torch.stack([torch.autograd.grad(F.linear_cross_entropy(x[n], w, t[n]), w)[0].flatten() for n in (0, 2)])
    for method in METHODS:
        found = finite_rows(lambda method=method: pt.jacobian(f, x, t, w, method=method), torch.tensor([0, 2]))
        assert found is not None or method not in ("auto", "loop"), method
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=0, msg=method)
