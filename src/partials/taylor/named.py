"""Derivatives by name: `derivatives(u, "t", "xx")(x, t)` and `partial(u, "xx")(x, t)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .._errors import InputError
from .._typing import Function, Tensor
from ._bundle import Derivatives
from .coordinates import Names, curried
from .evaluate import coordinates_of, evaluate
from .specs import Spec


def derivatives(
    u: Function,
    *specs: Spec,
    coords: Names = None,
    vectors: str | Iterable[str] = (),
    method: str = "auto",
    check: str = "first",
) -> Callable[..., Derivatives]:
    """Partial derivatives of `u` by its inputs, point by point: a function of the inputs of `u`.

    Every entry of a coordinate tensor is its own sample, so x and t are of shape `()`, `(N,)`, `(N, 1)` or any other, and broadcast
    against each other. The output keeps the shape of the points in front (a trailing 1 aside): `u` gives `(N,)`, `(N, 1)` or `(N, m)`,
    and so does each derivative. No `requires_grad_`, no `vmap`; the results are ordinary tensors that can be differentiated by the
    parameters, and by inputs that require grad.

    Args:
        u: a function or a module; its coordinates are called as in its signature (of `forward`).
        specs: `"xx"`, `("x", "x")`, `{"x": 2}` or `(2, 0)`, the orders by coordinate; names of several letters as `"theta theta"`.
        coords: the names of the D features of one packed input of shape `(..., D)`, as `"xyt"` or `("x", "theta")`; or the inputs that are
            coordinates, where others are not.
        vectors: inputs of shape `(..., D)` that are one vector coordinate each. With `r` among them, `"r"` is the gradient (output shape
            and then D), `"rr"` the Hessian (and D, D), `"r.r"` the Laplacian and `"r.rt"` the derivative by t of the Laplacian.
        method: `"taylor"` (one run on jets), `"nested"` (nested reverse mode), or `"auto"`, the one that costs less by count; nested
            wherever the function does something that no rule of Taylor mode covers. `d.plan` says which, and why.
        check: `"first"` compares two random points with nested reverse mode the first time; `"always"`; `"never"`.

    Returns:
        a function that returns a bundle `d`: `d.value`, `d.x`, `d.xx`, `d["xt"]` (the same as `d["tx"]`), and all that was found on the
        way. Where a derivative is identically zero it is a tensor of zeros.

    Raises:
        InputError: a spec that cannot be read, coordinates that are not real or do not broadcast, names that do not fit the inputs.
        OutputError: `u` returns no real or complex tensor, or one that does not keep the shape of the points.
        MixingError: the value at one point depends on other points (probed on the first call of a function).
        MethodError: `method="taylor"` and something in the function has no rule.
        CheckError: the two methods disagree.

    Warns where a derivative is zero everywhere since the function is made of straight pieces (ReLU networks have no second derivatives).

    >>> import torch
    >>> x, t = torch.linspace(0, 1, 5, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    >>> d = derivatives(lambda x, t: torch.exp(-t) * torch.sin(x), "t", "xx")(x, t)
    >>> bool(torch.allclose(d.t, d.xx)), d.xx.shape
    (True, torch.Size([5]))
    """
    _require_specs(specs)

    def at(*inputs: Any, **kwargs: Any) -> Derivatives:
        coordinates = coordinates_of(u, inputs, kwargs, coords, vectors)
        alphabet = coordinates.alphabet
        words = [alphabet.word(spec) for spec in specs]
        for spec, word in zip(specs, words, strict=True):
            _require_order(spec, word.order)
        found = evaluate(coordinates, [term for word in words for term in alphabet.terms(word)[0]], method, check)
        return Derivatives(alphabet, found, words, found.plan)

    return curried(at, u)


def partial(
    u: Function, spec: Spec, *, coords: Names = None, vectors: str | Iterable[str] = (), method: str = "auto", check: str = "first"
) -> Callable[..., Tensor]:
    """One partial derivative of `u`, as a function of the inputs of `u`: `derivatives(u, spec)(...)[spec]`.

    The result has the shape of the output of `u`, and a dimension of size D at its end for every free vector block. Arguments and errors
    are those of `derivatives`.

    >>> import torch
    >>> partial(lambda x, t: x**3 * t, "xxt")(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 5.0]))
    tensor([ 6., 12.])
    """
    at = derivatives(u, spec, coords=coords, vectors=vectors, method=method, check=check)

    def at_one(*inputs: Any, **kwargs: Any) -> Tensor:
        return at(*inputs, **kwargs)[spec]

    return curried(at_one, u)


def _require_specs(specs: tuple[Spec, ...]) -> None:
    if not specs:
        raise InputError("no derivative is asked for", expected="at least one", hint='derivatives(u, "x", "xx")')


def _require_order(spec: Spec, order: int) -> None:
    if not order:
        raise InputError(
            "a derivative of order 0 is asked for",
            got=repr(spec),
            expected="order 1 or more",
            hint="the value itself: it is always there as d.value",
        )
