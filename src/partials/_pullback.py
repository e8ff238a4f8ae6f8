"""Blocks of tensors computed from parameters alone, carried back to the parameters: views by index, anything else by autograd.

Dense rows are never carried back where a product will do: J_p = J_q (dq/dp), so J_p v = J_q (dq/dp v) and J_p^T u = (dq/dp)^T J_q^T u.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ._blocks import Block, Dense, Index, size_of
from ._compat import inside_transform
from ._errors import StaleError
from ._typing import Shape, Tensor

APART = Dense(torch.zeros(0, 0, device="cpu"))
"""Stands for "no entry in common"."""


@dataclass(frozen=True, eq=False)
class Placed(Block):
    """The block of a view whose entries are distinct entries of the parameter: norms and products are those of the view."""

    view: Block
    shape: Shape
    index: Tensor
    """(entries of the view,): their positions in the flattened parameter."""
    key: tuple[Shape, Shape, int]
    """(size, stride, offset) of the view: equal keys are equal views."""

    @property
    def rows(self) -> tuple[int, int]:
        return self.view.rows

    @property
    def dtype(self) -> torch.dtype:
        return self.view.dtype

    def dense(self) -> Tensor:
        flat = self.view._flat()
        return flat.new_zeros(*self.rows, size_of(self.shape)).index_copy(2, self.index, flat).reshape(*self.rows, *self.shape)

    def write(self, out: Tensor, *, add: bool = False) -> None:
        if not add:
            out.zero_()
        flat = self.view._flat().to(out.dtype)
        out.index_add_(2, self.index, flat) if add else out.index_copy_(2, self.index, flat)

    def select(self, index: Index) -> Block:
        return replace(self, view=self.view.select(index))

    def nbytes(self) -> int:
        return self.view.nbytes()

    def matmul(self, v: Tensor) -> Tensor:
        return self.view.matmul(v.flatten(0, -2)[self.index].reshape(*self.view.shape, v.shape[-1]) if v.ndim > 1 else v)

    def rmatmul(self, u: Tensor) -> Tensor:
        return self._place(self.view.rmatmul(u), u.shape[-1])

    def squared_norms(self) -> Tensor:
        return self.view.squared_norms()

    def inner(self, other: Block) -> Tensor:
        its = self._beside(other)
        return super().inner(other) if its is None else self.view.inner(its) if its is not APART else self._zeros(*self.rows)

    def gram(self, other: Block) -> Tensor:
        its = self._beside(other)
        return super().gram(other) if its is None else self.view.gram(its) if its is not APART else self._zeros(*self.rows, *other.rows)

    def own_gram(self, other: Block) -> Tensor:
        its = self._beside(other)
        return (
            super().own_gram(other)
            if its is None
            else self.view.own_gram(its)
            if its is not APART
            else self._zeros(*self.rows, other.rows[1])
        )

    def weighted_sum(self, weights: Tensor) -> Tensor:
        found = self.view.weighted_sum(weights)
        return self._place(found.movedim(0, -1), found.shape[0]).movedim(-1, 0)

    def scaled(self, weights: Tensor) -> Block:
        return replace(self, view=self.view.scaled(weights))

    def mixed(self, matrix: Tensor) -> Block:
        return replace(self, view=self.view.mixed(matrix))

    def _place(self, columns: Tensor, k: int) -> Tensor:
        """(*view shape, k) -> (*shape, k)."""
        flat = columns.reshape(-1, k)
        return flat.new_zeros(size_of(self.shape), k).index_copy(0, self.index, flat).reshape(*self.shape, k)

    def _zeros(self, *shape: int) -> Tensor:
        return self.view.squared_norms().new_zeros(shape)

    def _beside(self, other: Block) -> Block | None:
        """The other's view where it is the same one, APART where the two share no entry, None where nothing is known."""
        if not isinstance(other, Placed):
            return None
        if other.key == self.key:
            return other.view
        if not self.index.numel() or not other.index.numel():
            return APART
        (low, high), (its_low, its_high) = ((int(i.min()), int(i.max())) for i in (self.index, other.index))
        return APART if high < its_low or its_high < low else None


@dataclass(frozen=True, eq=False)
class Pullback(Block):
    """The block of `derived`, a function of `parameter`, times d derived / d parameter by ordinary autograd."""

    inner_block: Block
    derived: Tensor = field(repr=False)
    parameter: Tensor = field(repr=False)
    attached: bool = False
    edge: GradientEdge | None = field(default=None, repr=False)
    """Where the graph of `derived` ends: the parameter may have another edge later (`set_`, another dtype), to which nothing flows."""
    place: int = 0
    """Where the parameter's numbers were, which the graph may read again; a change in place autograd notices by itself."""

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return tuple(self.parameter.shape)

    @property
    def rows(self) -> tuple[int, int]:
        return self.inner_block.rows

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    def dense(self) -> Tensor:
        rows = self.inner_block.dense()
        return (
            self._pull(rows.flatten(0, 1)).unflatten(0, self.rows)
            if rows.shape[0] * rows.shape[1]
            else rows.new_zeros(*self.rows, *self.shape)
        )

    def select(self, index: Index) -> Block:
        return replace(self, inner_block=self.inner_block.select(index))

    def nbytes(self) -> int:
        return self.inner_block.nbytes()

    def matmul(self, v: Tensor) -> Tensor:
        pushed = [self._push(column) for column in v.unbind(-1)]
        found = [column for column in pushed if column is not None]
        return self.inner_block.matmul(torch.stack(found, -1)) if len(found) == len(pushed) > 0 else super().matmul(v)

    def rmatmul(self, u: Tensor) -> Tensor:
        return self._pull(self.inner_block.rmatmul(u).movedim(-1, 0)).movedim(0, -1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self._pull(self.inner_block.weighted_sum(weights))

    def scaled(self, weights: Tensor) -> Block:
        return replace(self, inner_block=self.inner_block.scaled(weights))

    def mixed(self, matrix: Tensor) -> Block:
        return replace(self, inner_block=self.inner_block.mixed(matrix))

    def _pull(self, cotangents: Tensor) -> Tensor:
        """(K, *derived shape) -> (K, *shape): K vector-Jacobian products of the function."""
        cotangents = cotangents.to(self.derived.dtype)
        if not self.attached and len(cotangents) > 2:
            rows = self._pulled_at_once(cotangents)
            if rows is not None:
                return rows
        return torch.stack([self._pulled(g) for g in cotangents.unbind()])

    def _pulled_at_once(self, cotangents: Tensor) -> Tensor | None:
        """One batched pass, which torch does not run for every operation, and for some wrongly: a sum of rows is compared with its own."""
        try:
            (rows,) = torch.autograd.grad(self.derived, self._end, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True)
        except RuntimeError:
            return None
        if rows is None:
            return self.parameter.detach().new_zeros(len(cotangents), *self.shape)
        weights = (torch.arange(len(cotangents), dtype=torch.float64, device=rows.device) + 1).sin()
        own = self._pulled(torch.tensordot(weights.to(cotangents.dtype), cotangents, 1))
        mine, size = (torch.tensordot(w.to(rows.dtype), r, 1) for w, r in ((weights, rows), (weights.abs(), rows.abs())))
        size = size.norm()
        close = (own - mine).norm() <= 1e3 * max(torch.finfo(t.dtype).eps for t in (rows, cotangents)) * size
        return rows if bool(close) or not bool(size.isfinite()) else None

    def _pulled(self, cotangent: Tensor) -> Tensor:
        with torch.enable_grad():
            (row,) = torch.autograd.grad(
                self.derived, self._end, cotangent, retain_graph=True, create_graph=self.attached, allow_unused=True
            )
        if row is None:
            return torch.zeros_like(self.parameter)
        return row.to_dense() if row.is_sparse else row

    def _push(self, v: Tensor) -> Tensor | None:
        """d derived / d parameter . v, as the derivative of the vector-Jacobian product in its (linear) cotangent.

        None where torch has no such second derivative, or a wrong one: <push v, w> must be <v, pull w>, and is not for an embedding's
        padding row or its scale by frequency. Under a transform nobody may ask.
        """
        if inside_transform():
            return None
        with torch.enable_grad():
            w = self._cotangent().requires_grad_()
            (pulled,) = torch.autograd.grad(self.derived, self._end, w, retain_graph=True, create_graph=True, allow_unused=True)
            if pulled is None:
                return torch.zeros_like(self.derived)
            if not pulled.requires_grad:
                return None
            v = v.to(pulled.dtype)
            try:
                (found,) = torch.autograd.grad(pulled, w, v, retain_graph=True, create_graph=self.attached)
            except (RuntimeError, NotImplementedError):  # the derivative of the backward is not implemented
                return None
        with torch.no_grad():
            gap = (found * w).sum() - (pulled * v).sum()
            size = found.norm() * w.norm() + pulled.norm() * v.norm()
            return found if bool(gap.abs() <= 1e3 * torch.finfo(w.dtype).eps * size) else None

    @property
    def _end(self) -> GradientEdge | Tensor:
        if self.edge is None:
            return self.parameter
        if self.parameter.data_ptr() != self.place:
            raise StaleError(
                "a parameter has other data than when this Jacobian was computed, and its factors are carried back through them",
                got=f"shape {tuple(self.parameter.shape)}, {self.parameter.dtype}, elsewhere",
                expected="the tensor of the call, which may be changed in place",
                hint="compute the Jacobian again, or take what you need from it (dense, norms, ...) before the change",
            )
        return self.edge

    def _cotangent(self) -> Tensor:
        """Something of the derived tensor's shape, the same each time, no two entries alike."""
        numbers = torch.arange(self.derived.numel(), dtype=torch.float64, device=self.derived.device)
        return (numbers + 1).sin().to(self.derived.dtype).view(self.derived.shape)


def carried(block: Block, derived: Tensor, parameter: Tensor, *, attached: bool) -> Block:
    """The block of `parameter` from that of `derived`, which is it, a view of it, or computed from it."""
    if derived is parameter:
        return block
    index = None if attached else positions(derived, parameter)
    if index is None:
        return Pullback(block, derived, parameter, attached, get_gradient_edge(parameter), parameter.data_ptr())
    key = (tuple(derived.shape), derived.stride(), int(derived.storage_offset() - parameter.storage_offset()))
    return Placed(block, tuple(parameter.shape), index, key)


def positions(view: Tensor, parameter: Tensor) -> Tensor | None:
    """Positions in the flattened parameter of a view's entries, None where it is no view or repeats entries."""
    if (
        not view._is_view()
        or view._base is not (parameter if parameter._base is None else parameter._base)
        or view.dtype != parameter.dtype
    ):
        return None
    if any(stride == 0 and size > 1 for size, stride in zip(view.shape, view.stride(), strict=True)):
        return None
    numbers = torch.empty_strided(parameter.shape, parameter.stride(), dtype=torch.int64, device=parameter.device)
    numbers.copy_(torch.arange(parameter.numel(), device=parameter.device).view(parameter.shape))
    offset = view.storage_offset() - parameter.storage_offset()
    found = numbers.as_strided(view.shape, view.stride(), offset).reshape(-1)
    return found if _apart(view) or len(torch.unique(found)) == len(found) else None


def _apart(view: Tensor) -> bool:
    """Whether each dimension steps over all that the smaller steps reach: no entry is there twice, and no number need be read to know."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(view.shape, view.stride(), strict=True) if size > 1):
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True
