"""Damped least squares on a Jacobian: (J^T J + d) x = J^T r, or x = J^T (J J^T + d)^-1 r, whichever matrix is smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._blocks import size_of
from ._errors import InputError
from ._typing import Tensor

if TYPE_CHECKING:
    from ._jacobian import Jacobian


def least_squares(J: Jacobian, r: Tensor, damping: float) -> Tensor:
    """argmin_x |J x - r|^2 + damping |x|^2, the shortest such x where damping is zero: (P,)."""
    if not damping >= 0:
        raise InputError("damping is not understood", got=repr(damping), expected="zero or more")
    rows, width = len(J) * size_of(J.out), J.columns.width
    flat = r.reshape(rows, 1).to(J.values)
    if damping == 0 or rows == 0:
        dense = J.dense().reshape(rows, width)
        return torch.linalg.pinv(dense).matmul(flat).squeeze(1) if rows else dense.new_zeros(width)
    if rows <= width:
        kernel = J.gram().reshape(rows, rows)
        return J.T @ _shifted_solve(kernel, damping, flat).reshape(r.shape)
    return _shifted_solve(J.normal(), damping, (J.T @ r).unsqueeze(1)).squeeze(1)


def _shifted_solve(matrix: Tensor, damping: float, right: Tensor) -> Tensor:
    """(matrix + damping I)^-1 right for a positive semidefinite matrix."""
    shifted = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) == 0:
        return torch.cholesky_solve(right, factor)
    solution: Tensor = torch.linalg.solve(shifted, right)
    return solution
