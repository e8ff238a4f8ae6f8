"""Functions with kinks. At a kink the derivative is torch's own choice (zero for relu and abs, a half each for equal maxima)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..._typing import Tensor
from ..jets import Jet, NoRule, compose, lengthened, lifted, linear, plus, times
from ..series import piecewise_linear, power
from ..table import BENT, enter, found, jet_rule
from .structure import behind, gather

Slope = Callable[[Tensor], Tensor]


class Found(NamedTuple):
    """Entries and where they were, as torch's own named results."""

    values: Any
    indices: Any


def _bent(function: Callable[[Tensor], Tensor], slope: Slope) -> Callable[..., Jet]:
    return lambda f: compose(piecewise_linear(function, slope), f)


relu = _bent(torch.relu, lambda x: x > 0)
enter(relu, "relu")
for _name, _function, _slope in (
    ("relu6", F.relu6, lambda x: (x > 0) & (x < 6)),
    ("hardsigmoid", F.hardsigmoid, lambda x: ((x > -3) & (x < 3)) / 6),
):
    enter(_bent(_function, _slope), _name)


@jet_rule("abs", "absolute", "__abs__")
def abs_(f: Jet) -> Jet:
    if not f.anything.is_complex():
        return compose(piecewise_linear(torch.abs, torch.sign), f)
    parts = [linear(f, torch.real), linear(f, torch.imag)]
    return compose(power(0.5), plus(times(parts[0], parts[0]), times(parts[1], parts[1])))


BENT.update(
    {
        function: name
        for name in ("relu", "relu6", "hardsigmoid", "leaky_relu", "hardtanh", "threshold", "prelu")
        for function in found(name)
    }
)
BENT.update({function: name for name in ("hardshrink", "softshrink") for function in found(name)})


@jet_rule("leaky_relu")
def leaky_relu(f: Jet, negative_slope: float = 0.01) -> Jet:
    slope = piecewise_linear(lambda x: F.leaky_relu(x, negative_slope), lambda x: torch.where(x > 0, 1, torch.full_like(x, negative_slope)))
    return compose(slope, f)


@jet_rule("hardtanh")
def hardtanh(f: Jet, min_val: float = -1.0, max_val: float = 1.0) -> Jet:
    made = piecewise_linear(lambda x: F.hardtanh(x, min_val, max_val), lambda x: (x > min_val) & (x < max_val))
    return compose(made, f)


@jet_rule("threshold")
def threshold(f: Jet, threshold: float, value: float) -> Jet:
    return compose(piecewise_linear(lambda x: F.threshold(x, threshold, value), lambda x: x > threshold), f)


@jet_rule("hardshrink")
def hardshrink(f: Jet, lambd: float = 0.5) -> Jet:
    return compose(piecewise_linear(lambda x: F.hardshrink(x, lambd), lambda x: (x < -lambd) | (x > lambd)), f)


@jet_rule("softshrink")
def softshrink(f: Jet, lambd: float = 0.5) -> Jet:
    return compose(piecewise_linear(lambda x: F.softshrink(x, lambd), lambda x: (x < -lambd) | (x > lambd)), f)


@jet_rule("prelu")
def prelu(f: Jet, weight: Tensor) -> Jet:
    value, rest = f.parts
    shaped = weight.reshape(-1, *(1,) * (f.ndim - 2)) if weight.numel() > 1 else weight.reshape(())
    return Jet(f.frame, parts=(F.prelu(value, weight), torch.where(value > 0, rest, rest * shaped)))


@jet_rule("clamp", "clip")
def clamp(f: Jet, min: Any = None, max: Any = None) -> Jet:
    if not isinstance(f, Jet) or isinstance(min, Jet) or isinstance(max, Jet):
        raise NoRule("clamp to bounds that depend on the coordinates")
    if any(isinstance(bound, torch.Tensor) and (bound.requires_grad or bound.ndim > f.ndim) for bound in (min, max)):
        raise NoRule("clamp to bounds that are differentiated")

    def inside(x: Tensor) -> Tensor:
        within = torch.ones_like(x, dtype=torch.bool)
        within = within if min is None else within & (x >= min)
        return within if max is None else within & (x <= max)

    return compose(piecewise_linear(lambda x: torch.clamp(x, min, max), inside), f)


@jet_rule("clamp_min")
def clamp_min(f: Jet, min: Any) -> Jet:
    return clamp(f, min=min)


@jet_rule("clamp_max")
def clamp_max(f: Jet, max: Any) -> Jet:
    return clamp(f, max=max)


def _either(pick: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Jet]:
    """The larger or the smaller of two: its derivatives, and where both are equal the mean of theirs."""

    def rule(f: Any, g: Any) -> Jet:
        like = f if isinstance(f, Jet) else g
        f, g = (t if isinstance(t, Jet) else lifted(t, like.frame, like) for t in (f, g))
        ndim = max(f.ndim, g.ndim)
        f, g = lengthened(f, ndim), lengthened(g, ndim)
        value, one, other = pick(f.value, g.value), f.bare(), g.bare()
        rest = torch.where((one == value) | (other != other), f.rest, g.rest)
        return Jet(f.frame, parts=(value, torch.where(one == other, (f.rest + g.rest) / 2, rest)))

    return rule


maximum, minimum = _either(torch.maximum), _either(torch.minimum)
enter(maximum, "maximum")
enter(minimum, "minimum")
enter(_either(torch.fmax), "fmax")
enter(_either(torch.fmin), "fmin")


def _shared(extreme: Callable[..., Tensor]) -> Callable[..., Jet]:
    """Equal entries share the derivative."""

    def rule(f: Jet, dim: Any = (), keepdim: bool = False) -> Jet:
        dims = tuple(behind(d, f.ndim) - 1 for d in ((dim,) if isinstance(dim, int) else dim))
        value, rest = f.parts
        made = extreme(value, dims, True)
        there = value == made
        slots = torch.where(there, rest, 0).sum([d + 1 for d in dims] or list(range(1, rest.ndim)), True) / there.sum(dims, True)
        whole = Jet(f.frame, parts=(made, slots))
        kept = dims or tuple(range(f.ndim))
        return whole if keepdim else linear(whole, lambda t: t.squeeze(tuple(d + 1 for d in kept)))

    return rule


amax = _shared(torch.amax)
enter(amax, "amax")
enter(_shared(torch.amin), "amin")


def _sawtooth(function: Any) -> Callable[..., Jet]:
    """The derivatives of the argument, wherever there are any."""

    def rule(f: Any, *by: Any) -> Jet:
        if not isinstance(f, Jet) or any(isinstance(b, Jet) or getattr(b, "requires_grad", False) for b in by):
            raise NoRule("a remainder by what is differentiated")
        value, rest = f.parts
        made = function(value, *by)
        return Jet(f.frame, parts=(made, rest.expand(rest.shape[0], *made.shape)))

    return rule


for _name in ("frac", "fmod", "remainder", "__mod__"):
    enter(_sawtooth(getattr(torch, _name, None) or getattr(torch.Tensor, _name)), _name)


@jet_rule("max")
def max_(f: Any, *args: Any, **kwargs: Any) -> Any:
    return _extreme(torch.max, maximum, f, *args, **kwargs)


@jet_rule("min")
def min_(f: Any, *args: Any, **kwargs: Any) -> Any:
    return _extreme(torch.min, minimum, f, *args, **kwargs)


def _extreme(function: Any, pairwise: Any, f: Any, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
    """With a dimension: the entries at the indices that torch finds, and those indices."""
    other = dim if isinstance(dim, Jet | torch.Tensor) else other
    if other is not None:
        return pairwise(f, other)
    if dim is None:
        raise NoRule("max or min over all entries")
    index = function(f.bare(), dim, keepdim=True).indices
    found_at = gather(f, dim, index)
    return Found(found_at, index) if keepdim else Found(linear(found_at, lambda t: t.squeeze(behind(dim, f.ndim))), index.squeeze(dim))


@jet_rule("sort")
def sort(f: Jet, dim: int = -1, descending: bool = False, **stable: Any) -> Any:
    index = torch.sort(f.bare(), dim=dim, descending=descending, **stable).indices
    return Found(gather(f, dim, index), index)


@jet_rule("topk")
def topk(f: Jet, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    index = torch.topk(f.bare(), k, dim, largest, sorted).indices
    return Found(gather(f, dim, index), index)


def _pooled(pool: Any, dims: int) -> Callable[..., Jet]:
    """The entries at the places that torch finds in the value."""

    def rule(f: Jet, *args: Any, **kwargs: Any) -> Jet:
        if kwargs.pop("return_indices", False):
            raise NoRule("max pooling that returns its indices")
        _, index = pool(f.bare(), *args, **kwargs, return_indices=True)
        flat = linear(f, lambda t: t.flatten(-dims))
        picked = gather(flat, -1, index.flatten(-dims))
        return linear(picked, lambda t: t.unflatten(-1, index.shape[-dims:]))

    return rule


for _dims in (1, 2, 3):
    enter(
        _pooled(getattr(F, f"max_pool{_dims}d_with_indices"), _dims), getattr(F, f"max_pool{_dims}d"), getattr(torch, f"max_pool{_dims}d")
    )
