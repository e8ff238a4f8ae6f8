"""Gaps: how far a sum of rows is from an ordinary backward, over the size that the sum has when nothing cancels.

NOTE on scales. Entrywise relative errors mean nothing: entries of healthy rows cancel to anything. A sum over rows with random weights
u has the size sqrt(sum_nc |u_nc J_nc|^2), and the errors of its terms add up in the same way, so that is what an error is measured by.
Norms of rows cost as much as a training step where there are many positions. So a gap is first measured by |J^T u| itself, whose square
has that scale's for its mean over the signs of u: it is `SURE` times the scale less than once in 10^13. What is more than 1 / `SURE` of
the tolerance by that is measured again by the norms: nothing passes that would not pass by them.

NOTE on products. J^T u is compared with the ordinary backward, and u.(J v) with (J^T u).v: together, with <backward, v>.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from .. import _algebra
from .._blocks import Block, size_of
from .._pullback import Pullback
from .._sums import Sums
from .._typing import Tensor
from .subject import Subject
from .tables import looked_up, others_zero
from .tolerance import ROWS, Tolerance, apart, distance, dot, over, size, typical

Key = tuple[str, str]
"""(check, parameter)."""
SURE = 8


@dataclass(frozen=True)
class Gap:
    """The error over its scale, and for an input the sample where it is largest."""

    error: float
    terms: int
    """The rows that were summed."""
    sample: int | None = None
    finite: bool = True
    """Whether the sum of rows is; where it is, every row is."""
    zero: bool = False
    """Whether the sum of rows is: their weights are random, so that then all of them are."""

    def over(self, tolerance: Tolerance) -> float:
        """The error in units of what is allowed."""
        return self.error / tolerance.summing(self.terms).value


@dataclass
class Sides:
    """The rows of some samples, weighted by u; everything here is without graph."""

    subject: Subject
    pushed: Collection[str]
    """The parameters whose products are compared, too."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """A random vector for each parameter, as far as it was asked for."""
    medians: dict[str, Tensor] = field(default_factory=dict)
    """The median sample's square of each target, as far as it was asked for."""

    def v(self, name: str) -> Tensor:
        """A random vector for a parameter."""
        if name not in self.vectors:
            like = next(t.tensor for t in self.subject.targets if t.name == name).detach()
            self.vectors[name] = self.subject.draws.spread(like.shape, like)
        return self.vectors[name]

    def group(self, name: str, samples: Sequence[int] | None) -> tuple[Block, ...]:
        """The blocks of a target for some samples; None: all."""
        blocks = self.subject.blocks[name]
        if samples is None:
            return blocks
        index = torch.tensor(samples, dtype=torch.int64, device=self.subject.values.device)
        return tuple(block.select(index) for block in blocks)

    def gaps(
        self, own: Mapping[str, Tensor], u: Tensor, samples: Sequence[int] | None, names: Collection[str] | None = None
    ) -> dict[Key, Gap]:
        """Compare with `own`, the gradients of sum u f by an ordinary backward; u (M, C) weights the M samples (None: all)."""
        found: dict[Key, Gap] = {}
        targets = [t for t in self.subject.targets if names is None or t.name in names]
        groups, rows = {t.name: self.group(t.name, samples) for t in targets}, dict[str, Tensor]()
        for target in targets:
            name = target.name
            if target.kind == "input":
                found["backward", name] = self._input(groups.pop(name), own[name], u, self._each(name, u, samples).sqrt())
                continue
            table = looked_up(groups[name]) if own[name].ndim == 2 and name not in self.pushed else None
            if table is not None and others_zero(own[name], table[0]):
                rows[name], groups[name] = table
        for name, mine in weighted_all(groups, u).items():
            its = own[name] if name not in rows else own[name][rows[name]]
            found["backward", name] = self._backward(name, mine, its, u, samples)
            if name in self.pushed:
                gap = gap_of_product(groups[name], u, self.v(name), self.scale(name, u, samples), mine)
                found["product", name] = Gap(gap, u.numel())
        return found

    def product(self, name: str, u: Tensor, samples: Sequence[int] | None) -> Gap:
        """The gap of a product alone."""
        found = gap_of_product(self.group(name, samples), u, self.v(name), self.scale(name, u, samples))
        return Gap(found, u.numel())

    def scale(self, name: str, u: Tensor, samples: Sequence[int] | None) -> Tensor:
        """sqrt(sum_nc |u_nc J_nc|^2) of a target over some samples, that of as many median samples at least."""
        own = self._each(name, u, samples).sum()
        if samples is None:
            return own.sqrt()
        if name not in self.medians:  # (a row that happens to cancel is judged beside its peers)
            peers = self.subject.squares(name).sum(1)
            peers = peers[peers.isfinite()]
            self.medians[name] = peers.median() if len(peers) else peers.new_zeros(())
        return torch.maximum(own, self.medians[name] * u.double().square().sum() / u.shape[1]).sqrt()

    def measured(self, error: Tensor, quick: Tensor, terms: int, exact: Callable[[], Tensor]) -> float:
        """The error of a sum over its size `quick`; over its `exact` scale where that would not be far below the tolerance."""
        found = ratio(error, quick)
        if bool(quick.isfinite()) and found * SURE <= self.subject.tolerance.summing(min(terms, ROWS)).value:
            return found
        scale = exact()
        return ratio(error, scale) if bool(scale.isfinite()) else found

    def _backward(self, name: str, mine: Tensor, own: Tensor, u: Tensor, samples: Sequence[int] | None) -> Gap:
        quick = size(mine)
        error = self.measured(distance(mine, own), quick, u.numel(), lambda: self.scale(name, u, samples))
        return Gap(error, u.numel(), None, bool(quick.isfinite()), not bool(quick))

    def _each(self, name: str, u: Tensor, samples: Sequence[int] | None) -> Tensor:
        squares = self.subject.squares(name)
        return (u.double().square() * (squares if samples is None else squares[samples])).sum(1)

    def _input(self, group: tuple[Block, ...], own: Tensor, u: Tensor, scale: Tensor) -> Gap:
        errors = over(distance(weighted_each(group, u), own.reshape(len(u), -1), samples=True), typical(scale)).nan_to_num(torch.inf)
        worst = int(errors.argmax())
        return Gap(float(errors[worst]), u.shape[1], worst, bool(scale.isfinite().all()), not bool(scale.any()))


def weighted(group: tuple[Block, ...], u: Tensor) -> Tensor:
    """sum_nc u[n, c] J[n, c] of a parameter: (*shape)."""
    with torch.no_grad():
        return _algebra.sum_of([block.rmatmul(u.unsqueeze(-1)) for block in group]).squeeze(-1)


def weighted_all(groups: Mapping[str, tuple[Block, ...]], u: Tensor) -> dict[str, Tensor]:
    """The same of several parameters: at once where they have one dtype, so that a cotangent that some of them share is read once."""
    if len({block.dtype for group in groups.values() for block in group}) != 1:
        return {name: weighted(group, u) for name, group in groups.items()}
    shapes = {name: group[0].shape for name, group in groups.items()}
    with torch.no_grad():
        found = Sums(groups).rmatmul(u.unsqueeze(-1)).squeeze(-1)
    parts = found.split([size_of(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


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
