"""`Jacobian`: the per-sample Jacobian with respect to parameters, a linear operator of shape (N, *out, P)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import torch

from . import _algebra, _pieces
from ._blocks import size_of
from ._errors import InputError, MemoryBudgetError, listed
from ._input_jacobian import InputJacobian
from ._pieces import added, joined
from ._plan import human_bytes
from ._rows import AbstractJacobian, Origin, Transposed
from ._scipy import linear_operator
from ._sketch import sketch
from ._solve import Curvature, How, least_squares
from ._stack import Stack
from ._sums import Sums
from ._typing import ByName, Shape, Tensor
from ._wide import wide


@dataclass(frozen=True, eq=False, repr=False)
class Jacobian(AbstractJacobian):
    """d output / d parameters for every sample: what `partials.jacobian` returns.

    Index letters: N samples, `*out` the output shape of one sample, P parameter entries in the order of `names`, each
    flattened in C order. Quantities are computed from the blocks; dense rows are formed only where they are asked for.

    >>> import torch, partials as pt
    >>> model = torch.nn.Linear(3, 2)
    >>> J = pt.jacobian(model, torch.randn(5, 3))
    >>> J.shape, J["weight"].shape, J.norms().shape
    ((5, 2, 8), torch.Size([5, 2, 2, 3]), torch.Size([5, 2]))
    """

    inputs: InputJacobian | None = None
    """The rows with respect to inputs, where `wrt` named inputs beside parameters."""
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    """The user's parameters by name, for `accumulate_grad`."""

    @overload
    def __getitem__(self, key: str) -> Tensor: ...

    @overload
    def __getitem__(self, key: Any) -> Jacobian: ...

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and self.inputs is not None and key in self.inputs:
            return self.inputs[key]
        return super().__getitem__(key)

    def _select(self, key: Any) -> Jacobian:
        chosen = super()._select(key)
        return chosen if self.inputs is None else replace(chosen, inputs=self.inputs[key])

    def to(self, device: torch.device | str) -> Jacobian:
        found = super().to(device)
        return found if self.inputs is None or found is self else replace(found, inputs=self.inputs.to(device))

    to.__doc__ = AbstractJacobian.to.__doc__

    def dict(self) -> ByName:
        """The dense rows by name, inputs first: {name: (N, *out, *shape)}."""
        return {**({} if self.inputs is None else self.inputs.dict()), **super().dict()}

    @joined()
    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        """J v: (P,), (P, k) or tensors by name -> (N, *out) or (N, *out, k)."""
        with self._reading():
            pieces = None if self.attached else self.columns.pieces(v, self._sums.dtype)
            if pieces is not None:
                return self._sums.push(pieces).reshape(self._lead)
            parts, columns = self.columns.vector(v)
            found = self._fold(self._sums.matmul(parts))
        return found if columns else found.squeeze(-1)

    @property
    def T(self) -> Transposed:
        """`J.T @ u`: (N, *out) or (N, *out, k) -> (P,) or (P, k)."""
        return Transposed(self._rmatmul, (self.columns.width, *self._lead))

    H = T

    @added("u")
    def _rmatmul(self, u: Tensor) -> Tensor:
        columns = u.ndim == len(self._lead) + 1
        self._expect("u", u.shape[:-1] if columns else u.shape, self._lead)
        with self._reading():
            found = self._sums.rmatmul(u.reshape(*self._flat, u.shape[-1] if columns else 1))
        return found if columns else found.squeeze(-1)

    def gram(self, other: Jacobian | None = None) -> Tensor:
        """J K^T, the (empirical tangent) kernel of all rows with all rows: (N, *out, M, *out). `other` has the same parameters."""
        right = self if other is None else other
        _same_columns([self, right])
        if self.pieces is not None or right.pieces is not None:
            return _pieces.gram(self, right)
        self._demand((*self._lead, *right._lead), self.dtype)
        with self._reading(), right._reading():
            found = self._sums.gram(right._sums)
            return found.reshape((*self._lead, *right._lead))

    @added("weights", outputs=True)
    def sum(self, weights: Tensor | None = None) -> Tensor:
        """sum_n w[n] J[n], weights (N,), all ones by default: (*out, P)."""
        w = self._ones() if weights is None else weights.to(self.values)
        self._expect("weights", w.shape, (len(self),))
        with self._reading():
            return self.columns.join(_algebra.weighted_sum(self.blocks, w), 1).reshape(*self.out, self.columns.width)

    def mean(self) -> Tensor:
        """The mean over samples: (*out, P). NaN where N = 0, as in torch."""
        return self.sum() / len(self) if len(self) else self.sum() * torch.nan

    def variance(self, correction: int = 1) -> Tensor:
        """The variance of every entry over samples, divided by N - correction: (*out, P)."""
        n = len(self)
        if self.pieces is not None:
            return _pieces.variance(self, correction)
        with self._reading():
            shift = self.columns.split(self.mean().reshape(-1, self.columns.width), 1)
            squares = {name: _algebra.scatter(group, shift[name]) for name, group in self.blocks.items()}
            return self.columns.join(squares, 1).reshape(*self.out, self.columns.width) / max(n - correction, 0)

    @added("H", together="H")
    def diagonal(self, H: Tensor | None = None) -> Tensor:
        """diag(J^T H J), H (N, C, C) over flattened outputs, the identity by default: (P,). The GGN's or Fisher's diagonal."""
        with self._reading():
            left = self.blocks if H is None else _algebra.mixed(self.blocks, self._matrices(H))
            return self.columns.join(_algebra.products(left, self.blocks, self._ones()), 1).sum(0)

    @added("H", together="H")
    def normal(self, H: Tensor | None = None) -> Tensor:
        """J^T H J dense, (P, P), for small P only: MemoryBudgetError above 4 GiB."""
        width = self.columns.width
        if width * width * 8 > 4 * 2**30:
            raise MemoryBudgetError(
                "J^T H J is too large to be formed",
                got=f"P = {width}: {human_bytes(8.0 * width * width)}",
                expected="at most 4 GiB",
                hint="J.ggn(H) @ v, or J.diagonal(H)",
            )
        with self._reading():
            return _algebra.normal(self.blocks, None if H is None else self._matrices(H))

    def ggn(self, H: Tensor | None = None) -> Curvature:
        """J^T H J as an operator, H (N, C, C) symmetric, the identity by default: `J.ggn(H) @ v`, v (P,), (P, k) or
        by name -> (P,) or (P, k).

        With H the loss' second derivative in f's outputs it is the generalised Gauss-Newton matrix, which for softmax and cross entropy,
        and for least squares, is the Fisher information. `J.ggn(H).solve(g, damping)` is then the natural gradient.
        (Martens 2020, "New insights and perspectives on the natural gradient method", section 8.)
        """
        return Curvature(self, None if H is None else self._matrices(H))

    @overload
    def clipped_sum(
        self, max_norm: float | Mapping[str, float], per: str = "all", return_norms: Literal[False] = False, *, epsilon: float = 0.0
    ) -> Tensor: ...

    @overload
    def clipped_sum(
        self, max_norm: float | Mapping[str, float], per: str = "all", *, return_norms: Literal[True], epsilon: float = 0.0
    ) -> tuple[Tensor, Any]: ...

    def clipped_sum(
        self, max_norm: float | Mapping[str, float], per: str = "all", return_norms: bool = False, *, epsilon: float = 0.0
    ) -> Any:
        """sum_n min(1, max_norm / (|J[n]| + epsilon)) J[n] of scalar outputs: (P,); zeros for N = 0.

        `per="parameter"` clips each parameter's part by its own norm; `max_norm` may then be {name: bound}. With `return_norms`, also the
        norms before clipping, (N,) or {name: (N,)}. (Abadi et al. 2016, "Deep learning with differential privacy", eq. 1; `epsilon` is
        there for codes that divide so.)

        Raises
        ------
        InputError
            for outputs that are not scalar, an unknown `per`, a max_norm that is not positive, or rows that are not finite.
        """
        if size_of(self.out) != 1:
            raise InputError(
                "clipped_sum needs one scalar per sample",
                got=f"output shape {self.out}",
                expected="()",
                hint="pt.gradient(f, x, target, loss=...)",
            )
        bounds = max_norm if isinstance(max_norm, Mapping) else dict.fromkeys(self.names, max_norm)
        known_bounds = bounds is not max_norm or (per == "parameter" and set(bounds) == set(self.names))
        if per not in ("all", "parameter") or not known_bounds or not all(bound > 0 for bound in bounds.values()) or not epsilon >= 0:
            raise InputError(
                "clipped_sum is not understood",
                got=f"max_norm={max_norm!r}, per={per!r}" + (f", epsilon={epsilon!r}" if epsilon else ""),
                expected='a positive max_norm, per="all" or "parameter"; {name: bound} of all parameters with the latter',
            )
        if self.pieces is not None:
            clipped, by_name = _pieces.clipped_sum(self, max_norm, per, epsilon)
        else:
            clipped, by_name = self._clipped(bounds, per, epsilon)
        if not return_norms:
            return clipped
        return clipped, (next(iter(by_name.values())) if per == "all" else by_name)

    def _clipped(self, bounds: Mapping[str, float], per: str, epsilon: float) -> tuple[Tensor, ByName]:
        with self._reading():
            squares = {name: _algebra.squared_norms(group) for name, group in self.blocks.items()}
            if per == "all":
                total = _algebra.sum_of(list(squares.values()))
                squares = dict.fromkeys(squares, total)
            # (a scalar factor for each sample folds into the cotangent: one product per parameter)
            norms = {name: square.clamp_min(0).sqrt() for name, square in squares.items()}
            factors = {name: (bounds[name] / (norm + epsilon)).clamp(max=1).unsqueeze(-1) for name, norm in norms.items()}
            if per == "all":
                clipped = self._sums.rmatmul(factors[self.names[0]])
            else:
                clipped = torch.cat([Sums({name: group}, self.attached).rmatmul(factors[name]) for name, group in self.blocks.items()])
            _algebra.demand_finite(squares)  # (last: to read the answer is to wait for the device)
        return clipped.squeeze(-1), {name: norm.squeeze(1) for name, norm in norms.items()}

    @joined()
    def sketch(self, k: int, kind: str = "gaussian", seed: int = 0) -> Tensor:
        """J S, every row projected to k numbers: (N, *out, k), float32 or wider. Inner products are kept on average, E<Sx, Sy> = <x, y>.

        S (P, k) is fixed by `seed`, parameter name and entry: the same for every batch, chunk, process and device, so that sketches made
        apart can be compared, and J.sketch is linear in J. It is never held as a whole. The variance of <Sx, Sy>, for S = S(k):

        "gaussian"
            (|x|^2 |y|^2 + <x,y>^2) / k. Costs N C P k multiplications (N C T E k for an embedding's rows).
        "rademacher"
            (|x|^2 |y|^2 + <x,y>^2 - 2 sum_p x_p^2 y_p^2) / k: random signs, at the same cost, made faster.
        "sparse"
            the same as that of signs. Every entry is added to one column in each of h = gcd(k, 4) segments: rows are formed a few at a
            time, and the cost is N C P h whatever k is.
            (Kane and Nelson 2014, "Sparser Johnson-Lindenstrauss transforms", block construction.)
        "kronecker"
            for each matrix parameter, (d, e) by its first dimension and the rest, A^T X B with random signs A (d, k1), B (e, k2), k1 k2 = k
            as nearly square as k allows: inputs and cotangents are projected before they meet, and no row is formed. It is no single
            projection of P, and has more variance: for the matrices X, Y of x, y at most (|X'Y|^2 + tr X'YX'Y) / k2
            + (|XY'|^2 + tr XY'XY') / k1 + (|XY'|^2 + |X'Y|^2 + |X|^2 |Y|^2 + <X,Y>^2) / k, never above (2/k1 + 2/k2 + 4/k) |x|^2 |y|^2,
            which rows of rank one come near. Vectors as "sparse"; pairs of different parameters p, q add
            (|x_p|^2 |y_q|^2 + <x_p,y_p> <x_q,y_q>) / k. (Choe et al. 2024, "What is your data worth to GPT?", section 3, with signs.)

        Raises
        ------
        InputError
            for an unknown kind, or k and seed that are no integers.

        >>> import torch, partials as pt
        >>> J = pt.jacobian(torch.nn.Linear(30, 2), torch.randn(5, 30))
        >>> J.sketch(16).shape, J.sketch(16, "kronecker", seed=1).shape
        (torch.Size([5, 2, 16]), torch.Size([5, 2, 16]))
        """
        dtype = torch.promote_types(self._dtype_of_rows(), torch.float32)
        with self._reading():
            return self._fold(sketch(self.blocks, k, kind, seed, self.values.new_empty(0, dtype=dtype)))

    def solve(
        self,
        r: Tensor,
        damping: float,
        *,
        method: str = "auto",
        dtype: torch.dtype | None = None,
        tolerance: float | None = None,
        max_iter: int | None = None,
    ) -> Tensor:
        """argmin_d |J d - r|^2 + damping |d|^2 for r (N, *out): (P,). With damping 0 the shortest of the minimisers.

        Parameters
        ----------
        method
            "rows": J^T (J J^T + damping)^-1 r. "columns": (J^T J + damping)^-1 J^T r. "cg": conjugate gradients on the latter from products
            alone, until |b - A d| <= tolerance |b| for A = J^T J + damping and b = J^T r, measured on the final d, not on the recurrence.
            "svd": of the dense rows, with singular values below max(N C, P) eps of the largest taken as zero where damping is 0. "auto":
            the smaller of rows and columns where it has at most 16384 of them, else "cg"; for damping 0 "svd" where the dense rows fit
            in 1 GiB, else "cg".
        dtype
            torch.float64 reads float32 factors in float64 and does all sums in it. J J^T has the squared condition number of J: without it,
            damping below eps |J|^2 is lost in rounding.
        tolerance, max_iter
            of "cg": by default the root of eps, and ten times the smaller side, at most 10000. Not reached: MethodError with the figures.

        >>> import torch, partials as pt
        >>> J = pt.jacobian(torch.nn.Linear(3, 2), torch.randn(5, 3))
        >>> J.solve(torch.randn(5, 2), damping=1e-3).shape
        torch.Size([8])
        """
        self._expect("r", r.shape, self._lead)
        how = How(method, tolerance, max_iter)
        return least_squares(self if dtype is None else self._wider(dtype), r, damping, how)

    def as_linear_operator(self) -> Any:
        """J as a `scipy.sparse.linalg.LinearOperator` of shape (N C, P), for lsqr, lsmr, svds, ...: products from factors, as NumPy arrays.

        Rows are (n, c) in C order; dtype is J's (float32 for half precision). Needs scipy: `pip install 'partials[scipy]'`.
        """
        return linear_operator(self)

    def accumulate_grad(self, weights: Tensor | None = None) -> None:
        """Add sum_n w[n] J[n] of scalar outputs into `p.grad` of every parameter, as a backward of the weighted sum would.

        `weights` are (N,), ones by default. InputError where outputs are no scalars, or a parameter is no leaf that requires grad.
        """
        if size_of(self.out) != 1:
            raise InputError(
                "accumulate_grad needs one scalar per sample", got=f"output shape {self.out}", expected="()", hint="J.T @ u, unflattened"
            )
        not_leaves = [name for name, tensor in self.leaves.items() if not tensor.is_leaf or not tensor.requires_grad]
        if not_leaves:
            raise InputError("some parameters have no .grad to add to", got=listed(not_leaves), expected="leaf tensors that require grad")
        total = self.unflatten(self.sum(weights).reshape(-1))
        for name, parameter in self.leaves.items():
            part = (torch.view_as_complex(total[name]) if parameter.is_complex() else total[name]).to(parameter)
            if parameter.grad is None:
                parameter.grad = part.clone()
            elif self.attached:
                parameter.grad = parameter.grad + part
            else:
                parameter.grad.add_(part)  # (in place, as backward: others may hold this tensor)

    def _ones(self) -> Tensor:
        return self.values.new_ones(len(self))

    def _matrices(self, H: Tensor) -> Tensor:
        n, c = self._flat
        self._expect("H", H.shape, (n, c, c))
        return H.to(self._dtype_of_rows())

    def _wider(self, dtype: torch.dtype) -> Jacobian:
        """This Jacobian with values and factors in `dtype` or wider."""
        blocks = {name: tuple(wide(block, dtype) for block in group) for name, group in self.blocks.items()}
        pieces = None if self.pieces is None else self.pieces.through(lambda J: J._wider(dtype), dtype)
        return replace(self, values=self.values.to(torch.promote_types(self.dtype, dtype)), blocks=blocks, pieces=pieces)

    def _expect(self, what: str, got: Sequence[int], expected: Shape) -> None:
        if tuple(got) != tuple(expected):
            raise InputError(
                f"{what} has another shape than the Jacobian asks for", got=f"shape {tuple(got)}", expected=f"shape {tuple(expected)}"
            )


def concat(jacobians: Sequence[Jacobian], weights: Sequence[float] | None = None) -> Jacobian:
    """Stack Jacobians over samples: rows of different batches, or of different residuals of the same parameters.

    `weights` multiplies each one's values and rows (1/sqrt(N_i) in least squares). Gram matrices of the result hold the cross
    blocks.

    Raises
    ------
    InputError
        if parameters or output shapes differ, or if there is nothing to stack.

    >>> import torch, partials as pt
    >>> model = torch.nn.Linear(3, 2)
    >>> parts = [pt.jacobian(model, torch.randn(n, 3)) for n in (5, 4)]
    >>> pt.concat(parts, weights=[5**-0.5, 4**-0.5]).gram().shape
    torch.Size([9, 2, 9, 2])
    """
    parts = list(jacobians)
    if not parts:
        raise InputError("there is nothing to stack", got="an empty sequence", expected="at least one Jacobian")
    _same_columns(parts)
    if len({(J.out, J.batched) for J in parts}) > 1 or not parts[0].batched:
        raise InputError("the outputs differ in shape", got=listed(J.out for J in parts), expected="one output shape, batched")
    factors = [1.0] * len(parts) if weights is None else [float(w) for w in weights]
    if len(factors) != len(parts):
        raise InputError("weights do not fit the Jacobians", got=f"{len(factors)} weights", expected=f"{len(parts)}, one for each Jacobian")
    values = torch.cat([J.values * w if w != 1 else J.values for J, w in zip(parts, factors, strict=True)])
    sources = tuple(source for J in parts for source in J.origin.sources)
    pieces = Stack(tuple((replace(J, inputs=None), w) for J, w in zip(parts, factors, strict=True)))
    return replace(
        parts[0],
        values=values,
        blocks={},
        aux=None,
        inputs=None,
        origin=Origin(sources=sources),
        pieces=pieces,
        attached=any(J.attached for J in parts),
    )


def _same_columns(jacobians: Sequence[Jacobian]) -> None:
    first = jacobians[0].columns.shapes
    for J in jacobians[1:]:
        if dict(J.columns.shapes) != dict(first):
            got, expected = (listed(f"{name} {shape}" for name, shape in shapes.items()) for shapes in (J.columns.shapes, first))
            raise InputError("the Jacobians have different parameters", got=got, expected=expected)
