"""The one table of jet rules: how a jet goes through a torch function.

A rule has the function's own signature, with jets in the place of tensors that depend on the coordinates, and returns jets. It may raise
`NoRule`, which sends the whole function to nested reverse mode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

JetRule = Callable[..., Any]
R = TypeVar("R", bound=JetRule)

JET_RULES: dict[Any, JetRule] = {}
VALUE_ONLY: set[Any] = set()
"""Functions that read the value and have no derivative, or whose derivative is zero wherever there is one."""
ATTRIBUTES: set[Any] = set()
"""What says something about a tensor and gives no tensor: its shape, its dtype."""
BENT: dict[Any, str] = {}
"""Functions made of straight pieces: second derivatives vanish wherever they are."""
_HOMES = (torch, torch.Tensor, F, torch.special, torch.linalg)


def found(name: str) -> Iterator[Any]:
    """Every torch function of that name: as a function, a method, a functional."""
    for home in _HOMES:
        function = getattr(home, name, None)
        if callable(function):
            yield function


@cache
def parameters_of(rule: JetRule) -> frozenset[str]:
    """The names of a rule's parameters."""
    return frozenset(inspect.signature(rule).parameters)


def jet_rule(*names: Any) -> Callable[[R], R]:
    """Register a rule for torch functions by name, wherever torch has that name, or for the functions themselves."""

    def register(rule: R) -> R:
        enter(rule, *names)
        return rule

    return register


def enter(rule: JetRule, *names: Any) -> None:
    for name in names:
        for function in found(name) if isinstance(name, str) else (name,):
            JET_RULES[function] = rule
