"""Checksums: crc32c, which zarr's shard index needs, and what guards a whole shard."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy

try:
    import google_crc32c
except ImportError:  # the extra `zarr` brings it; small things are counted without it
    google_crc32c = None  # type: ignore[assignment]

POLYNOMIAL = 0x82F63B78
"""Castagnoli's, with its bits reversed (RFC 3720, B.4)."""
AT_ONCE = 2**20
"""Bytes: other threads have a turn between them."""


def crc32c(data: bytes) -> int:
    """The CRC-32C of a few bytes, in plain Python where google-crc32c is not installed."""
    if google_crc32c is not None:
        return int(google_crc32c.value(data))
    return plain_crc32c(data)


def plain_crc32c(data: bytes) -> int:
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@cache
def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


def kind() -> str:
    """The checksum that shards written here get: "crc32c" at 11 GB/s with google-crc32c, else zlib's "crc32" at 1.7 GB/s."""
    return "crc32" if google_crc32c is None else "crc32c"


def of_pieces(pieces: Iterable[Any], name: str) -> int:
    """The checksum `name` of the pieces, one after the other; -1 where it cannot be computed here."""
    if name == "crc32c" and google_crc32c is None:
        return -1
    total = 0
    for piece in pieces:
        whole: Any = numpy.frombuffer(piece, numpy.uint8)
        for start in range(0, len(whole), AT_ONCE):
            part = whole[start : start + AT_ONCE]
            total = zlib.crc32(part, total) if name == "crc32" else google_crc32c.extend(total, part)
    return total
