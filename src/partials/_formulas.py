"""Which formula a quantity of a block takes: the one of the least estimated time, or the one that `formulas` asks for.

An estimate counts the multiplications, the entries of temporaries and the torch calls of a formula, in seconds of `_constants.py`.
Sizes are those of `Outer`: n (and m) samples, c (and d) outputs, t (and s) positions, g groups, i and o features of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

from ._constants import BATCHED, CALL, ENTRY, PRODUCT
from ._errors import InputError, near
from ._room import TILE

Costs = dict[str, float]
"""Formula -> seconds."""

FORMULAS = {
    "norms": ("pairs", "rows"),
    "gram": ("dots", "pairs", "rows"),
    "products": ("factors", "rows"),
    "dense": ("offsets", "patches"),
}
"""Quantity -> its formulas. "norms": all inner products within a sample; "products": J v and J^T u; "dense": rows of convolutions."""

NARROW = 32
"""Columns below which a product of matrices takes as long as with so many."""

_WANTED: ContextVar[Mapping[str, str]] = ContextVar("formulas", default={})  # noqa: B039 - never changed in place


@contextmanager
def formulas(**wanted: str) -> Iterator[None]:
    """Quantities that are computed inside take the named formulas, wherever a block has them, not those of the least estimated time.

    `norms` by "pairs" of positions (ghost norms) or by "rows" that are formed and freed; `gram` by "dots", "pairs" or "rows";
    `products` (J v and J^T u) by "factors" or "rows"; `dense` rows of convolutions by "offsets" of the kernel or by unfolded "patches".
    The numbers are the same up to rounding. `print(pt.explain(f, x))` shows the choice and the estimates.

    Raises
    ------
    InputError
        for a quantity or a formula that does not exist.

    Examples
    --------
    >>> import torch, partials as pt
    >>> J = pt.jacobian(torch.nn.Conv1d(2, 3, 3), torch.randn(4, 2, 9))
    >>> with pt.formulas(norms="rows"):
    ...     rows = J.norms()
    >>> torch.allclose(rows, J.norms())
    True
    """
    for quantity, formula in wanted.items():
        if quantity not in FORMULAS:
            raise InputError(
                f"{quantity!r} has no formulas to choose from", got=quantity, expected=", ".join(FORMULAS), hint=near(quantity, FORMULAS)
            )
        if formula not in FORMULAS[quantity]:
            known = FORMULAS[quantity]
            raise InputError(
                f"{quantity}={formula!r} is unknown", got=repr(formula), expected=", ".join(known), hint=near(str(formula), known)
            )
    token = _WANTED.set({**_WANTED.get(), **wanted})
    try:
        yield
    finally:
        _WANTED.reset(token)


def asked(quantity: str) -> str:
    """The formula that `formulas` asks for, "" for none."""
    return _WANTED.get().get(quantity, "")


def choice(quantity: str, costs: Costs) -> str:
    """The formula of a quantity: the wanted one, if it is among those of `costs`, else the one of the least cost."""
    wanted = asked(quantity)
    return wanted if wanted in costs else min(costs, key=lambda formula: costs[formula])


def inner(rows: tuple[int, int, int], positions: tuple[int, int], weight: tuple[int, int, int], products: int, *, same: bool) -> Costs:
    """Inner products of the rows of two blocks within each of n samples: (n, c, d), (t, s), (g, i, o); `products` of c and d."""
    (n, c, d), (t, s), (g, i, o) = rows, positions, weight
    wide = min(o, s) if products == c else o  # (what is formed for each position: its products, or the cotangents that it meets)
    return {
        "pairs": _seconds(batched=n * g * t * s * (i + d * o), entries=n * g * t * (s + (2 * d + products) * wide), calls=5),
        "rows": _seconds(batched=n * g * (t * c + s * d * (not same)) * i * o, entries=n * g * i * o * (c + d + products), calls=5),
    }


def gram(rows: tuple[int, int, int, int], positions: tuple[int, int], weight: tuple[int, int, int]) -> Costs:
    """Products of all samples with all: (n, c, m, d), (t, s), (g, i, o)."""
    (n, c, m, d), (t, s), (g, i, o) = rows, positions, weight
    p = g * i * o
    found = {
        "pairs": min(pairs_of(rows, positions, weight), pairs_of((m, d, n, c), (s, t), weight)),
        "rows": _seconds(products=n * m * c * d * p, batched=(n * t * c + m * s * d) * p, entries=2 * (n * c + m * d) * p, calls=6),
    }
    if g == 1:
        found["dots"] = _seconds(products=n * m * t * s * (i + c * d * o), entries=n * m * t * s * (1 + 3 * c * d), calls=6)
    return found


def pairs_of(rows: tuple[int, int, int, int], positions: tuple[int, int], weight: tuple[int, int, int]) -> float:
    """Seconds of a Gram matrix by pairs that contracts the right block first."""
    (n, c, m, d), (t, s), (g, i, o) = rows, positions, weight
    work = n * m * g * (t * s * (i + d * o) + t * c * d * o)
    return _seconds(batched=work, entries=n * m * g * t * (s + 2 * d * o), calls=8)


@lru_cache(maxsize=4096)
def products(rows: tuple[int, int], t: int, weight: tuple[int, int, int], k: int) -> Costs:
    """J v or J^T u with k columns: (n, c), t, (g, i, o)."""
    (n, c), (g, i, o) = rows, weight
    return {
        "factors": _seconds(products=n * g * t * o * k * (i + c), entries=n * g * t * o * k, calls=4),
        "rows": _seconds(products=n * g * c * i * o * k, batched=n * g * c * t * i * o, entries=2 * n * g * c * i * o, calls=5),
    }


def convolved(sizes: tuple[int, int], t: int, weight: tuple[int, int, int], kernel: int) -> tuple[Costs, Costs]:
    """Norms and dense rows of a convolution: (n, c), t positions, (g, i, o) with i a whole patch, and the kernel's first size."""
    (n, c), (g, i, o) = sizes, weight
    patches, formed = n * t * g * i, n * c * g * i * o
    narrow = max(1, NARROW * kernel / i)  # (of a product for one offset, whose side is that part of a patch)
    strips = _seconds(batched=narrow * formed * t, entries=8 * patches // max(1, kernel) + 6 * formed, calls=8 * kernel)
    rows = _seconds(batched=formed * t, entries=3 * patches + 4 * formed, calls=8)
    unfolded = inner((n, c, c), (t, t), weight, c, same=True)["pairs"] + _seconds(entries=8 * patches, calls=6)  # (strided copies)
    return {"rows": min(strips, rows), "pairs": unfolded}, {"offsets": strips, "patches": rows}


def _seconds(products: float = 0, batched: float = 0, entries: float = 0, calls: float = 0) -> float:
    tiles = 1 + 4 * entries // TILE  # (what takes more than a tile is computed in several)
    return PRODUCT * products + BATCHED * batched + ENTRY * entries + CALL * calls * tiles
