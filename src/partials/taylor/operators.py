"""Operators of vector calculus on functions of points.

All of them are curried: `laplacian(u)(X)`. Without `coords` or `vectors`, a single tensor input of shape `(..., D)` is one vector of D
features for each point, and several inputs, u(x, y), are scalar coordinates. `coords` and `vectors` are those of `derivatives`; `over`
picks some of the coordinates, by name or by number. `method`, `check` and errors are those of `derivatives`.
`laplacian(u).explain(X)` says which method ran, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, overload

import torch

from .._errors import InputError, OutputError, listed
from .._typing import Function, Shape, Tensor
from .coordinates import Call, Coordinates, Names, curried
from .evaluate import evaluate
from .points import Points
from .specs import VALUE, Components, Term, name_list

Over: TypeAlias = str | Iterable[str] | Iterable[int] | None
Vectors: TypeAlias = str | Iterable[str]
Found: TypeAlias = dict[Term, Tensor]


def hessian(
    u: Function, *, over: Over = None, coords: Names = None, vectors: Vectors = (), method: str = "auto", check: str = "first"
) -> Callable[..., Tensor]:
    """All second derivatives of `u`: the shape of the output and then `(D, D)`, for D coordinates.

    >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> hessian(lambda X: X[..., 0] ** 2 * X[..., 1])(X)[0]
    tensor([[4., 2.],
            [2., 0.]])
    """

    def at(*inputs: Any, **kwargs: Any) -> Tensor:
        coordinates, block = _resolved(u, inputs, kwargs, over, coords, vectors)
        return _matrix(evaluate(coordinates, _pairs(block), method, check), block)

    return curried(at, u)


@overload
def laplacian(
    u: Function,
    over: Over = None,
    weight: Tensor | None = None,
    aux: Literal[False] = False,
    *,
    coords: Names = None,
    vectors: Vectors = (),
    method: str = "auto",
    check: str = "first",
) -> Callable[..., Tensor]: ...


@overload
def laplacian(
    u: Function,
    over: Over = None,
    weight: Tensor | None = None,
    aux: bool = False,
    *,
    coords: Names = None,
    vectors: Vectors = (),
    method: str = "auto",
    check: str = "first",
) -> Callable[..., Any]: ...


def laplacian(
    u: Function,
    over: Over = None,
    weight: Tensor | None = None,
    aux: bool = False,
    *,
    coords: Names = None,
    vectors: Vectors = (),
    method: str = "auto",
    check: str = "first",
) -> Callable[..., Any]:
    """The sum of the second derivatives of `u`, of the shape of the output; with a weight A, `tr(A H)` for the Hessian H.

    Args:
        u: a function or a module.
        over: the coordinates to sum over, as `"xy"`, names, or numbers of features; all of them by default.
        weight: `(D, D)`, or `(D,)` for a diagonal A.
        aux: return `(value, gradient, laplacian)`; the gradient has the shape of the output and then D.

    >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> laplacian(lambda X: X[..., 0] ** 2 * X[..., 1])(X)
    tensor([4., 8.])
    """

    def at(*inputs: Any, **kwargs: Any) -> Any:
        coordinates, block = _resolved(u, inputs, kwargs, over, coords, vectors)
        rank = _rank(weight, len(block))
        if rank and not aux and not weight.requires_grad:  # type: ignore[union-attr]
            return _along_axes(coordinates, block, weight, method, check)  # type: ignore[arg-type]
        wanted = [Term((block,), ())] if rank == 0 else [Term((), (i, i)) for i in block] if rank == 1 else _pairs(block)
        found = evaluate(coordinates, [*wanted, *_gradient_terms(block)] if aux else wanted, method, check)
        result = _weighted(found, block, weight)
        return (found[VALUE], _gradient(found, block), result) if aux else result

    return curried(at, u)


def divergence(
    v: Function, *, over: Over = None, coords: Names = None, vectors: Vectors = (), method: str = "auto", check: str = "first"
) -> Callable[..., Tensor]:
    """The divergence of a vector field `v` whose output `(..., D)` has a component for each of its D coordinates; of shape `(...)`.

    >>> divergence(lambda X: X**2)(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([ 6., 14.])
    """

    def at(*inputs: Any, **kwargs: Any) -> Tensor:
        jacobian = _jacobian(v, inputs, kwargs, over, coords, vectors, method, check)
        return jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)

    return curried(at, v)


def curl(
    v: Function, *, over: Over = None, coords: Names = None, vectors: Vectors = (), method: str = "auto", check: str = "first"
) -> Callable[..., Tensor]:
    """The curl of a vector field: of shape `(..., 3)` for three coordinates, and the scalar `dv_y/dx - dv_x/dy` of shape `(...)` for two.

    >>> curl(lambda X: torch.stack([-X[..., 1], X[..., 0]], -1))(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([2., 2.])
    """

    def at(*inputs: Any, **kwargs: Any) -> Tensor:
        jacobian = _jacobian(v, inputs, kwargs, over, coords, vectors, method, check)
        size = jacobian.shape[-1]
        if size not in (2, 3):
            raise InputError(
                "the curl is defined in two and three dimensions",
                got=f"{size} coordinates",
                hint='over="xyz" to pick the coordinates of space',
            )
        turned = jacobian - jacobian.mT
        return turned[..., 1, 0] if size == 2 else torch.stack([turned[..., 2, 1], turned[..., 0, 2], turned[..., 1, 0]], -1)

    return curried(at, v)


def biharmonic(
    u: Function, *, over: Over = None, coords: Names = None, vectors: Vectors = (), method: str = "auto", check: str = "first"
) -> Callable[..., Tensor]:
    """The Laplacian of the Laplacian of `u`, the sum of `u_iijj`; of the shape of the output.

    >>> biharmonic(lambda X: X[..., 0] ** 4 + X[..., 0] ** 2 * X[..., 1] ** 2)(torch.tensor([[1.0, 2.0]]))
    tensor([32.])
    """

    def at(*inputs: Any, **kwargs: Any) -> Tensor:
        coordinates, block = _resolved(u, inputs, kwargs, over, coords, vectors)
        term = Term((block, block), ())
        return evaluate(coordinates, [term], method, check)[term]

    return curried(at, u)


def directional(u: Function, v: Tensor, order: int = 1, *, method: str = "auto", check: str = "first") -> Callable[..., Tensor]:
    """The derivative of some order along `v`: that of `s -> u(X + s v)` at 0, for the first input X of shape `(..., D)`.

    Args:
        u: a function or a module of X, and of further inputs that are passed on.
        v: broadcastable to X: `(D,)`, one direction for all points, or one for each of them.
        order: 1 or more.

    >>> directional(lambda X: X[..., 0] ** 3 * X[..., 1], torch.tensor([1.0, 0.0]), order=2)(torch.tensor([[2.0, 5.0]]))
    tensor([60.])
    """
    if not isinstance(order, int) or isinstance(order, bool) or order < 1:
        raise InputError("a derivative along a direction has an order of 1 or more", got=repr(order))

    def at(*inputs: Any, **kwargs: Any) -> Tensor:
        call = Call.of(u, inputs, kwargs)
        name, points = next(iter(call.tensors.items()), ("", None))
        if points is None or not points.dim() or not points.is_floating_point():
            raise InputError(
                "there is no packed input to take a direction in",
                got=listed(call.tensors),
                expected="a first tensor input of shape (..., D)",
            )
        if not _fits(v, tuple(points.shape)):
            raise InputError(
                "the direction does not broadcast to the input", got=f"{tuple(v.shape)}", expected=f"{tuple(points.shape)} or a part of it"
            )

        def along(s: Tensor) -> Any:
            return call({name: points + s.unsqueeze(-1) * v})

        steps = torch.zeros(points.shape[:-1], dtype=points.dtype, device=points.device)
        term = Term((), (0,) * order)
        return evaluate(Coordinates.of(Call.of(along, (steps,), {}), None, ()), [term], method, check)[term]

    return curried(at, u)


def _resolved(
    u: Function, inputs: Sequence[Any], kwargs: Any, over: Over, coords: Names, vectors: Vectors
) -> tuple[Coordinates, Components]:
    """The coordinates of a call, and the components that the operator runs over."""
    call = Call.of(u, inputs, kwargs)
    real = [name for name, tensor in call.tensors.items() if tensor.is_floating_point()]
    single = coords is None and not vectors and len(call.tensors) == 1 == len(real) and call.tensors[real[0]].dim() > 0
    coordinates = Coordinates.of(call, coords, real if single else vectors)
    known = coordinates.alphabet.components
    if over is None:
        return coordinates, tuple(component for name in known if name not in call.tensors or name in real for component in known[name])
    chosen = over if isinstance(over, str) else tuple(over)
    if not isinstance(chosen, str) and chosen and all(isinstance(place, int) for place in chosen):
        return coordinates, _numbered([place for place in chosen if isinstance(place, int)], len(coordinates.slots))
    names = name_list(chosen if isinstance(chosen, str) else [str(name) for name in chosen], known, "over")
    for name in names:
        if name not in known:
            raise coordinates.alphabet.unknown(f"over={over!r}", name)
    return coordinates, tuple(component for name in names for component in known[name])


def _numbered(over: Sequence[int], count: int) -> Components:
    if not all(-count <= place < count for place in over) or len({place % count for place in over}) < len(over):
        raise InputError(
            "`over` has numbers that name no coordinate, or one twice", got=str(tuple(over)), expected=f"different numbers below {count}"
        )
    return tuple(place % count for place in over)


def _pairs(block: Components) -> list[Term]:
    return [_pair(i, j) for place, i in enumerate(block) for j in block[place:]]


def _pair(i: int, j: int) -> Term:
    return Term((), (min(i, j), max(i, j)))


def _gradient_terms(block: Components) -> list[Term]:
    return [Term((), (i,)) for i in block]


def _gradient(found: Found, block: Components) -> Tensor:
    return torch.stack([found[term] for term in _gradient_terms(block)], -1)


def _matrix(found: Found, block: Components) -> Tensor:
    return torch.stack([torch.stack([found[_pair(i, j)] for j in block], -1) for i in block], -2)


def _rank(weight: Tensor | None, size: int) -> int:
    if weight is None:
        return 0
    if not isinstance(weight, Tensor) or tuple(weight.shape) not in ((size,), (size, size)):
        raise InputError(
            "the weight of the Laplacian does not fit the coordinates",
            got=f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__,
            expected=f"a tensor of shape ({size},) or ({size}, {size})",
        )
    return weight.dim()


def _weighted(found: Found, block: Components, weight: Tensor | None) -> Tensor:
    """`tr(A H)`: A is a matrix, a diagonal, or the identity."""
    if weight is None:
        return found[Term((block,), ())]
    if weight.dim() == 1:
        return sum((found[_pair(i, i)] * a for i, a in zip(block, weight, strict=True)), torch.zeros_like(found[VALUE]))
    return (_matrix(found, block) * weight.mT).sum((-2, -1))


def _along_axes(coordinates: Coordinates, block: Components, weight: Tensor, method: str, check: str) -> Tensor:
    """tr(A H) for a constant A: in the directions of its principal axes it is a sum of second derivatives with signs, one for each axis.

    A of rank r costs r first derivatives and not D (D + 1) / 2 second ones.
    """
    symmetric = torch.diag(weight) if weight.dim() == 1 else (weight + weight.mT) / 2
    sizes, axes = torch.linalg.eigh(symmetric.detach().to(torch.float64))
    kept = sizes.abs() > 1e-14 * sizes.abs().max()
    sizes, axes = sizes[kept], axes[:, kept] * sizes[kept].abs().sqrt()
    points = Points.of(coordinates, coordinates.inputs_of(block))
    some = next(iter(points.tensors.values()))
    if not len(sizes):
        return torch.zeros_like(coordinates.call(points.tensors))
    steps = some.new_zeros((*points.shape, len(sizes)))

    def along(s: Tensor) -> Any:
        moved = dict(points.tensors)
        for component, axis in zip(block, axes.to(some), strict=True):
            name, feature = coordinates.slots[component]
            step = s @ axis
            x = moved[name]
            if feature is None:
                moved[name] = x + step.reshape(x.shape)
            else:
                unit = torch.zeros(x.shape[-1], dtype=x.dtype, device=x.device)
                unit[feature] = 1
                moved[name] = x + step.unsqueeze(-1) * unit
        return coordinates.call(moved)

    up, down = (tuple(torch.nonzero(sign).flatten().tolist()) for sign in (sizes > 0, sizes < 0))
    terms = [Term((axes_of_sign,), ()) if axes_of_sign else None for axes_of_sign in (up, down)]
    there = Coordinates.of(Call.of(along, (steps,), {}), None, "s")
    found = evaluate(there, [term for term in terms if term is not None], method, check)
    plus, minus = (None if term is None else found[term] for term in terms)
    return -minus if plus is None else plus if minus is None else plus - minus  # type: ignore[operator]


def _jacobian(
    v: Function, inputs: Sequence[Any], kwargs: Any, over: Over, coords: Names, vectors: Vectors, method: str, check: str
) -> Tensor:
    """The derivatives of a vector field, `(..., D, D)`: components, then coordinates."""
    coordinates, block = _resolved(v, inputs, kwargs, over, coords, vectors)
    found = evaluate(coordinates, _gradient_terms(block), method, check)
    value = found[VALUE]
    if not value.dim() or value.shape[-1] != len(block):
        raise OutputError(
            "the vector field does not have a component for each coordinate",
            got=f"output {tuple(value.shape)}",
            expected=f"(..., {len(block)})",
            hint='over="xy" to pick the coordinates that the components belong to',
        )
    return _gradient(found, block)


def _fits(v: Tensor, shape: Shape) -> bool:
    try:
        return tuple(torch.broadcast_shapes(v.shape, shape)) == shape
    except RuntimeError:
        return False
