"""Trying to capture: the native runner, then the vmapped one; and the preview that `explain` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .._algebra import Blocks
from .._compat import inside_transform
from .._errors import MethodError, PartialsError
from .._machine import out_of_memory, share
from .._plan import LARGE, Cost, TooLarge, Use, Verdict, human_bytes
from .._probe import Facts, demand_policy, look
from .._problem import Problem
from .._state import drawn_since, random_state, restore
from ..methods._base import Computed
from ..methods._complete import stood_in_for
from .describe import described, held
from .engine import Run, native, parameters, solve, taped, vmapped
from .recorder import Recorder
from .script import Scribe
from .trace import Refused, Unplaced
from .trace import Use as Recorded
from .walk import Hidden, demand_complete

RUNNERS = {"native": native, "taped": taped, "vmapped": vmapped}
"""In the order in which they are tried; the taped one only where f differentiates inside."""


@dataclass(frozen=True)
class Preview:
    verdict: Verdict
    uses: tuple[Use, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)


TRANSFORMS = ("vmap", "forward")
"""Methods that run f under a torch.func transform."""


@dataclass(frozen=True)
class Attempt:
    """The blocks by the first runner that is complete; else why capture, and methods that would be as blind, are refused."""

    computed: Computed | None = None
    refused: dict[str, str] = field(default_factory=dict)
    doubtful: bool = False
    """The native run found no layout: samples may mix."""


def attempt(problem: Problem) -> Attempt:
    """Run f natively, else under vmap, until one run is complete."""
    reasons: list[str] = []
    nested = doubtful = False
    if inside_transform():
        return Attempt(None, {"capture": "a torch.func transform is running around this call"})
    device = problem.targets[0].tensor.device
    kind = Scribe if problem.history is not None and problem.history.due() else Recorder
    for name, runner in RUNNERS.items():
        if name == "taped" and not nested:
            continue
        before = random_state(device)
        try:
            if name != "vmapped" and problem.randomness in ("same", "different"):
                raise Refused(f'randomness="{problem.randomness}" is a policy for samples run apart')
            run = runner(problem, Recorder if doubtful else kind)
            if problem.randomness == "error" and drawn_since(before, device):
                restore(before, device)
                demand_policy(problem, look(problem))
            demand_room(problem, run[2].uses, int(torch.Size(run[0].shape[1:]).numel()))
            return Attempt(_solved(problem, run, name), {}, doubtful)
        except Hidden as hidden:
            restore(before, device)
            return Attempt(None, _hidden(hidden, reasons), doubtful)
        except Refused as refused:
            nested |= refused.nested
            doubtful |= isinstance(refused, Unplaced)
            reasons.append(f"{name}: {refused}")
        except MethodError as error:
            reasons.append(f"{name}: {error.what}")
        restore(before, device)
    return Attempt(None, {"capture": "; ".join(reasons)}, doubtful)


def _solved(problem: Problem, run: Run, runner: str) -> Computed:
    try:
        return solve(problem, run, runner)
    except (Refused, PartialsError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        # f ran: a reverse pass that fails here may do so only in the way that capture runs it
        raise Refused(f"the reverse pass fails ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})") from error


def _hidden(hidden: Hidden, reasons: list[str]) -> dict[str, str]:
    """What one run of f did not see, another does not see either: no second runner, and no transform where it would be blind."""
    return {"capture": "; ".join([*reasons, str(hidden)])} | (dict.fromkeys(TRANSFORMS, str(hidden)) if hidden.blind else {})


def preview(problem: Problem, facts: Facts) -> Preview:
    """One forward without a reverse pass: what capture would record, or why it would be refused."""
    if not problem.size:
        return Preview(Verdict("capture", "there is no sample"))
    reasons: list[str] = []
    nested = False
    for name, runner in RUNNERS.items():
        if name == "taped" and not nested:
            continue
        try:
            if name != "vmapped" and problem.randomness in ("same", "different"):
                raise Refused(f'randomness="{problem.randomness}" is a policy for samples run apart')
            values, _, trace, tensors = runner(problem)
            wanted = parameters(problem, tensors)
            demand_complete(values, wanted, trace, stood_in_for(problem, tensors))
            cost = _cost(problem, facts, sum(held(use) for use in trace.uses))
            return Preview(
                Verdict("capture", f"{name} run, every use of every parameter in factors", cost),
                described(trace.uses, wanted, problem.size, None, name),
            )
        except Hidden as hidden:
            refused_too = _hidden(hidden, reasons)
            return Preview(Verdict("capture", refused_too.pop("capture")), (), refused_too)
        except Refused as refused:
            nested |= refused.nested
            reasons.append(f"{name}: {refused}")
        except MethodError as error:
            reasons.append(f"{name}: {error.what}")
    return Preview(Verdict("capture", "; ".join(reasons)))


def verdict(problem: Problem, facts: Facts, blocks: Blocks) -> Verdict:
    """The verdict of a capture that has run and gave these blocks."""
    held_bytes = sum(block.nbytes() for group in blocks.values() for block in group)
    return Verdict("capture", "every use of every parameter in factors", _cost(problem, facts, held_bytes))


def demand_room(problem: Problem, uses: Sequence[Recorded], outputs: int) -> None:
    """TooLarge where the factors would take more than their share of what is free."""
    needed = sum(held(use) for use in uses) * max(1, outputs)
    if needed > LARGE and needed > (room := share(problem.targets[0].tensor.device)):
        raise TooLarge("the factors do not fit", got=human_bytes(needed), expected=f"at most {human_bytes(room)}, half of what is free")


def _cost(problem: Problem, facts: Facts, held_bytes: int) -> Cost:
    flops = facts.flops / facts.samples * problem.size
    return Cost(1 + facts.outputs, (1 + 2 * facts.outputs) * facts.operations, int((1 + facts.outputs) * flops), held_bytes)
