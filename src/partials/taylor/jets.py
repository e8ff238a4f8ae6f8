"""`Jet`: a value with its derivatives, and the arithmetic that the rules are written in.

A jet of a tensor of shape (*shape) is one tensor (1 + R, *shape), so that a linear layer stays one product; or, where only the value has
changed (a bias was added), the value and the rest apart, which saves a copy. The coordinates, and what linear maps make of them, are
affine: all but their first derivatives are zero, and those can be of size 1 along dimensions in which they do not change. That makes the
first layer of a network nearly free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import torch
from torch.overrides import handle_torch_function, has_torch_function

from .._typing import Shape, Tensor
from . import composition, kernels
from .composition import Series
from .frame import Frame
from .kernels import Parts


class NoRule(Exception):
    """A jet cannot go through this; the text says what it is."""


@final
class Jet:
    """The value and the derivatives of one tensor."""

    __slots__ = ("_base", "_parts", "_shift", "_stack", "affine", "aliased", "frame")

    def __init__(
        self,
        frame: Frame,
        stack: Tensor | None = None,
        parts: Parts | None = None,
        shift: Tensor | None = None,
        affine: Parts | None = None,
    ) -> None:
        """`shift`: a constant that is still to be added to the value of the stack. `affine`: parts whose rest is still to be expanded."""
        self.frame, self._parts, self.affine = frame, parts, affine
        self._base, self._shift = stack, shift
        self._stack = stack if shift is None else None
        self.aliased = False
        """Whether a view of the tensor was taken, so that a write would have to reach two jets."""

    @property
    def whole(self) -> bool:
        """Whether the stack is there already."""
        return self._stack is not None

    @property
    def stack(self) -> Tensor:
        """(1 + R, *shape)."""
        if self._stack is None:
            value, rest = self.parts
            self._stack = torch.cat([value.unsqueeze(0), rest])
        return self._stack

    @property
    def parts(self) -> Parts:
        """The value (*shape) and the rest (R, *shape)."""
        if self._parts is None:
            if self.affine is not None:
                value, rest = self.affine
                self._parts = value, rest.expand(self.frame.rest, *value.shape)
                return self._parts
            assert self._base is not None
            first, rest = self._base.split((1, self.frame.rest))
            self._parts = first.squeeze(0) if self._shift is None else first.squeeze(0) + self._shift, rest
        return self._parts

    @property
    def value(self) -> Tensor:
        return self.parts[0]

    @property
    def rest(self) -> Tensor:
        return self.parts[1]

    @property
    def anything(self) -> Tensor:
        """Some tensor of the jet, for its dtype and device, without taking it apart."""
        return self._base if self._base is not None else (self._parts or self.affine)[1]  # type: ignore[index]

    @property
    def shape(self) -> Shape:
        return tuple(self.anything.shape[1:] if self.affine is None else self.affine[0].shape)

    @property
    def ndim(self) -> int:
        return self.anything.ndim - 1

    def bare(self) -> Tensor:
        """The value outside of any graph."""
        if self._parts is not None or self._base is None:
            return (self._parts or self.affine)[0].detach()  # type: ignore[index]
        value = self._base.detach()[0]
        return value if self._shift is None else value + self._shift.detach()

    def shifted(self, constant: Any) -> Jet | None:
        """This jet plus a constant that changes neither its shape nor its dtype, without a pass over memory; None where that needs one."""
        if self._base is None or not isinstance(constant, torch.Tensor) or has_torch_function((constant,)):
            return None
        ours = self.shape
        if constant.dtype != self._base.dtype or constant.ndim > len(ours) or constant.device != self._base.device:
            return None
        if any(size not in (1, mine) for size, mine in zip(reversed(constant.shape), reversed(ours), strict=False)):
            return None
        return Jet(self.frame, self._base, shift=constant if self._shift is None else self._shift + constant)

    @property
    def base(self) -> tuple[Tensor, Tensor | None] | None:
        """A stack and what is still to be added to its value, where the jet is held so."""
        return None if self._base is None else (self._base, self._shift)


Operand: TypeAlias = Jet | Tensor | float | int | complex


def linear(f: Jet, function: Callable[[Tensor], Tensor]) -> Jet:
    """A linear map that acts on each slot: `function` takes and gives (S, *shape) for any S."""
    if f.whole:
        return Jet(f.frame, function(f.stack))
    value, rest = f.parts
    made = function(value.unsqueeze(0)).squeeze(0), function(rest)
    return Jet(f.frame, parts=made) if f.affine is None else narrowed(f.frame, *made)


def narrowed(frame: Frame, value: Tensor, rest: Tensor) -> Jet:
    """With a rest of constants that was expanded narrowed to what there is in memory."""
    if rest.requires_grad:
        return Jet(frame, parts=(value, rest))
    for dim in range(1, rest.ndim):
        if rest.shape[dim] > 1 and not rest.stride(dim):
            rest = rest.narrow(dim, 0, 1)
    return Jet(frame, affine=(value, rest))


def by_features(f: Jet, function: Callable[[Tensor], Tensor]) -> Jet:
    """A linear map that acts on the last dimension."""
    if f.affine is None or f.affine[1].shape[1:-1] == f.shape[:-1]:
        return stacked(f, function)
    value, rest = f.affine
    return Jet(f.frame, affine=(function(value.unsqueeze(0)).squeeze(0), function(rest.expand(*rest.shape[:-1], value.shape[-1]))))


def stacked(f: Jet, function: Callable[[Tensor], Tensor]) -> Jet:
    """A linear map that costs something: once, on the whole stack."""
    return Jet(f.frame, function(f.stack))


def join(jets: Sequence[Operand], function: Callable[[Sequence[Tensor]], Tensor], along: int | None = None) -> Jet:
    """A linear map of several tensors, such as `cat` along a dimension; tensors that are no jets have derivatives of zero."""
    frame = next(f.frame for f in jets if isinstance(f, Jet))
    affine = _affine_together(jets, frame, along)
    if affine is not None:
        value, rest = (function(tensors) for tensors in zip(*affine, strict=True))
        return Jet(frame, affine=(value.squeeze(0), rest))
    stacks = [f.stack if isinstance(f, Jet) else lifted(f, frame).stack for f in jets]
    return Jet(frame, function(stacks))


def _affine_together(jets: Sequence[Operand], frame: Frame, along: int | None) -> list[Parts] | None:
    """The parts of several jets, all of them affine and of size 1 in the same dimensions and not in `along`; None where they are not."""
    pairs = [(f.shape, f.affine[1].shape[1:]) for f in jets if isinstance(f, Jet) and f.affine is not None]
    if len(pairs) < sum(isinstance(f, Jet) for f in jets):
        return None
    dims = {tuple(size != whole for size, whole in zip(sizes, shape, strict=True)) for shape, sizes in pairs}
    if len(dims) > 1 or (along is not None and next(iter(dims))[along]):
        return None
    ours, found = next(iter(dims)), []
    for f in jets:
        if isinstance(f, Jet):
            value, rest = f.affine  # type: ignore[misc]
        elif isinstance(f, torch.Tensor) and f.ndim == len(ours):
            sizes = (1 if is_one else size for is_one, size in zip(ours, f.shape, strict=True))
            value, rest = f, f.new_zeros((frame.rest, *sizes))
        else:
            return None
        found.append((value.unsqueeze(0), rest))
    return found


def lifted(constant: Any, frame: Frame, like: Jet | None = None) -> Jet:
    """A constant as a jet."""
    if not isinstance(constant, torch.Tensor):
        assert like is not None
        constant = torch.as_tensor(constant, device=like.anything.device)
    return Jet(frame, parts=(constant, constant.new_zeros(()).expand(frame.rest, *constant.shape)))


def compose(series: Series, f: Jet) -> Jet:
    """phi(f), entry by entry."""
    if f.base is not None and not has_torch_function((f.base[0],)):
        return Jet(f.frame, composition.compose_stack(series, *f.base, f.frame))
    if f.affine is not None:
        return Jet(f.frame, composition.compose(series, f.affine, f.frame, affine=True))
    return Jet(f.frame, _compose(series, *f.parts, f.frame))


def _compose(series: Series, value: Tensor, rest: Tensor, frame: Frame) -> Tensor:
    if has_torch_function((value,)):  # so that a mode around us sees this as one operation
        return handle_torch_function(_compose, (value, rest), series, value, rest, frame)
    return composition.compose(series, (value, rest), frame)


def _multiply(f0: Tensor, f: Tensor, g0: Tensor, g: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    if has_torch_function((f0,)):
        return handle_torch_function(_multiply, (f0, f, g0, g), f0, f, g0, g, frame)
    return kernels.multiply((f0, f), (g0, g), frame)


def times(f: Operand, g: Operand) -> Jet:
    """f g."""
    if not isinstance(f, Jet):
        return scaled(g, f)  # type: ignore[arg-type]
    if not isinstance(g, Jet):
        return scaled(f, g)
    shape = broadcast(f.shape, g.shape)
    (f0, fr), (g0, gr) = spread(f, shape), spread(g, shape)
    return Jet(f.frame, parts=_multiply(f0, fr, g0, gr, f.frame))


def scaled(f: Jet, c: Any) -> Jet:
    """f times a constant, which may have more dimensions."""
    if f.affine is not None and (not isinstance(c, torch.Tensor) or c.ndim <= f.ndim):
        value, rest = f.affine[0] * c, f.affine[1] * c
        if value.shape == f.shape:
            return Jet(f.frame, affine=(value, rest))
    if not isinstance(c, torch.Tensor) or not c.ndim:
        return linear(f, lambda t: t * c)
    return linear(lengthened(f, c.ndim), lambda t: t * c)


def over(f: Operand, g: Operand) -> Jet:
    """f / g."""
    if not isinstance(g, Jet):
        if isinstance(g, torch.Tensor) and g.ndim:
            return linear(lengthened(f, g.ndim), lambda t: t / g)  # type: ignore[arg-type]
        return linear(f, lambda t: t / g)  # type: ignore[arg-type]
    from .series import reciprocal

    return times(f, compose(reciprocal, g))


def plus(f: Operand, g: Operand, alpha: Any = 1) -> Jet:
    """f + alpha g; a constant changes the value only."""
    if isinstance(f, Jet) and isinstance(g, Jet):
        g = g if isinstance(alpha, int | float) and alpha == 1 else scaled(g, alpha)
        if f.whole and g.whole and f.shape == g.shape:
            return Jet(f.frame, f.stack + g.stack)
        ndim = max(f.ndim, g.ndim)
        f, g = lengthened(f, ndim), lengthened(g, ndim)
        return Jet(f.frame, parts=(f.value + g.value, f.rest + g.rest))
    if isinstance(f, Jet):
        constant: Any = g if isinstance(alpha, int | float) and alpha == 1 else g * alpha
        return f.shifted(constant) or _moved(f, lambda value: value + constant)
    assert isinstance(g, Jet)
    g = g if isinstance(alpha, int | float) and alpha == 1 else scaled(g, alpha)
    return g.shifted(f) or _moved(g, lambda value: f + value)


def minus(f: Operand, g: Operand, alpha: Any = 1) -> Jet:
    return plus(f, g, -alpha)


def _moved(f: Jet, function: Callable[[Tensor], Tensor]) -> Jet:
    if f.affine is not None:
        moved = function(f.affine[0])
        if moved.shape == f.shape and moved.dtype == f.affine[1].dtype:
            return Jet(f.frame, affine=(moved, f.affine[1]))
    value, rest = f.parts
    moved = function(value)
    if moved.shape != value.shape or moved.dtype != value.dtype:
        rest = spread(Jet(f.frame, parts=(value, rest)), tuple(moved.shape))[1].to(moved.dtype)
    return Jet(f.frame, parts=(moved, rest))


def bilinear(f: Operand, g: Operand, product: Callable[[Tensor, Tensor], Tensor]) -> Jet:
    """A product of two jets that is not entry by entry, by pairs of slots."""
    assert isinstance(f, Jet) and isinstance(g, Jet)
    (f0, fr), (g0, gr) = f.parts, g.parts
    table = dict(f.frame.table)
    rest = []
    for slot in range(f.frame.rest):
        entry = product(fr[slot], g0) + product(f0, gr[slot])
        for i, j, weight in table.get(slot, ()):
            term = product(fr[i], gr[j])
            entry = entry + (term if weight == 1 else weight * term)
        rest.append(entry)
    return Jet(f.frame, parts=(product(f0, g0), torch.stack(rest)))


def lengthened(f: Jet, ndim: int) -> Jet:
    """With dimensions of size one in front of the shape, behind the slots, until there are `ndim`: as broadcasting has it."""
    missing = ndim - f.ndim
    return f if missing <= 0 else linear(f, lambda t: t.reshape(t.shape[0], *(1,) * missing, *t.shape[1:]))


def spread(f: Jet, shape: Shape) -> tuple[Tensor, Tensor]:
    """The parts, expanded to a shape."""
    value, rest = f.parts
    if tuple(value.shape) == tuple(shape):
        return value, rest
    padded = rest.reshape(rest.shape[0], *(1,) * (len(shape) - value.ndim), *value.shape)
    return value.expand(shape), padded.expand(rest.shape[0], *shape)


def broadcast(*shapes: Shape) -> Shape:
    return tuple(torch.broadcast_shapes(*shapes))
