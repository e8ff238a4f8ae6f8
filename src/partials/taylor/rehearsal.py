"""Extra runs of the user's function that leave no trace, and what a function is made of."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .._compat import unwatched
from .._state import rng_kept
from .._typing import Function, Tensor
from .coordinates import Call
from .transforms import inside_transform


def rehearse(call: Call, replaced: Mapping[str, Tensor], *, watched: bool = False) -> Any:
    """What the call returns with some inputs replaced, detached; the random state and the buffers stay as they were.

    The inputs require grad, since the function may well differentiate by them itself. Modes around us see it only if it is `watched`.
    """
    inputs = {**call.tensors, **replaced}
    if not inside_transform():
        inputs = {name: tensor.detach().requires_grad_(tensor.is_floating_point()) for name, tensor in inputs.items()}
    with without_trace(call, watched=watched), torch.enable_grad():
        value = call(inputs)
    return value.detach() if isinstance(value, Tensor) else value


@contextmanager
def without_trace(call: Call, *, watched: bool = False) -> Iterator[None]:
    """What runs inside leaves the random state and the buffers as they were, and no mode around us sees it."""
    buffers = [
        buffer for part in parts(call.function) if isinstance(part, nn.Module) for buffer in part.buffers() if not buffer.is_inference()
    ]
    saved = [(buffer, buffer._version, buffer.detach().clone()) for buffer in buffers]
    with nullcontext() if watched else unwatched(), ExitStack() as generators:
        for device in {tensor.device for tensor in call.tensors.values()} or {torch.device("cpu")}:
            generators.enter_context(rng_kept(device))
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, version, before in saved:
                    if buffer._version != version:
                        buffer.copy_(before)


def parts(function: Function) -> Iterator[object]:
    """All that a function is made of, each once: modules, code, switches, built-in functions and other objects that can be called.

    It is followed through closures, defaults, arguments of `functools.partial`, attributes, and global names of its own file.
    """
    waiting: list[Any] = [function]
    seen: set[int] = set()
    for thing in waiting:  # it grows on the way
        if thing is True or thing is False:
            yield thing
        elif id(thing) not in seen and (callable(thing) or isinstance(thing, types.CodeType)):
            seen.add(id(thing))
            if isinstance(thing, nn.Module):
                yield thing
                waiting += _attributes(thing)
                continue
            if not isinstance(thing, (types.FunctionType, types.MethodType, functools.partial)):
                yield thing
            waiting += _reached(thing)


def _reached(thing: Any) -> Iterator[object]:
    """What a callable holds that can change what it does."""
    if isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, types.MethodType):
        yield from (thing.__func__, *_attributes(thing.__self__))
    elif isinstance(thing, types.FunctionType):
        yield thing.__code__
        yield from (cell.cell_contents for cell in thing.__closure__ or () if _filled(cell))
        yield from (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values())
        reached = (thing.__globals__.get(name) for name in thing.__code__.co_names)
        yield from (found for found in reached if isinstance(found, nn.Module) or getattr(found, "__globals__", None) is thing.__globals__)
    elif stands_for_its_type(thing):
        yield from (vars(type(thing)).get("__call__"), *_attributes(thing))


def stands_for_its_type(thing: object) -> bool:
    """Whether a callable is an instance, whose class and attributes say what it does, and not a function or a class."""
    return hasattr(thing, "__dict__") and not isinstance(thing, (type, types.FunctionType))


def _attributes(thing: object) -> Iterator[object]:
    """The attributes of an object, and the members of those that are lists, tuples or dictionaries: sub-modules and hooks are in such."""
    for value in getattr(thing, "__dict__", {}).values():
        kind = type(value)
        if kind is dict or kind is OrderedDict:
            yield from value.values()
        elif kind is list or kind is tuple:
            yield from value
        elif kind is bool or callable(value):
            yield value


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
