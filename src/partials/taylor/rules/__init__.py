"""Jet rules, one file for each family; importing them fills the table."""

from __future__ import annotations

from . import arithmetic, attention, bent, linalg, norm, numbers, pointwise, products, recurrent, reduce, structure, values

__all__ = [
    "arithmetic",
    "attention",
    "bent",
    "linalg",
    "norm",
    "numbers",
    "pointwise",
    "products",
    "recurrent",
    "reduce",
    "structure",
    "values",
]
