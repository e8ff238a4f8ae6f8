"""Dtypes and devices; the real and imaginary parts of complex numbers."""

from __future__ import annotations

from typing import Any

import torch

from ..jets import Jet, NoRule, broadcast, lifted, linear, spread
from ..table import enter, jet_rule
from .linalg import atan2
from .structure import alias, same


@jet_rule("to", "type", "type_as", "cpu", "cuda")
def to(f: Jet, *args: Any, **kwargs: Any) -> Jet:
    """Another dtype or device; the tensor itself where it has those already."""
    plain = [arg.anything if isinstance(arg, Jet) else arg for arg in args]
    like: Any = f.anything.new_empty(0)
    like = like.to(*plain, **kwargs)
    return alias(f, linear(f, lambda t: t.to(like.device, like.dtype)))


for _name, _dtype in {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}.items():
    enter(lambda f, _dtype=_dtype: to(f, _dtype), getattr(torch.Tensor, _name))


@jet_rule("real", torch.Tensor.real.__get__)  # type: ignore[attr-defined]
def real(f: Jet) -> Jet:
    return alias(f, linear(f, torch.real)) if f.anything.is_complex() else same(f)


@jet_rule("imag", torch.Tensor.imag.__get__)  # type: ignore[attr-defined]
def imag(f: Jet) -> Jet:
    return alias(f, linear(f, torch.imag))


@jet_rule("view_as_real")
def view_as_real(f: Jet) -> Jet:
    return alias(f, linear(f, torch.view_as_real))


@jet_rule("view_as_complex")
def view_as_complex(f: Jet) -> Jet:
    return alias(f, linear(f, lambda t: torch.view_as_complex(t.contiguous())))


@jet_rule("conj", "conj_physical")
def conj(f: Jet) -> Jet:
    return alias(f, linear(f, lambda t: t.conj().resolve_conj()))


@jet_rule("complex")
def complex_(f: Any, g: Any) -> Jet:
    frame = next(t.frame for t in (f, g) if isinstance(t, Jet))
    shape = broadcast(tuple(f.shape), tuple(g.shape))
    pairs = zip(*(spread(t if isinstance(t, Jet) else lifted(t, frame), shape) for t in (f, g)), strict=True)
    value, rest = (torch.complex(*pair) for pair in pairs)
    return Jet(frame, parts=(value, rest))


@jet_rule("angle")
def angle(f: Jet) -> Jet:
    if not f.anything.is_complex():
        raise NoRule("the angle of real numbers")
    return atan2(linear(f, torch.imag), linear(f, torch.real))
