"""One page for the browser: self-contained HTML without scripts, with pictures inside it."""

from __future__ import annotations

from .documents import of_comparison, of_report

__all__ = ["of_comparison", "of_report"]
