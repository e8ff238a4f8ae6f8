"""Checks: what was computed, compared with what was computed another way."""

from __future__ import annotations

from .first import verify
from .levels import inspect
from .report import Report

__all__ = ["Report", "inspect", "verify"]
