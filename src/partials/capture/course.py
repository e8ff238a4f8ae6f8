"""The course of a run: every operation on tensors that depend on the samples, in order, with which tensors it took and how.

Where the samples lie in a tensor follows from the course and from where they lie in the inputs: from the operations, the tensors that
each took, the dimensions that were named, and which sizes are one, a multiple of N, or neither. So a layout that was measured in one
run holds in every run of the same course, whatever decided the course: a branch on data, a global, an attribute, a default, other
code. Values are left out, so that a new temperature is not a new course.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Iterable, Mapping
from functools import lru_cache
from operator import index
from typing import Any

import torch

from .. import _compat
from .._typing import Tensor
from ..rules.elementwise import ENTRY_BY_ENTRY
from .routes import Constant

MARK = "_partials_sample"
_RUNS = itertools.count(1)
FIRST, SPAN = 2**31, 2**32
"""Tensors of a run are numbered from FIRST on (no argument is such a number); SPAN is the room of one run."""
SIZED = {
    torch.reshape,
    torch.unflatten,
    torch.broadcast_to,
    *(
        getattr(Tensor, name)
        for name in ("view", "reshape", "unflatten", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty", "new_full")
    ),
}
"""Operations whose numbers are sizes."""
SMALL = 8
"""Integers up to this may name dimensions."""


LONGEST = 4096
"""Steps of packed sequences whose lengths are remembered."""


class Lengths(tuple[int, ...]):
    """The lengths of packed sequences, as an entry of the course."""


def digest(course: Iterable[Hashable], *, fine: bool = False) -> int:
    """A number for the code that a course went through: without sizes, and unless `fine` without constants and lengths.

    Small integers are kept, since they name dimensions. (hash(-1) is hash(-2): they are shifted.)
    """

    def coarse(entry: Hashable) -> Hashable:
        if type(entry) is int:
            return entry + 2 * SMALL if -SMALL <= entry <= SMALL else int
        return None if not fine and isinstance(entry, Constant | Lengths) else entry

    return hash(tuple([coarse(entry) for entry in course]))


class Course:
    """Follows which tensors depend on the samples: the inputs, and everything computed from them.

    What is computed carries its number as an attribute; the user's own inputs carry nothing.
    """

    __slots__ = ("count", "entries", "inputs", "n", "origin")

    def __init__(self, samples: Iterable[Tensor], n: int) -> None:
        self.n = n
        self.origin = next(_RUNS) * SPAN
        self.inputs = {id(t): FIRST + i for i, t in enumerate(samples)}
        self.count = FIRST + len(self.inputs)
        self.entries: list[Hashable] = []

    def number(self, t: Tensor) -> int:
        """The number of a tensor that depends on the samples, 0 of one that does not."""
        found: int = getattr(t, MARK, 0) - self.origin
        return found if 0 < found < SPAN else self.inputs.get(id(t), 0)

    def mark(self, t: Tensor) -> None:
        """From now on t depends on the samples, as the newest tensor of the run."""
        self.count += 1
        if id(t) in self.inputs:
            self.inputs[id(t)] = self.count
        else:
            setattr(t, MARK, self.origin + self.count)

    def note(self, func: Any, value: Any) -> None:
        """Add an argument that is no tensor and no container."""
        value = told(value)
        kind: Any = type(value)
        if kind is int or kind is float:
            if func in SIZED and value > 1:
                self.entries.append("N" if self.n and value % self.n == 0 else "size")
            elif func not in ENTRY_BY_ENTRY:
                self.entries.append(value if kind is int else kind)
            else:
                self.entries.append("shut" if value == 0 else "open")
        elif kind is slice:
            self.entries += (_bound(value.start), _bound(value.stop), _bound(value.step))
        else:
            self.entries.append(value if kind is bool or kind is str or value is None else kind)


@lru_cache(maxsize=4096)
def form(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    """What a layout can depend on in a shape: for each dimension, whether it is one, a multiple of N, or neither."""
    return tuple(1 if size == 1 else 2 if n and size % n == 0 else 0 for size in shape)


def wrapped(t: Tensor, course: Course) -> Hashable:
    """What a layout can depend on in a tensor of a `vmap`: the number of the one beneath, and which dimensions are mapped; "" of others."""
    if _compat.transform_of(t) != "vmap":
        return ""
    raw, order = _compat.unwrapped(t)
    return course.number(raw), order, form(raw.shape, course.n)


def contents(value: Any) -> Collection[Any] | None:
    """The values of a container, None of anything else."""
    if isinstance(value, tuple | list):
        return value
    return value.values() if isinstance(value, Mapping) else None


def _bound(value: Any) -> Hashable:
    value = told(value)
    kind: Any = type(value)
    return value if value is None or kind is int else kind


def told(value: Any) -> Any:
    """A number of numpy's, or of a tensor that bounds a slice, as Python's own."""
    if type(value) in (int, float, bool, str, slice) or value is None or not hasattr(value, "__index__"):
        return value
    try:
        return index(value)
    except (TypeError, RuntimeError):  # (an array, or the tensor of a transform)
        return value
