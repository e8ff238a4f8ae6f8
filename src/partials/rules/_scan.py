"""One direction of one recurrent layer over all its time steps: forward and hand-written reverse, no graph inside.

Rows lie flat, time step after time step, as `PackedSequence` keeps them: `sizes[t]` sequences are still running at step t. The state
has a row for each sequence; a step reads and writes its first `sizes[t]` rows, in whichever direction time is walked.

The products with the input come in done, for all time steps at once (`pre`). What a layer's hidden weight is used for is told apart
from the walk over time: `recurrent_product` is that use, with all hidden states known; its cotangents come from `Scan`'s reverse.

Letters: r row (time step and sequence), h hidden feature. Gates are ordered as torch stores them: i f g o (LSTM), r z n (GRU).
Source: the equations of `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.overrides import wrap_torch_function

from .._typing import Tensor

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


@dataclass(frozen=True)
class Layer:
    """What one direction of one layer computes with, cut from the graph."""

    kind: str
    """lstm, gru, tanh or relu."""
    weight: Tensor
    """Of the hidden state."""
    bias: Tensor | None
    projection: Tensor | None
    sizes: tuple[int, ...]
    reverse: bool

    def steps(self) -> range:
        """Time steps in the order in which they are walked."""
        return range(len(self.sizes))[:: -1 if self.reverse else 1]


class Walked(NamedTuple):
    """A forward that is done, with what its reverse reads."""

    out: Tensor
    """(R, H) hidden states, or, before a projection, what is projected in `inner`."""
    h: Tensor
    c: Tensor | None
    before: Tensor
    """(R, H) the hidden state that each step read."""
    inner: Tensor | None
    factors: tuple[Tensor, ...]
    """Derivatives of the gates and of the state, (R, ...), as the reverse of the layer's kind multiplies by them."""


@wrap_torch_function(lambda layer, pre, h, c: (pre, h))
def walk(layer: Layer, pre: Tensor, h: Tensor, c: Tensor | None) -> Walked:
    """The layer's forward; `pre` (R, gates * H), the products with the input, is written over."""
    with torch.no_grad():
        return FORWARD[layer.kind](layer, pre.detach(), h.detach().clone(), None if c is None else c.detach().clone())


@wrap_torch_function(lambda input, weight, bias=None: (input, weight, bias))
def recurrent_product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Stands for input @ weight.T + bias where that has been added already: no value, only the place that its cotangent comes to."""
    return _Place.apply(input, weight, bias)  # type: ignore[no-untyped-call]


@wrap_torch_function(lambda layer, walked, pre, product, projected, h, c: (pre, product, projected, h, c))
def joined(
    layer: Layer, walked: Walked, pre: Tensor, product: Tensor, projected: Tensor | None, h: Tensor, c: Tensor | None
) -> tuple[Tensor, ...]:
    """(out, final h, final c) of a forward that is done, in the graph of the products that it consists of."""
    return Scan.apply(layer, walked, pre, product, projected, h, c)  # type: ignore[no-untyped-call]


class _Place(torch.autograd.Function):
    """A reverse pass stops here: weight and bias have their cotangents from the rule, so none are computed."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return weight.new_zeros(()).expand(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("a recurrent layer's hidden weight is reached only through its recorded use")


class Scan(torch.autograd.Function):
    """The walk over time as one node: cotangents of the input products, of the hidden products, of the projection, of the first state."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, walked: Walked, pre: Tensor, product: Tensor, projected: Tensor | None, h: Tensor, c: Tensor | None
    ) -> Any:
        ctx.layer, ctx.walked, ctx.lead = layer, walked, pre.shape[:-1]
        ctx.set_materialize_grads(False)
        return walked.out.clone(), walked.h, *(() if walked.c is None else (walked.c,))  # (its own memory: users write in place)

    @staticmethod
    def backward(ctx: Any, out: Tensor | None, h: Tensor | None, c: Tensor | None = None) -> Any:
        layer, walked = ctx.layer, ctx.walked
        some = next(g for g in (out, h, c) if g is not None)
        out = torch.zeros_like(walked.out) if out is None else out
        h = some.new_zeros(walked.h.shape) if h is None else h.clone()
        if walked.c is not None:
            c = some.new_zeros(walked.c.shape) if c is None else c.clone()
        pre, product, projected, h, c = REVERSE[layer.kind](layer, walked, out, h, c)
        lead = ctx.lead  # (R, ...) as the layer's input has its rows: (T, B, ...) or packed
        return None, None, *(None if g is None else g.reshape(*lead, -1) for g in (pre, product, projected)), h, c


def _lstm(layer: Layer, pre: Tensor, h: Tensor, c: Tensor) -> Walked:
    """c' = f c + i g,  h' = o tanh(c'), projected where the layer has a projection."""
    width, sizes, w = c.shape[-1], layer.sizes, layer.weight.t()
    inner, cells, squashed = (pre.new_empty(len(pre), width) for _ in range(3))
    before = pre.new_empty(len(pre), h.shape[-1])
    out = inner if layer.projection is None else torch.empty_like(before)
    if layer.bias is not None:
        pre.add_(layer.bias)
    gates, first, last = pre.split(sizes), pre[:, : 2 * width].split(sizes), pre[:, 3 * width :].split(sizes)
    i, f, g = (pre[:, k * width : (k + 1) * width].split(sizes) for k in range(3))
    hs, cs, ts, ms, outs = (t.split(sizes) for t in (before, cells, squashed, inner, out))
    for t in layer.steps():
        state, cell = (h, c) if sizes[t] == len(h) else (h[: sizes[t]], c[: sizes[t]])
        hs[t].copy_(state)
        cs[t].copy_(cell)
        gates[t].addmm_(state, w)
        first[t].sigmoid_()
        g[t].tanh_()
        last[t].sigmoid_()
        cell.mul_(f[t]).addcmul_(i[t], g[t])
        torch.tanh(cell, out=ts[t])
        torch.mul(last[t], ts[t], out=ms[t])
        if layer.projection is not None:
            torch.mm(ms[t], layer.projection.t(), out=outs[t])
        state.copy_(outs[t])
    factors = torch.empty_like(pre)
    i, f, g, o = pre.chunk(4, 1)
    into = factors.chunk(4, 1)
    sigmoid_backward(g, i, grad_input=into[0])
    sigmoid_backward(cells, f, grad_input=into[1])
    tanh_backward(i, g, grad_input=into[2])
    sigmoid_backward(squashed, o, grad_input=into[3])
    return Walked(out, h, c, before, None if out is inner else inner, (factors, f, tanh_backward(o, squashed)))


def _lstm_reverse(layer: Layer, walked: Walked, out: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor | None, ...]:
    factors, forget, squash = walked.factors
    width, sizes = c.shape[-1], layer.sizes
    pre = torch.empty_like(factors)
    projected = None if layer.projection is None else torch.empty_like(walked.out)
    rows, outs, ds, fs = pre.split(sizes), out.split(sizes), squash.split(sizes), forget.split(sizes)
    into = pre[:, : 3 * width].unflatten(1, (3, width)).split(sizes)
    into_o = pre[:, 3 * width :].split(sizes)
    by, by_o = factors[:, : 3 * width].unflatten(1, (3, width)).split(sizes), factors[:, 3 * width :].split(sizes)
    ps = () if projected is None else projected.split(sizes)
    for t in reversed(layer.steps()):
        state, cell = (h, c) if sizes[t] == len(h) else (h[: sizes[t]], c[: sizes[t]])
        state.add_(outs[t])
        m = state
        if layer.projection is not None:
            ps[t].copy_(state)
            m = state @ layer.projection
        cell.addcmul_(m, ds[t])
        torch.mul(by[t], cell.unsqueeze(1), out=into[t])
        torch.mul(by_o[t], m, out=into_o[t])
        cell.mul_(fs[t])
        torch.mm(rows[t], layer.weight, out=state)
    return pre, pre, projected, h, c


def _gru(layer: Layer, pre: Tensor, h: Tensor, c: None) -> Walked:
    """n = tanh(x_n + r h_n),  h' = n + z (h - n)."""
    width, sizes = h.shape[-1], layer.sizes
    w, b = layer.weight.t(), layer.bias
    before, out, hidden = (pre.new_empty(len(pre), width) for _ in range(3))
    gates, n, z = (pre[:, slice(*cut)].split(sizes) for cut in ((0, 2 * width), (2 * width, None), (width, 2 * width)))
    r = pre[:, :width].split(sizes)
    hs, outs, ns = before.split(sizes), out.split(sizes), hidden.split(sizes)
    for t in layer.steps():
        state = h if sizes[t] == len(h) else h[: sizes[t]]
        hs[t].copy_(state)
        product = state @ w if b is None else torch.addmm(b, state, w)
        gates[t].add_(product[:, : 2 * width]).sigmoid_()
        ns[t].copy_(product[:, 2 * width :])
        n[t].addcmul_(r[t], ns[t]).tanh_()
        torch.lerp(n[t], state, z[t], out=outs[t])
        state.copy_(outs[t])
    r, z, n = pre.chunk(3, 1)
    d_n = tanh_backward(1 - z, n)
    d_z = sigmoid_backward(before - n, z)
    d_r = sigmoid_backward(d_n * hidden, r)
    return Walked(out, h, None, before, None, (torch.stack([d_r, d_z, d_n], 1), torch.stack([d_r, d_z, d_n * r], 1), z))


def _gru_reverse(layer: Layer, walked: Walked, out: Tensor, h: Tensor, c: None) -> tuple[Tensor | None, ...]:
    by_input, by_hidden, keep = walked.factors
    sizes = layer.sizes
    grads, product = torch.empty_like(keep), torch.empty_like(by_hidden)
    rows, outs, gs, zs, by, into = (t.split(sizes) for t in (product.flatten(1), out, grads, keep, by_hidden, product))
    for t in reversed(layer.steps()):
        state = h if sizes[t] == len(h) else h[: sizes[t]]
        state.add_(outs[t])
        gs[t].copy_(state)
        torch.mul(by[t], state.unsqueeze(1), out=into[t])
        state.mul_(zs[t]).addmm_(rows[t], layer.weight)
    return by_input * grads.unsqueeze(1), product, None, h, None


def _plain(layer: Layer, pre: Tensor, h: Tensor, c: None) -> Walked:
    """h' = tanh or relu of the sum of both products."""
    sizes, w = layer.sizes, layer.weight.t()
    act = torch.Tensor.tanh_ if layer.kind == "tanh" else torch.Tensor.relu_
    before = pre.new_empty(len(pre), h.shape[-1])
    if layer.bias is not None:
        pre.add_(layer.bias)
    gates, hs = pre.split(sizes), before.split(sizes)
    for t in layer.steps():
        state = h if sizes[t] == len(h) else h[: sizes[t]]
        hs[t].copy_(state)
        state.copy_(act(gates[t].addmm_(state, w)))
    return Walked(pre, h, None, before, None, (1 - pre.square() if layer.kind == "tanh" else (pre > 0).to(pre.dtype),))


def _plain_reverse(layer: Layer, walked: Walked, out: Tensor, h: Tensor, c: None) -> tuple[Tensor | None, ...]:
    sizes = layer.sizes
    pre = torch.empty_like(walked.out)
    rows, outs, by = (t.split(sizes) for t in (pre, out, walked.factors[0]))
    for t in reversed(layer.steps()):
        state = h if sizes[t] == len(h) else h[: sizes[t]]
        torch.mul(state.add_(outs[t]), by[t], out=rows[t])
        torch.mm(rows[t], layer.weight, out=state)
    return pre, pre, None, h, None


FORWARD: dict[str, Any] = {"lstm": _lstm, "gru": _gru, "tanh": _plain, "relu": _plain}
REVERSE: dict[str, Any] = {"lstm": _lstm_reverse, "gru": _gru_reverse, "tanh": _plain_reverse, "relu": _plain_reverse}
