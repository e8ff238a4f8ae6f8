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
from .._compat import body_of, level, own_memory, reverse
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
from .reverse import cotangents
from .script import NAME, RUNS, SPAN, Names, Script
from .trace import NO_GRAPH, Refused, Use


def replayed(problem: Problem) -> Computed | None:
    """The answer of a run that kept to what is known of the call; None where nothing is known, or the run did not keep to it."""
    history = problem.history
    script: Script = history.script
    if level() is not None:
        return None
    device = problem.targets[0].tensor.device
    if script.needed > LARGE and script.needed > share(device):
        return None
    before = generators(device)
    run = Replay(script, (*[problem.leaves[at].tensor for at in problem.sampled], *[t.tensor for t in problem.targets]))
    with run:
        returned, whole = problem.plainly()
    if (
        run.kept
        and next(run.steps, None) is None
        and run.of(values := problem.picker(returned)) == script.output
        and unmoved(before, device)
    ):
        try:
            found = _answer(problem, script, run, values, whole)
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


class Replay(Names, TorchFunctionMode):
    """Watches a run that is expected to keep to a script. `kept` says whether it has; from where it has not, nothing is recorded.

    What stands around every operation of f is written out: a call of Python takes a fifth of what an operation takes.
    """

    def __init__(self, script: Script, given: Sequence[Tensor]) -> None:
        self.origin, self.nodes, self.given = next(RUNS) * SPAN, [None], given[::-1]  # (as in `Names`)
        self.steps = iter(script.steps)
        self.edges: list[GradientEdge] = []
        self.taken: list[Any] = []
        """Of each use: what its block is made from, or the use itself where that takes more."""
        self.kept = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        step = next(self.steps, None)
        if step is None:
            return self._leave(func, args, kwargs)
        its, length, named, usual, others, words, worded, uses, reads, within = step
        if func != its or len(args) != length or level() is not None:
            return self._leave(func, args, kwargs)
        for at, name in named:
            value = args[at]
            if name > 0:
                if getattr(value, NAME, 0) - self.origin != name or value.grad_fn is not self.nodes[name]:
                    return self._leave(func, args, kwargs)
            elif value is not self.given[name] or value.grad_fn is not None:
                return self._leave(func, args, kwargs)
        for at, value in usual:
            worded = worded or args[at] is not value
        if (worded or kwargs) and self.words(func, [args[at] for at in others], kwargs) != words:
            return self._leave(func, args, kwargs)
        if uses:
            out = self._used(func, args, kwargs or {}, uses, reads)
        elif within:
            body = body_of(func)
            with self:
                out = body(*args, **kwargs or {})
        else:
            out = func(*args, **kwargs) if kwargs else func(*args)
        self.mark(out, args)
        return out

    def _leave(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.kept, self.steps = False, iter(())
        return func(*args, **kwargs or {})

    def _used(self, func: Any, args: Any, kwargs: Any, uses: tuple[bool, ...], reads: Any) -> Any:
        """Run an operation and record its uses: what their blocks are made from, or what the operation's rule says of them."""
        parts = tuple(RULES[func](*args, **kwargs)) if reads is None else ()
        out = func(*args, **kwargs)
        if out._is_view():
            out, _ = own_memory(out)
        node = out.grad_fn
        if node is None or (reads is None and len(parts) != len(uses)):
            self.kept, self.steps = False, iter(())
            return out
        self.edges.append(GradientEdge(node, out.output_nr))
        for places in reads or ():
            saved: Saved = ()
            for at in places:
                t = args[at]
                t = t.detach() if t.requires_grad else t
                saved += ((t, t._version),)
            self.taken.append(saved)
        for part, wanted in zip(parts, uses, strict=reads is None):
            if wanted:
                self.taken.append(Use(func, part, len(self.edges) - 1, out.shape, saved=tuple(keep(part, attached=False))))
        return out


def _answer(problem: Problem, script: Script, run: Replay, values: Tensor, whole: Any) -> Computed:
    """The reverse pass and the blocks of a run that kept to its script."""
    size, one = problem.size, script.outputs == 1
    if one and values.requires_grad:
        found: Any = reverse(values, torch.ones_like(values), run.edges, create_graph=False)
    else:
        found = cotangents(values, run.edges, create_graph=False)
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
