"""The reference that owes nothing to the library: a batch of one at a time, one torch.autograd.grad for each output entry."""

from __future__ import annotations

import functools

import torch

from partials.testing import CASES, loop
from partials.testing.oracle import gradients

__all__ = ["EPS", "assert_rows", "dense", "gradients", "loop", "reference"]

EPS = 256
"""Rounding errors allowed, in units of the dtype's precision, of a parameter's whole part."""


@functools.cache
def reference(name):
    """`loop` of a case of `partials.testing` in float64."""
    return loop(CASES[name].make())


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
