"""Trying to capture: the native runner, then the vmapped one; and the preview that `explain` prints."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._compat import inside_transform
from .._errors import MethodError
from .._plan import Cost, Use, Verdict
from .._probe import Facts, demand_policy, look, random_state
from .._problem import Problem
from ..methods._base import Computed
from .describe import described, held
from .engine import native, parameters, solve, taped, vmapped
from .recorder import Refused
from .walk import missed


RUNNERS = (("native", native), ("taped", taped), ("vmapped", vmapped))
"""In the order in which they are tried; the taped one only where f differentiates inside."""


@dataclass(frozen=True)
class Preview:
    verdict: Verdict
    uses: tuple[Use, ...] = ()


def attempt(problem: Problem) -> tuple[Computed | None, list[str]]:
    """The blocks by the first runner that is complete, and why those before it were refused."""
    reasons: list[str] = []
    nested = False
    if inside_transform():
        return None, ["a torch.func transform is running around this call"]
    for name, runner in RUNNERS:
        if name == "taped" and not nested:
            continue
        before = random_state()
        try:
            if name != "vmapped" and problem.randomness in ("same", "different"):
                raise Refused(f'randomness="{problem.randomness}" is a policy for samples run apart')
            run = runner(problem)
            if problem.randomness == "error" and random_state() != before:
                restore(before)
                demand_policy(problem, look(problem))
            within_budget(problem, run[2].uses, int(torch.Size(run[0].shape[1:]).numel()))
            return solve(problem, run, name), reasons
        except Refused as refused:
            nested |= refused.nested
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
    nested = False
    for name, runner in RUNNERS:
        if name == "taped" and not nested:
            continue
        try:
            if name != "vmapped" and problem.randomness in ("same", "different"):
                raise Refused(f'randomness="{problem.randomness}" is a policy for samples run apart')
            values, _, trace, tensors = runner(problem)
            wanted = parameters(problem, tensors)
            if lost := missed(values, wanted, trace):
                raise Refused(f"{', '.join(sorted(lost))} reached outside the recorded uses", nested=trace.nested)
            within_budget(problem, trace.uses, facts.outputs)
            cost = _cost(problem, facts, sum(held(use) for use in trace.uses))
            return Preview(
                Verdict("capture", f"{name} run, every use of every parameter in factors", cost),
                described(trace, wanted, problem.size, None, name),
            )
        except Refused as refused:
            nested |= refused.nested
            reasons.append(f"{name}: {refused}")
        except MethodError as error:
            reasons.append(f"{name}: {error.what}")
    return Preview(Verdict("capture", "; ".join(reasons)))


def verdict(problem: Problem, facts: Facts, computed: Computed) -> Verdict:
    """The verdict of a capture that has run."""
    held_bytes = sum(block.nbytes() for group in computed.blocks.values() for block in group)
    return Verdict("capture", "every use of every parameter in factors", _cost(problem, facts, held_bytes))


def within_budget(problem: Problem, uses: list, outputs: int) -> None:  # type: ignore[type-arg]
    """Refused where the factors alone would pass the budget."""
    if problem.budget is None:
        return
    needed = sum(held(use) for use in uses) * max(1, outputs)
    if needed > problem.budget:
        raise Refused(f"the factors need {needed} bytes, more than max_memory={problem.budget}")


def restore(state: bytes) -> None:
    """The random state of the CPU (and of CUDA, where in use) as it was."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(torch.frombuffer(bytearray(state[:size]), dtype=torch.uint8))
    if len(state) > size:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(state[size:]), dtype=torch.uint8))


def _cost(problem: Problem, facts: Facts, held_bytes: int) -> Cost:
    flops = facts.flops / facts.samples * problem.size
    return Cost(1 + facts.outputs, (1 + 2 * facts.outputs) * facts.operations, int((1 + facts.outputs) * flops), held_bytes)
