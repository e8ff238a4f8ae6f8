"""A run that keeps to the script of an earlier one: its uses are recorded as the script says, and nothing else is looked at.

Where an operation differs, f goes on unwatched, and is run once more by the recorder: a branch that was not taken before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from .._blocks import Block
from .._compat import batched, body_of, first_mapped, reverse, transform_now
from .._errors import PartialsError
from .._machine import out_of_memory, share
from .._plan import LARGE
from .._problem import Problem
from .._signature import rebuild, tensors_in
from .._state import generators, put_back, unmoved
from .._typing import Tensor
from ..methods._base import Computed
from ..rules import COMPOSITES, REPEATED, RULES, ExpandedPart, Part, Run
from ..rules._parts import keep
from .beneath import at_once, settled
from .build import Saved, block_of, carried_to, merged, zero
from .describe import described
from .engine import apart, unfolded
from .reverse import cotangents
from .script import NAME, Kind, Names, Script, Step
from .trace import NO_GRAPH, Refused, Use, edge_of, without_rule


def replayed(problem: Problem) -> Computed | None:
    """The answer of a run that kept to the script that is known of the call; None where it did not."""
    history = problem.history
    script: Script = history.script
    device = problem.targets[0].tensor.device
    if transform_now() is not None or (script.needed > LARGE and script.needed > share(device)):
        return None
    before, run = generators(device), Replay(problem, script)
    values, whole = _run(problem, script, run)
    if run.kept and (problem.randomness != "error" or unmoved(before, device)):
        try:
            found = _answer(problem, script, run, values, whole)
        except PartialsError:
            raise
        except Exception as error:  # (Refused, or a reverse pass that fails: the recorder's run says it)
            if out_of_memory(error):
                raise
            found = None
        if found is not None:
            history.kept += 1
            return found
    del run
    put_back(before, device)
    history.lost()
    return None


def _run(problem: Problem, script: Script, run: Replay) -> tuple[Any, Any]:
    """What f has returned: the output, and what its function returned without a loss; the run says whether it has kept to its script."""
    if script.runner == "vmapped":
        try:
            return apart(problem, {t.name: t.tensor for t in problem.targets}, run), None
        except Exception:  # (the recorder's run says what fails, and whether it fails elsewhere too)
            run.leave()
            return None, None
    with run:
        returned, whole = problem.plainly()
    values = problem.picker(returned) if run.kept else None
    if values is not None:
        run.ends(values)
    return values, whole


class Replay(Names, TorchFunctionMode):
    """Watches a run that is expected to keep to a script. `kept` says whether it has; from where it has not, nothing is recorded.

    What stands around every operation of f is written out: a call of Python takes a fifth of what an operation takes.
    """

    kept = True
    level: int | None = None

    def __init__(self, problem: Problem, script: Script) -> None:
        self.wanted, self.size = [t.tensor for t in problem.targets], problem.size
        super().__init__([*[problem.leaves[at].tensor for at in problem.sampled], *self.wanted])
        self.steps, self.answers, self.output = iter(script.steps), iter(script.answers), script.output
        self.edges: list[GradientEdge] = []
        self.folded: dict[int, torch.Size] = {}
        self.taken: list[Any] = []
        """Of each use: what its block is made from, or the use itself where that takes more."""

    def begins(self, samples: Sequence[Tensor], level: int | None) -> None:
        """Samples are run apart by the vmap of that level."""
        Names.__init__(self, [*samples, *self.wanted], mapped=True)
        self.level = level

    def ends(self, values: Tensor) -> None:
        """f is over and has returned these."""
        if next(self.steps, None) is not None or next(self.answers, None) is not None or self.of(values) != self.output:
            self.kept = False

    def leave(self) -> None:
        """The run does not keep to the script."""
        self.kept, self.steps = False, iter(())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        step = next(self.steps, None)
        if step is None:
            return self._without(func, args, kwargs)
        its, length, named, usual, others, words, worded, uses, reads, kind, _ = step
        if func != its or len(args) != length or transform_now() != self.level:
            return self._without(func, args, kwargs)
        history = self.history
        for at, name in named:
            value = args[at]
            if name > 0:
                if getattr(value, NAME, 0) - self.origin != name or history(value) is not self.nodes[name]:
                    return self._without(func, args, kwargs)
            elif value is not self.given[name] or history(value) is not None:
                return self._without(func, args, kwargs)
        for at, value in usual:
            worded = worded or args[at] is not value
        if (worded or kwargs) and self.words(func, [args[at] for at in others], kwargs) != words:
            return self._without(func, args, kwargs)
        if kind is not None:
            out = KINDS[kind](self, step, args, kwargs or {})
        elif uses:
            out = self._used(func, args, kwargs or {}, uses, reads)
        elif self.level is None:
            out = func(*args, **kwargs) if kwargs else func(*args)
        else:
            out = at_once(func, args, kwargs, self.level, self.size)
        if type(out) is not Tensor or length != 1 or out is args[0]:
            self.mark(out, args)
        else:  # (as `mark` does)
            setattr(out, NAME, self.origin + len(self.nodes))
            self.nodes.append(history(out))
        return out

    def _without(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.leave()
        return func(*args, **kwargs or {})

    def _used(self, func: Any, args: Any, kwargs: Any, uses: tuple[bool, ...], reads: Any) -> Any:
        """Run an operation and record its uses: what their blocks are made from, or what the operation's rule says of them."""
        parts: Sequence[Part] = () if reads is not None else tuple(RULES[func](*args, **kwargs))
        out = func(*args, **kwargs) if self.level is None else at_once(func, args, kwargs, self.level, self.size)
        owner, place, slot = out, None, len(self.edges)
        if reads is None or self.level is not None or out._is_view():
            out, owner, folded, place, parts = settled(func, out, parts, mapped=self.level is not None)
            if folded is not None:
                self.folded[slot] = folded
        if owner.grad_fn is None or (reads is None and len(parts) != len(uses)):
            self.leave()
            return out
        self.edges.append(edge_of(owner))
        for places in reads or ():
            saved: Saved = ()
            for at in places:
                t = args[at] if self.level is None else first_mapped(args[at])
                if t is None or (place is not None and place.levels and (t is args[at] or place.order is not None)):
                    self.leave()
                    return out
                t = t.detach() if t.requires_grad else t
                saved += ((t, t._version),)
            self.taken.append(saved)
        for part, wanted in zip(parts, uses, strict=reads is None):
            if wanted and place is not None:
                saved = tuple(keep(part, attached=False))
                self.taken.append(Use(func, part, slot, place.shape, place.order, place.merged, saved=saved))
        return out

    def _expanded(self, step: Step, args: Any, kwargs: Any) -> Any:
        tensors, shapes = tensors_in((*args, *kwargs.values())), iter(step.shapes)
        swapped: dict[int, Tensor] = {}
        for p in [p for p, mine in zip(tensors, step.uses, strict=True) if mine]:
            shape = next(shapes)
            wide = p.expand(shape) if p.shape != shape else p.view_as(p)
            self._widen(step.func, p, wide)
            swapped[id(p)] = wide if self.level is None else batched(wide, self.level)
        args, kwargs = rebuild((args, kwargs), iter([swapped.get(id(t), t) for t in tensors]))
        return step.func(*args, **kwargs)

    def _widened(self, step: Step, args: Any, kwargs: Any) -> Any:
        out = step.func(*args, **kwargs)
        self._widen(step.func, args[0], out)
        return out

    def _widen(self, func: Any, p: Tensor, wide: Tensor) -> None:
        """A parameter with an entry for each position that it is used at."""
        if wide.grad_fn is None:
            self.leave()
            return
        self.taken.append(Use(func, ExpandedPart(p, p), len(self.edges), wide.shape))
        self.edges.append(edge_of(wide))

    def _once(self, step: Step, args: Any, kwargs: Any) -> Any:
        if REPEATED[step.func](*args, **kwargs):
            self.leave()
        return step.func(*args, **kwargs)

    def _repeated(self, step: Step, args: Any, kwargs: Any) -> Any:
        once = REPEATED[step.func](*args, **kwargs)
        if once is None:
            return self._without(step.func, args, kwargs)
        with self:
            return step.func(once[0], *args[1:], **kwargs).expand(once[1])

    def _body(self, step: Step, args: Any, kwargs: Any) -> Any:
        with self:
            return body_of(step.func)(*args, **kwargs)

    def _composite(self, step: Step, args: Any, kwargs: Any) -> Any:
        run = Run(lambda _: next(self.answers, False), self.level is not None)  # (with one more question, other steps follow)
        with self:
            return COMPOSITES[step.func](run, *args, **kwargs)


KINDS = {
    Kind.EXPANDED: Replay._expanded,
    Kind.WIDENED: Replay._widened,
    Kind.ONCE: Replay._once,
    Kind.REPEATED: Replay._repeated,
    Kind.BODY: Replay._body,
    Kind.COMPOSITE: Replay._composite,
}


def _answer(problem: Problem, script: Script, run: Replay, values: Tensor, whole: Any) -> Computed:
    """The reverse pass and the blocks of a run that kept to its script."""
    size, one = problem.size, script.outputs == 1
    if one and values.requires_grad:
        found: Any = reverse(values, torch.ones_like(values), run.edges, create_graph=False)
    else:
        found = cotangents(values, run.edges, create_graph=False)
    if run.folded:
        found = unfolded(run.folded, found, 0 if one else 1)
    blocks: dict[str, tuple[Block, ...]] = dict.fromkeys(script.wanted, ())
    sources = []
    for told, use in zip(script.uses, run.taken, strict=True):
        slot, name, layout, quick, again, sizes = told
        for t, version in use.saved if quick is None else use:
            if t._version != version:
                raise Refused(f"an input of {sizes.operation} was changed in place after the operation read it")
            if again:
                sources.append((again, t, version))
        g = found[slot]
        if g is None:
            continue
        block = block_of(use, g, layout, size, single=one) if quick is None else quick(g, use)
        if name is not None:
            blocks[name] += (block,)
            continue
        for wanted, its in carried_to(use, block, {t.name: t.tensor for t in problem.targets}, attached=False).items():
            blocks[wanted] += (its,)
    for name, group in blocks.items():
        if len(group) != 1:
            parameter = next(t.tensor for t in problem.targets if t.name == name)
            blocks[name] = tuple(merged(list(group))) or (zero(parameter, size, script.outputs),)
    return Computed(
        values.detach(),
        blocks,
        [*without_rule(script.expanded), *([] if values.requires_grad else [NO_GRAPH])],
        whole,
        tuple(sources),
        lambda: described([told.sizes for told in script.uses], script.wanted, size, [told.layout for told in script.uses], script.runner),
        course=lambda: script.course,
        kept=True,
    )
