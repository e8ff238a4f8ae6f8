"""Every partial derivative of a parametrised PyTorch function or module, for each sample of a batch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._api import check, compare, explain, gradient, jacobian
    from ._compare import Comparison
    from ._errors import (
        CheckError,
        InputError,
        MemoryBudgetError,
        MethodError,
        MixingError,
        OutputError,
        PartialsError,
        RandomnessError,
        StoreError,
    )
    from ._formulas import formulas
    from ._input_jacobian import InputJacobian
    from ._jacobian import Jacobian, concat
    from ._plan import Plan
    from ._stream import stream
    from ._tape import tape
    from .checks.report import Report
    from .rules import rule
    from .store import open_store as open
    from .taylor import biharmonic, curl, derivatives, directional, divergence, hessian, laplacian, partial

__version__ = "0.1.0"

_HOMES = {
    "CheckError": "._errors",
    "Comparison": "._compare",
    "InputError": "._errors",
    "InputJacobian": "._input_jacobian",
    "Jacobian": "._jacobian",
    "MemoryBudgetError": "._errors",
    "MethodError": "._errors",
    "MixingError": "._errors",
    "OutputError": "._errors",
    "PartialsError": "._errors",
    "Plan": "._plan",
    "RandomnessError": "._errors",
    "Report": ".checks.report",
    "StoreError": "._errors",
    "biharmonic": ".taylor",
    "check": "._api",
    "compare": "._api",
    "concat": "._jacobian",
    "curl": ".taylor",
    "derivatives": ".taylor",
    "directional": ".taylor",
    "divergence": ".taylor",
    "explain": "._api",
    "formulas": "._formulas",
    "gradient": "._api",
    "hessian": ".taylor",
    "jacobian": "._api",
    "laplacian": ".taylor",
    "open": ".store",
    "partial": ".taylor",
    "rule": ".rules",
    "stream": "._stream",
    "tape": "._tape",
}
"""Where each public name lives: modules are loaded on first use, so that the command line's --help needs no torch."""

_RENAMED = {"open": "open_store"}
"""Names that would hide a built-in where they are defined."""

__all__ = [
    "CheckError",
    "Comparison",
    "InputError",
    "InputJacobian",
    "Jacobian",
    "MemoryBudgetError",
    "MethodError",
    "MixingError",
    "OutputError",
    "PartialsError",
    "Plan",
    "RandomnessError",
    "Report",
    "StoreError",
    "biharmonic",
    "check",
    "compare",
    "concat",
    "curl",
    "derivatives",
    "directional",
    "divergence",
    "explain",
    "formulas",
    "gradient",
    "hessian",
    "jacobian",
    "laplacian",
    "open",
    "partial",
    "rule",
    "stream",
    "tape",
]


if not TYPE_CHECKING:  # a type checker would believe every name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name], __name__), _RENAMED.get(name, name))
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
