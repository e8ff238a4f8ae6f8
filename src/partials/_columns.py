"""The columns of a Jacobian: names, shapes, and the way between a flat P axis and tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ._blocks import size_of
from ._errors import InputError, listed, near
from ._typing import Shape, Tensor


@dataclass(frozen=True)
class Columns:
    """`shapes` in the order of P; `aliases` are the further names of tied parameters."""

    shapes: Mapping[str, Shape]
    aliases: Mapping[str, str]

    @cached_property
    def sizes(self) -> list[int]:
        return [size_of(shape) for shape in self.shapes.values()]

    @cached_property
    def width(self) -> int:
        return sum(self.sizes)

    def name(self, name: str) -> str:
        """The first name of a parameter, also for an alias; KeyError with near names otherwise."""
        name = self.aliases.get(name, name)
        if name not in self.shapes:
            known = [*self.shapes, *self.aliases]
            raise UnknownName(f"{name!r} is not in this Jacobian", got=name, expected=listed(known), hint=near(name, known))
        return name

    def split(self, flat: Tensor, lead: int) -> dict[str, Tensor]:
        """(..., P, rest) with `lead` dimensions before P -> {name: (..., *shape, rest)}."""
        if flat.ndim <= lead or flat.shape[lead] != self.width:
            raise InputError(
                "the vector does not fit the parameters",
                got=f"shape {tuple(flat.shape)}",
                expected=f"{self.width} entries along dimension {lead}",
                hint="a dict by name",
            )
        before, after = flat.shape[:lead], flat.shape[lead + 1 :]
        parts = zip(self.shapes.items(), flat.split(self.sizes, lead), strict=True)
        return {name: part.reshape(before + shape + after) for (name, shape), part in parts}

    def join(self, parts: Mapping[str, Tensor], lead: int) -> Tensor:
        """{name: (..., *shape, rest)} with `lead` dimensions before the parameter's -> (..., P, rest)."""
        flat = [
            parts[name].reshape(*parts[name].shape[:lead], size_of(shape), *parts[name].shape[lead + len(shape) :])
            for name, shape in self.shapes.items()
        ]
        return torch.cat(flat, lead)

    def pieces(self, v: Tensor | Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor] | None:
        """A vector, (P,) or tensors by name, as the parts (p,) of the parameters in their order; None for a matrix (P, k)."""
        if isinstance(v, Tensor) and v.ndim == 1 and len(v) == self.width:
            return list(v.to(dtype).split(self.sizes))
        parts, columns = self.vector(v)
        return None if columns else [part.to(dtype).reshape(-1) for part in parts.values()]

    def vector(self, v: Tensor | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """A vector (P,), a matrix (P, k) or tensors by name -> ({name: (*shape, k)}, whether there were columns)."""
        if isinstance(v, Mapping):
            given = {self.name(name): tensor for name, tensor in v.items()}
            missing = [name for name in self.shapes if name not in given]
            if missing:
                raise InputError(
                    "the vector lacks parameters", got=listed(given), expected=listed(self.shapes), hint=f"add {listed(missing)}"
                )
            for name, shape in self.shapes.items():
                if tuple(given[name].shape) != shape:
                    raise InputError(
                        f"the vector's part {name!r} has another shape", got=str(tuple(given[name].shape)), expected=str(shape)
                    )
            return {name: given[name].unsqueeze(-1) for name in self.shapes}, False
        if v.ndim not in (1, 2):
            raise InputError(
                "the vector has another shape",
                got=f"shape {tuple(v.shape)}",
                expected=f"({self.width},) or ({self.width}, k), or a dict by name",
            )
        return self.split(v if v.ndim == 2 else v.unsqueeze(-1), 0), v.ndim == 2


class UnknownName(InputError, KeyError):
    """A parameter name that the Jacobian does not have."""

    __str__ = InputError.__str__
