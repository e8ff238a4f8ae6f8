"""A run that keeps to the script of an earlier one: its uses are recorded as the script says, and nothing else is looked at.

Where an operation differs, f goes on unwatched, and is run once more by the recorder: a branch that was not taken before.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from ..rules import RULES
from ..rules._parts import keep
from .engine import Run, answer
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
    if run is not None and not drawn_since(before, device):
        try:
            found = answer(problem, run, "native", script.layouts, lambda: script.course)
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
    replay = Replay(script, (*problem.samples, *tensors.values()))
    with replay:
        returned, whole = problem.plainly()
    out = problem.picker(returned)
    values = check_output(out, problem.size, problem.name, batched=True)
    if not replay.kept or next(replay.steps, None) is not None or replay.names.of(values) != script.output:
        return None
    return values, whole, replay.trace, tensors


class Replay(TorchFunctionMode):
    """Watches a run that is expected to keep to a script. `kept` says whether it has; from where it has not, nothing is recorded."""

    def __init__(self, script: Script, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.names, self.trace = Names(given), Trace()
        self.steps = iter(script.steps)
        self.kept = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.kept:
            return func(*args, **kwargs) if kwargs else func(*args)
        step = next(self.steps, None)
        if step is None or self.names.call(func, args, kwargs) != step.call or _compat.transforming():
            self.kept = False
            return func(*args, **kwargs) if kwargs else func(*args)
        if step.within:
            body = _compat.body_of(func)
            with self:
                out = body(*args, **kwargs or {})
        elif step.uses:
            out = self._use(step.uses, func, args, kwargs or {})
        else:
            out = func(*args, **kwargs) if kwargs else func(*args)
        self.names.mark(out, args)
        return out

    def _use(self, uses: tuple[bool, ...], func: Any, args: Any, kwargs: Any) -> Any:
        parts = tuple(RULES[func](*args, **kwargs))
        out = func(*args, **kwargs)
        if out._is_view():
            out, _ = _compat.own_memory(out)
        node, trace = out.grad_fn, self.trace
        if node is None or len(parts) != len(uses):
            self.kept = False
            return out
        slot = len(trace.edges)
        trace.edges.append(GradientEdge(node, out.output_nr))
        for part, wanted in zip(parts, uses, strict=True):
            if wanted:
                trace.uses.append(Use(func, part, slot, out.shape, saved=tuple(keep(part, attached=False))))
        return out
