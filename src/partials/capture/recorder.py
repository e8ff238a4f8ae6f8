"""The mode that watches f run: it follows which tensors depend on the samples, and records every use of a wanted parameter.

A use is an operation with an argument that requires grad, does not depend on the samples and leads to a wanted parameter, beside
one that does depend on them. Its output's gradient edge is taken before user code sees it; what happens to the output later,
in place or not, leaves the edge right.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, resolve_name

from .. import _compat
from .._graph import reached
from .._probe import UNBATCHED
from .._signature import rebuild, tensors_in, walk
from .._typing import Tensor
from ..rules import COMPOSITES, ELEMENTWISE, PHYSICAL, REPEATED, RULES, Declined, ExpandedPart, NoRule, Part, Run, embedding
from .layout import Layout

EXPANDS = {
    torch.Tensor.expand,
    torch.Tensor.expand_as,
    torch.Tensor.repeat,
    torch.broadcast_to,
    torch.Tensor.broadcast_to,
    torch.tile,
    torch.Tensor.tile,
}
"""Operations that can give a parameter a sample dimension of its own: a class token expanded to the batch."""
ROUTES = frozenset(
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in (
        *("index_select", "gather", "take", "take_along_dim", "masked_select", "sort", "argsort", "topk", "nonzero", "argwhere"),
        *("index_put", "index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce", "masked_scatter"),
        *("index_put_", "index_add_", "index_copy_", "scatter_", "scatter_add_", "scatter_reduce_", "masked_scatter_"),
        *("numpy", "__array__"),
    )
    if hasattr(owner, name)
)
"""Operations by which data decide where samples go: a layout measured for some data is none for others."""
ANSWERS = frozenset(
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose")
    if hasattr(owner, name)
) | {_compat.PACK}
"""Operations by which data decide what is run: the same layouts hold wherever the same answers were given."""
LONGEST_ANSWER = 4096
_PICKS = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_MARK = "_partials_sample"


@dataclass
class Use:
    """One recorded use: the edge whose cotangent is wanted, and the part that turns it into a block."""

    operation: str
    part: Part
    edge: GradientEdge
    shape: tuple[int, ...]
    """Of the edge's tensor as the block will see it, with mapped dimensions in front."""
    order: tuple[int, ...] | None = None
    """Under vmap: the permutation that brings the mapped dimensions of the edge's tensor to the front."""
    merged: bool = False
    """Under vmap: the batch dimension that the operation saw is merged with the mapped one."""
    layout: Layout | None = None
    """Where the samples are, if that is known: under our own vmap."""
    saved: tuple[tuple[Tensor, int], ...] = ()
    """Tensors that the block will read, with their versions when they were recorded."""


@dataclass
class Trace:
    """What one run of f recorded."""

    uses: list[Use] = field(default_factory=list)
    stops: dict[Any, list[Any]] = field(default_factory=dict)
    """Graph node of a recorded edge -> nodes of its data inputs, from which the completeness walk goes on."""
    nested: bool = False
    """f called torch.autograd.grad itself."""
    routed: bool = False
    """Where samples go depends on data: layouts hold for this call only."""
    one_by_one: bool = False
    """A derivative that torch computes wrongly for several outputs at once is in the graph."""
    answers: list[str] = field(default_factory=list)
    """What data answered to Python: branches, lengths."""
    refused: str = ""
    expanded: list[str] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    """Of the tensors that depend on the samples: the coarsest sets how well two reverse passes can agree."""


class Refused(Exception):
    """This run cannot be captured; the text says why. `nested`: since f differentiates inside."""

    def __init__(self, why: str, *, nested: bool = False) -> None:
        super().__init__(why)
        self.nested = nested


class Unplaced(Refused):
    """The cotangents of a use belong to no one sample, in no layout that its sizes allow."""


class Recorder(TorchFunctionMode):
    """Records into `trace`. With `expand_unknown`, operations without a rule get their parameter expanded over the samples."""

    open = True
    """Whether uses are recorded: the run is not over."""

    def __init__(
        self, wanted: Mapping[str, Tensor], samples: Iterable[Tensor], size: int, *, expand_unknown: bool = False, attached: bool = False
    ) -> None:
        super().__init__()
        self.wanted, self.size = wanted, size
        self.expand_unknown, self.attached = expand_unknown, attached
        self.trace = Trace()
        self.token = object()
        self.level: int | None = None
        """In a vmapped run: the number of our own vmap, whose mapped dimension is the samples."""
        self.samples = {id(t) for t in samples}
        self.leads: dict[int, tuple[Tensor, bool]] = {id(t): (t, True) for t in wanted.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((*args, *kwargs.values()) if kwargs else args)
        depends, parameters = self._scan(tensors)
        if parameters and torch.is_grad_enabled():
            if depends:
                out = self._use(func, args, kwargs, parameters, tensors)
            elif func in EXPANDS and not self.expand_unknown and self._gains_samples(out := func(*args, **kwargs), args[0]):
                out = self._record_expanded(func, args[0], out)
                depends = True
            elif func in REPEATED and not self.expand_unknown and (once := REPEATED[func](*args, **kwargs)):
                out = func(once[0], *args[1:], **kwargs)
                with self:
                    return out.expand(once[1])
            elif func not in EXPANDS or self.expand_unknown:
                out = func(*args, **kwargs)
        else:
            out = self._at_once(func, args, kwargs, tensors) if depends and func in PHYSICAL else func(*args, **kwargs)
            if func is torch.autograd.grad:
                self.trace.nested = True
        if depends:
            self._mark(out, func, args)
            if func in UNBATCHED:
                self.trace.one_by_one = True
                if self.expand_unknown:
                    raise Refused(f"torch's derivative of {label(func)} under vmap is wrong")
            if func in ANSWERS:
                self._note_answer(func, out)
            elif func in ROUTES or (func in _PICKS and _by_data(args[1]) and not self._fixed(args, out)):
                self.trace.routed = True
        return out

    def _fixed(self, args: Any, out: Any) -> bool:
        """Whether a pick is the same for all data and no cotangent goes through it: a mask looked up by positions that f counted out."""
        if not torch.is_grad_enabled() or any(t.requires_grad for t in tensors_in((args, out))):
            return False  # (without grad it may be the inside of somebody's own Function)
        return not any(self.depends(t) for t in tensors_in(args[1:2]))

    def _note_answer(self, func: Any, out: Any) -> None:
        answer = repr(out[1].tolist() if func is _compat.PACK else out)
        self.trace.routed |= len(answer) > LONGEST_ANSWER
        self.trace.answers.append(answer)

    def _scan(self, tensors: list[Tensor]) -> tuple[bool, list[Tensor]]:
        """Whether any tensor depends on the samples, and the tensors that lead to wanted parameters and do not."""
        depends, parameters = False, []
        for t in tensors:
            if self.depends(t):
                depends = True
            elif t.requires_grad and self.leads_to_wanted(t):
                parameters.append(t)
        return depends, parameters

    def depends(self, t: Tensor) -> bool:
        return getattr(t, _MARK, None) is self.token or id(t) in self.samples or _compat.transform_of(t) == "vmap"

    def leads_to_wanted(self, t: Tensor) -> bool:
        known = self.leads.get(id(t))
        if known is None or known[0] is not t:
            known = (t, t.grad_fn is not None and bool(reached(t, self.wanted)))
            self.leads[id(t)] = known
        return known[1]

    def _mark(self, out: Any, func: Any, args: Any) -> None:
        if isinstance(out, Tensor):
            self.trace.dtypes.add(out.dtype)
            setattr(out, _MARK, self.token)
        elif isinstance(out, tuple | list):
            for _, t in walk(out, ""):
                setattr(t, _MARK, self.token)
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            target = args[0]
            for written in (target, target._base) if isinstance(target, Tensor) else ():
                if written is not None and not self.leads.get(id(written), (None, False))[1]:
                    setattr(written, _MARK, self.token)

    def _use(self, func: Any, args: Any, kwargs: Any, parameters: list[Tensor], tensors: list[Tensor]) -> Any:
        embedding.refuse(func, args, kwargs)
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
            shape = broadcast([t.shape for t in tensors])
            return self._with_expanded(func, args, kwargs, parameters, lambda p: p.expand(shape) if p.shape != shape else p.view_as(p))
        if func in COMPOSITES:
            try:
                with self:
                    return COMPOSITES[func](Run(self.depends, self.attached or "vmap" in transforms), *args, **kwargs)
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
        parts = [part for part in RULES[func](*args, **kwargs) if id(part.parameter) in mine]
        for part in parts:
            if isinstance(part, Declined):
                raise NoRule(part.reason)
        if {id(part.parameter) for part in parts} != mine:
            raise NoRule("the rule says nothing about one of its parameters")
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            raise NoRule("an operation with several outputs")
        raw, order = _compat.unwrapped(out)
        if raw._is_view():
            out, raw = _compat.own_memory(out)
        if raw is out:
            place = Placement(raw.shape)
        else:
            levels, merges = raw.ndim - out.ndim, any(part.batched for part in parts)
            if merges and levels > 1:
                raise NoRule("a batch within several vmaps")
            place = Placement(torch.Size([raw.shape[d] for d in order]), order, levels, merges)
            parts = [with_data(part, lambda t: self._physical(t, place)) for part in parts]
        edge = get_gradient_edge(raw)
        self.trace.stops[edge.node] = [t.grad_fn for t in self._data(args, kwargs, mine) if t.grad_fn is not None]
        for part in parts:
            self._add(func, part, edge, place)
        return out

    def _physical(self, t: Tensor, place: Placement) -> Tensor:
        """The tensor beneath vmap with the mapped dimensions of the operation's output in front."""
        raw, order = _compat.unwrapped(t)
        if raw is t:
            raw = t.expand(*place.whole[: place.levels], *t.shape)
        elif raw.ndim - t.ndim != place.levels:
            raise NoRule("arguments of different vmaps")
        else:
            raw = raw.permute(order)
        return raw.flatten(0, 1) if place.merged else raw

    def _at_once(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """An operation that vmap would run sample by sample, on the batch beneath our vmap."""
        below = [_compat.unwrapped(t)[0] for t in tensors]
        one_level = all(raw.ndim - t.ndim == (raw is not t) for raw, t in zip(below, tensors, strict=True))
        if self.level is None or self.level != _compat.current_level() or not one_level:
            return func(*args, **kwargs)
        place = Placement(torch.Size([self.size]), levels=1)
        whole, named = rebuild((args, kwargs), iter([self._physical(t, place) for t in tensors]))
        try:
            return _compat.batched(PHYSICAL[func](*whole, **named), self.level)
        except NoRule:
            return func(*args, **kwargs)

    def _data(self, args: Any, kwargs: Any, mine: set[int]) -> list[Tensor]:
        return [_compat.unwrapped(t)[0] for t in tensors_in((*args, *kwargs.values())) if id(t) not in mine]

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
        if not self.attached:
            part = detached(part)
        saved = tuple((t, t._version) for t in read_by(part))
        layout = None if self.level is None else Layout(0, 1, place.whole[1]) if place.merged else Layout(0)
        self.trace.uses.append(Use(label(func), part, edge, place.shape, place.order, place.merged, layout, saved))


@dataclass(frozen=True)
class Placement:
    """How an operation's output lies beneath vmap: its shape with the mapped dimensions in front, and how it gets there."""

    whole: torch.Size
    order: tuple[int, ...] | None = None
    levels: int = 0
    merged: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.whole[0] * self.whole[1], *self.whole[2:]) if self.merged else tuple(self.whole)


def _by_data(index: Any) -> bool:
    """Whether an index picks entries by a tensor or a list, not by numbers and slices alone."""
    return any(isinstance(part, Tensor | list) for part in (index if isinstance(index, tuple) else (index,)))


def broadcast(shapes: list[torch.Size]) -> tuple[int, ...]:
    """The shape that these broadcast to (torch's own function for it takes 30 microseconds)."""
    rank = max(map(len, shapes))
    sizes = [1] * rank
    for shape in shapes:
        for at, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                sizes[at] = size
    return tuple(sizes)


@functools.cache
def label(func: Any) -> str:
    """A function's name as a user would write it."""
    name = resolve_name(func) or getattr(func, "__name__", str(func))
    return str(name).replace("torch.nn.functional.", "F.").removeprefix("torch.").replace("Tensor.__get__", "attribute")


def read_by(part: Part) -> list[Tensor]:
    """The data tensors that the part's block reads later."""
    return tensors_in(value for name, value in vars(part).items() if name not in ("parameter", "expanded"))


def with_data(part: Part, function: Any) -> Part:
    """The part with `function` applied to each data tensor."""
    fields = {n: v if n == "parameter" else rebuild(v, iter([function(t) for t in tensors_in((v,))])) for n, v in vars(part).items()}
    return type(part)(**fields)


def detached(part: Part) -> Part:
    """The part with its data cut from the graph, sharing memory and version counter."""
    return ExpandedPart(part.parameter, part.parameter) if isinstance(part, ExpandedPart) else with_data(part, Tensor.detach)
