"""Determinants, inverses and solutions of linear systems; products and distances of vectors.

With A = A0 (I + V), where V has no value and so is nilpotent: log det A = log det A0 + tr(V) - tr(V^2) / 2 + tr(V^3) / 3 - ..., and
A^-1 = (I - V + V^2 - ...) A0^-1, both sums ending at the order of the jet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..._typing import Tensor
from ..frame import Frame
from ..jets import Jet, NoRule, compose, lengthened, linear, minus, over, plus, scaled, stacked, times
from ..series import exp, log
from ..table import jet_rule
from .bent import clamp
from .products import einsum, matmul
from .reduce import norm, total
from .structure import unsqueeze


class Slogdet(NamedTuple):
    """As torch's own named result."""

    sign: Any
    logabsdet: Any


def _relative(f: Jet) -> tuple[Tensor, Tensor]:
    """A0 and V."""
    value, rest = f.parts
    if value.is_complex():
        raise NoRule("determinants and inverses of complex matrices")
    try:
        return value, torch.linalg.solve(value, rest)
    except RuntimeError as error:
        raise NoRule("a singular matrix") from error


def _powers(v: Tensor, frame: Frame) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """(k, V^k by slot) for k = 1, 2, ...; slots that are not there are zero."""
    power = dict(enumerate(v.unbind(0)))
    yield 1, power
    for k in range(2, frame.order + 1):
        following: dict[int, Tensor] = {}
        for slot, pairs in frame.table if k == 2 else frame.powers[k - 2]:
            terms = [weight * (v[i] @ power[j]) for i, j, weight in pairs if j in power]
            if terms:
                following[slot] = sum(terms[1:], terms[0])
        power = following
        yield k, power


def _log_det(f: Jet) -> tuple[Tensor, list[Tensor]]:
    """A0, and the slots of log det beside the value."""
    value, v = _relative(f)
    slots = list(v.diagonal(dim1=-2, dim2=-1).sum(-1).unbind(0))
    for k, power in _powers(v, f.frame):
        for slot, matrix in power.items() if k > 1 else ():
            slots[slot] = slots[slot] + (-1) ** (k + 1) / k * matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    return value, slots


@jet_rule("slogdet")
def slogdet(f: Jet) -> Slogdet:
    value, slots = _log_det(f)
    sign, size = torch.linalg.slogdet(value)
    return Slogdet(sign, Jet(f.frame, parts=(size, torch.stack(slots))))


@jet_rule("logdet")
def logdet(f: Jet) -> Jet:
    sign, size = slogdet(f)
    return Jet(f.frame, parts=(torch.logdet(f.value), torch.where(sign > 0, size.rest, torch.nan)))


@jet_rule("det")
def det(f: Jet) -> Jet:
    value, slots = _log_det(f)
    made = torch.det(value)
    return scaled(compose(exp, Jet(f.frame, parts=(torch.zeros_like(made), torch.stack(slots)))), made)


@jet_rule("inv", "inverse")
def inverse(f: Jet) -> Jet:
    value, v = _relative(f)
    first = torch.linalg.inv(value)
    slots = [torch.zeros_like(first)] * f.frame.rest
    for k, power in _powers(v, f.frame):
        for slot, matrix in power.items():
            slots[slot] = slots[slot] + (-1) ** k * (matrix @ first)
    return Jet(f.frame, parts=(first, torch.stack(slots)))


@jet_rule(torch.linalg.solve)
def solve(A: Any, B: Any, *, left: bool = True) -> Jet:
    if not left:
        raise NoRule("solve from the right")
    vector = B.ndim == 1 or (B.ndim == A.ndim - 1 and tuple(B.shape) == tuple(A.shape[:-1]))
    if vector:
        B = unsqueeze(B, -1) if isinstance(B, Jet) else B.unsqueeze(-1)
    made = matmul(inverse(A), B) if isinstance(A, Jet) else stacked(lengthened(B, A.ndim), lambda t: torch.linalg.solve(A, t))
    return linear(made, lambda t: t.squeeze(-1)) if vector else made


@jet_rule("matrix_power")
def matrix_power(f: Jet, n: int) -> Jet:
    if not 1 <= n <= 16:
        raise NoRule("a power of a matrix that is not between 1 and 16")
    made = f
    for _ in range(n - 1):
        made = matmul(made, f)
    return made


@jet_rule(torch.linalg.matrix_norm)
def matrix_norm(f: Jet, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False) -> Jet:
    if ord != "fro":
        raise NoRule("a matrix norm other than Frobenius'")
    return norm(f, 2, tuple(dim), keepdim)


@jet_rule("cross")
def cross(f: Any, g: Any, dim: int = -1) -> Jet:
    def turned(t: Any, by: int) -> Any:
        return linear(t, lambda s: s.roll(by, dim % t.ndim + 1)) if isinstance(t, Jet) else t.roll(by, dim)

    return minus(times(turned(f, -1), turned(g, 1)), times(turned(f, 1), turned(g, -1)))


@jet_rule("vecdot")
def vecdot(f: Any, g: Any, *, dim: int = -1) -> Jet:
    if (f.anything if isinstance(f, Jet) else f).is_complex():
        raise NoRule("vecdot of complex numbers")
    return total(times(f, g), dim)


@jet_rule("inner")
def inner(f: Any, g: Any) -> Jet:
    if not f.ndim or not g.ndim:
        return times(f, g)
    left, right = "abcdef"[: f.ndim - 1], "uvwxyz"[: g.ndim - 1]
    return einsum(f"{left}k,{right}k->{left}{right}", f, g)


@jet_rule("tensordot")
def tensordot(f: Any, g: Any, dims: Any = 2, out: None = None) -> Jet:
    if isinstance(dims, int):
        dims = (range(f.ndim - dims, f.ndim), range(dims))
    first, second = ([one] if isinstance(one, int) else list(one) for one in dims)
    left, right = list("abcdefgh"[: f.ndim]), list("stuvwxyz"[: g.ndim])
    for i, j in zip(first, second, strict=True):
        right[j] = left[i]
    kept = [*left, *right]
    kept = [letter for letter in kept if kept.count(letter) == 1]
    return einsum(f"{''.join(left)},{''.join(right)}->{''.join(kept)}", f, g)


@jet_rule(F.pairwise_distance)
def pairwise_distance(f: Any, g: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Jet:
    return norm(plus(minus(f, g), eps), p, -1, keepdim)


@jet_rule(torch.cdist)
def cdist(f: Any, g: Any, p: float = 2.0, compute_mode: str = "") -> Jet:
    """torch's own cannot be differentiated twice."""

    def spread(t: Any, dim: int) -> Any:
        return unsqueeze(t, dim) if isinstance(t, Jet) else t.unsqueeze(dim)

    return norm(minus(spread(f, -2), spread(g, -3)), p, -1)


@jet_rule(F.cosine_similarity)
def cosine_similarity(f: Any, g: Any, dim: int = 1, eps: float = 1e-8) -> Jet:
    def size(t: Any) -> Any:
        return clamp(norm(t, 2, dim), min=eps) if isinstance(t, Jet) else t.norm(dim=dim).clamp(min=eps)

    sizes = size(f), size(g)
    return over(total(times(f, g), dim), times(*sizes) if any(isinstance(one, Jet) for one in sizes) else sizes[0] * sizes[1])


@jet_rule("atan2", "arctan2")
def atan2(f: Any, g: Any) -> Jet:
    """The imaginary part of log(g + i f)."""
    like = (f if isinstance(f, Jet) else g).anything
    if like.dtype not in (torch.float32, torch.float64):
        raise NoRule("atan2 in half precision")
    made = compose(log, plus(_complex(g, like), times(1j, _complex(f, like))))
    y, x = (t.value if isinstance(t, Jet) else t for t in (f, g))
    return Jet(made.frame, parts=(torch.atan2(y, x), made.rest.imag))


def _complex(t: Any, like: Tensor) -> Any:
    dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
    return linear(t, lambda s: s.to(dtype)) if isinstance(t, Jet) else t.to(dtype)
