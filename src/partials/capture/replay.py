"""A run that keeps to the script of an earlier one: its uses are recorded as the script says, and nothing else is looked at.

Where an operation differs, f goes on unwatched, and is run once more by the recorder: a branch that was not taken before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

from .. import _compat
from .._errors import PartialsError
from .._machine import share
from .._output import check_output
from .._plan import LARGE
from .._problem import Problem
from .._signature import rebuild, tensors_in
from .._state import drawn_since, random_state, restore
from .._typing import Tensor
from ..methods._base import Computed
from ..rules import COMPOSITES, REPEATED, RULES, ExpandedPart, Part
from ..rules import Run as RuleRun
from ..rules._parts import keep
from .beneath import at_once, settled
from .engine import Run, answer, apart
from .script import Kind, Names, Script, Step
from .trace import Trace, Use, edge_of


def replayed(problem: Problem) -> Computed | None:
    """The answer of a run that kept to what is known of the call; None where nothing is known, or the run did not keep to it."""
    history = problem.history
    script: Script | None = None if history is None else history.script
    if history is None or script is None:
        return None
    device = problem.targets[0].tensor.device
    if script.needed > LARGE and script.needed > share(device):
        return None
    before = random_state(device)
    run = _run(problem, script)
    if run is not None and (problem.randomness != "error" or not drawn_since(before, device)):
        try:
            found = answer(problem, run, script.runner, script.layouts, lambda: script.course)
        except PartialsError:
            raise
        except Exception:  # (Refused, or a reverse pass that fails: the recorder's run says it)
            found = None
        if found is not None:
            history.kept += 1
            found.kept = True
            return found
    del run
    restore(before, device)
    history.lost()
    return None


def _run(problem: Problem, script: Script) -> Run | None:
    tensors = {t.name: t.tensor for t in problem.targets}
    replay = Replay(script, tensors.values(), problem.samples, problem.size)
    if script.runner == "vmapped":
        try:
            values, whole = apart(problem, tensors, replay), None
        except Exception:  # (the recorder's run says what fails, and whether it fails elsewhere too)
            return None
    else:
        with replay:
            returned, whole = problem.plainly()
        values = check_output(problem.picker(returned), problem.size, problem.name, batched=True)
        replay.ends(values)
    return (values, whole, replay.trace, tensors) if replay.kept else None


class Replay(TorchFunctionMode):
    """Watches a run that is expected to keep to a script. `kept` says whether it has; from where it has not, nothing is recorded."""

    def __init__(self, script: Script, wanted: Iterable[Tensor], samples: Iterable[Tensor], size: int) -> None:
        super().__init__()
        self.wanted, self.trace, self.size = tuple(wanted), Trace(expanded=list(script.expanded)), size
        self.names = Names((*samples, *self.wanted))
        self.steps, self.answers, self.output = iter(script.steps), iter(script.answers), script.output
        self.level: int | None = None
        self.kept = True

    def begins(self, samples: Sequence[Tensor], level: int | None) -> None:
        """Samples are run apart by the vmap of that level."""
        self.names, self.level = Names((*samples, *self.wanted), mapped=True), level

    def ends(self, values: Tensor) -> None:
        """f is over and has returned these."""
        told = next(self.steps, None) is None and next(self.answers, None) is None
        self.kept = self.kept and told and self.names.of(values) == self.output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.kept:
            return func(*args, **kwargs) if kwargs else func(*args)
        step = next(self.steps, None)
        if step is None or self.names.call(func, args, kwargs) != step.call or _compat.transform_now() != self.level:
            self.kept = False
            return func(*args, **kwargs) if kwargs else func(*args)
        if step.kind is None:
            out = at_once(func, args, kwargs, self.level, self.size)
        else:
            out = KINDS[step.kind](self, step, func, args, kwargs or {})
        self.names.mark(out, args)
        return out

    def _by_rule(self, step: Step, func: Any, args: Any, kwargs: Any) -> Any:
        parts: Sequence[Part] = tuple(RULES[func](*args, **kwargs))
        out = at_once(func, args, kwargs, self.level, self.size)
        out, owner, folded, place, parts = settled(func, out, parts, mapped=self.level is not None)
        if owner.grad_fn is None or len(parts) != len(step.uses):
            self.kept = False
            return out
        slot, trace = len(self.trace.edges), self.trace
        trace.edges.append(edge_of(owner))
        if folded is not None:
            trace.folded[slot] = folded
        for part, wanted in zip(parts, step.uses, strict=True):
            if wanted:
                saved = tuple(keep(part, attached=False))
                trace.uses.append(Use(func, part, slot, place.shape, place.order, place.merged, saved=saved))
        return out

    def _expanded(self, step: Step, func: Any, args: Any, kwargs: Any) -> Any:
        tensors, shapes = tensors_in((*args, *kwargs.values())), iter(step.shapes)
        swapped: dict[int, Tensor] = {}
        for p in [p for p, mine in zip(tensors, step.uses, strict=True) if mine]:
            if id(p) not in swapped:
                shape = next(shapes)
                wide = p.expand(shape) if p.shape != shape else p.view_as(p)
                self._widen(func, p, wide)
                swapped[id(p)] = wide if self.level is None else _compat.batched(wide, self.level)
        args, kwargs = rebuild((args, kwargs), iter([swapped.get(id(t), t) for t in tensors]))
        return func(*args, **kwargs)

    def _widened(self, step: Step, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        self._widen(func, args[0], out)
        return out

    def _widen(self, func: Any, p: Tensor, wide: Tensor) -> None:
        """A parameter with an entry for each position that it is used at."""
        if wide.grad_fn is None:
            self.kept = False
            return
        self.trace.uses.append(Use(func, ExpandedPart(p, p), len(self.trace.edges), wide.shape))
        self.trace.edges.append(edge_of(wide))

    def _once(self, step: Step, func: Any, args: Any, kwargs: Any) -> Any:
        self.kept = REPEATED[func](*args, **kwargs) is None
        return func(*args, **kwargs)

    def _repeated(self, step: Step, func: Any, args: Any, kwargs: Any) -> Any:
        once = REPEATED[func](*args, **kwargs)
        if once is None:
            self.kept = False
            return func(*args, **kwargs)
        with self:
            return func(once[0], *args[1:], **kwargs).expand(once[1])

    def _body(self, step: Step, func: Any, args: Any, kwargs: Any) -> Any:
        with self:
            return _compat.body_of(func)(*args, **kwargs)

    def _composite(self, step: Step, func: Any, args: Any, kwargs: Any) -> Any:
        run = RuleRun(lambda _: next(self.answers, False), self.level is not None)  # (one question more is one step more, or another)
        with self:
            return COMPOSITES[func](run, *args, **kwargs)


KINDS = {
    Kind.RULE: Replay._by_rule,
    Kind.EXPANDED: Replay._expanded,
    Kind.WIDENED: Replay._widened,
    Kind.ONCE: Replay._once,
    Kind.REPEATED: Replay._repeated,
    Kind.BODY: Replay._body,
    Kind.COMPOSITE: Replay._composite,
}
