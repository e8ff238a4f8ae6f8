"""`InputJacobian`: the per-sample Jacobian with respect to inputs. Block-diagonal over samples, so a vector for each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from . import _algebra, _pieces
from ._blocks import size_of
from ._errors import InputError
from ._pieces import joined
from ._rows import AbstractJacobian, Transposed
from ._typing import Tensor

REFUSED = ("sum", "mean", "variance", "gram", "clipped_sum", "solve", "diagonal", "normal", "ggn", "accumulate_grad", "sketch")


@dataclass(frozen=True, eq=False, repr=False)
class InputJacobian(AbstractJacobian):
    """d output[n] / d input[n]: `J[name]` is (N, *out, *in); `@` and `.T @` take and give one vector per sample, (N, P).

    Quantities that mean something for shared parameters only (`sum`, `gram`, `solve`, ...) are refused by InputError.

    >>> import torch, partials as pt
    >>> J = pt.jacobian(torch.nn.Linear(3, 2), torch.randn(5, 3), wrt="input")
    >>> J["input"].shape, (J.T @ torch.ones(5, 2)).shape
    (torch.Size([5, 2, 3]), torch.Size([5, 3]))
    """

    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        """J v for a vector of each sample: (N, P), (N, *in) of a single input, or {name: (N, *in)} -> (N, *out)."""
        flat = self._vectors(v)
        if self.pieces is not None:
            return self._times(torch.cat(list(flat.values()), -1).reshape(*self._lead[: self.batched], -1))
        with self._reading():
            rows = [
                (_algebra.rows(group).reshape(*self._flat, size_of(group[0].shape)) @ flat[name].unsqueeze(-1)).squeeze(-1)
                for name, group in self.blocks.items()
            ]
            return self._fold(_algebra.sum_of(rows))

    @joined("v")
    def _times(self, v: Tensor) -> Tensor:
        return self @ v

    @property
    def T(self) -> Transposed:
        """`J.T @ u`: (N, *out) -> (N, P), a vector for each sample."""
        return Transposed(self._rmatmul, (*self._lead[: self.batched], self.columns.width))

    H = T

    def _rmatmul(self, u: Tensor) -> Tensor:
        if tuple(u.shape) != self._lead:
            raise InputError(
                "u has another shape than the Jacobian asks for", got=f"shape {tuple(u.shape)}", expected=f"shape {self._lead}"
            )
        if self.pieces is not None:
            return _pieces.per_sample(self, u)
        with self._reading():
            weights = u.reshape(len(self), 1, size_of(self.out))
            parts = {
                name: (weights @ _algebra.rows(group).reshape(*self._flat, size_of(group[0].shape))).reshape(
                    len(self), *self.columns.shapes[name]
                )
                for name, group in self.blocks.items()
            }
            found = self.columns.join(parts, 1)
        return found if self.batched else found.squeeze(0)

    def _vectors(self, v: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        n = len(self)
        if not isinstance(v, Mapping):
            shapes = [(self.columns.width,), *(self.columns.shapes.values() if len(self.names) == 1 else ())]
            if tuple(v.shape) not in [(*self._lead[: self.batched], *shape) for shape in shapes]:
                raise InputError(
                    "v has another shape than the Jacobian asks for",
                    got=f"shape {tuple(v.shape)}",
                    expected=f"shape {(*self._lead[: self.batched], self.columns.width)}: a vector for each sample",
                )
            parts = self.columns.split(v.reshape(n, self.columns.width), 1)
            return {name: part.reshape(n, size_of(self.columns.shapes[name])) for name, part in parts.items()}
        parts = {self.columns.name(name): tensor for name, tensor in v.items()}
        for name, shape in self.columns.shapes.items():
            expected = (n, *shape) if self.batched else shape
            if name not in parts or tuple(parts[name].shape) != expected:
                got = "nothing" if name not in parts else str(tuple(parts[name].shape))
                raise InputError(f"the vector's part {name!r} has another shape", got=got, expected=str(expected))
        return {name: tensor.reshape(n, size_of(self.columns.shapes[name])) for name, tensor in parts.items()}

    def __getattr__(self, name: str) -> object:
        if name in REFUSED:
            raise InputError(
                f"{name} is a quantity over shared parameters; these rows belong to inputs, which every sample has for itself",
                got=f"wrt={', '.join(self.names)}",
                expected="parameters in wrt",
                hint="J.dict(), J @ v, J.T @ u, J.norms() or J.gram_blocks()",
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
