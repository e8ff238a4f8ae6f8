"""J v and J^T u of one vector, for blocks of one position that keep one cotangent: what depends on them alone is laid out once.

Such products are a few matrix products, of networks of which a training step takes a millisecond: what stands around them counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ._products import PLAIN
from ._typing import Tensor


@dataclass(frozen=True)
class Weight:
    """The block of a weight matrix: J[n, c] = g[n, c] (x) a[n]."""

    place: int
    """Its parameter's among those of the Jacobian."""
    a: Tensor
    """(N, I)."""
    turned: bool
    """Stored as (I, O)."""
    add: bool
    """To what has been written to the parameter's place."""

    def matrix(self, v: Sequence[Tensor], features: int) -> Tensor:
        """Its part of v: (I, O)."""
        part, inputs = v[self.place], self.a.shape[1]
        return part.view(inputs, features) if self.turned else part.view(features, inputs).t()

    def write(self, out: Sequence[Tensor], cotangents: Tensor, inputs: Tensor) -> None:
        """sum_n of (N, O) (x) (N, I), in its place."""
        left, right = (inputs, cotangents) if self.turned else (cotangents, inputs)
        place = out[self.place].view(left.shape[1], right.shape[1])
        if self.add:
            place.addmm_(left.t(), right)
        else:
            torch.mm(left.t(), right, out=place)


@dataclass(frozen=True)
class Row(ABC):
    """Blocks with one cotangent, weights and biases (whose rows are the cotangent)."""

    g: Tensor
    weights: Sequence[Weight]
    biases: Sequence[tuple[int, bool]]
    """(place, add)."""

    @abstractmethod
    def push(self, v: Sequence[Tensor]) -> Tensor:
        """J v, from the parts of v: (N, C)."""

    @abstractmethod
    def pull(self, u: Tensor, out: Sequence[Tensor]) -> None:
        """J^T u, of u (N, C), into the parts of `out`."""

    @staticmethod
    def of(g: Tensor, weights: Sequence[Weight], biases: Sequence[tuple[int, bool]]) -> Row | None:
        """From g of (N, C, O); None where the sums would want to be pairwise."""
        if g.shape[1] > 1:
            return Several(g, weights, biases)
        return One(g.squeeze(1), weights, biases) if g.shape[2] <= PLAIN else None

    def _bias(self, v: Sequence[Tensor]) -> Tensor | None:
        """The sum of the biases' parts, (O,)."""
        found: Tensor | None = None
        for place, _ in self.biases:
            found = v[place] if found is None else found + v[place]
        return found

    def _write_biases(self, out: Sequence[Tensor], sums: Tensor) -> None:
        for place, add in self.biases:
            out[place].add_(sums) if add else out[place].copy_(sums)


@dataclass(frozen=True)
class Several(Row):
    """Several outputs: g (N, C, O) is read once, by batches of a row times a matrix."""

    @cached_property
    def turned(self) -> Tensor:
        """g as (N, O, C)."""
        return self.g.mT

    def push(self, v: Sequence[Tensor]) -> Tensor:
        met, features = self._bias(v), self.g.shape[2]
        for weight in self.weights:
            matrix = weight.matrix(v, features)
            met = weight.a @ matrix if met is None else torch.addmm(met, weight.a, matrix)
        assert met is not None
        return torch.bmm(met.unsqueeze(1), self.turned).squeeze(1)

    def pull(self, u: Tensor, out: Sequence[Tensor]) -> None:
        folded = torch.bmm(u.unsqueeze(1), self.g).squeeze(1)
        for weight in self.weights:
            weight.write(out, folded, weight.a)
        if self.biases:
            self._write_biases(out, folded.sum(0))


@dataclass(frozen=True)
class One(Row):
    """One output: g (N, O) plays the part that a plays, and what is formed of each sample is as wide as the narrower of the two."""

    def push(self, v: Sequence[Tensor]) -> Tensor:
        bias, features = self._bias(v), self.g.shape[1]
        found = None if bias is None else torch.mv(self.g, bias).unsqueeze(1)
        for weight in self.weights:
            matrix, a = weight.matrix(v, features), weight.a
            left, right = (a, self.g @ matrix.t()) if a.shape[1] < features else (self.g, a @ matrix)
            dots = torch.bmm(left.unsqueeze(1), right.unsqueeze(2)).squeeze(2)
            found = dots if found is None else found.add_(dots)
        assert found is not None
        return found

    def pull(self, u: Tensor, out: Sequence[Tensor]) -> None:
        features, folded = self.g.shape[1], None
        for weight in self.weights:
            if weight.a.shape[1] < features:
                weight.write(out, self.g, weight.a * u)
            else:
                folded = self.g * u if folded is None else folded
                weight.write(out, folded, weight.a)
        if self.biases:
            self._write_biases(out, torch.mv(self.g.t(), u.squeeze(1)) if folded is None else folded.sum(0))
