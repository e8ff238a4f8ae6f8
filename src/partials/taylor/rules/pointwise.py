"""Functions of one variable with derivatives of every order, entry by entry: a series for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import series
from ..composition import Series
from ..jets import Jet, NoRule, compose, minus, scaled
from ..table import enter, jet_rule

_SMOOTH: dict[str, Series] = {
    name: getattr(series, name)
    for name in (
        *("exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan"),
        *("asinh", "acosh", "atanh", "sigmoid", "logsigmoid", "erf", "softsign"),
    )
} | {
    "sqrt": series.power(0.5),
    "rsqrt": series.power(-0.5),
    "log2": functools.partial(series.log, base=2.0),
    "log10": functools.partial(series.log, base=10.0),
    "expit": series.sigmoid,
    "ndtr": series.normal,
    **{f"arc{name[1:]}": getattr(series, name) for name in ("asin", "acos", "atan", "asinh", "acosh", "atanh")},
}


def _smooth(of: Series) -> Callable[..., Jet]:
    return lambda f: compose(of, f)


for _name, _series in _SMOOTH.items():
    enter(_smooth(_series), _name)


@jet_rule("erfc")
def erfc(f: Jet) -> Jet:
    return minus(1.0, compose(series.erf, f))


@jet_rule("logit")
def logit(f: Jet, eps: float | None = None) -> Jet:
    if eps is not None:
        raise NoRule("logit with eps")
    return minus(compose(series.log, f), compose(series.log, minus(1.0, f)))


@jet_rule("deg2rad")
def deg2rad(f: Jet) -> Jet:
    return scaled(f, math.pi / 180)


@jet_rule("rad2deg")
def rad2deg(f: Jet) -> Jet:
    return scaled(f, 180 / math.pi)


@jet_rule("tanhshrink")
def tanhshrink(f: Jet) -> Jet:
    return minus(f, compose(series.tanh, f))


@jet_rule(F.softplus)
def softplus(f: Jet, beta: float = 1, threshold: float = 20) -> Jet:
    return compose(series.softplus(beta, threshold), f)


@jet_rule(F.silu)
def silu(f: Jet) -> Jet:
    return compose(series.silu, f)


@jet_rule(F.mish)
def mish(f: Jet) -> Jet:
    return compose(series.mish, f)


@jet_rule(F.gelu)
def gelu(f: Jet, approximate: str = "none") -> Jet:
    return compose(series.gelu_tanh if approximate == "tanh" else series.gelu, f)


@jet_rule(F.elu)
def elu(f: Jet, alpha: float = 1.0) -> Jet:
    return compose(series.elu(alpha), f)


@jet_rule(F.selu, torch.selu)
def selu(f: Jet) -> Jet:
    return compose(series.elu(series.SELU_ALPHA, series.SELU_SCALE), f)


@jet_rule(F.celu, torch.celu)
def celu(f: Jet, alpha: float = 1.0) -> Jet:
    return compose(series.elu(alpha, 1.0, 1 / alpha), f)


@jet_rule(F.hardswish)
def hardswish(f: Jet) -> Jet:
    return compose(series.hardswish, f)
