"""The Taylor coefficients phi^(k)(x) / k! of functions of one variable, k = 0 .. n, by recurrences.

Most follow from a differential equation that the function solves, e.g. tanh' = 1 - tanh^2 gives
(k + 1) c[k+1] = [k = 0] - sum of c[i] c[k-i]. (Griewank & Walther, Evaluating Derivatives, 2nd ed., tables 13.1 and 13.2.)
At a kink the convention is torch's own: the derivative that its reverse mode gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .._typing import Tensor
from .composition import Scaled, Series, multiplied, scaled
from .slopes import sloped

Coefficients = list[Any]
"""Tensors, some with a factor apart."""
Known = Tensor | None


@sloped(0, 1, 0)
def exp(x: Tensor, n: int, value: Known = None) -> Coefficients:
    e = torch.exp(x) if value is None else value
    return [Scaled(e, 1 / math.factorial(k)) for k in range(n + 1)]


@sloped(0, math.log(2), 0)
def exp2(x: Tensor, n: int, value: Known = None) -> Coefficients:
    e = torch.exp2(x)
    return [Scaled(e, math.log(2) ** k / math.factorial(k)) for k in range(n + 1)]


@sloped(1, 1, 0)
def expm1(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return [torch.expm1(x), *exp(x, n)[1:]]


def log(x: Tensor, n: int, value: Known = None, base: float = math.e) -> Coefficients:
    r, scale = 1 / x, 1 / math.log(base)
    powers = _powers(r, n)
    return [torch.log(x) * scale, *(powers[k] * (scale * (-1) ** (k - 1) / k) for k in range(1, n + 1))]


def log1p(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return [torch.log1p(x), *log(1 + x, n)[1:]]


def power(exponent: float) -> Series:
    """x^p; a whole power has p + 1 coefficients, also at zero."""
    whole = float(exponent).is_integer() and exponent >= 0

    def of(x: Tensor, n: int, value: Known = None) -> Coefficients:
        found = []
        for k in range(min(n, int(exponent)) + 1 if whole else n + 1):
            factor = math.prod(exponent - j for j in range(k)) / math.factorial(k)
            left = exponent - k
            found.append(torch.full_like(x, factor) if left == 0 else factor * x if left == 1 else factor * torch.pow(x, left))
        return found

    return sloped(0, 0, -1)(of) if exponent == -1 else of


def powers_by_tensor(exponent: Tensor) -> Series:
    """x^p with an exponent for each entry."""

    def of(x: Tensor, n: int, value: Known = None) -> Coefficients:
        found, factor = [], torch.ones_like(exponent)
        for k in range(n + 1):
            found.append(torch.where(factor == 0, torch.zeros_like(x), factor * torch.pow(x, exponent - k)))
            factor = factor * (exponent - k) / (k + 1)
        return found

    return of


@sloped(0, 0, -1)
def reciprocal(x: Tensor, n: int, value: Known = None) -> Coefficients:
    powers = _powers(1 / x, n + 1)
    return [powers[k + 1] if k % 2 == 0 else -powers[k + 1] for k in range(n + 1)]


def sin(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _cycle([torch.sin(x), torch.cos(x)], (1, 1, -1, -1), n)


def cos(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _cycle([torch.cos(x), torch.sin(x)], (1, -1, -1, 1), n)


def sinh(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _cycle([torch.sinh(x), torch.cosh(x)], (1, 1, 1, 1), n)


def cosh(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _cycle([torch.cosh(x), torch.sinh(x)], (1, 1, 1, 1), n)


@sloped(1, 0, -1)
def tanh(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _riccati(torch.tanh(x) if value is None else value, -1, n)


@sloped(1, 0, 1)
def tan(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _riccati(torch.tan(x) if value is None else value, 1, n)


@sloped(0, 1, -1)
def sigmoid(x: Tensor, n: int, value: Known = None) -> Coefficients:
    """(1 + tanh(x / 2)) / 2."""
    s = torch.sigmoid(x) if value is None else value
    return [s, *(Scaled(c, factor * 0.5 ** (k + 1)) for k, (c, factor) in enumerate(map(scaled, _riccati(2 * s - 1, -1, n)[1:]), start=1))]


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Series:
    """Its slope is a sigmoid; beyond the threshold, of plus infinity: a straight line."""

    def of(x: Tensor, n: int, value: Known = None) -> Coefficients:
        z = beta * x
        slopes = sigmoid(torch.where(z > threshold, math.inf, z), n)
        return [F.softplus(x, beta, threshold) if value is None else value, *_integrated(slopes, beta, n)]

    return of


def logsigmoid(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return [F.logsigmoid(x) if value is None else value, *_integrated(sigmoid(-x, n), -1, n)]


def _integrated(slopes: Coefficients, inner: float, n: int) -> Coefficients:
    """Coefficients 1 .. n of a function whose derivative at x is s(inner * x), with the coefficients of s."""
    return [Scaled(c, factor * inner ** (k - 1) / k) for k, (c, factor) in zip(range(1, n + 1), map(scaled, slopes), strict=False)]


def silu(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return [F.silu(x), *_times_x(x, sigmoid(x, n))[1:]]


def normal(x: Tensor, n: int, value: Known = None) -> Coefficients:
    """Phi(x), the normal distribution function."""
    return [0.5 * torch.erfc(-x / math.sqrt(2)), *_normal_density(x, n)]


def gelu(x: Tensor, n: int, value: Known = None) -> Coefficients:
    """x Phi(x)."""
    return [F.gelu(x), *_times_x(x, normal(x, n))[1:]]


def gelu_tanh(x: Tensor, n: int, value: Known = None) -> Coefficients:
    """x (1 + tanh(q(x))) / 2 with q(x) = sqrt(2 / pi) (x + 0.044715 x^3)."""
    scale, cube = math.sqrt(2 / math.pi), 0.044715
    slope = [scale * (1 + 3 * cube * x * x), 6 * scale * cube * x, torch.full_like(x, 3 * scale * cube)]
    t = _through(torch.tanh(scale * (x + cube * x**3)), slope, n)
    return [F.gelu(x, approximate="tanh"), *_times_x(x, [0.5 * (1 + t[0]), *(0.5 * c for c in t[1:])])[1:]]


def mish(x: Tensor, n: int, value: Known = None) -> Coefficients:
    """x tanh(softplus(x))."""
    return [F.mish(x), *_times_x(x, _through(torch.tanh(F.softplus(x)), sigmoid(x, n), n))[1:]]


def elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Series:
    """scale * x above zero, scale * alpha * (exp(x * input_scale) - 1) below; at zero the slope of below, and no further derivatives."""

    def of(x: Tensor, n: int, value: Known = None) -> Coefficients:
        e = torch.exp(input_scale * x)
        below = [(scale * alpha * input_scale**k / math.factorial(k)) * e for k in range(n + 1)]
        below[0] = scale * alpha * torch.expm1(input_scale * x)
        return [*_beyond(x > 0, (scale * x, scale), below[:2]), *(torch.where(x < 0, c, 0) for c in below[2:])]

    return of


SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def erf(x: Tensor, n: int, value: Known = None) -> Coefficients:
    root = math.sqrt(2)
    density = _normal_density(root * x, n)
    return [torch.erf(x), *(density[k - 1] * (2 * root**k / k) * k for k in range(1, n + 1))]


def atan(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _primitive(torch.atan(x), _one_over(x, 1, n), n)


def atanh(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _primitive(torch.atanh(x), _one_over(x, -1, n), n)


def asin(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _primitive(torch.asin(x), _one_over_root(1 - x * x, x, -1, n), n)


def acos(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _primitive(torch.acos(x), [-c for c in _one_over_root(1 - x * x, x, -1, n)], n)


def asinh(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _primitive(torch.asinh(x), _one_over_root(1 + x * x, x, 1, n), n)


def acosh(x: Tensor, n: int, value: Known = None) -> Coefficients:
    return _primitive(torch.acosh(x), _one_over_root(x * x - 1, x, 1, n), n)


def softsign(x: Tensor, n: int, value: Known = None) -> Coefficients:
    s = torch.sign(x)
    powers = _powers(1 / (1 + x.abs()), n + 1)
    return [F.softsign(x), *(powers[k + 1] * (-s) ** (k - 1) for k in range(1, n + 1))]


def piecewise_linear(function: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Series:
    """A function of pieces that are straight: its value and its slope, torch's own at the kinks; all further derivatives are zero."""
    return lambda x, n, value=None: [function(x), slope(x).to(x.dtype)]


def hardswish(x: Tensor, n: int, value: Known = None) -> Coefficients:
    inside, above = (x > -3) & (x < 3), x >= 3
    slope = torch.where(inside, (2 * x + 3) / 6, above.to(x.dtype))
    return [F.hardswish(x), slope, inside.to(x.dtype) / 6]


def _powers(r: Tensor, n: int) -> Coefficients:
    """[1, r, r^2, ..., r^n]."""
    found = [torch.ones_like(r), r]
    for _ in range(2, n + 1):
        found.append(found[-1] * r)
    return found


def _cycle(two: Coefficients, signs: tuple[int, int, int, int], n: int) -> Coefficients:
    return [Scaled(two[k % 2], signs[k % 4] / math.factorial(k)) for k in range(n + 1)]


def _square(c: Sequence[Scaled], k: int) -> Scaled:
    """The k-th coefficient of c * c."""
    pairs = [(c[i], c[k - i], 1.0 if 2 * i == k else 2.0) for i in range(k // 2 + 1)]
    (left, right, weight), *others = pairs
    scale = weight * left.factor * right.factor
    total = left.tensor * right.tensor
    for left, right, weight in others:
        total.addcmul_(left.tensor, right.tensor, value=weight * left.factor * right.factor / scale)
    return Scaled(total, scale)


def _riccati(first: Tensor, sign: int, n: int) -> Coefficients:
    """c' = 1 + sign c^2."""
    c = [Scaled(first, 1.0)]
    for k in range(n):
        if k == 0:
            c.append(Scaled(torch.addcmul(torch.ones((), dtype=first.dtype, device=first.device), first, first, value=sign), 1.0))
        else:
            square, factor = _square(c, k)
            c.append(Scaled(square, factor * sign / (k + 1)))
    return c


def _through(first: Tensor, inner: Coefficients, n: int) -> list[Tensor]:
    """tanh of a function: c' = (1 - c^2) * inner, with the coefficients of the inner function's derivative."""
    c, rest = [Scaled(first, 1.0)], list[Tensor]()
    for k in range(n):
        square, factor = _square(c, k)
        rest.append((1 if k == 0 else 0) - factor * square)
        terms = [rest[i] * multiplied(inner[k - i]) for i in range(k + 1) if k - i < len(inner)]
        c.append(Scaled(sum(terms[1:], terms[0]), 1 / (k + 1)))
    return [multiplied(entry) for entry in c]


def _times_x(x: Tensor, coefficients: Coefficients) -> Coefficients:
    c = [multiplied(entry) for entry in coefficients]
    return [x * c[0], *(x * c[k] + c[k - 1] for k in range(1, len(c)))]


def _normal_density(x: Tensor, n: int, value: Known = None) -> Coefficients:
    """Coefficients 1 .. n of the normal distribution function: its density's, divided by k."""
    d = [torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)]
    for k in range(n - 1):
        d.append(-(x * d[k] + (d[k - 1] if k else 0)) / (k + 1))
    return [c / (k + 1) for k, c in enumerate(d[:n])]


def _primitive(first: Tensor, slope: Coefficients, n: int) -> Coefficients:
    return [first, *(slope[k - 1] / k for k in range(1, n + 1))]


def _one_over(x: Tensor, sign: int, n: int) -> Coefficients:
    """1 / (1 + sign x^2)."""
    r = 1 / (1 + sign * x * x)
    c = [r]
    for k in range(1, n):
        c.append(-sign * r * (2 * x * c[k - 1] + (c[k - 2] if k > 1 else 0)))
    return c


def _one_over_root(q: Tensor, x: Tensor, sign: int, n: int) -> Coefficients:
    """q^(-1/2) for q = a + sign x^2: q c' = -sign x c."""
    c = [torch.rsqrt(q)]
    for k in range(n - 1):
        c.append(-sign * ((2 * k + 1) * x * c[k] + (k * c[k - 1] if k else 0)) / ((k + 1) * q))
    return c


def _beyond(where: Tensor, line: tuple[Tensor, float], otherwise: Coefficients) -> Coefficients:
    """A straight line where `where`, and another series elsewhere."""
    values = [line[0], torch.full_like(line[0], line[1])]
    return [torch.where(where, values[k] if k < 2 else torch.zeros_like(c), c) for k, c in enumerate(otherwise)]
