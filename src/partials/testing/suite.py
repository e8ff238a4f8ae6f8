"""The conformance suite: one set of laws for built-in and users' rules, for methods, blocks and Jacobians."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from .._blocks import Block
from .._errors import InputError, MethodError
from .._jacobian import Jacobian
from .._typing import Tensor
from .cases import CASES, Call, Case
from .conformance import Conformance, Finding, finding, rows_finding
from .laws import laws_of, laws_of_block
from .oracle import loop


def check_rule(
    operation: Callable[..., Tensor],
    *args: Any,
    dims: Mapping[int | str, int | None] | None = None,
    out_dim: int = 0,
    **kwargs: Any,
) -> Conformance:
    """Hold the rule of an operation to everything that a rule must do, on example arguments.

    Parameters
    ----------
    operation
        What was given to `partials.rule`.
    *args, **kwargs
        Arguments as the operation takes them, floating tensors in float64. Tensors that require grad are the parameters; the other
        tensors hold samples (two at the least) along dimension 0, or along `dims[position or keyword]` (None: shared by all).
    out_dim
        The sample dimension of what the operation returns.

    Returns
    -------
    Conformance
        In float64 on the whole batch and under `torch.vmap`: rows against one `torch.autograd.grad` for each output of each batch
        of one; every quantity against that of the rows; J v against J^T u; sums against one ordinary backward; the batch in parts
        against the whole; one sample; and float32 against float64.

    Raises
    ------
    CheckError
        where a law is broken; its `.report` is the Conformance.
    MethodError
        where the operation is not captured: the words say why.
    InputError
        where no argument requires grad, none holds samples, or the operation was captured without a rule.

    Examples
    --------
    >>> import torch, partials.testing
    >>> x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    >>> partials.testing.check_rule(torch.nn.functional.linear, x, w).passed
    True
    """
    name = getattr(operation, "__name__", str(operation))
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    call, single = (_called(operation, given, dims or {}, out_dim, dtype) for dtype in (torch.float64, torch.float32))
    _demand_rule(call, name)
    found = [
        *_call_laws(call, "capture"),
        *_renamed("one sample at a time, vectorised", _rows_laws(call, call, randomness="same")),
        *_renamed("float32", _rows_laws(single, call)),
    ]
    return Conformance(f"the rule of {name}", tuple(found)).raise_if_failed()


def check_method(method: str, cases: Mapping[str, Case] | None = None) -> dict[str, Conformance]:
    """Hold a method to the same laws on every case, except where the case says that the method refuses it: {case: Conformance}.

    Raises
    ------
    CheckError
        where a law is broken.
    MethodError
        where the method refuses a case that does not expect it.
    """
    found = {}
    for name, case in (CASES if cases is None else cases).items():
        try:
            found[name] = check_call(case.make(), method)
        except MethodError as refused:
            if case.refuses.get(method, "\0") not in str(refused):
                raise
    return found


def check_call(call: Call, method: str = "auto") -> Conformance:
    """Hold one call of `partials.jacobian`, by one method, to every law.

    Raises
    ------
    CheckError
        where a law is broken.
    """
    return Conformance(f"method {method!r}", tuple(_call_laws(call, method))).raise_if_failed()


def check_jacobian(J: Jacobian) -> Conformance:
    """Hold the quantities of a Jacobian to those of its own dense rows, which must fit in memory.

    Raises
    ------
    CheckError
        where a law is broken.
    """
    return Conformance("the Jacobian", tuple(laws_of(J))).raise_if_failed()


def check_block(block: Block) -> Conformance:
    """Hold the algebra of one block to that of its dense rows.

    Raises
    ------
    CheckError
        where a law is broken.
    """
    return Conformance(f"the block {type(block).__name__}", tuple(laws_of_block(block))).raise_if_failed()


def _call_laws(call: Call, method: str) -> Iterator[Finding]:
    values, rows = loop(call)
    J = call.jacobian(method=method, check="never")
    yield from _against(J, values, rows)
    yield from laws_of(J)
    yield _one_backward(call, J)
    half = max(1, call.samples // 2)
    whole, parts = _flat(J), [call.part(0, half), call.part(half, call.samples)] if call.samples > 1 else [call]
    yield rows_finding("the batch in parts", torch.cat([_flat(part.jacobian(method=method, check="never")) for part in parts]), whole)
    yield rows_finding("one sample", _flat(call.part(0, 1).jacobian(method=method, check="never")), whole[:1])


def _rows_laws(call: Call, reference: Call, **options: Any) -> Iterator[Finding]:
    values, rows = loop(reference)
    yield from _against(call.jacobian(method="capture", check="never", **options), values, rows)


def _renamed(run: str, found: Iterator[Finding]) -> Iterator[Finding]:
    return (replace(f, law=f"{run}: {f.law}") for f in found)


def _against(J: Jacobian, values: Tensor, rows: Mapping[str, Tensor]) -> Iterator[Finding]:
    yield finding("values", J.values, values)
    shape = (len(J), values[:1].numel(), -1)
    for name, part in rows.items():
        yield rows_finding(f"rows of {name}", J[name].reshape(shape), part.reshape(shape))


def _flat(J: Jacobian) -> Tensor:
    """(N, C, P)."""
    rows = J.dense()
    return rows.reshape(len(rows), -1, rows.shape[-1])


def _one_backward(call: Call, J: Jacobian) -> Finding:
    """J^T u against the backward of sum(u * f)."""
    out = call.pick(call.f(*call.inputs, **call.kwargs))
    u = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator("cpu").manual_seed(7), device="cpu").to(out.device)
    parts = torch.autograd.grad((out * u).sum(), list(call.parameters.values()), allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, call.parameters.values(), strict=True)]
    return finding("J^T u = one backward", J.T @ u, torch.cat([g.flatten() for g in whole]))


def _called(operation: Callable[..., Tensor], given: Mapping[Any, Any], dims: Mapping[Any, Any], out_dim: int, dtype: torch.dtype) -> Call:
    """The operation in a small function: its output meets fixed numbers, so that every entry of the cotangent counts."""
    turned = {key: _in_dtype(value, dtype) for key, value in given.items()}
    tensors = {key: value for key, value in turned.items() if isinstance(value, Tensor)}
    parameters = {str(key): value for key, value in tensors.items() if value.requires_grad}
    keys = [key for key in tensors if str(key) not in parameters]
    in_dims = tuple(dims.get(key, 0) for key in keys)
    if not parameters or all(dim is None for dim in in_dims):
        raise InputError(
            "there is nothing to hold a rule to",
            got=f"{len(parameters)} tensors that require grad, {sum(dim is not None for dim in in_dims)} with samples",
            expected="at least one of each among the arguments",
        )

    def f(*inputs: Tensor) -> Tensor:
        put = {**turned, **dict(zip(keys, inputs, strict=True))}
        positional = (value for key, value in put.items() if isinstance(key, int))
        z = operation(*positional, **{key: value for key, value in put.items() if not isinstance(key, int)})
        z = z.movedim(out_dim, 0)
        z = z.reshape(len(z), -1)
        places = torch.arange(3 * z.shape[1], dtype=dtype, device=z.device).reshape(z.shape[1], 3)
        return (z.sin() + z) @ (1 + places).cos()

    options = {"params": parameters, "in_dims": in_dims}
    return Call(f, tuple(turned[key] for key in keys), parameters, options, dims=dict(enumerate(in_dims)))


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(value.requires_grad)


def _demand_rule(call: Call, name: str) -> None:
    """The native run must take the operation by its rule: through an expansion any operation would pass."""
    J = call.jacobian(method="capture", check="never")
    other = [use for use in J.plan.uses if use.rule == "expansion" or use.layout == "vmapped"]
    if other or not J.plan.uses:
        raise InputError(
            f"{name} was not captured by a rule",
            got="; ".join(f"{use.operation}: {use.rule}, {use.layout}" for use in J.plan.uses) or "no use of a parameter",
            expected="a use by its rule in the native run",
            hint="partials.rule(operation), with the very object that is called",
        )
