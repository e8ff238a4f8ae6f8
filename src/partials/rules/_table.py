"""The table itself, and the one door into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from .._errors import InputError
from .._typing import Tensor
from ._parts import Part

Rule = Callable[..., Iterable[Part]]
R = TypeVar("R", bound=Callable[..., Any])

RULES: dict[Any, Rule] = {}
ELEMENTWISE: set[Any] = set()
"""Operations whose output entry depends on one (broadcast) entry of each tensor argument."""
COMPOSITES: dict[Any, Callable[..., Any]] = {}
"""Operations that are re-expressed in others: what stands in for them computes their result by operations that have rules."""
REPEATED: dict[Any, Callable[..., tuple[Any, tuple[int, ...]] | None]] = {}
"""Operations on parameters alone that may give the same for every sample: (first argument for one of them, shape to expand to)."""
PHYSICAL: dict[Any, Callable[..., Any]] = {}
"""Operations that torch's vmap runs sample by sample, as functions of whole batches: all tensors are (N, ...), also the result."""

ALIKE: set[Any] = set()
"""Operations that torch's vmap decomposes, and that do the same whatever dimensions stand in front, where only the first argument holds
samples."""


@dataclass(frozen=True)
class Run:
    """What a composite rule may ask of the run that it is part of."""

    of_samples: Callable[[Tensor], bool]
    """Whether a tensor depends on the samples."""
    differentiable: bool
    """Derivatives of the derivative are wanted, or a `vmap` runs: only operations that torch knows will do."""


def rule(*operations: Any, override: bool = False, composite: bool = False) -> Callable[[R], R]:
    """Register a rule for torch functions, methods, or custom operations: how their parameters' derivatives come about.

    The decorated function has the operation's signature and yields parts (see `partials.rules`). With `composite`, it returns the
    operation's result instead, computed by operations that have rules, and takes a `Run` before the operation's arguments; it raises
    `NoRule` before it has computed anything where it does not know them.

    Raises
    ------
    InputError
        where an operation has a rule already and `override` is not set, or is not callable.

    Examples
    --------
    >>> import torch, partials as pt
    >>> from partials.rules import OuterPart
    >>> @pt.rule(torch.ops.aten.linear.default, override=True)
    ... def my_linear(input, weight, bias=None):
    ...     yield OuterPart(weight, input)
    """

    for operation in operations:
        if not callable(operation):
            raise InputError(
                "a rule belongs to an operation", got=type(operation).__name__, expected="a torch function, method or custom operation"
            )

    def register(function: R) -> R:
        for operation in operations:
            if any(operation in table for table in (RULES, ELEMENTWISE, COMPOSITES)) and not override:
                raise InputError(
                    f"{getattr(operation, '__name__', operation)} has a rule already",
                    got="a second rule",
                    expected="one rule for each operation",
                    hint="override=True to replace it",
                )
        for operation in operations:
            ELEMENTWISE.discard(operation)
            for table in (RULES, COMPOSITES):
                table.pop(operation, None)
            (COMPOSITES if composite else RULES)[operation] = function
        return function

    return register
