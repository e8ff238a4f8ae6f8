"""`Conv`: the block of a convolution's weight, kept as the input and the cotangent; patches are unfolded a few samples at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from ._blocks import ROOM, Block
from ._factors import Outer
from ._typing import Shape, Tensor

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
GRADIENT: dict[int, Callable[..., Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


@dataclass(frozen=True, eq=False)
class Conv(Block):
    """J[n, c] = sum over positions of g (x) patch. Several images of one sample (frames) are further positions."""

    a: Tensor
    """(N, frames, I, *space)."""
    g: Tensor
    """(N, C, frames, O, *space')."""
    shape: Shape
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def rows(self) -> tuple[int, int]:
        return self.g.shape[0], self.g.shape[1]

    def dense(self) -> Tensor:
        """The rows, one product for each offset of the kernel: no patches are unfolded."""
        n, c, frames, o = self.g.shape[:4]
        groups, space = self.groups, self.g.shape[4:]
        g = self.g.unflatten(3, (groups, o // groups)).movedim(3, 1).movedim(3, 4).flatten(5)  # (N, groups, C, O/groups, frames, L)
        g = g.reshape(n, groups, c * (o // groups), frames * space.numel())
        x, rows = self._padded(), []
        for offset in product(*map(range, self.shape[2:])):
            cuts = tuple(
                slice(k * gap, k * gap + step * (size - 1) + 1, step)
                for k, gap, step, size in zip(offset, self.dilation, self.stride, space, strict=True)
            )
            seen = x[(slice(None), slice(None), slice(None), *cuts)].flatten(3)  # (N, frames, I, L)
            seen = seen.unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3).reshape(n, groups, frames * space.numel(), self.shape[1])
            rows.append(g @ seen)
        found = torch.stack(rows, -1).unflatten(2, (c, o // groups))  # (N, groups, C, O/groups, I/groups, kernel)
        return found.movedim(2, 1).reshape(n, c, *self.shape)

    def select(self, index: Tensor) -> Block:
        return replace(self, a=self.a.index_select(0, index), g=self.g.index_select(0, index))

    def nbytes(self) -> int:
        return self.a.nbytes + self.g.nbytes

    def matmul(self, v: Tensor) -> Tensor:
        """J v: the convolution with v, met with the cotangent."""
        x, g = self._padded().flatten(0, 1), self.g.flatten(2)
        columns = []
        for weight in v.to(x.dtype).unbind(-1):
            z = CONV[len(self.stride)](x, weight, None, self.stride, 0, self.dilation, self.groups)
            columns.append(g @ z.unflatten(0, self.a.shape[:2]).flatten(1).unsqueeze(-1))
        return torch.cat(columns, -1) if columns else g.new_zeros(*self.rows, 0)

    def rmatmul(self, u: Tensor) -> Tensor:
        """J^T u: the convolution's own weight gradient, of the cotangent that u weighs."""
        columns = [self._weight_gradient(column) for column in u.to(self.g.dtype).unbind(-1)]
        return torch.stack(columns, -1) if columns else u.new_zeros(*self.shape, 0)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        outputs = self.rows[1]
        seeds = weights.to(self.g.dtype)[:, None, None] * torch.eye(outputs, dtype=self.g.dtype, device=self.g.device)
        return self.rmatmul(seeds).movedim(-1, 0)

    def _weight_gradient(self, u: Tensor) -> Tensor:
        g = torch.einsum("nc,nc...->n...", u, self.g).flatten(0, 1)
        if not len(g):
            return g.new_zeros(self.shape)
        return GRADIENT[len(self.stride)](self._padded().flatten(0, 1), self.shape, g, self.stride, 0, self.dilation, self.groups)

    def _padded(self) -> Tensor:
        pads = [p for pair in reversed(self.padding) for p in pair]
        return F.pad(self.a, pads) if any(pads) else self.a

    def squared_norms(self) -> Tensor:
        positions, patch = self.g.shape[2] * self.g.shape[4:].numel(), torch.Size(self.shape[1:]).numel()
        features = self.rows[1] * self.shape[0] // self.groups
        if positions * (patch + features) < features * patch:  # (few positions: pairs of them cost less than rows)
            return self._by_outer(lambda block: block.squared_norms())
        return super().squared_norms()

    def inner(self, other: Block) -> Tensor:
        if not isinstance(other, Conv):
            return super().inner(other)
        return self._by_outer(lambda block, its: block.inner(its), other)

    def own_gram(self, other: Block) -> Tensor:
        if not isinstance(other, Conv):
            return super().own_gram(other)
        return self._by_outer(lambda block, its: block.own_gram(its), other)

    def scaled(self, weights: Tensor) -> Block:
        return replace(self, g=self.g * weights.to(self.g.dtype).reshape(*self.rows, *(1,) * (self.g.ndim - 2)))

    def mixed(self, matrix: Tensor) -> Block:
        return replace(self, g=(matrix.to(self.g.dtype) @ self.g.flatten(2)).unflatten(2, self.g.shape[2:]))

    def outer(self) -> Outer:
        """The same block with patches unfolded: a (N, T, groups, I/groups * kernel), g (N, C, T, groups, O/groups)."""
        n, c, frames = self.g.shape[:3]
        space = self.g.shape[4:]
        positions, entries = frames * space.numel(), torch.Size(self.shape[1:]).numel()
        patches = self._patches().movedim(2, 2 + len(space))  # (N, frames, *space', I, *kernel)
        a = patches.reshape(n, positions, self.groups, entries)
        g = self.g.movedim(3, -1).reshape(n, c, positions, self.groups, self.shape[0] // self.groups)
        return Outer(a, g, self.shape)

    def _patches(self) -> Tensor:
        """(N, frames, I, *space', *kernel): a strided view of the padded input."""
        x = self._padded()
        for d, (size, step, gap) in enumerate(zip(self.shape[2:], self.stride, self.dilation, strict=True)):
            x = x.unfold(3 + d, gap * (size - 1) + 1, step)[..., ::gap]
        cut = tuple(slice(0, size) for size in self.g.shape[4:])
        return x[(slice(None), slice(None), slice(None), *cut)]

    def _at(self, samples: slice) -> Conv:
        return replace(self, a=self.a[samples], g=self.g[samples])

    def _step(self) -> int:
        """Samples whose patches fit in `ROOM` bytes."""
        n, _, frames = self.g.shape[:3]
        each = frames * self.g.shape[4:].numel() * torch.Size(self.shape[1:]).numel() * self.groups * self.a.element_size()
        return max(1, min(max(n, 1), ROOM // max(each, 1)))

    def _by_outer(self, function: Callable[..., Tensor], *others: Conv) -> Tensor:
        step, n = self._step(), len(self.g)
        if n <= step:
            return function(self.outer(), *(o.outer() for o in others))
        cuts = [slice(s, s + step) for s in range(0, n, step)]
        return torch.cat([function(self._at(cut).outer(), *(o._at(cut).outer() for o in others)) for cut in cuts])
