"""From a problem to blocks: look, ask every method for a verdict, choose, run; with `auto`, go on to the next where one fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from . import capture
from ._blocks import Block, Dense
from ._columns import Columns
from ._compat import has_hooks, is_compiled
from ._errors import MethodError, PartialsError, listed
from ._input_jacobian import InputJacobian
from ._jacobian import Jacobian
from ._machine import out_of_memory, share
from ._modules import modules
from ._output import detached
from ._plan import LARGE, Plan, TooLarge, Verdict, choose, human_bytes, known
from ._probe import Facts, demand_policy, look
from ._problem import Problem
from ._rows import Check, Origin
from ._state import autocast, noted, ordinary, rng_kept, without_backward
from .methods import METHODS, Computed
from .methods._composite import Composite

NAMES = ["capture", *METHODS]
"""Every method, by the name that `method=` takes."""


def plan(problem: Problem, method: str = "auto") -> tuple[Plan, Facts]:
    """The plan for a problem, and the facts that it rests on. Runs f on one sample, and once on the batch to record its uses."""
    known(method, NAMES)
    facts = look(problem)
    demand_policy(problem, facts)
    with problem.running("recording the uses of parameters"), rng_kept(problem.targets[0].tensor.device):
        seen = capture.preview(problem, facts)
    verdicts = (seen.verdict, *_textbook(problem, facts, seen.refused))
    wanted = "capture" if method == "auto" and seen.verdict.accepted else method
    made = _plan(problem, facts, verdicts, choose(verdicts, wanted, problem.budget))
    made.recorded = seen.uses
    return made, facts


def compute(problem: Problem, method: str = "auto") -> tuple[Computed, Plan]:
    """Plan and run: capture wherever it can, else the cheapest method. With "auto", where one fails while running, the next one runs.

    What could not run in earlier calls of the same kind is asked again now and then only.
    """
    again = _again(problem) if method in ("auto", "capture") else None
    if again is not None:
        return again
    known(method, NAMES)
    refused: dict[str, str] = {}
    doubtful, history = False, problem.history
    if method == "auto" and history is not None and history.told():
        refused, doubtful = dict(history.refused), history.doubtful
    elif method in ("auto", "capture") and problem.size:
        with problem.running("capturing the uses of parameters"):
            tried = capture.attempt(problem)
        refused, doubtful = tried.refused, tried.doubtful
        if tried.computed is not None:
            tried.computed.doubtful |= doubtful
            return tried.computed, _captured(problem, tried.computed)
        if method == "capture":
            raise MethodError(
                "method='capture' cannot run here", got=refused["capture"], hint="method='auto', which takes the next method that can"
            )
    facts = look(problem)
    demand_policy(problem, facts)
    if not problem.size:
        with problem.running("asking what an output looks like"):
            return _empty(problem), _plan(problem, facts, _textbook(problem, facts), choose(_textbook(problem, facts), "auto", None))
    failed: Exception | None = None
    while True:
        verdicts = _textbook(problem, facts, refused)
        if failed is not None and not any(v.accepted for v in verdicts):
            raise failed
        made = _plan(
            problem,
            facts,
            (Verdict("capture", refused.get("capture", "not asked for")), *verdicts),
            choose(verdicts, method, problem.budget),
        )
        _demand_room(problem, made)
        with problem.running(f"computing the Jacobian (method {made.method!r})"):
            try:
                aux = _whole(problem)
                computed = METHODS[made.method].run(exact(problem, facts), facts, made.chunk)
                if history is not None and method == "auto":
                    history.refused, history.doubtful = refused, doubtful
                aux = aux if computed.aux is None else computed.aux
                return replace(computed, aux=aux, doubtful=doubtful, course=lambda: (facts.course, facts.course)), made
            except MethodError as error:
                if method != "auto":
                    raise
                refused[made.method] = f"{error.what}: {error.got}" if error.got else error.what
            except PartialsError:
                raise
            except Exception as error:  # f ran on a plain sample just before: what fails here may be the method's way of running it
                if method != "auto" or out_of_memory(error):
                    demand_second_pass(problem, made.method, error)
                    raise
                failed = failed or error
                refused[made.method] = f"f fails there ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


def _again(problem: Problem) -> tuple[Computed, Plan] | None:
    """The answer and its plan, where an earlier run has shown how such a call goes."""
    history, doing = problem.history, "capturing the uses of parameters"
    if history is None or history.script is None:
        return None
    if history.bufferless and ordinary():
        try:
            computed = capture.replayed(problem)
        except Exception as error:
            noted(error, problem.told(doing))
            raise
    else:
        with problem.running(doing):
            computed = capture.replayed(problem)
    return None if computed is None else (computed, _captured(problem, computed))


def demand_second_pass(problem: Problem, method: str, error: Exception) -> None:
    """MethodError where an error says that f's graph allows a single reverse pass (a fused loss, a Function of the user's)."""
    if any(words in str(error) for words in ("backward called twice", "backward through the graph a second time")):
        raise MethodError(
            f"method={method!r} runs several reverse passes through one call of {problem.name}, which allows one",
            got=str(error).partition("\n")[0],
            hint="method='auto', or method='loop' where each sample has one output",
        ) from error


def _demand_room(problem: Problem, made: Plan) -> None:
    """TooLarge where the rows would take more than their share of what is free."""
    needed = made.chosen.cost.bytes if made.chosen.cost is not None else 0
    if needed > LARGE and needed > (room := share(problem.targets[0].tensor.device)):
        raise TooLarge(
            f"the rows do not fit (method {made.method!r})",
            got=human_bytes(needed),
            expected=f"at most {human_bytes(room)}, half of what is free",
        )


def _textbook(problem: Problem, facts: Facts, refused: Mapping[str, str] = MappingProxyType({})) -> tuple[Verdict, ...]:
    return tuple(Verdict(m.name, refused[m.name]) if m.name in refused else m.verdict(problem, facts) for m in METHODS.values())


def _captured(problem: Problem, computed: Computed) -> Plan:
    """The plan of a capture that has run: the other methods are asked for their costs only when somebody looks."""
    blocks = computed.blocks  # (no more of the answer: all that f returned would keep the graph of the call alive)

    def ask() -> tuple[Verdict, ...]:
        facts = look(problem)
        return (capture.verdict(problem, facts, blocks), *_textbook(problem, facts))

    history, outputs = problem.history, tuple(computed.values.shape[1:])
    if history is not None and history.plan is not None:
        made: Plan = object.__new__(Plan)  # (a constructor takes three times as long)
        made.__dict__ |= history.plan | {"asked": ask, "outputs": outputs, "recorded": computed.uses, "notes": []}
        return made
    made = Plan(
        function=problem.name,
        method="capture",
        asked=ask,
        samples=problem.size,
        outputs=outputs,
        parameters=problem.shapes,
        dtype=str(problem.dtype).removeprefix("torch."),
        recorded=computed.uses,
    )
    if history is not None:
        history.plan = vars(made) | {"asked": (), "recorded": ()}
    return made


def wrap(problem: Problem, computed: Computed, made: Plan, check: Check | None = None) -> Jacobian | InputJacobian:
    """The user's object: rows of parameters, of inputs, or of parameters with those of inputs beside them."""
    values = computed.values if problem.batched else computed.values.squeeze(0)
    columns, remarks = (problem.history and problem.history.form) or _form(problem)
    made.notes += [*computed.notes, *remarks]
    aux = None if problem.picker.choice is None else detached(computed.aux)
    origin, inputs = Origin(check, computed.sources), None
    if problem.inputs:
        blocks = {t.name: computed.blocks[t.name] for t in problem.inputs}
        inputs = InputJacobian(
            values,
            blocks,
            Columns({name: problem.shapes[name] for name in blocks}, {}),
            made,
            problem.batched,
            problem.create_graph,
            aux,
            origin,
        )
        if not problem.parameters:
            return inputs
    blocks = {t.name: computed.blocks[t.name] for t in problem.parameters} if problem.inputs else computed.blocks
    leaves = {}
    for t in problem.parameters:
        leaves[t.name] = t.own
    return Jacobian(values, blocks, columns, made, problem.batched, problem.create_graph, aux, origin, inputs, leaves)


def _form(problem: Problem) -> tuple[Columns, list[str]]:
    """The columns of parameters, and what is to be said of such a call: asked for once for all calls alike."""
    shapes = {t.name: problem.shapes[t.name] for t in problem.parameters} if problem.inputs else problem.shapes
    form = Columns(shapes, problem.aliases), _remarks(problem)
    if problem.history is not None:
        problem.history.form = form
    return form


def _remarks(problem: Problem) -> list[str]:
    """What was left out of f, or is read in one of several ways."""
    notes = []
    if problem.module is not None and any(map(is_compiled, modules(problem.module))):
        notes.append("compiled modules were run uncompiled: compiled code shows no operations")
    if hooked := [t.name for t in problem.targets if has_hooks(t.own)]:
        notes.append(f"hooks of {listed(hooked)} were not run: rows are derivatives of f, and a hook changes gradients")
    if problem.module is not None and without_backward(problem.module, twice=problem.create_graph):
        notes.append("cuDNN was off: it has no backward of recurrent layers in evaluation mode, and none of their backward")
    if pairs := [t.name for t in problem.targets if t.pairs_of is not None]:
        notes.append(f"complex {listed(pairs)}: rows by real and imaginary part, in a last dimension of two (torch.view_as_real)")
    return notes


def _plan(problem: Problem, facts: Facts, verdicts: tuple[Verdict, ...], chosen: Verdict) -> Plan:
    notes = [] if facts.single_error is None else ["f refuses a batch of one; facts were taken from the whole batch"]
    return Plan(
        function=problem.name,
        method=chosen.method,
        asked=verdicts,
        samples=problem.size,
        outputs=facts.out_shape,
        parameters=problem.shapes,
        dtype=str(problem.dtype).removeprefix("torch."),
        chunk=chosen.chunk,
        notes=notes,
    )


def _empty(problem: Problem) -> Computed:
    """No samples: f still says what an output looks like."""
    values = problem.values()
    values = values if problem.create_graph else values.detach()
    outputs = int(torch.Size(values.shape[1:]).numel())
    blocks: dict[str, tuple[Block, ...]] = {t.name: (Dense(t.tensor.new_zeros(0, outputs, *problem.shape_of(t))),) for t in problem.targets}
    return Computed(values, blocks, aux=_whole(problem))


def _whole(problem: Problem) -> Any:
    """All that one plain call of f returns, detached, where `output=` picked a part of it: what `J.aux` holds."""
    if problem.picker.choice is None:
        return None
    with rng_kept(problem.targets[0].tensor.device), autocast(problem.rounding):
        return detached(problem.function(*problem.args, **problem.kwargs))


def exact(problem: Problem, facts: Facts) -> Problem:
    """The same problem in whose runs of f normalisations are written out, where f differentiates through them itself."""
    return replace(problem, within=Composite) if facts.inexact else problem


def without_graph(problem: Problem) -> Problem:
    """The same problem with results that carry no graph: what checks compare with."""
    return replace(problem, create_graph=False)
