"""`Conv`: the block of a convolution's weight, kept as the input and the cotangent; patches are unfolded a few samples at a time.

A transposed convolution is the same with the roles of the two exchanged: its weight meets the input at one position with a patch of
the output, so that the cotangent is unfolded and the input is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from math import prod

import torch
import torch.nn.functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from . import _formulas, _room
from ._blocks import Block, Index, chosen
from ._factors import Outer
from ._formulas import Costs
from ._gather import cat, each, in_chunks, widest
from ._products import tracked
from ._typing import Shape, Tensor

SHARE = 2
"""Of a temporary's room, one part in so many is what patches take at a time: then a cache holds them, until their product is done."""
CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
GRADIENT: dict[int, Callable[..., Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


@dataclass(frozen=True, eq=False)
class Conv(Block):
    """J[n, c] = sum over positions of g (x) patch. Several images of one sample (frames) are further positions."""

    a: Tensor
    """(N, frames, I, *space)."""
    g: Tensor
    """(N, C, frames, O, *space')."""
    shape: Shape
    """(O, I/groups, *kernel), transposed (I, O/groups, *kernel)."""
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False

    @property
    def rows(self) -> tuple[int, int]:
        return self.g.shape[0], self.g.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.g.dtype

    def dense(self) -> Tensor:
        """The rows: one product for each offset along the kernel's first dimension, or of patches a few samples at a time."""
        if self.transposed:
            return self._by_outer(lambda block: block.dense())
        if _formulas.choice("dense", self._costs()[1]) == "patches":
            return cat([rows for _, rows in self._patched()]).reshape(*self.rows, *self.shape)
        return torch.stack(list(self._strips()), 5).reshape(*self.rows, *self.shape)

    def write(self, out: Tensor, *, add: bool = False) -> None:
        if self.transposed or tracked(self.a, self.g, out):
            super().write(out, add=add)
            return
        if _formulas.choice("dense", self._costs()[1]) == "patches":
            for samples, rows in self._patched():
                place = out[samples].view(rows.shape)
                place.add_(rows) if add else place.copy_(rows)
            return
        target = out.view(*self.rows, self.groups, self.shape[0] // self.groups, *self.shape[1:])
        for offset, strip in enumerate(self._strips()):
            place = target.select(5, offset)
            place.add_(strip) if add else place.copy_(strip)

    def _patched(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows (n, C, groups, O/groups, I/groups * kernel) of a few samples, whose patches a cache holds: one product for them all."""
        (_, c, frames, o), groups, space = self.g.shape[:4], self.groups, self.g.shape[4:]
        entries, positions = prod(self.shape[1:]), prod(space)
        size = frames * positions * groups * entries * self.a.element_size()
        x = self._patches(space).unflatten(2, (groups, -1))  # (N, frames, groups, I/groups, *space, *kernel), a view
        x = x.permute(0, 2, 1, 3, *range(4 + len(space), x.ndim), *range(4, 4 + len(space)))
        g = self.g.unflatten(3, (groups, -1)).permute(0, 3, 2, 1, 4, *range(5, 5 + len(space)))  # (N, groups, frames, C, O/groups, *space)
        g, room, kept = g.reshape(len(x), groups * frames, c * o // groups, positions), None, tracked(x, g)
        fit = _room.tile(self.g) // max(1, SHARE * size)
        for samples in in_chunks(len(x), SHARE * size, self.g, fit - fit % 2 or None):  # (threads take samples: an odd one would take all)
            its = x[samples]
            if room is None or kept:  # (fresh memory for each would cost more than the copy)
                room = torch.empty_like(its, memory_format=torch.contiguous_format)
            patches = room[: len(its)].copy_(its).view(len(its) * groups * frames, entries, positions)
            rows = torch.bmm(g[samples].flatten(0, 1), patches.mT).view(len(its), groups, frames, c, o // groups, entries)
            yield samples, (rows.squeeze(2) if frames == 1 else rows.sum(2)).transpose(1, 2)

    def _strips(self) -> Iterator[Tensor]:
        """The rows at each offset along the kernel's first dimension: (N, C, groups, O/groups, I/groups, *kernel[1:]).

        Patches are laid out along the other dimensions only. Along the first one, positions that a stride takes apart are brought
        side by side (a phase for each remainder), so that those of one offset lie one after the other: no patch is copied for it.
        """
        (n, c, frames, o), groups, k = self.g.shape[:4], self.groups, self.shape[2]
        step, gap, (length, *others) = self.stride[0], self.dilation[0], self.g.shape[4:]
        across = prod(others)
        x = self._patches(self.g.shape[4:], first=1)  # (N, frames, I, size, *others, *kernel[1:])
        x = x.narrow(3, 0, step * (length - 1) + gap * (k - 1) + 1)
        if x.shape[3] % step:
            x = F.pad(x, [0, 0] * (x.ndim - 4) + [0, -x.shape[3] % step])
        x = x.unflatten(3, (-1, step)).unflatten(2, (groups, -1))  # (N, frames, groups, I/groups, size/step, step, *others, *kernel[1:])
        kernel, places = list(range(6 + len(others), x.ndim)), list(range(6, 6 + len(others)))
        x = x.permute(0, 2, 1, 3, *kernel, 5, 4, *places).reshape(n * groups * frames, prod(self.shape[1:]) // k, step, x.shape[4] * across)
        g = self.g.unflatten(3, (groups, -1)).permute(0, 3, 2, 1, 4, *range(5, 6 + len(others)))  # (N, groups, frames, C, O/groups, ...)
        g = g.reshape(n * groups * frames, c * o // groups, length * across)
        for offset in range(k):
            start = offset * gap // step * across
            rows = torch.bmm(g, x[:, :, offset * gap % step, start : start + length * across].mT)
            rows = rows.view(n, groups, frames, c, o // groups, self.shape[1], *self.shape[3:])
            yield (rows.squeeze(2) if frames == 1 else rows.sum(2)).transpose(1, 2)

    def select(self, index: Index) -> Block:
        return replace(self, a=chosen(self.a, index), g=chosen(self.g, index))

    def nbytes(self) -> int:
        return self.a.nbytes + self.g.nbytes

    def matmul(self, v: Tensor) -> Tensor:
        """J v: the convolution with v, met with the cotangent."""
        (x, pads), g, columns = self._given(), self.g.flatten(2), []
        for weight in v.to(x.dtype).unbind(-1):
            z = self._convolved(x.flatten(0, 1), weight, pads)
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
        x, pads = self._given()
        if self.transposed:
            x, g, pads = self._padded(g), x.flatten(0, 1), (0,) * len(pads)
        else:
            x = x.flatten(0, 1)
        return GRADIENT[len(self.stride)](x, self.shape, g, self.stride, pads, self.dilation, self.groups)

    def _given(self) -> tuple[Tensor, tuple[int, ...]]:
        """The input, and the padding that is left to the kernel: none where it is not the same on both sides, it is in the input then."""
        if self.transposed or all(before == after for before, after in self.padding):
            return self.a, tuple([before for before, _ in self.padding])
        return self._padded(), (0,) * len(self.padding)

    def _convolved(self, x: Tensor, weight: Tensor, pads: tuple[int, ...]) -> Tensor:
        """The operation itself: (N * frames, I, ...) to (N * frames, O, *space')."""
        dims = len(self.stride)
        if not self.transposed:
            return CONV[dims](x, weight, None, self.stride, pads, self.dilation, self.groups)
        reach = [gap * (k - 1) + 1 for gap, k in zip(self.dilation, self.shape[2:], strict=True)]
        least = [(size - 1) * step + r for size, step, r in zip(self.a.shape[3:], self.stride, reach, strict=True)]
        extra = [size + sum(both) - low for size, both, low in zip(self.g.shape[4:], self.padding, least, strict=True)]
        return TRANSPOSED[dims](x, weight, None, self.stride, pads, extra, self.groups, self.dilation)

    def _padded(self, wide: Tensor | None = None) -> Tensor:
        """The side of which patches are taken (the input, transposed the cotangent), padded, as far as patches reach."""
        wide = wide if wide is not None else self.g if self.transposed else self.a
        pads = [p for pair in reversed(self.padding) for p in pair]
        wide = F.pad(wide, pads) if any(pads) else wide
        if self.transposed:  # what output_padding added lies beyond the last patch
            for d, (size, step, gap, k) in enumerate(zip(self.a.shape[3:], self.stride, self.dilation, self.shape[2:], strict=True)):
                at = wide.ndim - len(self.stride) + d
                wide = wide.narrow(at, 0, (size - 1) * step + gap * (k - 1) + 1)
        return wide

    def squared_norms(self) -> Tensor:
        if self.transposed:
            return self._by_outer(lambda block: block.squared_norms())
        if _formulas.choice("norms", self._costs()[0]) == "pairs":
            return self._by_outer(lambda block: block.squared_norms())
        if _formulas.choice("dense", self._costs()[1]) == "patches":
            parts = (widest(rows)[0].flatten(2) for _, rows in self._patched())
            return cat([each(rows, rows) for rows in parts])
        return self._by_samples(lambda block: reduce(torch.add, (each(strip, strip) for (strip,) in map(widest, block._strips()))))

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
        space = self.a.shape[3:] if self.transposed else self.g.shape[4:]
        positions, entries = frames * space.numel(), torch.Size(self.shape[1:]).numel()
        patches = self._patches(space)
        if self.transposed:  # (N, C, frames, O, *space, *kernel) -> (N, C, frames, *space, O, *kernel)
            g = patches.movedim(3, 3 + len(space)).reshape(n, c, positions, self.groups, entries)
            return Outer(self.a.movedim(2, -1).reshape(n, positions, self.groups, self.shape[0] // self.groups), g, self.shape, "io")
        a = patches.movedim(2, 2 + len(space)).reshape(n, positions, self.groups, entries)  # (N, frames, *space', I, *kernel)
        g = self.g.movedim(3, -1).reshape(n, c, positions, self.groups, self.shape[0] // self.groups)
        return Outer(a, g, self.shape)

    def _patches(self, space: torch.Size, first: int = 0) -> Tensor:
        """(..., *space, *kernel): a strided view of the padded side, with patches along the dimensions from `first` on."""
        x = self._padded()
        lead = x.ndim - len(space)
        for d, (size, step, gap) in enumerate(zip(self.shape[2:], self.stride, self.dilation, strict=True)):
            if d >= first:
                x = x.unfold(lead + d, gap * (size - 1) + 1, step)[..., ::gap].narrow(lead + d, 0, space[d])
        return x

    def _at(self, samples: slice) -> Conv:
        return replace(self, a=self.a[samples], g=self.g[samples])

    def _costs(self) -> tuple[Costs, Costs]:
        """Of norms and of dense rows."""
        positions, patch = self.g.shape[2] * self.g.shape[4:].numel(), torch.Size(self.shape[1:]).numel()
        return _formulas.convolved(self.rows, positions, (self.groups, patch, self.shape[0] // self.groups), self.shape[2])

    def _step(self) -> int:
        """Samples whose patches fit in the room for rows."""
        n, c, frames = self.g.shape[:3]
        positions = c * self.a.shape[3:].numel() if self.transposed else self.g.shape[4:].numel()
        each = frames * positions * torch.Size(self.shape[1:]).numel() * self.groups * self.a.element_size()
        return max(1, min(max(n, 1), _room.rows() // max(each, 1)))

    def _by_outer(self, function: Callable[..., Tensor], *others: Conv) -> Tensor:
        step, n = self._step(), len(self.g)
        if n <= step:
            return function(self.outer(), *(o.outer() for o in others))
        cuts = [slice(s, s + step) for s in range(0, n, step)]
        return torch.cat([function(self._at(cut).outer(), *(o._at(cut).outer() for o in others)) for cut in cuts])
