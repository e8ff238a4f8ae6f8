"""Layouts that were measured before, so that the probe's two reverse passes run once for a function, not at every call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from torch import nn

from .._problem import Problem
from .._typing import Tensor

LIMIT = 256


class Remembered:
    """A bounded, thread-safe map; objects in a key are compared by identity and kept alive by the entry."""

    def __init__(self) -> None:
        self.lock, self.entries = threading.Lock(), OrderedDict[Hashable, Any]()

    def get(self, key: Hashable | None) -> Any:
        with self.lock:
            return None if key is None else self.entries.get(key)

    def put(self, key: Hashable, value: Any) -> None:
        with self.lock:
            self.entries[key] = value
            while len(self.entries) > LIMIT:
                self.entries.popitem(last=False)

    def clear(self) -> None:
        with self.lock:
            self.entries.clear()


LAYOUTS = Remembered()


def key_of(problem: Problem, uses: list[Any]) -> Hashable | None:
    """The function itself (a closure by its code and what it closes over, so that a fresh lambda is not new), its modes, its uses."""
    f = problem.function
    if isinstance(f, nn.Module):
        identity: Hashable = (_Same(f), _modes(f))
    else:
        code = getattr(f, "__code__", None)
        if code is None:
            identity = _Same(f)
        else:
            cells = [cell.cell_contents for cell in f.__closure__ or () if _filled(cell)]
            held = [v for v in (*cells, getattr(f, "__self__", None), *(f.__defaults__ or ())) if isinstance(v, nn.Module) or callable(v)]
            identity = (code, *(_Same(v) for v in held), *(_modes(v) for v in held if isinstance(v, nn.Module)))
    loss = problem.options.get("loss")
    sizes = tuple(leaf.tensor.ndim for leaf in problem.leaves)
    return (
        identity,
        None if loss is None else loss.__code__,
        tuple(problem.dims),
        sizes,
        tuple(t.name for t in problem.targets),
        tuple(uses),
    )


def _modes(module: nn.Module) -> Hashable:
    return tuple(m.training for m in module.modules())


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not Tensor
    except ValueError:
        return False


class _Same:
    """Equal only to the same object."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value
