"""Whether part of f's backward is the user's own Python: it need not be linear in its cotangent, as torch's own is."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from .._graph import of_python
from .._problem import Problem
from .._state import drawn_from
from .._typing import Tensor


def own_backward(problem: Problem) -> bool:
    """True where f registers a hook on a tensor of its own, or goes through an autograd.Function (as modules with backward hooks do)."""
    with problem.running("looking for hooks"), drawn_from(problem.random_state, problem.targets[0].tensor.device), _Registered() as seen:
        out = problem(problem.tensors())
    return seen.any or of_python(out)


class _Registered(TorchFunctionMode):
    """Notes hooks that are registered inside."""

    any = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any |= func is Tensor.register_hook
        return func(*args, **(kwargs or {}))
