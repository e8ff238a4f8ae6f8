"""J and J^T H J as SciPy's linear operators: NumPy in, NumPy out, products from factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ._typing import Tensor

if TYPE_CHECKING:
    from ._jacobian import Jacobian
    from ._solve import Curvature


def linear_operator(J: Jacobian) -> Any:
    """(N C, P)."""
    rows, width = J.values.numel(), J.shape[-1]

    def matmat(v: Any) -> Any:
        return _array(J @ _tensor(v, J)).reshape(rows, -1)

    def rmatmat(u: Any) -> Any:
        return _array(J.T @ _tensor(u, J).reshape(*J.values.shape, -1))

    return _operator((rows, width), J, matmat, rmatmat)


def curvature_operator(curvature: Curvature) -> Any:
    """(P, P), symmetric."""

    def matmat(v: Any) -> Any:
        return _array(curvature @ _tensor(v, curvature.J))

    return _operator(curvature.shape, curvature.J, matmat, matmat)


def _operator(shape: Any, J: Jacobian, matmat: Any, rmatmat: Any) -> Any:
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError("as_linear_operator needs SciPy: pip install 'partials[scipy]'") from error

    def matvec(v: Any) -> Any:
        return matmat(v.reshape(-1, 1))[:, 0]

    def rmatvec(u: Any) -> Any:
        return rmatmat(u.reshape(-1, 1))[:, 0]

    dtype = _array(J.values.new_empty(0)).dtype
    return LinearOperator(shape, matvec=matvec, rmatvec=rmatvec, matmat=matmat, rmatmat=rmatmat, dtype=dtype)


def _tensor(array: Any, J: Jacobian) -> Tensor:
    return torch.as_tensor(array.copy()).to(J.device, torch.promote_types(J.dtype, torch.float32))


def _array(t: Tensor) -> Any:
    return t.detach().to("cpu", torch.promote_types(t.dtype, torch.float32)).numpy()
