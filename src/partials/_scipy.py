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
        return _array(J @ _tensor(v, J)).reshape(rows, v.shape[1])

    def rmatmat(u: Any) -> Any:
        return _array(J.T @ _tensor(u, J).reshape(*J.values.shape, u.shape[1]))

    return _operator((rows, width), J, _by_parts(matmat), _by_parts(rmatmat))


def curvature_operator(curvature: Curvature) -> Any:
    """(P, P), symmetric."""

    def matmat(v: Any) -> Any:
        return _array(curvature @ _tensor(v, curvature.J))

    return _operator(curvature.shape, curvature.J, _by_parts(matmat), _by_parts(matmat))


def _by_parts(product: Any) -> Any:
    """The product of a real operator with complex columns too: of their real and imaginary parts."""

    def whole(v: Any) -> Any:
        return product(v.real) + 1j * product(v.imag) if v.dtype.kind == "c" else product(v)

    return whole


def _operator(shape: Any, J: Jacobian, matmat: Any, rmatmat: Any) -> Any:
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError("as_linear_operator needs SciPy: pip install 'partials[scipy]'") from error

    def matvec(v: Any) -> Any:
        return matmat(v.reshape(-1, 1))[:, 0]

    def rmatvec(u: Any) -> Any:
        return rmatmat(u.reshape(-1, 1))[:, 0]

    dtype = _array(torch.empty(0, dtype=J._dtype_of_rows(), device="cpu")).dtype
    return LinearOperator(shape, matvec=matvec, rmatvec=rmatvec, matmat=matmat, rmatmat=rmatmat, dtype=dtype)


def _tensor(array: Any, J: Jacobian) -> Tensor:
    return torch.as_tensor(array.copy()).to(J.device, torch.promote_types(J._dtype_of_rows(), torch.float32))


def _array(t: Tensor) -> Any:
    return t.detach().to("cpu", torch.promote_types(t.dtype, torch.float32)).numpy()
