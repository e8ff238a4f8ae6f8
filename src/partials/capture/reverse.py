"""Reverse passes from the outputs that stop at the uses: C of them give every factor of the Jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._compat import reverse
from .._typing import Tensor

SEEDS_AT_ONCE = 10
"""Output entries in one batched pass: more gain nothing and cost memory (100 at once took three times as long as a loop)."""


def single(values: Tensor, edges: Sequence[Any], *, create_graph: bool) -> Sequence[Tensor | None]:
    """The same for one output per sample: (*edge shape), without the dimension C."""
    if not values.requires_grad or not edges or not values.shape[0]:
        return [None] * len(edges)
    return reverse(values, torch.ones_like(values), edges, create_graph=create_graph)


def cotangents(values: Tensor, edges: Sequence[Any], *, create_graph: bool, one_by_one: bool = False) -> list[Tensor | None]:
    """d (sum over samples of output c) / d edge for each c: (C, *edge shape), None where nothing flows."""
    n, outputs = values.shape[0], values.shape[1:].numel()
    if not values.requires_grad or not edges or not n or not outputs:
        return [None] * len(edges)
    flat = values.reshape(n, outputs)
    if create_graph or one_by_one:  # (vmap over a backward that is differentiated again is not right for every operation)
        return _stacked([_pass(flat, edges, c, create_graph=create_graph) for c in range(outputs)])
    done: list[list[Tensor | None]] = []
    for start in range(0, outputs, SEEDS_AT_ONCE):
        count = min(SEEDS_AT_ONCE, outputs - start)
        seeds = flat.new_zeros(count, n, outputs)
        for i in range(count):
            seeds[i, :, start + i] = 1
        try:
            found = torch.autograd.grad(flat, edges, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True)
        except RuntimeError:  # an operation whose backward vmap cannot run: one output at a time gives the same
            return _stacked([_pass(flat, edges, c, create_graph=False) for c in range(outputs)])
        done.append(list(found))
    return [
        None if parts[0] is None else parts[0] if len(parts) == 1 else torch.cat([p for p in parts if p is not None])
        for parts in zip(*done, strict=True)
    ]


def weighted(values: Tensor, edges: Sequence[Any], seeds: Tensor) -> list[Tensor | None]:
    """One reverse pass from `seeds`, (N, *out)."""
    return list(reverse(values, seeds, edges, create_graph=False))


def _pass(flat: Tensor, edges: Sequence[Any], c: int, *, create_graph: bool) -> list[Tensor | None]:
    seed = torch.zeros_like(flat)
    seed[:, c] = 1
    return list(reverse(flat, seed, edges, create_graph=create_graph))


def _stacked(rows: list[list[Tensor | None]]) -> list[Tensor | None]:
    columns: list[Tensor | None] = []
    for parts in zip(*rows, strict=True):
        some = next((p for p in parts if p is not None), None)
        columns.append(None if some is None else torch.stack([torch.zeros_like(some) if p is None else p for p in parts]))
    return columns
