"""Cases that every method must agree on; for tests of this library and of what is built on it."""

from __future__ import annotations

from .cases import CASES, Call, Case

__all__ = ["CASES", "Call", "Case"]
