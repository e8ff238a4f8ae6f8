"""Room for temporaries: how many bytes a quantity may form at once, in the blocks and above them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ._typing import Tensor

TILE, TILE_ON_DEVICE, ROWS = 2**23, 2**26, 2**26
"""Bytes of one temporary (on a CPU what its caches hold and the allocator keeps, else enough to fill the device), and of rows that
are formed for a moment, where no budget asks for less."""

_LIMIT: ContextVar[int | None] = ContextVar("room", default=None)


def tile(like: Tensor) -> int:
    """Bytes of one temporary."""
    usual, limit = TILE if like.device.type == "cpu" else TILE_ON_DEVICE, _LIMIT.get()
    return usual if limit is None else min(usual, limit)


def rows() -> int:
    """Bytes of rows that are formed at once where a quantity needs rows for a moment."""
    limit = _LIMIT.get()
    return ROWS if limit is None else min(ROWS, limit)


@contextmanager
def limited(limit: int) -> Iterator[None]:
    """Temporaries of at most `limit` bytes each inside."""
    token = _LIMIT.set(limit)
    try:
        yield
    finally:
        _LIMIT.reset(token)
