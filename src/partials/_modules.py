"""A module's parts, walked quickly: what `named_modules` and `named_parameters` give, without their generators at every level.

A module that overrides those methods is asked by its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ._typing import Tensor

Named = list[tuple[str, nn.Module]]


def named_modules(module: nn.Module) -> Named:
    """(dotted name ending in a dot, module) in the order of `named_modules`; a module that is held twice comes twice."""
    found: Named = []
    _visit(module, "", found)
    return found


def modules(module: nn.Module) -> list[nn.Module]:
    """Every module once."""
    return list({id(owner): owner for _, owner in named_modules(module)}.values())


def named_parameters(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """(name, parameter) in the order of `named_parameters`, a tied one by each of its names."""
    kind = type(module)
    if kind.named_parameters is not nn.Module.named_parameters or kind.named_modules is not nn.Module.named_modules:
        return module.named_parameters(remove_duplicate=False)
    return [
        (prefix + name, parameter)
        for prefix, owner in named_modules(module)
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]


def _visit(module: nn.Module, prefix: str, found: Named) -> None:
    if type(module).named_modules is not nn.Module.named_modules:
        found += [(f"{prefix}{name}." if name else prefix, owner) for name, owner in module.named_modules(remove_duplicate=False)]
        return
    found.append((prefix, module))
    for name, child in module._modules.items():
        if child is not None:
            _visit(child, f"{prefix}{name}.", found)
