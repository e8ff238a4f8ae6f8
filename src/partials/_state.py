"""Leaving things as they were: buffers of the module after runs that the user did not ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ._typing import Tensor

Snapshot = list[tuple[nn.Module, str, Tensor | None, int, Tensor | None]]


@contextmanager
def untouched(module: nn.Module | None) -> Iterator[None]:
    """The module's buffers are the same objects with the same values afterwards, also after an exception.

    A copy is kept only where a module in training mode could write (batch statistics, power iterations); elsewhere the
    version counter tells whether anything was written.
    """
    before = _snapshot(module) if module is not None else []
    try:
        yield
    finally:
        for owner, name, tensor, version, kept in before:
            owner._buffers[name] = tensor
            if tensor is not None and kept is not None and tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(kept)


def _snapshot(module: nn.Module) -> Snapshot:
    found: Snapshot = []
    for owner in module.modules():
        for name, tensor in owner._buffers.items():
            kept = tensor.detach().clone() if tensor is not None and owner.training else None
            found.append((owner, name, tensor, 0 if tensor is None or tensor.is_inference() else tensor._version, kept))
    return found


@contextmanager
def rng_kept(device: torch.device) -> Iterator[None]:
    """The random state of the CPU and of `device` is the same afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
