"""The reference that owes nothing to the library: a batch of one at a time, one torch.autograd.grad for each output entry."""

from __future__ import annotations

import functools

import torch

from partials.testing import CASES
from partials.testing.cases import N

EPS = 256
"""Rounding errors allowed, in units of the dtype's precision, of a parameter's whole part."""


@functools.cache
def reference(name):
    """`loop` of a case of `partials.testing` in float64."""
    return loop(CASES[name].make())


def loop(call, create_graph=False):
    """(values (N, *out), {name: rows (N, *out, *shape)}) of a `partials.testing.Call`."""
    values, rows = [], {name: [] for name in call.parameters}
    for n in range(N):
        args = [cut(x, n, call.dims.get(i, 0), call.parameters) for i, x in enumerate(call.inputs)]
        kwargs = {key: cut(x, n, call.dims.get(key, 0), call.parameters) for key, x in call.kwargs.items()}
        out = call.pick(call.f(*args, **kwargs))[0]
        values.append(out if create_graph else out.detach())
        for name, row in gradients(out, call.parameters, create_graph).items():
            rows[name].append(row)
    return torch.stack(values), {name: torch.stack(parts) for name, parts in rows.items()}


def gradients(out, parameters, create_graph=False):
    """{name: (*out, *shape)}: one reverse pass for each entry of out, zeros where it does not depend on a parameter."""
    found = {name: [] for name in parameters}
    for entry in out.reshape(-1):
        parts = torch.autograd.grad(entry, list(parameters.values()), retain_graph=True, create_graph=create_graph, allow_unused=True)
        for (name, p), part in zip(parameters.items(), parts, strict=True):
            found[name].append(torch.zeros_like(p) if part is None else part)
    return {name: torch.stack(parts).reshape(out.shape + parameters[name].shape) for name, parts in found.items()}


def cut(x, n, dim, parameters):
    """Sample n of an input as a batch of one; parameters, shared inputs and whatever is no tensor stay whole."""
    if isinstance(x, dict):
        return {key: cut(part, n, dim, parameters) for key, part in x.items()}
    if not isinstance(x, torch.Tensor) or dim is None or any(x is p for p in parameters.values()):
        return x
    return x.narrow(dim, n, 1)


def dense(rows, lead):
    """{name: (N, *out, *shape)} side by side: (N, *out, P)."""
    return torch.cat([part.flatten(lead) if part.ndim > lead else part.unsqueeze(-1) for part in rows.values()], -1)


def assert_rows(found, expected, eps=EPS):
    """Every parameter's part agrees within rounding of its own size, or of the hundredth part of the whole where it cancels."""
    assert list(found) == list(expected)
    whole = max((float(part.double().norm()) for part in expected.values()), default=0.0)
    for name, part in expected.items():
        assert found[name].shape == part.shape, f"{name}: shape {tuple(found[name].shape)}, not {tuple(part.shape)}"
        error = float((found[name].double() - part.double()).norm())
        scale = max(float(part.double().norm()), whole / 100)
        bound = eps * torch.finfo(found[name].dtype).eps * scale
        assert error <= bound, f"{name}: off by {error:.2e} where {bound:.2e} is allowed"
