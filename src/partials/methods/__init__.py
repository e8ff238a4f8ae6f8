"""The ordered table of methods: how a Jacobian is computed, one file for each."""

from __future__ import annotations

from . import backward, forward, grad, jacobian, loop, vmap
from ._base import Computed, Method

METHODS: dict[str, Method] = {m.name: m for m in (vmap.METHOD, forward.METHOD, jacobian.METHOD, grad.METHOD, backward.METHOD, loop.METHOD)}

__all__ = ["METHODS", "Computed", "Method"]
