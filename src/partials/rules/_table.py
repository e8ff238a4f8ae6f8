"""The table itself, and the one door into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .._errors import InputError
from ._parts import Part

Rule = Callable[..., Iterable[Part]]
R = TypeVar("R", bound=Rule)

RULES: dict[Any, Rule] = {}
REWRITES: dict[Any, Callable[..., Any]] = {}
"""Operations that are run as others, which have rules."""
ELEMENTWISE: set[Any] = set()
"""Operations whose output entry depends on one (broadcast) entry of each tensor argument."""


def rule(*operations: Any, override: bool = False) -> Callable[[R], R]:
    """Register a rule for torch functions, methods, or custom operations: how their parameters' derivatives come about.

    The decorated function has the operation's signature and yields parts (see `partials.rules`).

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
            if (operation in RULES or operation in ELEMENTWISE) and not override:
                raise InputError(
                    f"{getattr(operation, '__name__', operation)} has a rule already",
                    got="a second rule",
                    expected="one rule for each operation",
                    hint="override=True to replace it",
                )
        for operation in operations:
            ELEMENTWISE.discard(operation)
            RULES[operation] = function
        return function

    return register


def rewrite(*operations: Any) -> Callable[[R], R]:
    """Say operations in terms of others: the decorated function is called in their place, watched like the user's own code.

    It takes `of_samples`, which tells whether a tensor depends on the samples, and then the operation's arguments. It raises
    `NoRule` before it has computed anything where it does not know them.
    """

    def register(function: R) -> R:
        REWRITES.update(dict.fromkeys(operations, function))
        return function

    return register
