"""A run that keeps to the script of an earlier one: its uses are recorded as the script says, and nothing else is looked at.

Where an operation differs, f goes on unwatched, and is run once more by the recorder: a branch that was not taken before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from .. import _compat
from .._blocks import Block
from .._errors import PartialsError
from .._machine import share
from .._plan import LARGE
from .._problem import Problem
from .._state import generators, put_back, unmoved
from .._typing import Tensor
from ..methods._base import Computed
from ..rules import RULES
from ..rules._parts import keep
from .build import Saved, block_of, carried_to, merged, zero
from .describe import described
from .reverse import cotangents, single
from .script import NAME, Names, Script, Step
from .trace import NO_GRAPH, Refused, Use


def replayed(problem: Problem) -> Computed | None:
    """The answer of a run that kept to what is known of the call; None where nothing is known, or the run did not keep to it."""
    history = problem.history
    script: Script = history.script
    if _compat.inside_transform():
        return None
    device = problem.targets[0].tensor.device
    if script.needed > LARGE and script.needed > share(device):
        return None
    before = generators(device)
    run = Replay(script, (*[problem.leaves[at].tensor for at in problem.sampled], *[t.tensor for t in problem.targets]))
    with run:
        returned, whole = problem.plainly()
    if run.kept and run.over(values := problem.picker(returned)) and unmoved(before, device):
        try:
            found = _answer(problem, run, values, whole)
        except PartialsError:
            raise
        except Exception:  # (Refused, or a reverse pass that fails: the recorder's run says it)
            found = None
        if found is not None:
            history.kept += 1
            return found
    del run
    put_back(before, device)
    history.lost()
    return None


class Replay(TorchFunctionMode):
    """Watches a run that is expected to keep to a script. `kept` says whether it has; from where it has not, nothing is recorded."""

    def __init__(self, script: Script, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.script, self.names = script, Names(given)
        self.steps = iter(script.steps)
        self.edges: list[GradientEdge] = []
        self.taken: list[Any] = []
        """Of each use: what its block is made from, or the use itself where that takes more."""
        self.kept = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        step = next(self.steps, None)
        if step is None or not self._same(step, func, args, kwargs):
            self._leave()
            return func(*args, **kwargs) if kwargs else func(*args)
        if step.within:
            body = _compat.body_of(func)
            with self:
                out = body(*args, **kwargs or {})
        elif step.reads is not None or not step.uses:
            out = func(*args, **kwargs) if kwargs else func(*args)
            if step.uses:
                out = self._read(step.reads, args, out)
        else:
            out = self._use(step, args, kwargs or {})
        self.names.mark(out, args)
        return out

    def _leave(self) -> None:
        self.kept, self.steps = False, iter(())

    def _same(self, step: Step, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation is the expected one, and takes what it took."""
        its, count, named, usual, others, words, worded, *_ = step
        if func != its or len(args) != count or _compat.transforming():
            return False
        names = self.names
        for at, name in named:
            value = args[at]
            if name > 0:
                if getattr(value, NAME, 0) - names.origin != name or value.grad_fn is not names.nodes[name]:
                    return False
            elif value is not names.given[name] or value.grad_fn is not None:
                return False
        for at, value in usual:
            worded = worded or args[at] is not value
        return not (worded or kwargs) or names.words(func, [args[at] for at in others], kwargs) == words

    def _read(self, reads: Any, args: Any, out: Tensor) -> Tensor:
        """Record the uses of an operation, whose blocks are made from these arguments."""
        out = self._stop(out)
        for places in reads:
            saved: Saved = ()
            for at in places:
                t = args[at]
                t = t.detach() if t.requires_grad else t
                saved += ((t, t._version),)
            self.taken.append(saved)
        return out

    def _use(self, step: Step, args: Any, kwargs: Any) -> Tensor:
        """Record the uses of an operation as its rule tells them."""
        parts = tuple(RULES[step.func](*args, **kwargs))
        out = self._stop(step.func(*args, **kwargs))
        if len(parts) != len(step.uses):
            self._leave()
            return out
        for part, wanted in zip(parts, step.uses, strict=True):
            if wanted:
                slot = len(self.edges) - 1
                self.taken.append(Use(step.func, part, slot, out.shape, saved=tuple(keep(part, attached=False))))
        return out

    def _stop(self, out: Tensor) -> Tensor:
        """The reverse pass stops at this tensor: a use's output."""
        if out._is_view():
            out, _ = _compat.own_memory(out)
        node = out.grad_fn
        if node is None:
            self._leave()
        else:
            self.edges.append(GradientEdge(node, out.output_nr))
        return out

    def over(self, values: Tensor) -> bool:
        """Whether the script ends here as well, with the same output."""
        return next(self.steps, None) is None and self.names.of(values) == self.script.output


def _answer(problem: Problem, run: Replay, values: Tensor, whole: Any) -> Computed:
    """The reverse pass and the blocks of a run that kept to its script."""
    script, size, one = run.script, problem.size, run.script.outputs == 1
    found: Any = single(values, run.edges, create_graph=False) if one else cotangents(values, run.edges, create_graph=False)
    blocks: dict[str, tuple[Block, ...]] = dict.fromkeys(script.wanted, ())
    sources = []
    for told, use in zip(script.uses, run.taken, strict=True):
        for t, version in use.saved if type(use) is Use else use:
            if t._version != version:
                raise Refused(f"an input of {told.sizes.operation} was changed in place after the operation read it")
            if told.again:
                sources.append((told.again, t, version))
        g = found[told.slot]
        if g is None:
            continue
        block = block_of(use, g, told.layout, size, single=one) if told.quick is None else told.quick(g, use)
        if told.name is not None:
            blocks[told.name] += (block,)
            continue
        for name, its in carried_to(use, block, {t.name: t.tensor for t in problem.targets}, attached=False).items():
            blocks[name] += (its,)
    for target in problem.targets:
        group = blocks[target.name]
        if len(group) != 1:
            blocks[target.name] = tuple(merged(list(group))) or (zero(target.tensor, size, script.outputs),)
    return Computed(
        values.detach(),
        blocks,
        [] if values.requires_grad else [NO_GRAPH],
        whole,
        tuple(sources),
        lambda: described([told.sizes for told in script.uses], script.wanted, size, [told.layout for told in script.uses]),
        course=lambda: script.course,
        kept=True,
    )
