"""The bytes of a store: zarr v3 metadata, and shards that are plain C-order rows followed by zarr's index of them.

A shard file is what the zarr v3 specification calls `sharding_indexed` with full-width inner chunks of a few rows, an uncompressed
little-endian inner codec and the index at the end: any zarr reader opens it, and `numpy.memmap` reads its rows in place.
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy

from .._errors import StoreError
from .checksum import crc32c

DTYPES = ("float16", "float32", "float64", "complex64", "complex128", "int64")
LARGEST_HEADER = 16 * 2**20
"""Bytes of a metadata file that are read before anything in it is believed."""
MISSING = 2**64 - 1
INNER_BYTES = 4 * 2**20
ENTRY = 16


@dataclass(frozen=True)
class Array:
    """An array whose first dimension is cut into blocks of `block` rows, one shard file each."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    block: int
    inner: int
    """Rows of an inner chunk; divides `block`."""
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * numpy.dtype(self.dtype).itemsize

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] // self.block)

    def rows(self, index: int) -> tuple[int, int]:
        """The range of rows of a block."""
        return index * self.block, min((index + 1) * self.block, self.shape[0])

    def key(self, index: int) -> str:
        """The path of a block's shard below the store."""
        return "/".join([self.name, "c", str(index), *("0" for _ in self.shape[1:])])

    def shard_bytes(self, rows: int) -> int:
        """The size of a shard that holds so many rows."""
        return -(-rows // self.inner) * self.inner * self.row_bytes + ENTRY * (self.block // self.inner) + 4

    def shard(self, rows: numpy.ndarray) -> list[Any]:
        """The pieces of a block's file, in order: its rows, what fills the last inner chunk, and the index."""
        lacking = -len(rows) % self.inner
        fill = numpy.full((lacking, *self.shape[1:]), fill_of(self.dtype), self.dtype)
        pieces = [rows, fill] if lacking else [rows]
        return [*(_bytes(p) for p in pieces), self.index(len(rows))]

    def index(self, rows: int) -> bytes:
        """(offset, bytes) of each inner chunk, and the CRC-32C of that."""
        size, chunks = self.inner * self.row_bytes, -(-rows // self.inner)
        entries = numpy.full((self.block // self.inner, 2), MISSING, "<u8")
        entries[:chunks, 0] = numpy.arange(chunks, dtype="<u8") * size
        entries[:chunks, 1] = size
        table = entries.tobytes()
        return table + crc32c(table).to_bytes(4, "little")

    def metadata(self) -> str:
        """The text of the array's zarr.json."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [self.inner, *map(_at_least_one, self.shape[1:])],
            "codecs": [little],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        return _text(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": list(self.shape),
                "data_type": self.dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.block, *map(_at_least_one, self.shape[1:])]}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": _fill_text(self.dtype),
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "attributes": self.attributes,
            }
        )


def array(name: str, shape: tuple[int, ...], dtype: str, block: int, attributes: dict[str, Any] | None = None) -> Array:
    """An array with inner chunks of as many rows as fit in 4 MiB and divide the block."""
    row = prod(shape[1:]) * numpy.dtype(dtype).itemsize
    most = max(1, min(block, INNER_BYTES // max(1, row)))
    inner = next(size for size in range(most, 0, -1) if block % size == 0)
    return Array(name, shape, dtype, block, inner, attributes or {})


def group(attributes: dict[str, Any]) -> str:
    """The text of the store's own zarr.json."""
    return _text({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def parsed(name: str, text: str) -> Array:
    """The array that a zarr.json describes, as this library writes it.

    Raises
    ------
    StoreError
        where it is not of that form: every number is checked before anything is allocated from it.
    """
    try:
        meta = json.loads(text)
        if not isinstance(meta, dict):
            raise TypeError("no object")
        (codec,) = meta["codecs"]
        shape, chunk, inner = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"], codec["configuration"]["chunk_shape"]
        numbers = [*shape, *chunk, *inner]
        sane = all(type(n) is int and 0 <= n < 2**63 for n in numbers) and len(shape) == len(chunk) == len(inner) >= 1
        widths = list(map(_at_least_one, shape[1:]))
        sane = sane and chunk[0] >= 1 and inner[0] >= 1 and chunk[0] % inner[0] == 0 and chunk[1:] == widths == inner[1:]
        if not sane or codec["name"] != "sharding_indexed" or meta["data_type"] not in DTYPES or not isinstance(meta["attributes"], dict):
            raise ValueError("not written by this library")
        if prod(shape) >= 2**63 // 16:
            raise ValueError(f"a shape of {shape}")
        return Array(name, tuple(shape), meta["data_type"], chunk[0], inner[0], meta["attributes"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise StoreError(
            f"the metadata of {name!r} cannot be read",
            got=str(error) or type(error).__name__,
            expected="a zarr.json as `partials` writes it",
        ) from None


def fill_of(dtype: str) -> Any:
    return -1 if dtype == "int64" else numpy.nan


def _fill_text(dtype: str) -> Any:
    return -1 if dtype == "int64" else ["NaN", "NaN"] if dtype.startswith("complex") else "NaN"


def _at_least_one(size: int) -> int:
    return max(1, size)


def _bytes(rows: numpy.ndarray) -> memoryview:
    return numpy.ascontiguousarray(rows).reshape(-1).view(numpy.uint8).data


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False)
