"""Operations that act entry by entry, with broadcasting: the parameter is expanded to the output's shape (a view, no memory), and
autograd's own cotangent of the expanded tensor, summed within each sample, is the row. No formula is needed."""

from __future__ import annotations

import torch

from ._table import ELEMENTWISE, RULES

_NAMES = (
    *(
        "add",
        "sub",
        "mul",
        "div",
        "pow",
        "atan2",
        "maximum",
        "minimum",
        "fmod",
        "remainder",
        "lerp",
        "addcmul",
        "addcdiv",
        "hypot",
        "copysign",
        "xlogy",
    ),
    *(
        "where",
        "subtract",
        "multiply",
        "divide",
        "true_divide",
        "rsub",
        "clamp",
        "float_power",
        "logaddexp",
        "arctan2",
        "ldexp",
        "fmax",
        "fmin",
    ),
)
_DUNDERS = tuple(f"__{side}{name}__" for side in ("", "r", "i") for name in ("add", "sub", "mul", "div", "truediv", "pow"))

ENTRY_BY_ENTRY = frozenset(
    {getattr(owner, name) for owner in (torch, torch.Tensor) for name in _NAMES if hasattr(owner, name)}
    | {getattr(torch.Tensor, f"{name}_") for name in _NAMES if hasattr(torch.Tensor, f"{name}_")}
    | {getattr(torch.Tensor, name) for name in _DUNDERS if hasattr(torch.Tensor, name)}
)
"""All such operations, those with a rule included."""
ELEMENTWISE.update(ENTRY_BY_ENTRY - RULES.keys())
