"""Leaving things as they were: buffers of the module after runs that the user did not ask for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from ctypes import string_at
from types import TracebackType
from typing import Any, Self

import torch
from torch import default_generator, is_grad_enabled, is_inference_mode_enabled, nn

from ._compat import compiled_somewhere, rounded
from ._modules import modules
from ._typing import Tensor

SMALL = 2**12
"""Entries of a buffer that is copied even where its module is in evaluation mode."""
Snapshot = list[tuple[nn.Module, str, Tensor | None, int, Tensor | None]]


class Running(AbstractContextManager["Running"]):
    """Inside: gradients on, inference mode and autocast off (f runs in its own); afterwards `module`'s buffers are as they were.

    Exceptions get a note of what was being done. A class, and contexts that are entered only where they change something: it stands around
    every call.
    """

    stack: ExitStack | None = None

    def __init__(self, note: str, module: nn.Module | None, *, twice: bool) -> None:
        self.note, self.module, self.twice = note, module, twice

    def __enter__(self) -> Self:
        if self.module is not None or self.twice or not ordinary():
            self._enter()
        return self

    def _enter(self) -> None:
        contexts: list[AbstractContextManager[object]] = []
        if is_inference_mode_enabled():
            contexts.append(torch.inference_mode(False))
        if contexts or not is_grad_enabled():
            contexts.append(torch.enable_grad())
        if rounding():
            contexts.append(unrounded())
        if compiled_somewhere():
            contexts.append(uncompiled())
        if self.module is not None and any(owner._buffers for owner in modules(self.module)):
            contexts.append(untouched(self.module))
        if self.module is not None and without_backward(self.module, twice=self.twice):
            contexts.append(without_cudnn())
        if self.twice:
            contexts.append(twice_differentiable())
        if contexts:
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context)
                self.stack = stack.pop_all()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            noted(error, self.note)
        if self.stack is not None:
            self.stack.__exit__(kind, error, trace)


def noted(error: Exception, note: str) -> None:
    """Add the note to the error, once."""
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def ordinary() -> bool:
    """Whether f can be run as it is: gradients are on, inference mode and autocast off, and nothing was compiled."""
    return is_grad_enabled() and not (is_inference_mode_enabled() or rounded() or compiled_somewhere())


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
    for owner in modules(module):
        for name, tensor in owner._buffers.items():
            kept = tensor.detach().clone() if tensor is not None and (owner.training or tensor.numel() <= SMALL) else None
            found.append((owner, name, tensor, 0 if tensor is None or tensor.is_inference() else tensor._version, kept))
    return found


@contextmanager
def rng_kept(device: torch.device) -> Iterator[None]:
    """The random state of the CPU and of `device` is the same afterwards."""
    state = random_state(device)
    try:
        yield
    finally:
        restore(state, device)


RandomState = tuple[Tensor, ...]
"""Of the CPU's generator, and of an accelerator's."""


def random_state(device: torch.device) -> RandomState:
    """The state of the CPU's generator, and of `device`'s own where it has one."""
    cpu = default_generator.get_state()
    return (cpu, own.get_rng_state(*place(device))) if (own := _own_numbers(device)) else (cpu,)


def _own_numbers(device: torch.device) -> Any:
    """The module of torch that holds the generator of an accelerator; None of the CPU and of devices without one."""
    if device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None


def place(device: torch.device) -> tuple[torch.device, ...]:
    """What tells torch's module of an accelerator which one is meant: Apple's has one only, and takes nothing."""
    return () if device.type == "mps" else (device,)


def drawn_since(state: RandomState, device: torch.device) -> bool:
    """Whether random numbers were drawn since the state was taken."""
    return any(_bytes(old) != _bytes(new) for old, new in zip(state, random_state(device), strict=True))  # (half of torch.equal's time)


def _bytes(state: Tensor) -> bytes:
    return string_at(state.data_ptr(), state.numel())


Copies = tuple[torch.Generator, Tensor | None]


def generators(device: torch.device) -> Copies:
    """Copies of the CPU's generator, and of the state of `device`'s own where it has one: made in half the time of reading a state."""
    own = None if device.type == "cpu" else _own_numbers(device)
    return default_generator.clone_state(), own.get_rng_state(*place(device)) if own else None


def unmoved(copies: Copies, device: torch.device) -> bool:
    """Whether no random numbers were drawn since the copies were made."""
    first, other = copies
    if _bytes(default_generator.get_state()) != _bytes(first.get_state()):
        return False
    return other is None or _bytes(other) == _bytes(_own_numbers(device).get_rng_state(*place(device)))


def put_back(copies: Copies, device: torch.device) -> None:
    """The generators as the copies are."""
    restore((copies[0].get_state(), *[other for other in copies[1:] if isinstance(other, Tensor)]), device)


def restore(state: RandomState, device: torch.device) -> None:
    """The generators of the CPU and of `device` as `random_state` found them."""
    torch.set_rng_state(state[0])
    for other in state[1:]:
        _own_numbers(device).set_rng_state(other, *place(device))


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
    if not compiled_somewhere():
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


Rounding = tuple[tuple[str, torch.dtype | None], ...]
"""Kinds of devices whose autocast is to be switched on with a dtype, or off (None)."""


def rounding() -> Rounding:
    """The autocast that is on, with its dtypes."""
    if not rounded():
        return ()
    card = torch.accelerator.current_accelerator()
    kinds = ("cpu", "cuda") if card is None or card.type == "cuda" else ("cpu", "cuda", card.type)
    return tuple([(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)])


@contextmanager
def autocast(wanted: Rounding) -> Iterator[None]:
    """Inside, autocast is as `wanted`."""
    if not wanted:
        yield
        return
    with ExitStack() as stack:
        for kind, dtype in wanted:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
        yield


def unrounded() -> AbstractContextManager[None]:
    """Inside no autocast: for what is computed from factors, in whatever region of the caller's."""
    return autocast(tuple([(kind, None) for kind, _ in rounding()]))


def arithmetic(*, attached: bool) -> AbstractContextManager[Any]:
    """For what is computed from factors: gradients are recorded only where results carry them, and nothing is rounded by autocast."""
    recorded = torch.enable_grad() if attached else torch.no_grad()
    return _unrounded_besides(recorded) if rounding() else recorded


@contextmanager
def _unrounded_besides(recorded: AbstractContextManager[Any]) -> Iterator[None]:
    with recorded, unrounded():
        yield


def without_backward(module: nn.Module, *, twice: bool = False) -> bool:
    """Whether cuDNN would run a recurrent layer that it cannot differentiate: in evaluation mode, or `twice` in any."""
    return any(
        isinstance(owner, nn.RNNBase) and (twice or not owner.training) and any(p.is_cuda for p in owner.parameters(recurse=False))
        for owner in modules(module)
    )


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Recurrent layers run by torch's own kernels, which have a backward in evaluation mode and one of the backward."""
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def twice_differentiable() -> AbstractContextManager[object]:
    """Attention by the kernel that can be differentiated twice: the fused ones have no derivative of their backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
