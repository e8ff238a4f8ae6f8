"""Proof that a run with stand-in tensors used the stand-ins everywhere: the user's own must not be reached."""

from __future__ import annotations

from .._errors import MethodError, listed
from .._graph import reached
from .._problem import Problem
from .._typing import Tensor


def all_seen(problem: Problem, out: Tensor, method: str) -> None:
    """MethodError if the graph of `out` leads to an original parameter: a use that substitution did not see."""
    originals = {t.name: t.tensor for t in problem.targets if t.leaf is None and t.tensor.requires_grad}
    missed = reached(out, originals) if out.requires_grad and originals else set()
    if missed:
        raise MethodError(
            f"method={method!r} cannot stand in for {listed(sorted(missed))}: {problem.name} also uses it where no torch function shows it",
            got="a use of the original tensor (a view taken before the call, a custom Function, a scripted module)",
            expected="every use through a torch function",
            hint="method='loop' or method='grad', which use the parameters as they are",
        )
