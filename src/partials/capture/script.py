"""The script of a run: every torch operation in order, with where each argument came from. What a later run is held against.

A course says what layouts depend on, and an ordinary run is watched closely to learn it. A script says more: it names what every
operation took, whether that depends on the samples or not. A run that keeps to a script needs no closer look: its uses, their layouts
and its completeness are those of the run that was written down. Complete it is since every tensor that requires grad came from an
operation of torch's own on named tensors, whose graph leads to its arguments and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, GetSetDescriptorType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch

from .. import _compat
from .._signature import tensors_in, walk
from .._typing import Tensor
from ..rules import COMPOSITES, REPEATED, RULES, ExpandedPart
from ..rules._scan import recurrent_product
from ..rules.elementwise import ENTRY_BY_ENTRY
from .course import Lengths
from .layout import Layout
from .recorder import Recorder
from .routes import EXPANDS, Constant, writes
from .trace import Trace, Use

NAME = "_partials_step"
_RUNS = itertools.count(1)
SPAN = 2**32
_OF_TORCH = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType, MethodWrapperType, GetSetDescriptorType)
_OWN = ("torch.", f"{recurrent_product.__module__}")
_TRUE, _FALSE = (bool, True), (bool, False)  # (True == 1, but a sum over dimension 1 is no sum with keepdim)
_AS_THEY_ARE = frozenset({int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


class Kind(Enum):
    """How an operation is run that is no plain one: see `replay`."""

    RULE = "a use, by its rule"
    EXPANDED = "a use, of parameters that are expanded before it"
    WIDENED = "a use, which expands the parameter itself"
    ONCE = "of parameters alone, and not the same for every sample"
    REPEATED = "of parameters alone, run once for all samples; what that takes are steps too"
    BODY = "Python, whose own operations are steps too"
    COMPOSITE = "expressed in others, which are steps too"


@dataclass(frozen=True, slots=True)
class Step:
    """One operation: what it was called with, and how it is run."""

    call: list[Any]
    kind: Kind | None = None
    uses: tuple[bool, ...] = ()
    """Of what the operation's rule says, or of its tensors where it has none: which concerns a wanted parameter."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of expanded parameters."""


@dataclass(frozen=True, slots=True, eq=False)
class Script:
    """A run, and what was found out about it."""

    runner: str
    """native or vmapped."""
    steps: tuple[Step, ...]
    output: Hashable
    layouts: tuple[Layout, ...]
    """Of the uses."""
    needed: int
    """Bytes that the factors of one output take."""
    course: tuple[int, int]
    """Numbers for what f did (see `Computed.course`)."""
    answers: tuple[bool, ...] = ()
    """What composites were told of their arguments: whether they depend on the samples."""
    expanded: tuple[str, ...] = ()
    """Operations without a rule."""


class Names:
    """Names for the tensors of one run: those given, results in order; others go by their shape.

    A result carries its number as an attribute. Its graph node is kept as well, since a tensor that was written to unseen has another.
    """

    __slots__ = ("given", "history", "lost", "nodes", "origin")

    def __init__(self, given: Iterable[Tensor], *, mapped: bool = False) -> None:
        self.origin = next(_RUNS) * SPAN
        self.history: Callable[[Any], Any] = _compat.node_beneath if mapped else attrgetter("grad_fn")
        """A tensor's graph node."""
        self.given = {id(t): -1 - i for i, t in enumerate(given)}
        self.nodes: list[Any] = [None]
        self.lost = False
        """Whether a tensor was met whose history no operation showed."""

    def of(self, t: Tensor) -> Hashable:
        """The name of a tensor; one that equals nothing where it has a history that no operation showed."""
        number: int = getattr(t, NAME, 0) - self.origin
        if 0 < number < SPAN:
            if self.history(t) is self.nodes[number]:
                return number
        elif (found := self.given.get(id(t))) is not None:
            return found
        elif self.history(t) is None:
            return t.shape if not _compat.transform_of(t) else (t.shape, "of each sample")
        self.lost = True
        return object()

    def call(self, func: Any, args: Any, kwargs: Any) -> list[Any]:
        """A call as a list that can be compared."""
        words: list[Any] = [func]
        origin, nodes, history = self.origin, self.nodes, self.history
        for value in args:
            if isinstance(value, Tensor) and 0 < (number := getattr(value, NAME, 0) - origin) < SPAN and history(value) is nodes[number]:
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
            elif kind is list or isinstance(value, tuple):
                words.append((kind, len(value)))
                self._add(words, value, func)
            elif kind is slice:
                words.append(slice)
                self._add(words, (value.start, value.stop, value.step), func)
            elif kind is bool:
                words.append(_TRUE if value else _FALSE)
            elif is_dataclass(kind) and kind.__module__.startswith(_OWN):
                words.append(kind)
                self._add(words, [getattr(value, each.name) for each in fields(kind)], func)
            else:
                words.append(value if value is ... else object() if isinstance(value, Mapping) else Same(value))

    def mark(self, out: Any, args: Any) -> None:
        """Name what an operation has computed: the next in order."""
        if isinstance(out, Tensor):
            for value in args:
                if value is out:  # (x.contiguous() may be x; relu in place is x with another history)
                    if 0 < (number := getattr(out, NAME, 0) - self.origin) < SPAN:
                        self.nodes[number] = self.history(out)
                    return
            setattr(out, NAME, self.origin + len(self.nodes))
            self.nodes.append(self.history(out))
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


@dataclass(slots=True)
class Draft:
    """A script while it is being written."""

    names: Names
    plain: bool
    """Whether a later run can be held against it."""
    steps: list[Step | None] = field(default_factory=list)
    answers: list[bool] = field(default_factory=list)
    output: Hashable = None
    """The name of what f has returned."""

    def script(self, trace: Trace, runner: str, layouts: Sequence[Layout | None], needed: int, course: tuple[int, int]) -> Script | None:
        """The script of the run that is over, where all of it can be told again."""
        placed = tuple([p for p in layouts if p is not None and p.owned is None])
        by_values = trace.routed or any(isinstance(entry, Constant | Lengths) for entry in trace.course)
        strange = by_values or trace.nested or trace.one_by_one or len(placed) < len(layouts)
        output = self.output
        if not self.plain or strange or not trace.uses or not isinstance(output, int) or output < 0:
            return None
        steps = tuple([step for step in self.steps if step is not None])
        return Script(runner, steps, output, placed, needed, course, tuple(self.answers), tuple(trace.expanded))


class Scribe(Recorder):
    """A recorder that writes a draft of the script as well."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        plain = all(t.grad_fn is None for t in self.wanted.values())
        self.draft = self.trace.draft = Draft(Names((*self.given, *self.wanted.values())), plain)

    def begins(self, samples: Sequence[Tensor], level: int | None) -> None:
        super().begins(samples, level)
        self.samples = samples
        self.draft.names = Names((*samples, *self.wanted.values()), mapped=True)

    def ends(self, values: Tensor) -> None:
        self.draft.output = self.draft.names.of(values)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draft = self.draft
        at, uses = len(draft.steps), len(self.trace.uses)
        call = draft.names.call(func, args, kwargs)
        draft.steps.append(None)
        out = super().__torch_function__(func, types, args, kwargs)
        draft.plain &= _told_again(func, kwargs or {}) and not draft.names.lost
        draft.plain &= _compat.transform_now() == self.level
        if draft.plain:
            step = self._step(call, func, args, kwargs or {}, self.trace.uses[uses:], within=len(draft.steps) > at + 1)
            draft.steps[at], draft.plain = step, step is not None
        draft.names.mark(out, args)
        return out

    def asked(self, t: Tensor) -> bool:
        self.draft.answers.append(found := super().asked(t))
        return found

    def _step(self, call: list[Any], func: Any, args: Any, kwargs: Any, uses: list[Use], *, within: bool) -> Step | None:
        """The step, None for what cannot be told again."""
        if within:  # (uses are those of the steps inside)
            if func in COMPOSITES:
                return Step(call, Kind.COMPOSITE)
            if func in REPEATED:
                return Step(call, Kind.REPEATED)
            own = func not in RULES and isinstance(func, FunctionType) and _compat.body_of(func) is not None
            return Step(call, Kind.BODY) if own else None
        if not uses:
            if func not in REPEATED or self.expand_unknown:
                return Step(call)
            return None if REPEATED[func](*args, **kwargs) else Step(call, Kind.ONCE)
        if any(use.func is not func for use in uses):
            return None
        mine, expanded = {id(use.part.parameter) for use in uses}, sum(type(use.part) is ExpandedPart for use in uses)
        if expanded:
            told = tuple([id(t) in mine for t in tensors_in((*args, *kwargs.values()))])
            widened = func in EXPANDS and not self.expand_unknown
            shapes = tuple([use.shape for use in uses])
            return Step(call, Kind.WIDENED if widened else Kind.EXPANDED, told, shapes) if expanded == len(uses) else None
        told = tuple([id(part.parameter) in mine for part in RULES[func](*args, **kwargs)]) if func in RULES else ()
        return Step(call, Kind.RULE, told) if sum(told) == len(uses) else None


def _told_again(func: Any, kwargs: Any) -> bool:
    """Whether an operation is torch's own, or one that a composite of ours consists of, and writes to none of its arguments."""
    own = isinstance(func, _OF_TORCH) or (isinstance(func, FunctionType) and (func.__module__ or "").startswith(_OWN))
    return own and not writes(func) and "out" not in kwargs
