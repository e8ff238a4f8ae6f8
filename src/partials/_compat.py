"""Every private torch name that the library uses, each with a public way to the same answer.

Without the private names a capture sees only plain tensors: what runs under a vmap is refused, and another method runs.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from ._typing import Tensor

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:  # pragma: no cover - a torch that moved it
        TorchDispatchMode = object

try:
    from torch._C import _functorch as _private
except ImportError:  # pragma: no cover - a torch that moved its internals
    _private = None  # type: ignore[assignment]

_engine = getattr(torch.autograd.Variable, "_execution_engine", None)
_run_backward = getattr(_engine, "run_backward", None)


try:
    from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode  # type: ignore[attr-defined]
except ImportError:  # pragma: no cover - a torch that moved its internals
    _pop_mode = None  # type: ignore[assignment]

try:
    from torch.overrides import _get_current_function_mode_stack as _modes
    from torch.utils._device import DeviceContext
except ImportError:  # pragma: no cover
    _modes, DeviceContext = None, ()  # type: ignore[assignment,misc]

try:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode as _proxy_mode
except ImportError:  # pragma: no cover - a torch that moved it
    _proxy_mode = None  # type: ignore[assignment]

PRIVATE = _private is not None and not os.environ.get("PARTIALS_PUBLIC_ONLY")
"""Whether the private calls are there and not switched off (PARTIALS_PUBLIC_ONLY=1 switches them off)."""


rounded: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True) if PRIVATE else lambda: True
"""Whether autocast is on for some kind of device: True where nobody can say at once."""
transform_now: Callable[[], int | None] = _private.maybe_current_level if PRIVATE else lambda: -1
"""The number of the innermost running torch.func transform, None outside any, -1 where nobody can say."""

PACK = getattr(torch, "_pack_padded_sequence", None)
"""What `pack_padded_sequence` calls; a mode sees no public name of it. Without it, a packed run is taken for one routed by data."""


def transform_of(t: Tensor) -> str:
    """The innermost torch.func transform that wraps `t`: "vmap", "other" (grad, jvp, functionalize), or ""."""
    if type(t) is not Tensor and isinstance(t, torch.nn.Parameter):
        return ""
    if PRIVATE:
        if not _private.is_functorch_wrapped_tensor(t):
            return ""
        return "vmap" if _private.is_batchedtensor(t) else "other"
    text = repr(t) if _looks_wrapped(t) else ""
    return "vmap" if text.startswith("BatchedTensor") else "other" if text else ""


def _looks_wrapped(t: Tensor) -> bool:
    """A functorch wrapper has no storage of its own: the public sign of one."""
    try:
        t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return True
    return False


def unwrapped(t: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor beneath all vmap levels, and the permutation that brings its batch dimensions to the front, outermost first."""
    bdims: list[int] = []
    while transform_of(t) == "vmap":
        bdims.append(_private.maybe_get_bdim(t))
        t = _private.get_unwrapped(t)
    # (a level's bdim counts dimensions of the tensor one level down, so levels are undone from the outermost)
    rest = list(range(t.ndim))
    front = [rest.pop(bdim) for bdim in reversed(bdims)]
    return t, (*front, *rest)


def mapped_size(t: Tensor) -> int:
    """The size of the dimension that the innermost `vmap` maps over in `t`."""
    return int(_private.get_unwrapped(t).shape[_private.maybe_get_bdim(t)])


def batched(t: Tensor, level: int) -> Tensor:
    """`t`, (N, ...), as the `vmap` of that level sees one sample's (...)."""
    return _private._add_batch_dim(t, 0, level)


def first_mapped(t: Tensor) -> Tensor | None:
    """The tensor beneath one vmap that maps its first dimension; t itself where nothing wraps it, None where that is not how it lies."""
    if not PRIVATE:
        return None if transform_of(t) else t
    if not _private.is_functorch_wrapped_tensor(t):
        return t
    raw: Tensor = _private.get_unwrapped(t)
    return raw if _private.maybe_get_bdim(t) == 0 and not _private.is_functorch_wrapped_tensor(raw) else None


def node_beneath(t: Tensor) -> Any:
    """The graph node of the tensor beneath one vmap, or of t itself."""
    return _private.get_unwrapped(t).grad_fn if _private.is_functorch_wrapped_tensor(t) else t.grad_fn


Below: Any = getattr(torch._C, "_DisableFuncTorch", nullcontext)
"""A context for operations on tensors that nothing wraps: as if no transform were running, so that torch does not decompose them."""


def current_level() -> int | None:
    """The number of the innermost running torch.func transform, None outside any."""
    return _private.maybe_current_level() if _private is not None else None


def reverse(output: Tensor, seed: Tensor, edges: Sequence[Any], *, create_graph: bool) -> tuple[Tensor | None, ...]:
    """d (output . seed) / d edges; the graph is kept, None where nothing flows.

    The private way leaves out what `torch.autograd.grad` finds out about its arguments: half of its time where little is computed.
    """
    if PRIVATE and _run_backward is not None:
        found: tuple[Tensor | None, ...] = _run_backward((output,), (seed,), True, create_graph, tuple(edges), True, accumulate_grad=False)
        return found
    return torch.autograd.grad(output, edges, seed, retain_graph=True, create_graph=create_graph, allow_unused=True)


def compiled_somewhere() -> bool:
    """Whether `torch.compile` can have made anything in this process; with public names only, whether its module has been loaded."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    backends = getattr(dynamo, "cached_backends", None) if PRIVATE else None
    if backends is None:
        return "torch._dynamo" in sys.modules
    return bool(backends) and any(backend is not None for backend in backends.values())


def transforming() -> bool:
    """Whether a torch.func transform may be running in this thread, so that tensors must be looked at; True where nobody can say."""
    return current_level() is not None if PRIVATE else True


class _Plain(torch.autograd.Function):
    """A Function without `setup_context`: torch refuses to apply it where a torch.func transform is running."""

    @staticmethod
    def forward(*context_and_input: Any) -> Any:
        return context_and_input[1]


_NOTHING = torch.empty(0, device="cpu")


def inside_transform() -> bool:
    """Whether a torch.func transform (vmap, grad, vjp, jvp, ...) is running in this thread.

    A function may close over batched tensors while its inputs look ordinary, so that no tensor at hand would tell.
    """
    if PRIVATE:
        return current_level() is not None
    try:
        _Plain.apply(_NOTHING)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return True
    return False


_OFF = {name: (lambda *_: False) for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")}
_REBOUND: dict[Any, Any] = {}


def body_of(function: Any) -> Any:
    """A Python-level torch function without its override check, so that a mode sees the operations inside; None for others.

    Only public Python is used: the same code object, bound to globals in which the check says no.
    """
    if function not in _REBOUND:
        inner = getattr(function, "__wrapped__", None)
        if isinstance(function, FunctionType) and inner is None and (function.__module__ or "").startswith("torch.nn.functional"):
            copy = FunctionType(
                function.__code__, {**function.__globals__, **_OFF}, function.__name__, function.__defaults__, function.__closure__
            )
            copy.__kwdefaults__ = function.__kwdefaults__
            inner = copy
        _REBOUND[function] = inner
    return _REBOUND[function]


def has_hooks(t: Tensor) -> bool:
    """Whether the user registered hooks on the tensor's gradient (`register_hook`)."""
    return bool(getattr(t, "_backward_hooks", None))


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `torch.compile` wraps the module."""
    return "_orig_mod" in module._modules


def own_memory(z: Tensor) -> tuple[Tensor, Tensor]:
    """`z` and the tensor beneath its vmap levels, no longer a view: later in-place operations on z leave its gradient edge right."""
    if transform_of(z) != "vmap":
        with Below():
            fresh = torch.ops.aten._unsafe_view(z, z.shape)
        return fresh, fresh
    below, bottom = own_memory(_private.get_unwrapped(z))
    return _private._add_batch_dim(below, _private.maybe_get_bdim(z), _private.maybe_get_level(z)), bottom


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still held: `peak` is the most at any moment."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.held: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        if made:
            given = {t.untyped_storage()._cdata for t in _flat((*args, *(kwargs or {}).values())) if isinstance(t, Tensor)}
            for t in made:
                self._hold(t, given)
        return out

    def _hold(self, t: Tensor, given: set[int]) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.held or key in given:
            return  # known, or a view of what was there before
        self.held[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self.held.pop(key, None)
        self.now -= size


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


class WrittenBytes(TorchFunctionMode):
    """The public stand-in: all that the torch functions inside wrote, three times over for the reverse passes; nothing is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and not transform_of(t):
                self.peak += 3 * t.nbytes
        return out


def meter() -> LiveBytes | WrittenBytes:
    """A context that measures the bytes which the torch operations inside hold at once."""
    return LiveBytes() if PRIVATE and TorchDispatchMode is not object else WrittenBytes()


def traced() -> bool:
    """Whether `make_fx` is recording operations."""
    return _proxy_mode is not None and _proxy_mode() is not None


def watched() -> bool:
    """Whether a torch function mode that may look at operations is active around us: any but that of `torch.set_default_device`."""
    if not torch.overrides.has_torch_function((_NOTHING,)):
        return False
    if _modes is None or os.environ.get("PARTIALS_PUBLIC_ONLY"):
        return True
    return any(not isinstance(mode, DeviceContext) for mode in _modes())


@contextmanager
def unwatched() -> Iterator[None]:
    """Torch function modes around us see nothing, but for torch's default device; modes that are entered inside do."""
    if _pop_mode is None or os.environ.get("PARTIALS_PUBLIC_ONLY"):  # they see work of ours as well: more to look at, nothing wrong
        yield
        return
    around: list[Any] = []
    devices: list[Any] = []
    try:
        while _len_torch_function_stack():
            around.append(_pop_mode())
        devices = [mode for mode in reversed(around) if isinstance(mode, DeviceContext)]
        for mode in devices:
            _push_mode(mode)
        yield
    finally:
        for _ in range(min(len(devices), _len_torch_function_stack())):
            _pop_mode()
        for mode in reversed(around):
            _push_mode(mode)
