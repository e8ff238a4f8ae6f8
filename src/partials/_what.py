"""Quantities by name, as streams and stores are asked for them: "norms", "clipped_sum:1.0", "sketch:4096", "sketch:4096:kronecker"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._errors import InputError, near
from ._sketch import KINDS

STORED = ("jacobian", "norms", "sum", "gram", "diagonal", "sketch:K", "sketch:K:KIND")
"""What a store can hold; K is a number of columns, KIND one of `Jacobian.sketch`."""
STREAMED = (*STORED, "clipped_sum:C")
EXAMPLES = {"sketch": "sketch:4096", "clipped_sum": "clipped_sum:1.0"}


def parsed(what: str, known: Sequence[str] = STREAMED) -> tuple[str, tuple[Any, ...]]:
    """The name of a quantity and the arguments of the method of that name.

    Raises
    ------
    InputError
        where the quantity is none of the known ones.
    """
    name, *words = str(what).split(":")
    if name in {form.partition(":")[0] for form in known}:
        if name == "sketch" and words and _positive(words[0], int) and (len(words) == 1 or (len(words) == 2 and words[1] in KINDS)):
            return name, (int(words[0]), *words[1:])
        if name == "clipped_sum" and len(words) == 1 and _positive(words[0], float):
            return name, (float(words[0]),)
        if name not in EXAMPLES and not words:
            return name, ()
    hint = EXAMPLES.get(name) or near(what, [*known, EXAMPLES["sketch"]])
    raise InputError(f"what={what!r} is unknown", got=repr(what), expected=f"one of: {', '.join(known)}", hint=hint)


def _positive(text: str, number: type[int] | type[float]) -> bool:
    try:
        return 0 < number(text) < 2**31
    except ValueError:
        return False
