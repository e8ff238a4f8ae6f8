"""The script of a run: every torch operation in order, with where each argument came from. What a later run is held against.

A course says what layouts depend on, and an ordinary run is watched closely to learn it. A script says more: it names what every
operation took, whether that depends on the samples or not. A run that keeps to a script needs no closer look: its uses, their layouts
and its completeness are those of the run that was written down. Complete it is since every tensor that requires grad came from an
operation of torch's own on named tensors, whose graph leads to its arguments and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, GetSetDescriptorType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch

from .. import _compat
from .._signature import walk
from .._typing import Tensor
from ..rules import COMPOSITES, REPEATED, RULES, ExpandedPart
from ..rules.elementwise import ENTRY_BY_ENTRY
from .layout import Layout
from .recorder import Recorder, writes

NAME = "_partials_step"
_RUNS = itertools.count(1)
SPAN = 2**32
_OF_TORCH = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType, MethodWrapperType, GetSetDescriptorType)
_TRUE, _FALSE = (bool, True), (bool, False)  # (True == 1, but a sum over dimension 1 is no sum with keepdim)
_AS_THEY_ARE = frozenset({int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


@dataclass(frozen=True, slots=True)
class Step:
    """One operation: what it was called with, and whether it is a use."""

    call: list[Any]
    uses: tuple[bool, ...] = ()
    """Of what the operation's rule says, which concerns a wanted parameter; nothing where the operation is no use."""
    within: bool = False
    """The operation is Python whose own operations are steps too."""


@dataclass(frozen=True, slots=True)
class Script:
    """A run, and what was found out about it."""

    steps: tuple[Step, ...]
    output: Hashable
    layouts: tuple[Layout, ...]
    """Of the uses."""
    needed: int
    """Bytes that the factors of one output take."""


class Names:
    """Names for the tensors of one run: those given, results in order; others go by their shape.

    A result carries its number as an attribute. Its graph node is kept as well, since a tensor that was written to unseen has another.
    """

    __slots__ = ("given", "lost", "nodes", "origin")

    def __init__(self, given: Iterable[Tensor]) -> None:
        self.origin = next(_RUNS) * SPAN
        self.given = {id(t): -1 - i for i, t in enumerate(given)}
        self.nodes: list[Any] = [None]
        self.lost = False
        """Whether a tensor was met whose history no operation showed."""

    def of(self, t: Tensor) -> Hashable:
        """The name of a tensor; one that equals nothing where it has a history that no operation showed."""
        number: int = getattr(t, NAME, 0) - self.origin
        if 0 < number < SPAN:
            if t.grad_fn is self.nodes[number]:
                return number
        elif (found := self.given.get(id(t))) is not None:
            return found
        elif t.grad_fn is None:
            return t.shape
        self.lost = True
        return object()

    def call(self, func: Any, args: Any, kwargs: Any) -> list[Any]:
        """A call as a list that can be compared."""
        words: list[Any] = [func]
        origin, nodes = self.origin, self.nodes
        for value in args:
            if isinstance(value, Tensor) and 0 < (number := getattr(value, NAME, 0) - origin) < SPAN and value.grad_fn is nodes[number]:
                words.append(number)  # (most arguments are, and need no more)
            else:
                self._add(words, (value,), func)
        if kwargs:
            words += kwargs
            self._add(words, kwargs.values(), func)
        return words

    def _add(self, words: list[Any], values: Iterable[Any], func: Any) -> None:
        for value in values:
            kind: Any = type(value)
            if isinstance(value, Tensor):
                words.append(self.of(value))
            elif kind is float or kind is int:
                words.append(kind if func in ENTRY_BY_ENTRY else value if kind is int else (float, value))
            elif kind in _AS_THEY_ARE:
                words.append(value)
            elif kind is tuple or kind is list or kind is torch.Size:
                words.append((kind, len(value)))
                self._add(words, value, func)
            elif kind is slice:
                words.append(slice)
                self._add(words, (value.start, value.stop, value.step), func)
            elif kind is bool:
                words.append(_TRUE if value else _FALSE)
            else:
                words.append(value if value is ... else object() if isinstance(value, Mapping) else Same(value))

    def mark(self, out: Any, args: Any) -> None:
        """Name what an operation has computed: the next in order."""
        if isinstance(out, Tensor):
            for value in args:
                if value is out:  # (x.contiguous() may be x; relu in place is x with another history)
                    if 0 < (number := getattr(out, NAME, 0) - self.origin) < SPAN:
                        self.nodes[number] = out.grad_fn
                    return
            setattr(out, NAME, self.origin + len(self.nodes))
            self.nodes.append(out.grad_fn)
        elif isinstance(out, tuple | list):
            for _, t in walk(out, ""):
                self.mark(t, args)


class Same:
    """Equal to what holds the very same object."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Scribe(Recorder):
    """A recorder that writes the script as well; `trace.script` is None where the run is not one that can be repeated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.names = Names((*self.given, *self.wanted.values()))
        self.steps: list[Step | None] = []
        self.plain = all(t.grad_fn is None for t in self.wanted.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        at, uses = len(self.steps), len(self.trace.uses)
        call = self.names.call(func, args, kwargs)
        self.steps.append(None)
        out = super().__torch_function__(func, types, args, kwargs)
        self._settle(at, call, func, args, kwargs or {}, self.trace.uses[uses:])
        self.names.mark(out, args)
        return out

    def _settle(self, at: int, call: list[Any], func: Any, args: Any, kwargs: Any, uses: list[Any]) -> None:
        within = len(self.steps) > at + 1
        own = isinstance(func, _OF_TORCH) or (isinstance(func, FunctionType) and (func.__module__ or "").startswith("torch."))
        self.plain &= not self.names.lost
        self.plain &= own and not self.transforming and not writes(func) and "out" not in kwargs
        if within:  # (uses are those of the steps inside)
            self.plain &= (
                func not in RULES and func not in COMPOSITES and isinstance(func, FunctionType) and _compat.body_of(func) is not None
            )
            self.steps[at] = Step(call, within=True)
            return
        told: tuple[bool, ...] = ()
        self.plain &= bool(uses) or func not in REPEATED  # (what these do may depend on values)
        if uses:
            self.plain &= func in RULES and all(use.func is func and type(use.part) is not ExpandedPart for use in uses)
            mine = {id(use.part.parameter) for use in uses}
            told = tuple(id(part.parameter) in mine for part in RULES[func](*args, **kwargs)) if self.plain else ()
            self.plain &= sum(told) == len(uses)
        self.steps[at] = Step(call, told)

    def script(self, values: Tensor, layouts: Iterable[Layout | None], needed: int) -> Script | None:
        """The script of the run that is over, where all of it can be told again."""
        trace, placed = self.trace, tuple(layouts)
        known = not any(layout is None or layout.owned is not None for layout in placed)
        plain = self.plain and known and not (trace.routed or trace.nested or trace.one_by_one or trace.expanded)
        output = self.names.of(values)
        if not plain or not trace.uses or not isinstance(output, int) or output < 0:
            return None
        return Script(tuple(step for step in self.steps if step is not None), output, tuple(p for p in placed if p is not None), needed)
