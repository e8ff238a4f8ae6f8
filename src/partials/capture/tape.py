"""Recording through nested `torch.autograd.grad`: every forward and every transposed use of a weight.

A reverse pass with create_graph=True uses W again: z = W a gives a-bar = W^T z-bar, whose own reverse pass uses W once more. The
products here are nodes whose reverse pass is made of such products itself, so each of them is recorded where it happens:

    forward     z[o] = sum_i W[o,i] a[i]       J_W = sum_t z-bar[t] (x) a[t]
    transposed  b[i] = sum_o W[o,i] g[o]       J_W = sum_t g[t] (x) b-bar[t]

Entry-by-entry operations need nothing new: their parameter is expanded, and autograd itself brings what later passes do with the expanded
tensor back to it. Normalisations are written out. The parameters stay attached: an ordinary backward through the tape trains.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import get_gradient_edge

from .. import _compat
from .._typing import Tensor
from ..methods._composite import TABLE as WRITTEN_OUT
from ..rules import RULES, GatherPart, NoRule, OuterPart, SumPart
from ..rules.elementwise import ENTRY_BY_ENTRY
from .beneath import Placement
from .recorder import Recorder, broadcast
from .trace import Refused, label

_FLIPPED = {"oi": "io", "io": "oi"}


class TapeRecorder(Recorder):
    """A recorder whose uses may be used again by reverse passes of f's own. Without `samples`, all but parameters and buffers is data."""

    buffers: frozenset[int] = frozenset()
    open = True
    """Whether uses are still recorded; reverse passes after the run are not f's own."""

    def depends(self, t: Tensor) -> bool:
        if self.known_samples or super().depends(t):
            return super().depends(t)
        return t.ndim > 0 and id(t) not in self.buffers and not (id(t) in self.leads and self.leads[id(t)][0] is t) and not self._own(t)

    def _own(self, t: Tensor) -> bool:
        return t.requires_grad and self.leads_to_wanted(t)

    def _use(self, func: Any, args: Any, kwargs: Any, parameters: list[Tensor], tensors: list[Tensor]) -> Any:
        if any(_compat.transform_of(t) for t in tensors):
            raise Refused(f"{label(func)} runs inside a torch.func transform within f")
        mine = {id(p) for p in parameters}
        if func in AGAIN:
            with self:
                return AGAIN[func](*args, **kwargs)
        if func is F.linear:
            return self._linear(mine, *args, **kwargs)
        if func in ENTRY_BY_ENTRY:
            shape = broadcast([t.shape for t in tensors])
            return self._with_expanded(func, args, kwargs, parameters, lambda p: p.expand(shape) if p.shape != shape else p.view_as(p))
        if func in RULES:
            try:
                parts = [part for part in RULES[func](*args, **kwargs) if id(part.parameter) in mine]
                if len(parts) == 1 and isinstance(parts[0], OuterPart):
                    return self._matmul(parts[0])
                if all(isinstance(part, GatherPart) or (isinstance(part, SumPart) and part.times is None) for part in parts):
                    return self._by_rule(func, args, kwargs, parameters)
            except NoRule as declined:
                raise Refused(f"{label(func)}: {declined}") from None
        body = _compat.body_of(func) if isinstance(func, FunctionType) else None
        if body is None or func in RULES:
            raise Refused(f"{label(func)} has no rule for what f's own reverse passes do with its parameter")
        with self:
            return body(*args, **kwargs)

    def _linear(self, mine: set[int], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        z = self.product(input, weight, "oi") if id(weight) in mine else F.linear(input, weight)
        if bias is None:
            return z
        self._mark(z, F.linear, ())
        with self:
            return z + bias

    def _matmul(self, part: OuterPart) -> Tensor:
        if part.groups or part.scale != 1:
            raise NoRule("a batch of parameter matrices, or a scaled one")
        if part.order == "i":
            with self:
                return (part.a * part.parameter).sum(-1)
        if part.transposed:
            return self.product(part.a.mT, part.parameter, part.order).mT
        return self.product(part.a, part.parameter, part.order)

    def product(self, a: Tensor, weight: Tensor, order: str) -> Tensor:
        """a W^T where W is stored (o, i), a W where it is stored (i, o); recorded, also where a reverse pass makes it."""
        if not torch.is_grad_enabled():
            return _product(a, weight, order)
        z: Tensor = _Product.apply(a, _Link.apply(weight, order), weight.detach(), _Use(self, weight, order))  # type: ignore[no-untyped-call]
        if self.open:
            edge = get_gradient_edge(z)
            self.trace.stops[edge.node] = [] if a.grad_fn is None else [a.grad_fn]
            self._add(F.linear, OuterPart(weight, a, order), edge, Placement(z.shape))
        return z


class _Use:
    """What a product's reverse pass needs to know."""

    def __init__(self, tape: TapeRecorder, weight: Tensor, order: str) -> None:
        self.tape, self.weight, self.order = tape, weight, order


def _product(a: Tensor, weight: Tensor, order: str) -> Tensor:
    return a @ (weight.mT if order == "oi" else weight)


class _Product(torch.autograd.Function):
    """The product, with the weight behind a link: its own gradient is computed only by a pass that asks for it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, link: Tensor, weight: Tensor, use: _Use) -> Tensor:
        ctx.save_for_backward(a)
        ctx.use = use
        return _product(a, weight, use.order)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (a,), use = ctx.saved_tensors, ctx.use
        parcel = g.new_zeros(0)
        parcel.factors = g, a  # type: ignore[attr-defined]
        back = use.tape.product(g, use.weight, _FLIPPED[use.order]) if ctx.needs_input_grad[0] else None
        return back, parcel, None, None


class _Link(torch.autograd.Function):
    """Stands for the weight in the graph. Only where its gradient is wanted does the reverse pass come here, with a parcel of factors."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, order: str) -> Tensor:
        ctx.order = order
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, parcel: Any) -> Any:
        g, a = (factor.reshape(-1, factor.shape[-1]) for factor in parcel.factors)
        return (g.mT @ a if ctx.order == "oi" else a.mT @ g), None


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _channels(p: Tensor | None, x: Tensor) -> Tensor | None:
    return None if p is None else p.reshape(-1, *(1,) * (x.ndim - 2))


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return _affine(F.group_norm(input, num_groups, eps=eps), _channels(weight, input), _channels(bias, input))


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _affine(F.rms_norm(input, normalized_shape, eps=eps), weight, None)


def _batch_norm(
    input: Tensor,
    mean: Any = None,
    var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    return _affine(F.batch_norm(input, mean, var, None, None, training, momentum, eps), _channels(weight, input), _channels(bias, input))


def _convolution(dims: int) -> Callable[..., Tensor]:
    """The patches as rows of a matrix: memory for each place of the kernel, and a product that is recorded like any other."""

    def conv(
        input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Tensor:
        if input.ndim != dims + 2:
            raise Refused("a convolution without a batch, within f's own reverse passes")
        steps, gaps = ((v,) * dims if isinstance(v, int) else tuple(v) * (dims // len(v)) for v in (stride, dilation))
        spans = [gap * (size - 1) for gap, size in zip(gaps, weight.shape[2:], strict=True)]
        patches = F.pad(input, _margins(padding, spans))
        for d in range(dims):
            patches = patches.unfold(2 + d, spans[d] + 1, steps[d])[..., :: gaps[d]]
        rows = patches.movedim(1, 1 + dims).unflatten(1 + dims, (groups, -1)).flatten(2 + dims).unbind(1 + dims)
        made = [F.linear(row, w.flatten(1)) for row, w in zip(rows, weight.chunk(groups), strict=True)]
        z = (made[0] if groups == 1 else torch.cat(made, -1)).movedim(-1, 1)
        return z if bias is None else z + bias.reshape(-1, *(1,) * dims)

    return conv


def _margins(padding: Any, spans: list[int]) -> list[int]:
    """Before and behind each dimension, the last one first, as `F.pad` has them."""
    if padding == "same":
        pairs = [(span // 2, span - span // 2) for span in spans]
    elif isinstance(padding, str):
        pairs = [(0, 0) for _ in spans]
    else:
        sizes = (padding,) * len(spans) if isinstance(padding, int) else tuple(padding) * (len(spans) // len(padding))
        pairs = [(size, size) for size in sizes]
    return [margin for pair in reversed(pairs) for margin in pair]


AGAIN: dict[Any, Callable[..., Tensor]] = {
    **WRITTEN_OUT,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.batch_norm: _batch_norm,
    **{getattr(F, f"conv{dims}d"): _convolution(dims) for dims in (1, 2, 3)},
    **{getattr(torch, f"conv{dims}d"): _convolution(dims) for dims in (1, 2, 3)},
}
"""Operations with parameters, by operations that can be recorded through any number of reverse passes."""
