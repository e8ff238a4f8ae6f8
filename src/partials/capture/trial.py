"""Trying to capture: the native runner, then the vmapped one; and the preview that `explain` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._compat import inside_transform
from .._errors import MethodError
from .._machine import share
from .._plan import LARGE, Cost, TooLarge, Use, Verdict, human_bytes
from .._probe import Facts, demand_policy, look, random_state
from .._problem import Problem
from ..methods._base import Computed
from .describe import described, held
from .engine import native, parameters, solve, vmapped
from .recorder import Refused
from .recorder import Use as Recorded
from .walk import missed


@dataclass(frozen=True)
class Preview:
    verdict: Verdict
    uses: tuple[Use, ...] = ()


def attempt(problem: Problem) -> tuple[Computed | None, list[str]]:
    """The blocks by the first runner that is complete, and why those before it were refused."""
    reasons: list[str] = []
    if inside_transform():
        return None, ["a torch.func transform is running around this call"]
    for name, runner in (("native", native), ("vmapped", vmapped)):
        before = random_state()
        try:
            if name == "native" and problem.randomness in ("same", "different"):
                raise Refused(f'randomness="{problem.randomness}" is a policy for samples run apart')
            run = runner(problem)
            if problem.randomness == "error" and random_state() != before:
                restore(before)
                demand_policy(problem, look(problem))
            demand_room(problem, run[2].uses, int(torch.Size(run[0].shape[1:]).numel()))
            return solve(problem, run, name), reasons
        except Refused as refused:
            reasons.append(f"{name}: {refused}")
        except MethodError as error:
            reasons.append(f"{name}: {error.what}")
        restore(before)
    return None, reasons


def preview(problem: Problem, facts: Facts) -> Preview:
    """One forward without a reverse pass: what capture would record, or why it would be refused."""
    if not problem.size:
        return Preview(Verdict("capture", "there is no sample"))
    reasons = []
    for name, runner in (("native", native), ("vmapped", vmapped)):
        try:
            if name == "native" and problem.randomness in ("same", "different"):
                raise Refused(f'randomness="{problem.randomness}" is a policy for samples run apart')
            values, _, trace, tensors = runner(problem)
            wanted = parameters(problem, tensors)
            if lost := missed(values, wanted, trace):
                raise Refused(f"{', '.join(sorted(lost))} reached outside the recorded uses")
            cost = _cost(problem, facts, sum(held(use) for use in trace.uses))
            return Preview(
                Verdict("capture", f"{name} run, every use of every parameter in factors", cost),
                described(trace, wanted, problem.size, None, name),
            )
        except Refused as refused:
            reasons.append(f"{name}: {refused}")
        except MethodError as error:
            reasons.append(f"{name}: {error.what}")
    return Preview(Verdict("capture", "; ".join(reasons)))


def verdict(problem: Problem, facts: Facts, computed: Computed) -> Verdict:
    """The verdict of a capture that has run."""
    held_bytes = sum(block.nbytes() for group in computed.blocks.values() for block in group)
    return Verdict("capture", "every use of every parameter in factors", _cost(problem, facts, held_bytes))


def demand_room(problem: Problem, uses: Sequence[Recorded], outputs: int) -> None:
    """TooLarge where the factors would take more than their share of what is free."""
    needed = sum(held(use) for use in uses) * max(1, outputs)
    if needed > LARGE and needed > (room := share(problem.targets[0].tensor.device)):
        raise TooLarge("the factors do not fit", got=human_bytes(needed), expected=f"at most {human_bytes(room)}, half of what is free")


def restore(state: bytes) -> None:
    """The random state of the CPU (and of CUDA, where in use) as it was."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(torch.frombuffer(bytearray(state[:size]), dtype=torch.uint8))
    if len(state) > size:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(state[size:]), dtype=torch.uint8))


def _cost(problem: Problem, facts: Facts, held_bytes: int) -> Cost:
    flops = facts.flops / facts.samples * problem.size
    return Cost(1 + facts.outputs, (1 + 2 * facts.outputs) * facts.operations, int((1 + facts.outputs) * flops), held_bytes)
