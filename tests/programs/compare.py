"""One program by several methods, against one torch.autograd.grad for each output entry of each batch of one, in float64."""

from __future__ import annotations

from dataclasses import replace

import torch

import partials as pt
from partials.testing import check_jacobian

EXACT = {"float64": 1e-11, "float32": 5e-3}
"""Of the row's norm, or of a thousandth of the largest row's, or of a thousandth: where a row is zero, roundings are left."""

WAYS = {
    "native": {"method": "capture"},
    "vmapped": {"method": "capture", "randomness": "same"},  # (a policy for samples run apart, which rules the native run out)
    "vmap": {"method": "vmap"},
    "grad": {"method": "grad"},
    "jacobian": {"method": "jacobian"},
    "backward": {"method": "backward"},
    "forward": {"method": "forward"},
    "auto": {},
}


def rows_by_loop(program):
    """(N, C, P) in float64."""
    net, inputs, wanted = replace(program, dtype="float64").make()
    found = []
    for n in range(program.n):
        for entry in net(*(x[n : n + 1] for x in inputs))[0].reshape(-1):
            parts = [None] * len(wanted)
            if entry.requires_grad:
                parts = torch.autograd.grad(entry, list(wanted.values()), retain_graph=True, allow_unused=True)
            found.append(
                torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(wanted.values(), parts, strict=True)])
            )
    rows = torch.stack(found)
    return rows.reshape(program.n, -1, rows.shape[1])


def exact(program, way, rows=None):
    """Whether the way does this program at all; an AssertionError where it gives another answer than the loop."""
    rows = rows_by_loop(program) if rows is None else rows
    net, inputs, _ = program.make()
    try:
        J = pt.jacobian(net, *inputs, check="never", **WAYS[way])
    except pt.MethodError as refused:
        assert way != "auto", f"no method does this: {refused}"
        return False
    shape, norms = rows.shape, rows.norm(dim=-1)
    far = (J.dense().reshape(shape).double() - rows).norm(dim=-1)
    scale = norms.clamp_min(1e-3 * max(1.0, float(norms.max())))
    assert (far <= EXACT[program.dtype] * scale).all(), f"{way}: rows are off by {float((far / scale).max()):.1e}"
    if J.plan.method == "capture" and norms.max() > 1e-3:
        check_jacobian(J)
    return True
