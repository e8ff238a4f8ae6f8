"""What a store says of itself, read with distrust: every word is checked before anything is allocated, mapped or followed from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from .._columns import Columns
from .._errors import InputError, StoreError
from .._typing import Shape
from .._what import STORED
from .._what import parsed as parsed_what
from . import format as form
from .format import LARGEST_HEADER, Array

VERSION = 1
CONFIG = "run.json"
MAIN = {"jacobian": "jacobian", "norms": "norms", "gram": "gram", "sketch": "sketch", "sum": "parts", "diagonal": "parts"}
"""The array that holds each quantity."""


def loads(text: str | bytes) -> Any:
    """JSON without NaN or infinity; ValueError for anything else, however deeply it is nested."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def bounded(path: Path) -> str:
    """The text of a metadata file, not followed out of the store and not larger than such a file can be."""
    if path.is_symlink() or not path.is_file():
        raise StoreError(f"{path} is missing", got="no such file" if not path.exists() else "a link", expected="a file of the store")
    if path.stat().st_size > LARGEST_HEADER:
        raise StoreError(f"{path} is too large", got=f"{path.stat().st_size} bytes", expected=f"at most {LARGEST_HEADER}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} cannot be read", got=str(error), expected="text in UTF-8") from None


def config_of(path: Path) -> dict[str, Any]:
    """What `run.json` says: {"version", "fingerprint", "arrays", "config"}."""
    try:
        record = loads(bounded(path / CONFIG))
        if not isinstance(record, dict) or record["version"] != VERSION:
            raise ValueError(f"version {record['version']}")
        names = record["arrays"]
        if not (isinstance(record["fingerprint"], dict) and isinstance(record["config"], dict) and isinstance(names, list)):
            raise ValueError("its fields")
        if not (0 < len(names) < 8 and all(isinstance(name, str) and name.isidentifier() and name.isascii() for name in names)):
            raise ValueError("names of arrays that are no plain words")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path / CONFIG} cannot be read", got=str(error), expected=f"version {VERSION} of what `partials run` writes"
        ) from None
    return record


def array_of(path: Path, name: str) -> Array:
    """The array `name` of a store, whose folders are no links."""
    within(path, f"{name}/c")
    return form.parsed(name, bounded(path / name / "zarr.json"))


def within(path: Path, key: str) -> Path:
    """The place of a file of the store.

    Raises
    ------
    StoreError
        where a link stands on the way: it would lead out of the store.
    """
    place = path
    for part in key.split("/"):
        place = place / part
        if place.is_symlink():
            expected, hint = "a file or folder of the store", "nothing was read or written"
            raise StoreError(f"{place} leads out of the store", got="a link", expected=expected, hint=hint)
    return place


def agreeing(path: Path, arrays: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """(the main array, all arrays): that they fit each other, and the table of columns and the output shape fit them.

    An array that grows while a stream is written may be longer than the others: all have the rows that each has.
    """
    try:
        main = next(a for name, a in arrays.items() if "what" in a.attributes)
        kind, how = parsed_what(main.attributes["what"], STORED)
        values, out = arrays["values"], _shape(main.attributes["out"])
        columns = columns_of(main)
        samples = values.shape[0] if main.name == "parts" else min(values.shape[0], main.shape[0])
        c, width = prod(out), columns.width
        expected: dict[str, Shape] = {
            "jacobian": (samples, c, width),
            "norms": (samples, c),
            "gram": (samples, c, samples, c),
            "sketch": (samples, c, *how[:1]),
            "sum": (values.blocks, c, width),
            "diagonal": (values.blocks, width),
        }
        per = 1 if main.name == "parts" else values.block
        if main.name != MAIN[kind] or (samples, c) != (samples, *values.shape[1:]) or main.block != per:
            raise ValueError(f"{main.name} {main.shape} and values {values.shape}")
        if main.shape[1:] != expected[kind][1:] or (main.name == "parts" and main.shape[0] < values.blocks):
            raise ValueError(f"a shape of {main.shape} for {expected[kind]}")
        rows = {"parts": values.blocks}
        return replace(main, shape=expected[kind]), {
            name: replace(a, shape=(rows.get(name, samples), *a.shape[1:])) for name, a in arrays.items()
        }
    except (StopIteration, KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        words = str(error).partition("\n")[0]
        raise StoreError(
            f"the arrays of {path} do not fit each other",
            got=words or type(error).__name__,
            expected="one quantity, its values and its columns, as `partials` writes them",
        ) from None


def columns_of(main: Array) -> Columns:
    """The table of columns: names and shapes of parameters that stand side by side."""
    shapes: dict[str, Shape] = {}
    offset = 0
    for name, column in main.attributes["columns"].items():
        shapes[name] = _shape(column["shape"])
        if column["offset"] != offset or type(column["offset"]) is not int:
            raise ValueError(f"the columns of {name!r} begin at {column['offset']!r}, not at {offset}")
        offset += prod(shapes[name])
    aliases = main.attributes.get("aliases", {})
    if not all(isinstance(name, str) and first in shapes for name, first in aliases.items()):
        raise ValueError("a further name of a parameter that is not there")
    return Columns(shapes, dict(aliases))


def _shape(sizes: Any) -> Shape:
    if not isinstance(sizes, list) or not all(type(n) is int and 0 <= n < 2**63 for n in sizes) or prod(sizes) >= 2**63:
        raise ValueError(f"a shape of {sizes!r}"[:80])
    return tuple(sizes)
