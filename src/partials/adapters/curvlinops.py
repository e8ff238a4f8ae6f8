"""curvlinops: Jacobians and curvature matrices as its linear operators, for its solvers, spectra, traces, diagonals and SciPy export.

    J = pt.jacobian(model, x)
    hutchinson_trace(GGNOperator(J, output_hessians(loss, J.values, y)), num_matvecs=100)

Products come from factors: a forward and C reverse passes once, then one or two products with small matrices for each vector; curvlinops's
own operators run a forward and a reverse pass for each. Parameters are the tensors of its list format, in the order of `J.names`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._jacobian import Jacobian
from .._typing import Shape, Tensor
from . import host

with host("curvlinops-for-pytorch", "curvlinops"):
    from curvlinops._torch_base import PyTorchLinearOperator  # (the interface of its operators, which has no public name)


class Operator(PyTorchLinearOperator):
    """Made of a Jacobian, and where and as it is."""

    def __init__(self, J: Jacobian, columns: list[Shape], rows: list[Shape]) -> None:
        self.J = J
        super().__init__(columns, rows)

    @property
    def device(self) -> torch.device:
        return self.J.device

    @property
    def dtype(self) -> torch.dtype:
        return self.J.dtype


class JacobianOperator(Operator):
    """J of all samples, (N C, P), rows (n, c) in C order.

    >>> import torch, partials as pt
    >>> from partials.adapters.curvlinops import JacobianOperator
    >>> A = JacobianOperator(pt.jacobian(torch.nn.Linear(3, 2), torch.randn(5, 3)))
    >>> A.shape, (A.adjoint() @ torch.ones(10)).shape
    ((10, 8), torch.Size([8]))
    """

    def __init__(self, J: Jacobian) -> None:
        super().__init__(J, _shapes(J), [tuple(J.values.shape)])

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self.J @ _flat(X)]

    def _adjoint(self) -> TransposedJacobianOperator:
        return TransposedJacobianOperator(self.J)


class TransposedJacobianOperator(Operator):
    """J^T of all samples, (P, N C)."""

    def __init__(self, J: Jacobian) -> None:
        super().__init__(J, [tuple(J.values.shape)], _shapes(J))

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return _listed(self.J, self.J.T @ X[0])

    def _adjoint(self) -> JacobianOperator:
        return JacobianOperator(self.J)


class GGNOperator(Operator):
    """scale J^T H J, (P, P), symmetric; H (N, C, C), the identity by default.

    With `H = output_hessians(loss, J.values, y)` it is the generalised Gauss-Newton matrix of the summed loss, which for softmax and cross
    entropy and for least squares is the Fisher matrix; of a gradient, `GGNOperator(G)` is the empirical Fisher matrix sum_n g_n g_n^T.
    curvlinops divides by the number of samples where the loss is a mean: `scale=1 / len(J)`.
    """

    SELF_ADJOINT = True

    def __init__(self, J: Jacobian, H: Tensor | None = None, scale: float = 1.0) -> None:
        self.matrix, self.scale = J.ggn(H), scale
        super().__init__(J, _shapes(J), _shapes(J))

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return _listed(self.J, self.scale * (self.matrix @ _flat(X)))


def output_hessians(loss: Callable[[Tensor, Tensor], Tensor], values: Tensor, target: Tensor) -> Tensor:
    """d2 loss / d output2 for every sample, (N, C, C): of `loss(values[n:n+1], target[n:n+1])`, with C over flattened outputs."""

    def one(value: Tensor, wanted: Tensor) -> Tensor:
        return loss(value.unsqueeze(0), wanted.unsqueeze(0)).reshape(())

    count = int(torch.Size(values.shape[1:]).numel())
    if not len(values):
        return values.new_zeros(0, count, count)
    found: Tensor = torch.func.vmap(torch.func.hessian(one))(values.detach(), target)
    return found.reshape(len(values), count, count)


def _shapes(J: Jacobian) -> list[Shape]:
    return [J.columns.shapes[name] for name in J.names]


def _flat(X: list[Tensor]) -> Tensor:
    """[(*shape, K), ...] -> (P, K)."""
    return torch.cat([x.flatten(0, -2) for x in X])


def _listed(J: Jacobian, matrix: Tensor) -> list[Any]:
    """(P, K) -> [(*shape, K), ...]."""
    shapes = _shapes(J)
    parts = matrix.split([int(torch.Size(shape).numel()) for shape in shapes])
    return [part.reshape(*shape, matrix.shape[-1]) for part, shape in zip(parts, shapes, strict=True)]
