"""A run that keeps to the script of an earlier one: its uses are recorded as the script says, and nothing else is looked at.

Where an operation differs, f goes on unwatched, and is run once more by the recorder: a branch that was not taken before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from .. import _compat
from .._errors import PartialsError
from .._machine import share
from .._output import check_output
from .._plan import LARGE
from .._problem import Problem
from .._state import drawn_since, random_state, restore
from .._typing import Tensor
from ..methods._base import Computed
from ..rules import RULES, Part
from ..rules._parts import keep
from .beneath import at_once, settled
from .engine import Run, answer, apart
from .script import Names, Script
from .trace import Trace, Use


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
        self.wanted, self.trace, self.size = tuple(wanted), Trace(), size
        self.names = Names((*samples, *self.wanted))
        self.steps, self.output = iter(script.steps), script.output
        self.level: int | None = None
        self.kept = True

    def begins(self, samples: Sequence[Tensor], level: int | None) -> None:
        """Samples are run apart by the vmap of that level."""
        self.names, self.level = Names((*samples, *self.wanted), mapped=True), level

    def ends(self, values: Tensor) -> None:
        """f is over and has returned these."""
        self.kept = self.kept and next(self.steps, None) is None and self.names.of(values) == self.output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.kept:
            return func(*args, **kwargs) if kwargs else func(*args)
        step = next(self.steps, None)
        if step is None or self.names.call(func, args, kwargs) != step.call or _compat.transform_now() != self.level:
            self.kept = False
            return func(*args, **kwargs) if kwargs else func(*args)
        if step.within:
            body = _compat.body_of(func)
            with self:
                out = body(*args, **kwargs or {})
        elif step.uses:
            out = self._use(step.uses, func, args, kwargs or {})
        else:
            out = at_once(func, args, kwargs, self.level, self.size)
        self.names.mark(out, args)
        return out

    def _use(self, uses: tuple[bool, ...], func: Any, args: Any, kwargs: Any) -> Any:
        parts: Sequence[Part] = tuple(RULES[func](*args, **kwargs))
        out = at_once(func, args, kwargs, self.level, self.size)
        out, owner, folded, place, parts = settled(func, out, parts, mapped=self.level is not None)
        node, trace = owner.grad_fn, self.trace
        if node is None or len(parts) != len(uses):
            self.kept = False
            return out
        slot = len(trace.edges)
        trace.edges.append(GradientEdge(node, owner.output_nr))
        if folded is not None:
            trace.folded[slot] = folded
        for part, wanted in zip(parts, uses, strict=True):
            if wanted:
                saved = tuple(keep(part, attached=False))
                trace.uses.append(Use(func, part, slot, place.shape, place.order, place.merged, saved=saved))
        return out
