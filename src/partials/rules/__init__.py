"""The table of rules: how one call of an operation that takes a parameter becomes blocks. One file for each family.

A rule is a function with the operation's own signature that yields parts (`_parts.py`):

    @rule(torch.nn.functional.linear)
    def linear(input, weight, bias=None):       # z[t, o] = sum_i input[t, i] weight[o, i] + bias[o]
        yield OuterPart(weight, input)          # J = sum_t g[t, o] input[t, i]
        yield SumPart(bias)                     # J = sum_t g[t, o]

Arguments that are no wanted parameter may be yielded all the same; they are ignored. For a use that it does not know a rule
yields `Declined` (or raises `NoRule`), and the operation is then expanded or another method runs. Operations that act entry
by entry need no formula: they are listed in `elementwise.py` (sums and products have one all the same, in `arithmetic.py`). What
can be said in operations that have rules is rewritten in them (`contraction.py`).
"""

from __future__ import annotations

from . import arithmetic, attention, contraction, conv, elementwise, embedding, linear, norm, recurrent
from ._parts import ConvPart, Declined, ExpandedPart, GatherPart, NoRule, OuterPart, Part, SumPart, data_of, keep, with_data
from ._table import ALIKE, COMPOSITES, ELEMENTWISE, PHYSICAL, REPEATED, RULES, Run, rule

__all__ = [
    "ALIKE",
    "COMPOSITES",
    "ELEMENTWISE",
    "PHYSICAL",
    "REPEATED",
    "RULES",
    "ConvPart",
    "Declined",
    "ExpandedPart",
    "GatherPart",
    "NoRule",
    "OuterPart",
    "Part",
    "Run",
    "SumPart",
    "arithmetic",
    "attention",
    "contraction",
    "conv",
    "data_of",
    "elementwise",
    "embedding",
    "keep",
    "linear",
    "norm",
    "recurrent",
    "rule",
    "with_data",
]
