"""Plus, minus, times, over, to the power of; what has two operands, entry by entry."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..jets import Jet, NoRule, Operand, compose, linear, minus, over, plus, scaled, times
from ..series import exp, log, power, powers_by_tensor
from ..table import jet_rule


@jet_rule("add", "__add__", "__radd__")
def add(f: Operand, g: Operand, *, alpha: Any = 1) -> Jet:
    return plus(f, g, alpha)


@jet_rule("sub", "subtract", "__sub__")
def sub(f: Operand, g: Operand, *, alpha: Any = 1) -> Jet:
    return minus(f, g, alpha)


@jet_rule("__rsub__", "rsub")
def rsub(f: Operand, g: Operand, *, alpha: Any = 1) -> Jet:
    """g - f."""
    return minus(g, f, alpha)


@jet_rule("mul", "multiply", "__mul__", "__rmul__")
def mul(f: Operand, g: Operand) -> Jet:
    return times(f, g)


@jet_rule("div", "divide", "true_divide", "__div__", "__truediv__")
def div(f: Operand, g: Operand, *, rounding_mode: str | None = None) -> Jet:
    if rounding_mode is not None:
        raise NoRule("a division that rounds")
    return over(f, g)


@jet_rule("__rdiv__", "__rtruediv__")
def rdiv(f: Operand, g: Operand) -> Jet:
    return over(g, f)


@jet_rule("neg", "negative", "__neg__")
def neg(f: Jet) -> Jet:
    return linear(f, torch.neg)


@jet_rule("square")
def square(f: Jet) -> Jet:
    return compose(power(2), f)


@jet_rule("reciprocal")
def reciprocal(f: Jet) -> Jet:
    return compose(power(-1), f)


@jet_rule("pow", "float_power", "__pow__")
def pow_(f: Operand, exponent: Operand) -> Jet:
    if isinstance(exponent, Jet):
        if isinstance(f, Jet):
            return compose(exp, times(exponent, compose(log, f)))
        if isinstance(f, torch.Tensor):
            return compose(exp, scaled(exponent, torch.log(f)))
        return compose(exp, scaled(exponent, math.log(f))) if isinstance(f, int | float) and f > 0 else _no_power()
    assert isinstance(f, Jet)
    if isinstance(exponent, torch.Tensor):
        if exponent.requires_grad or exponent.ndim > f.ndim:
            raise NoRule("a power whose exponent is differentiated")
        return compose(powers_by_tensor(exponent), f)
    if isinstance(exponent, complex):
        return _no_power()
    return compose(power(exponent), f)


@jet_rule("__rpow__")
def rpow(f: Operand, base: Operand) -> Jet:
    return pow_(base, f)


def _no_power() -> Jet:
    raise NoRule("a complex or negative base or exponent of a power")


@jet_rule("addcmul")
def addcmul(f: Operand, one: Operand, other: Operand, *, value: Any = 1) -> Jet:
    return plus(f, _product(one, other), value)


@jet_rule("addcdiv")
def addcdiv(f: Operand, one: Operand, other: Operand, *, value: Any = 1) -> Jet:
    return plus(f, over(one, other) if _any(one, other) else one / other, value)  # type: ignore[operator, arg-type]


@jet_rule("lerp")
def lerp(start: Operand, end: Operand, weight: Operand) -> Jet:
    difference = minus(end, start) if _any(start, end) else end - start  # type: ignore[operator]
    return plus(start, _product(weight, difference))


@jet_rule("hypot")
def hypot(f: Operand, g: Operand) -> Jet:
    return compose(power(0.5), plus(_product(f, f), _product(g, g)))


def _product(f: Operand, g: Operand) -> Operand:
    return times(f, g) if _any(f, g) else f * g  # type: ignore[operator]


def _any(*operands: Any) -> bool:
    return any(isinstance(operand, Jet) for operand in operands)
