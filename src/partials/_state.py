"""Leaving things as they were: buffers of the module after runs that the user did not ask for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ._typing import Tensor

SMALL = 2**12
"""Entries of a buffer that is copied even where its module is in evaluation mode."""
Snapshot = list[tuple[nn.Module, str, Tensor | None, int, Tensor | None]]


@contextmanager
def untouched(module: nn.Module | None) -> Iterator[None]:
    """The module's buffers are the same objects with the same values afterwards, also after an exception.

    A copy is kept where a module in training mode could write (batch statistics, power iterations), and of small buffers
    (counters). Values are compared too: `batch_norm` writes its statistics without moving their version counter.
    """
    before = _snapshot(module) if module is not None else []
    try:
        yield
    finally:
        for owner, name, tensor, version, kept in before:
            owner._buffers[name] = tensor
            if tensor is not None and kept is not None and (tensor._version != version or not torch.equal(tensor, kept)):
                tensor.data.copy_(kept)  # (by way of .data: the values are what they were, so the version is left alone)


def _snapshot(module: nn.Module) -> Snapshot:
    found: Snapshot = []
    for owner in module.modules():
        for name, tensor in owner._buffers.items():
            kept = tensor.detach().clone() if tensor is not None and (owner.training or tensor.numel() <= SMALL) else None
            found.append((owner, name, tensor, 0 if tensor is None or tensor.is_inference() else tensor._version, kept))
    return found


@contextmanager
def rng_kept(device: torch.device) -> Iterator[None]:
    """The random state of the CPU and of `device` is the same afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


RandomState = tuple[Tensor, ...]


def random_state(device: torch.device) -> RandomState:
    """The state of the CPU's generator, and of `device`'s where it is a CUDA device."""
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))


def restore(state: RandomState, device: torch.device) -> None:
    """The generators of the CPU and of `device` as `random_state` found them."""
    torch.set_rng_state(state[0])
    for other in state[1:]:
        torch.cuda.set_rng_state(other, device)


@contextmanager
def drawn_from(state: RandomState | None, device: torch.device) -> Iterator[None]:
    """Random numbers from `state` (None: as they come) inside, and the random state as it was afterwards."""
    with rng_kept(device):
        if state is not None:
            restore(state, device)
        yield


_EAGER_LOCK = threading.Lock()
_EAGER: list[Any] = []
"""One entry for each call that wants compiled code run as it was written; the first holds torch's switch, which is for all threads."""


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what `torch.compile` made runs the Python that it was made from: compiled code shows no operations to a mode."""
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
        yield
        return
    with _EAGER_LOCK:
        _EAGER.append(None if _EAGER else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _EAGER_LOCK:
            stance = _EAGER.pop(-1 if len(_EAGER) > 1 else 0)
            if stance is not None:
                stance.__exit__(None, None, None)


def twice_differentiable(wanted: bool) -> AbstractContextManager[object]:
    """Attention by the kernel that can be differentiated twice: the fused ones have no derivative of their backward."""
    if not wanted:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
