"""Sums, means and norms over dimensions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ..jets import Jet, NoRule, broadcast, compose, join, lifted, linear, minus, plus, scaled, spread, times
from ..series import exp, log, power
from ..table import jet_rule
from .structure import behind, copied


def dims_of(f: Jet, dim: Any) -> tuple[int, ...]:
    """Dimensions of the stack: those given, or all behind the slots."""
    if dim is None or (isinstance(dim, tuple | list) and not dim):
        return tuple(range(1, f.ndim + 1))
    found = behind(dim, f.ndim)
    return (found,) if isinstance(found, int) else tuple(found)


def total(f: Jet, dim: Any = None, keepdim: bool = False) -> Jet:
    dims = dims_of(f, dim)
    return linear(f, lambda t: t.sum(dims, keepdim)) if dims and f.ndim else copied(f)


@jet_rule("sum")
def sum_(f: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Jet:
    summands = f if dtype is None else linear(f, lambda t: t.to(dtype))
    return total(summands, dim if axis is None else axis, keepdim)


@jet_rule("mean")
def mean(f: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Jet:
    dim = dim if axis is None else axis
    return scaled(sum_(f, dim, keepdim, dtype=dtype), 1 / max(count(f, dim), 1))


def count(f: Jet, dim: Any) -> int:
    return math.prod((1, *f.shape)[d] for d in dims_of(f, dim)) if f.ndim else 1


def centred(f: Jet, dim: Any) -> Jet:
    return minus(f, mean(f, dim, True))


@jet_rule("var")
def var(f: Jet, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: float | None = None) -> Jet:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    away = correction if correction is not None else 1 if unbiased is None else int(unbiased)
    c = centred(f, dim)
    return scaled(total(times(c, c), dim, keepdim), 1 / (count(f, dim) - away))


@jet_rule("std")
def std(f: Jet, *args: Any, **kwargs: Any) -> Jet:
    return compose(power(0.5), var(f, *args, **kwargs))


@jet_rule("prod")
def prod(f: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Jet:
    """One factor after the other."""
    if dim is None or dtype is not None or f.shape[dim] > 64:
        raise NoRule("prod over all entries, or over more than 64")
    factors = [linear(f, partial(torch.narrow, dim=behind(dim, f.ndim), start=i, length=1)) for i in range(f.shape[dim])]
    made = factors[0]
    for factor in factors[1:]:
        made = times(made, factor)
    return made if keepdim else linear(made, lambda t: t.squeeze(behind(dim, f.ndim)))


@jet_rule("norm", "vector_norm")
def norm(f: Jet, p: Any = None, dim: Any = None, keepdim: bool = False, dtype: Any = None, **kwargs: Any) -> Jet:
    """At the zero vector first derivatives are torch's choice, zero; of higher ones there are none: NaN, as in reverse mode."""
    p = kwargs.get("ord", p)
    p = 2 if p is None or p == "fro" else p
    if not isinstance(p, int | float) or p <= 0 or dtype is not None or f.anything.is_complex() or kwargs.keys() - {"ord"}:
        raise NoRule("a norm of an unusual order or dtype")
    if p not in (1, 2):
        return _other_norm(f, p, dim, keepdim)
    if p == 1:
        sign = torch.sign(f.bare())
        return total(linear(f, lambda t: t * sign), dim, keepdim)
    made = compose(power(0.5), total(times(f, f), dim, keepdim))
    value, rest = made.parts
    first = torch.tensor([term.order == 1 for term in f.frame.slots[1:]], device=value.device).reshape(-1, *(1,) * value.ndim)
    return Jet(f.frame, parts=(value, torch.where(first & (value == 0), 0, rest)))


def _other_norm(f: Jet, p: float, dim: Any, keepdim: bool) -> Jet:
    from .bent import abs_, amax

    if p == math.inf:
        return amax(abs_(f), () if dim is None else dim, keepdim)
    return compose(power(1 / p), total(compose(power(p), f if p % 2 == 0 else abs_(f)), dim, keepdim))


@jet_rule("cumprod")
def cumprod(f: Jet, dim: int, *, dtype: Any = None) -> Jet:
    """One factor after the other."""
    if dtype is not None or f.shape[dim] > 64:
        raise NoRule("cumprod over more than 64")
    made, *factors = (linear(f, partial(torch.narrow, dim=behind(dim, f.ndim), start=i, length=1)) for i in range(f.shape[dim]))
    found = [made]
    for factor in factors:
        found.append(times(found[-1], factor))
    return join(found, lambda stacks: torch.cat(list(stacks), behind(dim, f.ndim)), dim % f.ndim)


@jet_rule("logaddexp")
def logaddexp(f: Any, g: Any) -> Jet:
    like = f if isinstance(f, Jet) else g
    shape = broadcast(tuple(f.shape), tuple(g.shape))
    both = [Jet(like.frame, parts=spread(t if isinstance(t, Jet) else lifted(t, like.frame, like), shape)) for t in (f, g)]
    return logsumexp(join(both, lambda stacks: torch.stack(list(stacks), 1)), 0)


@jet_rule("logsumexp")
def logsumexp(f: Jet, dim: Any, keepdim: bool = False) -> Jet:
    shift = f.bare().amax(dim, keepdim=True)
    shift = torch.where(shift.isfinite(), shift, 0)
    made = plus(compose(log, total(compose(exp, minus(f, shift)), dim, True)), shift)
    return made if keepdim else linear(made, lambda t: t.squeeze(dims_of(f, dim)))


@jet_rule("softmax", "_softmax")
def softmax(f: Jet, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Jet:
    f, dim = _prepared(f, dim, dtype)
    e = compose(exp, minus(f, f.bare().amax(dim, keepdim=True)))
    return times(e, compose(power(-1), total(e, dim, True)))


@jet_rule("log_softmax")
def log_softmax(f: Jet, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Jet:
    f, dim = _prepared(f, dim, dtype)
    return minus(f, logsumexp(f, dim, True))


def _prepared(f: Jet, dim: Any, dtype: Any) -> tuple[Jet, int]:
    if dim is None or not f.ndim:
        raise NoRule("softmax without its dimension")
    return (f if dtype is None else linear(f, lambda t: t.to(dtype))), dim
