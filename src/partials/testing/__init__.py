"""For tests of this library and of what is built on it: cases that every method must agree on, and the conformance suite.

`check_rule` is for a rule of your own, `check_method` for all cases by one method, `check_call`, `check_jacobian` and `check_block`
for one of each; `loop` is the reference that they are held to.
"""

from __future__ import annotations

from .cases import CASES, Call, Case
from .conformance import Conformance, Finding
from .oracle import loop
from .suite import check_block, check_call, check_jacobian, check_method, check_rule

__all__ = [
    "CASES",
    "Call",
    "Case",
    "Conformance",
    "Finding",
    "check_block",
    "check_call",
    "check_jacobian",
    "check_method",
    "check_rule",
    "loop",
]
