"""What every Jacobian has, with respect to parameters or to inputs: values, names, rows, norms, the plan, the check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, overload

import torch

from . import _algebra, _pieces
from ._algebra import Blocks
from ._blocks import size_of
from ._columns import Columns
from ._compat import inside_transform
from ._errors import InputError, MemoryBudgetError, MethodError, StaleError
from ._machine import share
from ._moved import moved, same_place
from ._pieces import Pieces, joined
from ._plan import LARGE, Plan, human_bytes
from ._state import arithmetic
from ._sums import Sums
from ._typing import ByName, Shape, Tensor

if TYPE_CHECKING:
    from .checks.report import Report


Check = Callable[[Any, str], "Report"]
"""From a Jacobian and a level to the report."""


@dataclass(frozen=True)
class Origin:
    """Where a Jacobian comes from: the problem it answers (as a closure that checks it) and what it must find unchanged."""

    check: Check | None = None
    sources: tuple[tuple[str, Tensor, int], ...] = ()
    """Tensors that are read again by quantities, with the version they had."""


@dataclass(frozen=True, eq=False, repr=False)
class AbstractJacobian(ABC):
    """Rows d output[n] / d target, one for each sample n and output entry, held in blocks."""

    values: Tensor
    """f's output: (N, *out); (*out) for a single sample (`batched=False`)."""
    blocks: Blocks
    columns: Columns
    plan: Plan
    batched: bool = True
    attached: bool = False
    """Whether results carry a graph (`create_graph=True`)."""
    aux: Any = None
    origin: Origin = field(default_factory=Origin)
    pieces: Pieces | None = field(default=None, kw_only=True)
    """Where the rows are not held but had piece by piece: then `blocks` is empty."""

    @property
    def out(self) -> Shape:
        """The output shape of one sample."""
        return tuple(self.values.shape[1:] if self.batched else self.values.shape)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.columns.shapes)

    @property
    def shape(self) -> Shape:
        """(N, *out, P)."""
        return (*self._lead, self.columns.width)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __len__(self) -> int:
        """The number of samples."""
        return int(self.values.shape[0]) if self.batched else 1

    @overload
    def __getitem__(self, key: str) -> Tensor: ...

    @overload
    def __getitem__(self, key: Any) -> Self: ...

    def __getitem__(self, key: Any) -> Any:
        """`J[name]`: the dense rows of one parameter, (N, *out, *shape). `J[index]`: the Jacobian of the chosen samples."""
        if isinstance(key, str):
            return self._rows_of(key)
        return self._select(key)

    def __contains__(self, name: object) -> bool:
        return name in self.columns.shapes or name in self.columns.aliases

    def __iter__(self) -> Iterator[str]:
        raise TypeError("a Jacobian is not iterable; J.names are its parameters, J[n] its samples")

    def dict(self) -> ByName:
        """The dense rows by name: {name: (N, *out, *shape)}."""
        return {name: self._rows_of(name) for name in self.names}

    def dense(self, out: Tensor | None = None) -> Tensor:
        """The dense Jacobian, (N, *out, P); with `out=`, written into that tensor without a temporary of its size.

        Raises
        ------
        InputError
            if `out` has another shape, dtype or device.
        """
        if self.pieces is not None and out is None:
            return self._dense_of_pieces()
        with self._reading():
            if self.attached and self.pieces is None:
                return self._fold(
                    torch.cat([_algebra.rows(group).reshape(*self._flat, size_of(group[0].shape)) for group in self.blocks.values()], -1)
                )
            if out is None:
                self._demand(self.shape, self._dtype_of_rows())
                out = torch.empty(self.shape, dtype=self._dtype_of_rows(), device=self.device)
            elif tuple(out.shape) != self.shape or out.dtype != self._dtype_of_rows() or out.device != self.device:
                raise InputError(
                    "out= does not fit the Jacobian",
                    got=f"shape {tuple(out.shape)}, {out.dtype}, {out.device}",
                    expected=f"shape {self.shape}, {self._dtype_of_rows()}, {self.device}",
                )
            if self.pieces is not None:
                return _pieces.dense(self, out)
            flat = out.view(*self._flat, self.columns.width) if out.is_contiguous() else out.new_empty(*self._flat, self.columns.width)
            _algebra.write(self.blocks, flat)
            return out if out.is_contiguous() else out.copy_(flat.reshape(self.shape))

    @joined()
    def _dense_of_pieces(self) -> Tensor:
        return self.dense()

    @joined()
    def norms(self, ord: float = 2) -> Tensor:
        """The norm of every row over all parameters together: (N, *out)."""
        with self._reading():
            if ord == 2:
                return self._fold(_root(self._sums.squared_norms()))
            return self._fold(_algebra.other_norms(self.blocks, ord))

    @joined(outputs=False)
    def gram_blocks(self) -> Tensor:
        """Each sample's own block of J J^T: (N, *out, *out)."""
        with self._reading():
            found = self._sums.own_gram()
            return found.reshape((*self._lead, *self.out))

    def unflatten(self, t: Tensor) -> ByName:
        """A tensor with a flat P axis first, (P,) or (P, k), by name: {name: (*shape) or (*shape, k)}."""
        return self.columns.split(t, 0)

    def to(self, device: torch.device | str) -> Self:
        """The same Jacobian with values and factors on another device, where quantities are then computed.

        Factors of several batches that one accelerator cannot hold may lie in host memory, and come back a batch at a time for each
        quantity: `pt.concat([pt.jacobian(model, x.cuda()).to("cpu") for x in batches]).to("cuda")`.

        Raises
        ------
        RuntimeError
            of torch, where there is no such device.
        """
        device = torch.device(device)
        if self.pieces is None and same_place(self.values, device):
            return self
        pieces = None if self.pieces is None else self.pieces.through(lambda J: J.to(device))
        with self._reading():
            blocks = {name: tuple(moved(block, device) for block in group) for name, group in self.blocks.items()}
        return replace(self, values=self.values.to(device), blocks=blocks, pieces=pieces, aux=None, origin=Origin())

    def check(self, level: str = "quick") -> Report:
        """Compare this Jacobian with one ordinary backward, and samples of it with a batch of one. See `partials.check`."""
        if self.pieces is not None:
            return self.pieces.check(level)
        if self.origin.check is None:
            raise MethodError(
                "a Jacobian of chosen or joined samples, or on another device, has no function to be checked against",
                hint="check the Jacobians it came from",
            )
        return self.origin.check(self, level)

    def __repr__(self) -> str:
        if self.pieces is not None:
            lines = [f"{type(self).__name__} {self.shape} {self.dtype} on {self.device}: computed piece by piece"]
            return "\n".join([*lines, *self._lines()])
        held = sum(block.nbytes() for group in self.blocks.values() for block in group)
        rows = size_of(self.shape) * torch.finfo(self.dtype).bits // 8
        lines = [f"{type(self).__name__} {self.shape} {self.dtype} on {self.device}: {human_bytes(held)} held, {human_bytes(rows)} dense"]
        return "\n".join([*lines, *self._lines()])

    def _lines(self) -> list[str]:
        names = list(self.columns.shapes.items())
        lines = [f"  {name:<32} {shape}" for name, shape in names[:12]]
        lines += [f"  ... and {len(names) - 12} more"] * (len(names) > 12)
        return [*lines, f"  by {self.plan.method}" + (f", in chunks of {self.plan.chunk}" if self.plan.chunk else "")]

    @property
    def _lead(self) -> Shape:
        return (len(self), *self.out) if self.batched else self.out

    @property
    def _flat(self) -> tuple[int, int]:
        """(N, C)."""
        return len(self), size_of(self.out)

    def _fold(self, t: Tensor) -> Tensor:
        """(N, C, ...) -> (N, *out, ...)."""
        return t.reshape((*self._lead, *t.shape[2:]))

    @cached_property
    def _sums(self) -> Sums:
        return Sums(self.blocks, self.attached)

    def _dtype_of_rows(self) -> torch.dtype:
        if self.pieces is not None:
            return self.pieces.dtype()
        found = self.dtype
        for group in self.blocks.values():
            found = torch.promote_types(found, group[0].dtype)
        return found

    @joined()
    def _rows_of(self, name: str) -> Tensor:
        self._demand((*self._flat, *self.columns.shapes[self.columns.name(name)]), self.dtype)
        with self._reading():
            group = self.blocks[self.columns.name(name)]
            rows = _algebra.rows(group)
            own = self.attached or inside_transform() or not any(block.keeps(rows) for block in group)
            return self._fold(rows if own else rows.clone())

    def _select(self, key: Any) -> Self:
        if not self.batched:
            raise InputError("a Jacobian of a single sample has no samples to choose", got=repr(key), expected="a parameter name")
        n = len(self)
        try:
            index = torch.arange(n, device="cpu")[key.cpu() if isinstance(key, Tensor) else key].reshape(-1)
        except (IndexError, TypeError) as error:
            raise InputError(
                "the index does not choose samples",
                got=f"{key!r}",
                expected=f"an int, slice, list, mask or int64 tensor within {n} samples",
            ) from error
        if self.pieces is not None:
            values = self.values.index_select(0, index.to(self.device))
            return replace(self, values=values, aux=None, pieces=self.pieces.select(index))
        with self._reading():
            chosen = _algebra.select(self.blocks, index)
            values = self.values.index_select(0, index.to(self.device))
        return replace(self, values=values, blocks=chosen, aux=None, origin=replace(self.origin, check=None))

    def _reading(self) -> AbstractContextManager[Any]:
        """Before factors are read: what they alias must be unchanged. Inside: `arithmetic`."""
        for name, tensor, version in self.origin.sources:
            if tensor._version != version:
                raise StaleError(
                    f"{name} has been changed in place since this Jacobian was computed, and its factors read it",
                    got=f"version {tensor._version}",
                    expected=f"version {version}",
                    hint="compute the Jacobian again, or take what you need from it (dense, norms, ...) before the change",
                )
        return arithmetic(attached=self.attached)

    def _demand(self, shape: Shape, dtype: torch.dtype) -> None:
        """MemoryBudgetError where a large result would take more than its share of what is free."""
        needed = size_of(shape) * dtype.itemsize
        if needed > LARGE and needed > (room := share(self.device)):
            raise MemoryBudgetError(
                f"a result of shape {tuple(shape)} does not fit",
                got=human_bytes(needed),
                expected=f"at most {human_bytes(room)}, half of what is free",
                hint="J.dense(out=...) into memory of your own (torch.from_file, say), or a quantity that needs no dense rows",
            )

    @abstractmethod
    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        """J v."""

    @property
    @abstractmethod
    def T(self) -> Transposed:
        """The transpose: `J.T @ u`."""


@dataclass(frozen=True)
class Transposed:
    """J^T, an operator that knows one thing: `@`."""

    apply: Callable[[Tensor], Tensor]
    shape: Shape

    def __matmul__(self, u: Tensor) -> Tensor:
        return self.apply(u)


def _root(squares: Tensor) -> Tensor:
    """The square root, with derivative zero (not NaN) where a row is zero and a graph is kept."""
    if not squares.requires_grad:
        return squares.sqrt()
    zero = squares == 0
    return torch.where(zero, torch.zeros_like(squares), torch.where(zero, torch.ones_like(squares), squares).sqrt())
