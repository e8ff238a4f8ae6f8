"""Capture: operation-level recording of every use of a parameter, and the Jacobian in factors."""

from __future__ import annotations

from .replay import replayed
from .trial import attempt, preview, verdict

__all__ = ["attempt", "preview", "replayed", "verdict"]
