"""The mode that watches f run: it follows which tensors depend on the samples, and records every use of a wanted parameter.

A use is an operation with an argument that requires grad, does not depend on the samples and leads to a wanted parameter, beside
one that does depend on them. Its output's gradient edge is taken before user code sees it; what happens to the output later,
in place or not, leaves the edge right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from .. import _compat
from .._graph import reached
from .._probe import UNBATCHED
from .._signature import rebuild, tensors_in, walk
from .._typing import Tensor
from ..rules import (
    COMPOSITES,
    ELEMENTWISE,
    REPEATED,
    RULES,
    Declined,
    ExpandedPart,
    NoRule,
    Part,
    Run,
    embedding,
    keep,
)
from .beneath import Placement, at_once, settled
from .course import LONGEST, Course, Lengths, contents, form, wrapped
from .routes import EXPANDS, Uniform, constant, gains, multiplies, opens, picks, pools, routes, spreads, writes
from .trace import Refused, Trace, Use, edge_of, label


class Recorder(TorchFunctionMode):
    """Records into `trace`. With `expand_unknown`, operations without a rule get their parameter expanded over the samples."""

    open = True
    """Whether uses are recorded: the run is not over."""
    known_samples = True
    """Whether the course follows the samples from given inputs; else `depends` says what is data."""

    def __init__(
        self, wanted: Mapping[str, Tensor], samples: Iterable[Tensor], size: int, *, expand_unknown: bool = False, attached: bool = False
    ) -> None:
        super().__init__()
        self.wanted, self.size = wanted, size
        self.expand_unknown, self.attached = expand_unknown, attached
        self.given = tuple(samples)
        self.course = Course(self.given, size)
        self.trace = Trace(course=self.course.entries)
        self.transforming = False
        """Whether a torch.func transform is running, at the present operation."""
        self.level: int | None = None
        """In a vmapped run: the number of our own vmap, whose mapped dimension is the samples."""
        self.leads: dict[int, tuple[Tensor, bool]] = {id(t): (t, True) for t in wanted.values()}
        self.constants: list[Tensor] = []
        """Of the present operation: those whose sizes are a multiple of N."""
        self.uniform = Uniform()

    def begins(self, samples: Sequence[Tensor], level: int | None) -> None:
        """Samples are run apart by the vmap of that level."""
        self.level = level

    def ends(self, values: Tensor) -> None:
        """f is over and has returned these."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.transforming = _compat.transforming()
        depends, parameters = self._scan(func, args, kwargs)
        if parameters and torch.is_grad_enabled():
            if depends:
                out = self._use(func, args, kwargs, parameters, tensors_in((*args, *kwargs.values()) if kwargs else args))
            elif func in EXPANDS and not self.expand_unknown and self._gains_samples(out := func(*args, **kwargs), args[0]):
                out = self._record_expanded(func, args[0], out)
                depends = True
            elif func in REPEATED and not self.expand_unknown and (once := REPEATED[func](*args, **kwargs)):
                with self:
                    return func(once[0], *args[1:], **kwargs).expand(once[1])
            elif func not in EXPANDS or self.expand_unknown:
                out = func(*args, **kwargs)
        else:
            out = at_once(func, args, kwargs, self.level, self.size) if depends else func(*args, **kwargs)
            self.trace.nested |= func is torch.autograd.grad
        if not self.transforming:
            self.uniform.see(func, args, kwargs, out)
        if depends:
            self._mark(out, func, args)
            if func in UNBATCHED:
                self.trace.one_by_one = True
                if self.expand_unknown:
                    raise Refused(f"torch's derivative of {label(func)} under vmap is wrong")
            if func is _compat.PACK:
                self._note_lengths(out)
            elif routes(func) or (picks(func, args) and not self._fixed(args, out)):
                self.trace.routed = True
            else:
                self.trace.routed |= func in EXPANDS and self.depends(args[0]) and spreads(args[0], out, self.course.n)
        return out

    def _fixed(self, args: Any, out: Any) -> bool:
        """Whether a pick is the same for all data and no cotangent goes through it: a mask looked up by positions that f counted out."""
        if not torch.is_grad_enabled() or any(_compat.unwrapped(t)[0].requires_grad for t in tensors_in((args, out))):
            return False  # (without grad it may be the inside of somebody's own Function)
        return not any(self.depends(t) for t in tensors_in(args[1:2]))

    def _note_lengths(self, packed: Any) -> None:
        """Where packing put the samples: layouts hold wherever the lengths were the same."""
        lengths = tuple(packed[1].tolist())
        self.trace.routed |= len(lengths) > LONGEST
        self.course.entries.append(Lengths(lengths))

    def _scan(self, func: Any, args: Any, kwargs: Any) -> tuple[bool, list[Tensor]]:
        """Whether any tensor depends on the samples, and the tensors that lead to wanted parameters and do not.

        An operation on the samples goes into the course.
        """
        entries = self.course.entries
        before = len(entries)
        entries.append(func)
        parameters: list[Tensor] = []
        count = self._meet(func, args, parameters)
        if kwargs:
            entries += kwargs
            count += self._meet(func, kwargs.values(), parameters)
        if self.constants:
            self._note_constants(func, args, kwargs) if count else self.constants.clear()
        if not count:
            del entries[before:]
        elif count > 1 and multiplies(func):
            self.trace.routed |= self._placed_by_data(args, kwargs)
        return count > 0, parameters

    def _note_constants(self, func: Any, args: Any, kwargs: Any) -> None:
        """Constants whose values may decide where samples go: see the NOTE in `routes`."""
        found, n = self.constants, self.course.n
        self.constants = []
        if picks(func, args):
            return  # (told by its index, if at all: see `_fixed`)
        if not multiplies(func) and not pools(func, args, n):
            samples = [t for t in tensors_in((*args, *kwargs.values())) if self.depends(t)]
            found = [t for t in found if gains(t, samples, n)]
        for t in found if self.transforming else [t for t in found if t not in self.uniform]:
            entry = constant(t)
            self.trace.routed |= entry is None
            self.course.entries.append(entry)

    def _placed_by_data(self, args: Any, kwargs: Any) -> bool:
        """Whether a product of samples with samples may put them in places that data decide: one factor, computed, has no gradient."""
        samples = [t for t in tensors_in((*args, *kwargs.values()) if kwargs else args) if self.depends(t)]
        return any(not t.requires_grad and id(t) not in self.course.inputs for t in samples)

    def _meet(self, func: Any, values: Iterable[Any], parameters: list[Tensor]) -> int:
        """How many tensors depend on the samples; all arguments go into the course."""
        count, course = 0, self.course
        for value in values:
            if isinstance(value, Tensor):
                entry: Any = course.number(value)
                if entry or (self.transforming and (entry := wrapped(value, course))):
                    count += 1
                elif not self.known_samples and self.depends(value):
                    count, entry = count + 1, "data"
                elif value.requires_grad and self.leads_to_wanted(value):
                    parameters.append(value)
                    entry = value.shape
                else:
                    entry = form(value.shape, course.n)
                    if course.n > 1 and 2 in entry:
                        self.constants.append(value)
                    entry = *entry, opens(func, value)
                course.entries.append(entry)
            elif (inner := contents(value)) is None:
                course.note(func, value)
            else:
                course.entries.append(len(inner))
                count += self._meet(func, inner, parameters)
        return count

    def depends(self, t: Tensor) -> bool:
        return bool(self.course.number(t)) or _compat.transform_of(t) == "vmap"

    def asked(self, t: Tensor) -> bool:
        """What composites are told."""
        return self.depends(t)

    def leads_to_wanted(self, t: Tensor) -> bool:
        known = self.leads.get(id(t))
        if known is None or known[0] is not t:
            known = (t, t.grad_fn is not None and bool(reached(t, self.wanted)))
            self.leads[id(t)] = known
        return known[1]

    def _mark(self, out: Any, func: Any, args: Any) -> None:
        mark = self.course.mark
        if isinstance(out, Tensor):
            self.trace.dtypes.add(out.dtype)
            mark(out)
        elif isinstance(out, tuple | list):
            for _, t in walk(out, ""):
                mark(t)
        if writes(func):
            target = args[0]
            for written in (target, target._base) if isinstance(target, Tensor) else ():
                if written is not None and not self.leads.get(id(written), (None, False))[1]:
                    mark(written)

    def _use(self, func: Any, args: Any, kwargs: Any, parameters: list[Tensor], tensors: list[Tensor]) -> Any:
        embedding.refuse(func, args, kwargs)
        transforms: set[str] = set()
        if self.transforming:
            transforms = {_compat.transform_of(t) for t in tensors}
            if "other" in transforms or ("vmap" in transforms and not _compat.PRIVATE):
                raise Refused(f"{label(func)} runs inside a torch.func transform within f")
        if any(t.is_complex() for t in (tensors if func in RULES else parameters)):
            raise Refused(f"{label(func)} is complex arithmetic, for which there are no factors")
        expandable = self.expand_unknown or "vmap" in transforms  # (along our own vmap, or what the user's own maps over)
        if func in RULES:
            try:
                return self._by_rule(func, args, kwargs, parameters)
            except NoRule as declined:
                if not (expandable and declined.expandable):
                    raise Refused(f"{label(func)}: {declined}") from None
                return self._by_expansion(func, args, kwargs, parameters)
        if func in ELEMENTWISE and not expandable:
            shape = broadcast([t.shape for t in tensors_in((*args, *kwargs.values()))])
            return self._with_expanded(func, args, kwargs, parameters, lambda p: p.expand(shape) if p.shape != shape else p.view_as(p))
        if func in COMPOSITES:
            try:
                with self:
                    return COMPOSITES[func](Run(self.asked, self.attached or "vmap" in transforms), *args, **kwargs)
            except NoRule as declined:
                if not (expandable and declined.expandable):
                    raise Refused(f"{label(func)}: {declined}") from None
                return self._by_expansion(func, args, kwargs, parameters)
        body = _compat.body_of(func) if isinstance(func, FunctionType) else None
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if expandable:
            return self._by_expansion(func, args, kwargs, parameters)
        raise Refused(f"{label(func)} takes a parameter and has no rule")

    def _by_rule(self, func: Any, args: Any, kwargs: Any, parameters: list[Tensor]) -> Any:
        mine = {id(p) for p in parameters}
        parts, told = [], set()
        for part in RULES[func](*args, **kwargs):
            if (key := id(part.parameter)) in mine:
                if type(part) is Declined:
                    raise NoRule(part.reason)
                parts.append(part)
                told.add(key)
        if told != mine:
            raise NoRule("the rule says nothing about one of its parameters")
        out = at_once(func, args, kwargs, self.level, self.size)
        if not isinstance(out, Tensor):
            raise NoRule("an operation with several outputs")
        out, owner, folded, place, settled_parts = settled(func, out, parts, mapped=self.transforming)
        edge = edge_of(owner)
        self.trace.stops[edge.node] = [t.grad_fn for t in self._data(args, kwargs, mine) if t.grad_fn is not None]
        for part in settled_parts:
            self._add(func, part, edge, place)
        if folded is not None:
            self.trace.folded[len(self.trace.edges) - 1] = folded
        return out

    def _data(self, args: Any, kwargs: Any, mine: set[int]) -> list[Tensor]:
        others = [t for t in tensors_in((*args, *kwargs.values()) if kwargs else args) if id(t) not in mine]
        # (what vmap has wrapped says that it requires no grad, whatever is beneath)
        return [t for t in ([_compat.unwrapped(t)[0] for t in others] if self.transforming else others) if t.requires_grad]

    def _by_expansion(self, func: Any, args: Any, kwargs: Any, parameters: list[Tensor]) -> Any:
        """The parameter as (N, *shape), one for each sample, seen by vmap as the sample's own: its cotangent is the block.

        Under the user's own `torch.vmap` in a native run, one for each entry that it maps over: whose they are is measured.
        """
        self.trace.expanded.append(label(func))
        in_place = getattr(func, "__name__", "").endswith("_") and any(t is args[0] for t in parameters)
        level, size = self.level or _compat.current_level() or 0, self.size
        if self.level is None:
            mapped = next(t for _, t in walk((args, kwargs), "") if _compat.transform_of(t) == "vmap")
            size = _compat.mapped_size(mapped)

        def expand(p: Tensor) -> Tensor:
            wide = p.expand(size, *p.shape)
            return wide.clone() if in_place else wide

        return self._with_expanded(func, args, kwargs, parameters, expand, lambda wide: _compat.batched(wide, level))

    def _with_expanded(self, func: Any, args: Any, kwargs: Any, parameters: list[Tensor], expand: Any, wrap: Any = None) -> Any:
        mine = {id(p) for p in parameters}
        swapped: dict[int, Tensor] = {}
        for p in parameters:
            if id(p) not in swapped:
                wide = expand(p)
                self._record_expanded(func, p, wide)
                swapped[id(p)] = wide if wrap is None else wrap(wide)
        new_args, new_kwargs = rebuild(
            (args, kwargs), iter([swapped[id(t)] if id(t) in mine else t for t in tensors_in((*args, *kwargs.values()))])
        )
        if wrap is None:
            return func(*new_args, **new_kwargs)
        try:
            out = func(*new_args, **new_kwargs)
        except Exception as error:  # it ran with the parameter itself: what fails is the expansion
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise Refused(f"{label(func)} cannot be run with its parameter expanded ({first})") from error
        found = [_compat.unwrapped(t)[0] for t in tensors_in((out,)) if t.is_floating_point()]
        seen = any(t.requires_grad for t in found)
        if seen and isinstance(func, FunctionType):  # (Python code may ask whether its arguments require grad: under vmap none does)
            nodes = {str(key): _compat.unwrapped(wide)[0] for key, wide in swapped.items()}
            seen = any(reached(t, nodes) for t in found)
        if found and not seen:
            raise Refused(f"{label(func)} loses the derivative of its parameter when that is expanded")
        return out

    def _record_expanded(self, func: Any, p: Tensor, wide: Tensor) -> Tensor:
        edge = get_gradient_edge(wide)
        self.trace.stops[edge.node] = []
        self._add(func, ExpandedPart(p, wide), edge, Placement(wide.shape))
        return wide

    def _gains_samples(self, out: Any, before: Tensor) -> bool:
        """Whether an expansion gave the parameter a dimension that could hold the samples."""
        if self.size < 2 or not isinstance(out, Tensor) or not out.requires_grad or out is before:
            return False
        old = (1,) * (out.ndim - before.ndim) + tuple(before.shape)
        return any(new != size and new % self.size == 0 for size, new in zip(old, out.shape, strict=True))

    def _add(self, func: Any, part: Part, edge: GradientEdge, place: Placement) -> None:
        trace, course = self.trace, self.course
        if not trace.edges or trace.edges[-1] is not edge:
            trace.edges.append(edge)
        if not self.attached and type(part) is ExpandedPart:
            part.expanded = part.parameter
        saved = tuple(keep(part, attached=self.attached))
        shape = place.shape
        layout = None if self.level is None else place.layout
        kind: Any = type(part)
        course.entries += (kind, form(shape, course.n))
        trace.uses.append(Use(func, part, len(trace.edges) - 1, shape, place.order, place.merged, layout, saved))


def broadcast(shapes: list[torch.Size]) -> tuple[int, ...]:
    """The shape that these broadcast to (torch's own function for it takes 30 microseconds)."""
    rank = max(map(len, shapes))
    sizes = [1] * rank
    for shape in shapes:
        for at, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                sizes[at] = size
    return tuple(sizes)
