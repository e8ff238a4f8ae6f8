"""The script of a run: every torch operation in order, with where each argument came from. What a later run is held against.

A course says what layouts depend on, and an ordinary run is watched closely to learn it. A script says more: it names what every
operation took, whether that depends on the samples or not. A run that keeps to a script needs no closer look: its uses, their layouts
and its completeness are those of the run that was written down. Complete it is since every tensor that requires grad came from an
operation of torch's own on named tensors, whose graph leads to its arguments and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from itertools import islice
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, GetSetDescriptorType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any, NamedTuple

import torch

from .. import _compat
from .._signature import tensors_in, walk
from .._typing import Tensor
from ..rules import COMPOSITES, REPEATED, RULES, ExpandedPart, OuterPart, SumPart
from ..rules._scan import recurrent_product
from ..rules.elementwise import ENTRY_BY_ENTRY
from .build import READ_AGAIN, Quick, quickly
from .course import Lengths
from .describe import formless, sizes_of
from .layout import Layout
from .recorder import Recorder
from .routes import EXPANDS, PICKS, Constant, bounded, opens, writes
from .trace import Trace, Use

NAME = "_partials_step"
_RUNS = itertools.count(1)
SPAN = 2**32
_OF_TORCH = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType, MethodWrapperType, GetSetDescriptorType)
_OWN = ("torch.", recurrent_product.__module__)
_TRUE, _FALSE = (bool, True), (bool, False)  # (True == 1, but a sum over dimension 1 is no sum with keepdim)
_AS_THEY_ARE = frozenset({int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


class Kind(Enum):
    """How an operation is run that is neither a plain one nor a use by its rule: see `replay`."""

    EXPANDED = "a use, of parameters that are expanded before it"
    WIDENED = "a use, which expands the parameter itself"
    ONCE = "of parameters alone, and not the same for every sample"
    REPEATED = "of parameters alone, run once for all samples; what that takes are steps too"
    BODY = "Python, whose own operations are steps too"
    COMPOSITE = "expressed in others, which are steps too"


class Step(NamedTuple):
    """One operation: what it was called with, and whether it is a use."""

    func: Any
    length: int
    """Number of positional arguments."""
    named: tuple[tuple[int, int], ...]
    """(place, name) of the arguments with a name."""
    usual: tuple[tuple[int, Any], ...]
    """(place, argument) of those that the very same object says all of."""
    others: tuple[int, ...]
    """Places of the arguments without a name."""
    words: list[Any]
    """For these, and for keywords."""
    worded: bool
    """Whether words must be compared in any case."""
    uses: tuple[bool, ...] = ()
    """Of what the operation's rule says, which concerns a wanted parameter; of its tensors, which are expanded; () where it is no use."""
    reads: tuple[tuple[int, ...], ...] | None = None
    """Of each use: which arguments its block is made from; None where the rule must be asked each time."""
    kind: Kind | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of expanded parameters."""


class Told(NamedTuple):
    """What a script says of one use."""

    slot: int
    name: str | None
    """Of the parameter; None where the tensor was computed from parameters."""
    layout: Layout
    quick: Quick | None
    """How the block is made; None where that takes the use itself."""
    again: str
    """What the block reads again, "" where nothing."""
    sizes: Use
    """The use without its tensors: what they were like."""


@dataclass(frozen=True, slots=True, eq=False)
class Script:
    """A run, and what was found out about it."""

    runner: str
    """native or vmapped."""
    steps: tuple[Step, ...]
    uses: tuple[Told, ...]
    output: int
    outputs: int
    """Of each sample."""
    wanted: dict[str, Tensor]
    """What the parameters are like: no values."""
    needed: int
    """Bytes that the factors of one output take."""
    course: tuple[int, int]
    """Numbers for what f did (see `Computed.course`)."""
    answers: tuple[bool, ...]
    """What composites were told of their arguments: whether they depend on the samples."""
    expanded: tuple[str, ...]
    """Operations without a rule."""


class Names:
    """Names for the tensors of one run: 1, 2, ... for results in order, -1, -2, ... for those given; others go by their form.

    A result carries its number as an attribute. Its graph node is kept as well, since a tensor that was written to unseen has another.
    """

    history: Callable[[Any], Any] = attrgetter("grad_fn")
    """A tensor's graph node."""
    places: dict[int, int] | None = None
    lost = False
    """Whether a tensor was met whose history no operation showed."""

    def __init__(self, given: Sequence[Tensor], *, mapped: bool = False) -> None:
        self.origin, self.nodes = next(_RUNS) * SPAN, list[Any]((None,))
        self.given = given[::-1]  # (so that the names are its indices)
        if mapped:
            self.history = _compat.node_beneath

    def of(self, t: Tensor) -> int:
        """The name of a tensor, 0 of one without."""
        number: int = getattr(t, NAME, 0) - self.origin
        if 0 < number < SPAN:
            if self.history(t) is self.nodes[number]:
                return number
        elif self.history(t) is None:
            if self.places is None:
                self.places = {id(t): -i for i, t in enumerate(reversed(self.given), 1)}
            return self.places.get(id(t), 0)
        self.lost = True
        return 0

    def words(self, func: Any, values: Iterable[Any], kwargs: Any) -> list[Any]:
        """Arguments as a list that can be compared; a tensor equals nothing where it has a history that no operation showed."""
        words: list[Any] = []
        self._add(words, values, func)
        if kwargs:
            words += kwargs
            self._add(words, kwargs.values(), func)
        return words

    def _add(self, words: list[Any], values: Iterable[Any], func: Any) -> None:
        for value in values:
            kind: Any = type(value)
            if isinstance(value, Tensor):
                name = self.of(value)
                form = value.shape, value.dtype, _compat.transform_of(value)
                words.append((Tensor, name) if name else object() if self.lost else (*form, opens(func, value)))
            elif kind is float or kind is int:
                words.append((kind, value == 0) if func in ENTRY_BY_ENTRY else value if kind is int else (float, value))
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
    output: int = 0
    """The name of what f has returned."""

    def script(
        self,
        trace: Trace,
        runner: str,
        values: Tensor,
        wanted: Mapping[str, Tensor],
        layouts: Sequence[Layout | None],
        needed: int,
        course: tuple[int, int],
    ) -> Script | None:
        """The script of the run that is over, where all of it can be told again."""
        placed = tuple([p for p in layouts if p is not None and p.owned is None])
        by_values = trace.routed or any(isinstance(entry, Constant | Lengths) for entry in trace.course)
        strange = by_values or trace.nested or trace.one_by_one or len(placed) < len(layouts)
        if not self.plain or strange or not trace.uses or self.output < 1:
            return None
        names, n, outputs = {id(t): name for name, t in wanted.items()}, len(values), values.shape[1:].numel()
        forms = {name: formless(t) for name, t in wanted.items()}
        uses = zip(trace.uses, placed, strict=True)
        steps, told = [], []
        for step in self.steps:
            if step is not None:
                mine = []
                for use, layout in islice(uses, sum(step.uses)):
                    name = names.get(id(use.part.parameter))
                    known = step.reads is not None and name is not None and outputs == 1 and (runner == "native" or _lies_first(use))
                    quick = quickly(use.part, torch.Size(use.shape), layout, n) if known else None
                    form = formless(use.part.parameter) if name is None else forms[name]
                    again = f"an input of {use.operation}" if type(use.part) in READ_AGAIN else ""
                    mine.append(Told(use.slot, name, layout, quick, again, sizes_of(use, form)))
                if any(use.quick is None for use in mine):
                    step, mine = step._replace(reads=None), [use._replace(quick=None) for use in mine]
                steps.append(step)
                told += mine
        found = tuple(steps), tuple(told), self.output, outputs, forms, needed, course
        return Script(runner, *found, tuple(self.answers), tuple(trace.expanded))


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
        draft, kwargs = self.draft, kwargs or {}
        at, uses = len(draft.steps), len(self.trace.uses)
        step = _step(draft.names, func, args, kwargs)
        draft.steps.append(None)
        out = super().__torch_function__(func, types, args, kwargs)
        draft.plain &= _told_again(func, kwargs) and not draft.names.lost and _compat.transform_now() == self.level
        draft.plain &= not torch.is_inference_mode_enabled()  # (which no mode sees begin or end)
        draft.plain &= not (func in PICKS and bounded(args[1]))
        if draft.plain:
            used = self._used(step, args, kwargs, out, self.trace.uses[uses:], within=len(draft.steps) > at + 1)
            draft.steps[at], draft.plain = used, used is not None
        draft.names.mark(out, args)
        return out

    def asked(self, t: Tensor) -> bool:
        self.draft.answers.append(found := super().asked(t))
        return found

    def _used(self, step: Step, args: Any, kwargs: Any, out: Any, uses: list[Use], *, within: bool) -> Step | None:
        """The step with its uses, None for what cannot be told again."""
        func = step.func
        if within:  # (uses are those of the steps inside)
            return self._within(step)
        if not uses:
            if func not in REPEATED or self.expand_unknown:
                return step
            return None if REPEATED[func](*args, **kwargs) else step._replace(kind=Kind.ONCE)
        expanded = sum(type(use.part) is ExpandedPart for use in uses)
        if any(use.func is not func for use in uses) or 0 < expanded < len(uses):
            return None
        mine = {id(use.part.parameter) for use in uses}
        if expanded:
            tensors = list(map(id, tensors_in((*args, *kwargs.values()))))
            told = tuple([of in mine and of not in tensors[:at] for at, of in enumerate(tensors)])
            kind = Kind.WIDENED if func in EXPANDS and not self.expand_unknown else Kind.EXPANDED
            return step._replace(uses=told, kind=kind, shapes=tuple([use.shape for use in uses])) if sum(told) == expanded else None
        parts = list(RULES[func](*args, **kwargs)) if func in RULES else []
        told = tuple(id(part.parameter) in mine for part in parts)
        if sum(told) != len(uses):
            return None
        fixed = not kwargs and (func not in ENTRY_BY_ENTRY or not step.others)  # (no number that the part depends on may be another)
        reads = [found for part, mine in zip(parts, told, strict=True) if mine and (found := _reads(part, args, out)) is not None]
        return step._replace(uses=told, reads=tuple(reads) if fixed and len(reads) == len(uses) else None)

    @staticmethod
    def _within(step: Step) -> Step | None:
        """An operation whose own are steps too."""
        func = step.func
        if func in COMPOSITES or func in REPEATED:
            return step._replace(kind=Kind.COMPOSITE if func in COMPOSITES else Kind.REPEATED)
        own = func not in RULES and isinstance(func, FunctionType) and _compat.body_of(func) is not None
        return step._replace(kind=Kind.BODY) if own else None


def _step(names: Names, func: Any, args: Any, kwargs: Any) -> Step:
    told = [names.of(value) if isinstance(value, Tensor) else 0 for value in args]
    named = tuple([(at, name) for at, name in enumerate(told) if name])
    others = tuple([at for at, name in enumerate(told) if not name])
    usual = tuple([(at, args[at]) for at in others if _plain(args[at])])
    words = names.words(func, [args[at] for at in others], kwargs)
    return Step(func, len(args), named, usual, others, words, bool(kwargs) or len(usual) < len(others))


def _plain(value: Any) -> bool:
    """Whether the very same object is the very same argument, whatever was done since."""
    kind: Any = type(value)
    return kind in _AS_THEY_ARE or kind in (bool, float) or (kind in (tuple, torch.Size) and all(map(_plain, value)))


def _reads(part: Any, args: Any, out: Any) -> tuple[int, ...] | None:
    """Which arguments the tensors of a part are; None where they are not, or the part may hold more of the run."""
    kind: Any = type(part)
    if out.dtype is not part.parameter.dtype or kind not in (OuterPart, SumPart):
        return None
    times = part.times if kind is SumPart else None
    if times is not None and (type(times) is not FunctionType or times.__closure__ or times.__defaults__):
        return None
    places = {id(value): at for at, value in enumerate(args)}
    found = [places.get(id(t), -1) for t in (part.saved if kind is SumPart else (part.a,))]
    return None if -1 in found else tuple(found)


def _lies_first(use: Use) -> bool:
    """Whether a use under vmap, and what its block reads, lie beneath with the samples in front and nothing else moved."""
    return use.order is None and not use.merged and (type(use.part) is OuterPart or (type(use.part) is SumPart and not use.part.saved))


def _told_again(func: Any, kwargs: Any) -> bool:
    """Whether an operation is torch's own, or one that a composite of ours consists of, and writes to none of its arguments."""
    own = isinstance(func, _OF_TORCH) or (isinstance(func, FunctionType) and (func.__module__ or "").startswith(_OWN))
    return own and not writes(func) and "out" not in kwargs
