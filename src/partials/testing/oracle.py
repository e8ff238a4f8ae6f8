"""The reference that owes nothing to the methods: a batch of one at a time, one torch.autograd.grad for each output entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .._typing import ByName, Tensor
from .cases import Call


def loop(call: Call, *, create_graph: bool = False) -> tuple[Tensor, ByName]:
    """(values (N, *out), {name: rows (N, *out, *shape)}) of a call.

    >>> from partials.testing import CASES, loop
    >>> values, rows = loop(CASES["mlp"].make())
    >>> rows["0.weight"].shape
    torch.Size([4, 3, 5, 4])
    """
    values: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {name: [] for name in call.parameters}
    for n in range(call.samples):
        one = call.part(n, n + 1)
        out = one.pick(one.f(*one.inputs, **one.kwargs))[0]
        values.append(out if create_graph else out.detach())
        for name, row in gradients(out, call.parameters, create_graph=create_graph).items():
            rows[name].append(row)
    return torch.stack(values), {name: torch.stack(parts) for name, parts in rows.items()}


def gradients(out: Tensor, parameters: Mapping[str, Tensor], *, create_graph: bool = False) -> ByName:
    """{name: (*out, *shape)}: one reverse pass for each entry of out, zeros where it does not depend on a parameter."""
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for entry in out.reshape(-1):
        parts: Any = [None] * len(parameters)
        if entry.requires_grad:
            parts = torch.autograd.grad(entry, list(parameters.values()), retain_graph=True, create_graph=create_graph, allow_unused=True)
        for (name, p), part in zip(parameters.items(), parts, strict=True):
            found[name].append(torch.zeros_like(p) if part is None else part.to_dense() if part.is_sparse else part)
    return {
        name: (torch.stack(parts) if parts else parameters[name].new_zeros(0)).reshape(out.shape + parameters[name].shape)
        for name, parts in found.items()
    }
