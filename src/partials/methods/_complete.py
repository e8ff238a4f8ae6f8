"""Proof that a run with stand-in tensors used the stand-ins everywhere: the user's own must not be reached."""

from __future__ import annotations

from collections.abc import Mapping

from .._errors import MethodError, listed
from .._graph import reached
from .._problem import Problem
from .._typing import Tensor


def all_seen(problem: Problem, out: Tensor, method: str, tensors: Mapping[str, Tensor] | None = None) -> None:
    """MethodError if the graph of `out` leads to an original parameter otherwise than by its stand-in among `tensors`.

    That is a use which substitution did not see.
    """
    originals = stood_in_for(problem, tensors or {})
    stops = [t.grad_fn for t in (tensors or {}).values() if t.grad_fn is not None]
    missed = reached(out, originals, stops) if out.requires_grad and originals else set()
    if missed:
        raise MethodError(
            f"method={method!r} cannot stand in for {listed(sorted(missed))}: {problem.name} also uses it where no torch function shows it",
            got="a use of the original tensor (a view taken before the call, a custom Function, a scripted module)",
            expected="every use through a torch function",
            hint="method='loop' or method='grad', which use the parameters as they are",
        )


def stood_in_for(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The user's own tensors, outside of the arguments, that others stand in for."""
    return {t.name: t.own for t in problem.targets if t.leaf is None and t.own.requires_grad and tensors.get(t.name) is not t.own}
