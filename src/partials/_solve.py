"""Damped least squares and curvature systems on a Jacobian, on whichever side is smaller, or from products alone.

(J^T J + d)^-1 J^T r = J^T (J J^T + d)^-1 r, and (J^T H J + d)^-1 b = (b - J^T (d + H J J^T)^-1 H J b) / d (Woodbury).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ._errors import InputError, MethodError
from ._scipy import curvature_operator
from ._state import unrounded
from ._typing import Shape, Tensor

if TYPE_CHECKING:
    from ._jacobian import Jacobian

SIDE, DENSE = 16384, 2**30
"""The largest matrix that is factorised, and the bytes of rows that are decomposed, where nobody asked for it."""


@dataclass(frozen=True)
class How:
    """Which formula, and when conjugate gradients stop."""

    method: str = "auto"
    tolerance: float | None = None
    max_iter: int | None = None


@dataclass(frozen=True, eq=False)
class Curvature:
    """J^T H J of shape (P, P), symmetric, never formed: `@`, `solve`, `as_linear_operator`. What `J.ggn(H)` returns."""

    J: Jacobian
    H: Tensor | None = None
    """(N, C, C), symmetric; None is the identity."""

    @property
    def shape(self) -> Shape:
        return (self.J.columns.width, self.J.columns.width)

    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        """(P,), (P, k) or by name -> (P,) or (P, k)."""
        u = self.J @ v
        columns = u.shape[-1] if u.ndim > self.J.values.ndim else 1
        if self.H is not None:
            with unrounded():
                u = (self.H.to(u.dtype) @ u.reshape(*self.H.shape[:2], columns)).reshape(u.shape)
        return self.J.T @ u

    def solve(
        self,
        b: Tensor,
        damping: float,
        *,
        method: str = "auto",
        dtype: torch.dtype | None = None,
        tolerance: float | None = None,
        max_iter: int | None = None,
    ) -> Tensor:
        """(J^T H J + damping)^-1 b for b (P,), H positive semidefinite: (P,). With damping 0 the shortest least-squares solution.

        The options are those of `Jacobian.solve`; "rows" (Woodbury's identity on J J^T) needs damping above 0, there is no "svd".
        """
        if tuple(b.shape) != self.shape[:1]:
            raise InputError(
                "b has another shape than the curvature asks for", got=f"shape {tuple(b.shape)}", expected=f"shape {self.shape[:1]}"
            )
        wide = self if dtype is None else Curvature(self.J._wider(dtype), self.H)
        how = How(method, tolerance, max_iter)
        with unrounded():
            return SYSTEMS[_choice(wide.J, damping, how, SYSTEMS, exact="columns")](wide, b.to(_working(wide.J)), damping, how)

    def as_linear_operator(self) -> Any:
        """As a `scipy.sparse.linalg.LinearOperator`, for cg, eigsh, ...; see `Jacobian.as_linear_operator`."""
        return curvature_operator(self)


def least_squares(J: Jacobian, r: Tensor, damping: float, how: How) -> Tensor:
    """argmin_x |J x - r|^2 + damping |x|^2, the shortest such x where damping is zero: (P,)."""
    method = _choice(J, damping, how, LEAST_SQUARES, exact="svd")
    with unrounded():
        return LEAST_SQUARES[method](J, r.to(_working(J)), damping, how)


def _working(J: Jacobian) -> torch.dtype:
    """Factorisations want float32 at the least."""
    return torch.promote_types(J._dtype_of_rows(), torch.float32)


def _choice(J: Jacobian, damping: float, how: How, known: Mapping[str, Any], exact: str) -> str:
    """`exact` is the method of damping 0."""
    if not 0 <= damping < torch.inf:
        raise InputError("damping is not understood", got=repr(damping), expected="zero or more")
    if how.method not in ("auto", *known):
        raise InputError(f"method={how.method!r} is unknown", got=repr(how.method), expected=f"one of: {', '.join(('auto', *known))}")
    if how.method != "auto":
        return how.method
    rows, width = J.values.numel(), J.columns.width
    if damping == 0:
        small = rows * width * J.dtype.itemsize <= DENSE if exact == "svd" else width <= SIDE
        return exact if small else "cg"
    if min(rows, width) > SIDE:
        return "cg"
    return "rows" if rows <= width else "columns"


def _by_rows(J: Jacobian, r: Tensor, damping: float, how: How) -> Tensor:
    kernel = J.gram().reshape(r.numel(), r.numel()).to(r.dtype)
    return J.T @ _shifted_solve(kernel, damping, r.reshape(-1)).reshape(r.shape)


def _by_columns(J: Jacobian, r: Tensor, damping: float, how: How) -> Tensor:
    return _curvature_by_columns(Curvature(J), J.T @ r, damping, how)


def _by_svd(J: Jacobian, r: Tensor, damping: float, how: How) -> Tensor:
    dense = J.dense().reshape(r.numel(), J.columns.width).to(r.dtype)
    if not dense.numel():
        return dense.new_zeros(J.columns.width)
    if damping == 0:
        return torch.linalg.pinv(dense) @ r.reshape(-1)
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    return right.mH @ ((left.mH @ r.reshape(-1)) * values / (values.square() + damping))


def _by_gradients(J: Jacobian, r: Tensor, damping: float, how: How) -> Tensor:
    return _conjugate_gradients(Curvature(J), J.T @ r, damping, how)


def _curvature_by_rows(curvature: Curvature, b: Tensor, damping: float, how: How) -> Tensor:
    J, H = curvature.J, curvature.H
    if damping == 0:
        raise InputError('method="rows" divides by the damping', got="damping=0", expected="above 0", hint='method="columns" or "cg"')
    (n, c), rows = J._flat, J.values.numel()
    if H is None:
        H = torch.eye(c, dtype=b.dtype, device=b.device).expand(n, c, c)
    H, kernel = H.to(b.dtype), J.gram().reshape(n, c, rows).to(b.dtype)
    system = (H @ kernel).reshape(rows, rows) + damping * torch.eye(rows, dtype=b.dtype, device=b.device)
    right = (H @ (J @ b).reshape(n, c, 1)).reshape(rows)
    met: Tensor = J.T @ torch.linalg.solve(system, right).reshape(J.values.shape)
    return (b - met) / damping


def _curvature_by_columns(curvature: Curvature, b: Tensor, damping: float, how: How) -> Tensor:
    return _shifted_solve(curvature.J.normal(curvature.H).to(b.dtype), damping, b)


def _shifted_solve(matrix: Tensor, damping: float, right: Tensor) -> Tensor:
    """(matrix + damping I)^-1 right for a positive semidefinite matrix, the pseudo-inverse for damping 0: (R,) -> (R,)."""
    if damping == 0:
        return torch.linalg.pinv(matrix, hermitian=True) @ right
    shifted = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) == 0:
        return torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)
    values, vectors = torch.linalg.eigh(matrix)  # rounding took it below zero: eigenvalues are put back there, the damping is exact
    return vectors @ ((vectors.mT @ right) / (values.clamp_min(0) + damping))


def _conjugate_gradients(curvature: Curvature, b: Tensor, damping: float, how: How) -> Tensor:
    """(A + damping)^-1 b from zero (so that x stays in the range of J^T), until the true residual is small (Hestenes and Stiefel 1952)."""
    side = min(curvature.J.values.numel(), len(b))
    most = min(10 * side + 10, 10_000) if how.max_iter is None else how.max_iter
    limit = _number(b.norm()) * (torch.finfo(b.dtype).eps ** 0.5 if how.tolerance is None else how.tolerance)
    x, residual, steps = torch.zeros_like(b), b, 0
    while True:
        direction, square = residual, residual @ residual
        while steps < most and not _number(square) <= limit**2:
            steps += 1
            seen = curvature @ direction + damping * direction
            length = square / (direction @ seen)
            x, residual = x + length * direction, residual - length * seen
            square, before = residual @ residual, square
            direction = residual + (square / before) * direction
            if not bool(square.isfinite()):
                break
        residual = b - (curvature @ x + damping * x)
        if _number(residual.norm()) <= limit:
            return x
        if steps >= most or not bool(residual.isfinite().all()):
            raise MethodError(
                "conjugate gradients have not converged",
                got=f"a residual of {_number(residual.norm()):.2e} after {steps} steps",
                expected=f"{limit:.2e} within {most} steps",
                hint="more damping, dtype=torch.float64, a larger tolerance or max_iter",
            )


def _number(t: Tensor) -> float:
    return float(t.detach())


Solve = Callable[..., Tensor]
LEAST_SQUARES: dict[str, Solve] = {"rows": _by_rows, "columns": _by_columns, "svd": _by_svd, "cg": _by_gradients}
SYSTEMS: dict[str, Solve] = {"rows": _curvature_by_rows, "columns": _curvature_by_columns, "cg": _conjugate_gradients}
