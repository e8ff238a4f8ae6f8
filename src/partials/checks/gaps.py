"""Gaps: how far a sum of rows is from an ordinary backward, over the size that the sum has when nothing cancels.

NOTE on scales. Entrywise relative errors mean nothing: entries of healthy rows cancel to anything. A sum over rows with random weights
u has the size sqrt(sum_nc |u_nc J_nc|^2), and the errors of its terms add up in the same way, so that is what an error is measured by.

NOTE on products. J^T u is compared with the ordinary backward, and u.(J v) with (J^T u).v: together, with <backward, v>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from .. import _algebra
from .._blocks import Block
from .._pullback import Pullback
from .._typing import Tensor
from .subject import Subject
from .tolerance import Tolerance, apart, distance, dot, over, typical

Key = tuple[str, str]
"""(check, parameter)."""


@dataclass(frozen=True)
class Gap:
    """The error over its scale, and for an input the sample where it is largest."""

    error: float
    terms: int
    """The rows that were summed."""
    sample: int | None = None

    def over(self, tolerance: Tolerance) -> float:
        """The error in units of what is allowed."""
        return self.error / tolerance.summing(self.terms).value


@dataclass
class Sides:
    """The rows of some samples, weighted by u; everything here is without graph."""

    subject: Subject
    squares: dict[str, Tensor]
    v: dict[str, Tensor]
    """A vector for each parameter whose product is compared."""
    few: list[int] | None = None
    """The samples on which products are compared where all samples are summed; None for all of them."""
    medians: dict[str, Tensor] = field(default_factory=dict)
    """The median sample's square of each target, as far as it was asked for."""

    def gaps(
        self, own: Mapping[str, Tensor], u: Tensor, samples: Sequence[int] | None, names: Sequence[str] | None = None
    ) -> dict[Key, Gap]:
        """Compare with `own`, the gradients of sum u f by an ordinary backward; u (M, C) weights the M samples (None: all)."""
        found: dict[Key, Gap] = {}
        index = None if samples is None else torch.tensor(samples, dtype=torch.int64, device=u.device)
        for target in self.subject.targets:
            name = target.name
            if names is not None and name not in names:
                continue
            group = self.subject.blocks[name] if index is None else tuple(block.select(index) for block in self.subject.blocks[name])
            if target.kind == "input":
                found["backward", name] = self._input(group, own[name], u, self._each(name, u, samples).sqrt())
                continue
            scale, mine = self.scale(name, u, samples), weighted(group, u)
            found["backward", name] = Gap(ratio(distance(mine, own[name]), scale), u.numel())
            if name in self.v:
                few = self.few if samples is None else None
                gap = gap_of_product(group, u, self.v[name], scale, mine) if few is None else self._product(name, u, few)
                found["product", name] = Gap(gap, u.numel() if few is None else u[few].numel())
        return found

    def _product(self, name: str, u: Tensor, samples: list[int]) -> float:
        index = torch.tensor(samples, dtype=torch.int64, device=u.device)
        group = tuple(block.select(index) for block in self.subject.blocks[name])
        return gap_of_product(group, u[samples], self.v[name], self.scale(name, u[samples], samples))

    def scale(self, name: str, u: Tensor, samples: Sequence[int] | None) -> Tensor:
        """sqrt(sum_nc |u_nc J_nc|^2) of a target over some samples, that of as many median samples at least."""
        own = self._each(name, u, samples).sum()
        if samples is None:
            return own.sqrt()
        if name not in self.medians:  # (a row that happens to cancel is judged beside its peers)
            peers = self.squares[name].sum(1)
            peers = peers[peers.isfinite()]
            self.medians[name] = peers.median() if len(peers) else peers.new_zeros(())
        return torch.maximum(own, self.medians[name] * u.double().square().sum() / u.shape[1]).sqrt()

    def _each(self, name: str, u: Tensor, samples: Sequence[int] | None) -> Tensor:
        squares = self.squares[name] if samples is None else self.squares[name][samples]
        return (u.double().square() * squares).sum(1)

    def _input(self, group: tuple[Block, ...], own: Tensor, u: Tensor, scale: Tensor) -> Gap:
        errors = over(distance(weighted_each(group, u), own.reshape(len(u), -1), samples=True), typical(scale)).nan_to_num(torch.inf)
        worst = int(errors.argmax())
        return Gap(float(errors[worst]), u.shape[1], worst)


def weighted(group: tuple[Block, ...], u: Tensor) -> Tensor:
    """sum_nc u[n, c] J[n, c] of a parameter: (*shape)."""
    with torch.no_grad():
        return _algebra.sum_of([block.rmatmul(u.unsqueeze(-1)) for block in group]).squeeze(-1)


def weighted_each(group: tuple[Block, ...], u: Tensor) -> Tensor:
    """sum_c u[n, c] J[n, c] of an input, each sample by itself: (N, entries)."""
    with torch.no_grad():
        rows = _algebra.rows(group)
        return torch.einsum("nc,ncp->np", u.to(rows.dtype), rows.reshape(*u.shape, -1) if rows.numel() else rows.new_zeros(*u.shape, 0))


def pushed(group: tuple[Block, ...], u: Tensor, v: Tensor) -> Tensor:
    """sum_nc u[n, c] (J[n, c] . v), in float64 from J v on."""
    with torch.no_grad():
        products = _algebra.sum_of([block.matmul(v.unsqueeze(-1)) for block in group]).squeeze(-1)
        return (products.double() * u.double()).sum()


def gap_of_product(group: tuple[Block, ...], u: Tensor, v: Tensor, scale: Tensor, mine: Tensor | None = None) -> float:
    """|u.(J v) - (J^T u).v| over the scale; `mine` is J^T u where it is known."""
    mine = weighted(group, u) if mine is None else mine
    return ratio(apart(pushed(group, u, v), dot(mine, v)).abs(), scale)


def in_dtype(block: Any, dtype: torch.dtype) -> Any:
    """The block with the same factors in another dtype, without graph; what a pullback goes through keeps its own."""
    if isinstance(block, Pullback):
        return replace(block, inner_block=in_dtype(block.inner_block, dtype))
    if isinstance(block, Block):
        cast = {entry.name: in_dtype(getattr(block, entry.name), dtype) for entry in fields(block)}  # type: ignore[arg-type]
        return replace(block, **cast)  # type: ignore[type-var]
    if isinstance(block, tuple) and any(isinstance(part, Block | tuple) for part in block):
        return tuple(in_dtype(part, dtype) for part in block)
    return block.detach().to(dtype) if isinstance(block, Tensor) and block.is_floating_point() else block


def ratio(error: Tensor, scale: Tensor) -> float:
    found = float(over(error, scale))
    return found if found == found else torch.inf


def vectors(subject: Subject) -> dict[str, Tensor]:
    """A random vector for each parameter."""
    return {t.name: subject.draws.spread(t.tensor.shape, t.tensor.detach()) for t in subject.targets if t.kind == "parameter"}
