"""What "exact" means here: J, norms and Gram against a float64 loop of batches of one, within 1e-11 of the row's norm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import partials as pt
from partials.capture.known import LAYOUTS
from partials.checks.first import PASSED

EXACT = 1e-11
"""Of the row's norm; of the largest row's where the row is zero."""


def exact(f, *inputs, parameters=None, dims=(), pick=None, bound=EXACT, **options):
    """Compare `pt.jacobian(f, *inputs)` with the loop, with checks on and off and nothing remembered; the Jacobian."""
    if parameters is None:
        parameters = trainable(f) if isinstance(f, nn.Module) else [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    rows = loop(f, inputs, parameters, dims, pick or (lambda out: out))
    for check in ("never", "first"):
        LAYOUTS.clear()
        PASSED.clear()
        J = pt.jacobian(f, *inputs, check=check, **options)
        same(J, rows, bound)
    return J


def same(J, rows, bound=EXACT):
    """J's rows, norms and Gram matrix are those of `rows`, (N, C, P)."""
    n, c, p = rows.shape
    assert J.shape[0] == n and J.dense().numel() == rows.numel(), (J.shape, rows.shape)
    rows = rows.double()
    norms = rows.norm(dim=-1)
    scale = norms.where(norms > 0, norms.max())
    dense = J.dense().reshape(n, c, p).double()
    assert ((dense - rows).norm(dim=-1) <= bound * scale).all(), float(((dense - rows).norm(dim=-1) / scale).max())
    assert ((J.norms().reshape(n, c).double() - norms).abs() <= bound * scale).all()
    flat = rows.reshape(n * c, p)
    gram = J.gram().reshape(n * c, n * c).double()
    assert ((gram - flat @ flat.T).abs() <= bound * scale.reshape(-1, 1) * scale.reshape(1, -1)).all()


def loop(f, inputs, parameters, dims=(), pick=lambda out: out):
    """(N, C, P) by one torch.autograd.grad for each output entry of each batch of one."""
    dims = dict(enumerate(dims)) if isinstance(dims, tuple | list) else dims
    size = next(x.shape[dims.get(i, 0) or 0] for i, x in enumerate(inputs) if is_batched(x, i, dims, parameters))
    rows = []
    for n in range(size):
        given = [x.narrow(dims.get(i, 0), n, 1) if is_batched(x, i, dims, parameters) else x for i, x in enumerate(inputs)]
        out = pick(f(*given)).reshape(-1)
        rows.append(torch.stack([row(entry, parameters) for entry in out]))
    return torch.stack(rows)


def row(entry, parameters):
    """The flat row of one output entry, zeros for what it does not use."""
    if not entry.requires_grad:
        return torch.cat([torch.zeros_like(p).reshape(-1) for p in parameters])
    found = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(found, parameters, strict=True)])


def is_batched(x, i, dims, parameters):
    return isinstance(x, torch.Tensor) and dims.get(i, 0) is not None and x.ndim and not any(x is p for p in parameters)


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def refused(error, words, f, *inputs, **options):
    """`pt.jacobian(f, *inputs)` is refused in these words, with checks on and off; the error."""
    for check in ("never", "first"):
        LAYOUTS.clear()
        PASSED.clear()
        with pytest.raises(error, match=words) as caught:
            pt.jacobian(f, *inputs, check=check, **options)
    return caught.value


def twin(module):
    """The same module on memory of its own."""
    return copy.deepcopy(module)
