"""`Stack`: Jacobians over different samples, one under the other, each segment in its own form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import _algebra
from ._blocks import Block
from ._typing import Shape, Tensor


@dataclass(frozen=True)
class Stack(Block):
    """Segments of samples of one parameter; the blocks within a segment add up."""

    segments: tuple[tuple[Block, ...], ...]

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.segments[0][0].shape

    @property
    def sizes(self) -> list[int]:
        return [segment[0].rows[0] for segment in self.segments]

    @property
    def rows(self) -> tuple[int, int]:
        return sum(self.sizes), self.segments[0][0].rows[1]

    def dense(self) -> Tensor:
        return torch.cat([_algebra.rows(segment) for segment in self.segments])

    def select(self, index: Tensor) -> Block:
        """Consecutive indices of one segment stay together, in the order asked for."""
        starts = torch.tensor([0, *self.sizes]).cumsum(0)
        owner = torch.bucketize(index.cpu(), starts[1:], right=True)
        cuts = (owner.diff() != 0).nonzero().flatten() + 1
        found = []
        for piece, owners in zip(index.cpu().tensor_split(cuts), owner.tensor_split(cuts), strict=True):
            which = int(owners[0]) if len(owners) else 0
            found.append(tuple(block.select(piece - starts[which]) for block in self.segments[which]))
        return Stack(tuple(found))

    def nbytes(self) -> int:
        return sum(block.nbytes() for segment in self.segments for block in segment)

    def matmul(self, v: Tensor) -> Tensor:
        return torch.cat([_algebra.sum_of([block.matmul(v) for block in segment]) for segment in self.segments])

    def rmatmul(self, u: Tensor) -> Tensor:
        parts = zip(self.segments, u.split(self.sizes), strict=True)
        return _algebra.sum_of([block.rmatmul(part) for segment, part in parts for block in segment])

    def squared_norms(self) -> Tensor:
        return torch.cat([_algebra.squared_norms(segment) for segment in self.segments])

    def inner(self, other: Block) -> Tensor:
        return self._beside(other, lambda a, b: a.inner(b))

    def own_gram(self, other: Block) -> Tensor:
        return self._beside(other, lambda a, b: a.own_gram(b))

    def gram(self, other: Block) -> Tensor:
        return torch.cat(
            [
                torch.cat([_algebra.sum_of([a.gram(b) for a in segment for b in its]) for its in segments_of(other)], 2)
                for segment in self.segments
            ]
        )

    def weighted_sum(self, weights: Tensor) -> Tensor:
        parts = zip(self.segments, weights.split(self.sizes), strict=True)
        return _algebra.sum_of([block.weighted_sum(part) for segment, part in parts for block in segment])

    def scaled(self, weights: Tensor) -> Block:
        parts = zip(self.segments, weights.split(self.sizes), strict=True)
        return Stack(tuple(tuple(block.scaled(part) for block in segment) for segment, part in parts))

    def mixed(self, matrix: Tensor) -> Block:
        parts = zip(self.segments, matrix.split(self.sizes), strict=True)
        return Stack(tuple(tuple(block.mixed(part) for block in segment) for segment, part in parts))

    def _beside(self, other: Block, function: Callable[[Block, Block], Tensor]) -> Tensor:
        starts = [0, *torch.tensor(self.sizes).cumsum(0).tolist()]
        found = []
        for segment, start, stop in zip(self.segments, starts, starts[1:], strict=False):
            its = other.select(torch.arange(start, stop))
            found.append(_algebra.sum_of([function(block, its) for block in segment]))
        return torch.cat(found)


def segments_of(block: Block) -> tuple[tuple[Block, ...], ...]:
    return block.segments if isinstance(block, Stack) else ((block,),)
