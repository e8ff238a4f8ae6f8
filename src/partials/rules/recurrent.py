"""Recurrent layers and cells, re-expressed in uses: a time step is one more position t at which a weight is shared.

The products with the input are one linear operation over all time steps. The walk over time is a single node of the graph (see
`_scan.py`) beside one `recurrent_product` that says where the hidden weight was used. Where derivatives of the derivative are wanted,
or a `vmap` runs, the same layer is a plain loop of linear operations.

Source: the equations of `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`; layouts of arguments are those of `torch.lstm` and others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .._state import rounding
from .._typing import Tensor
from ._parts import NoRule, OuterPart, SumPart
from ._scan import Layer, joined, recurrent_product, walk
from ._table import Run, rule

States = tuple[Tensor, ...]
"""(h,) or (h, c)."""


@rule(recurrent_product)
def _recurrent_product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    yield OuterPart(weight, input)
    if bias is not None:
        yield SumPart(bias)


# --- layers ------------------------------------------------------------------------------------------------------


def _network(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    """`torch.lstm`, `torch.gru`, `torch.rnn_tanh` or `torch.rnn_relu`, for padded and for packed sequences."""

    def network(run: Run, *args: Any, **named: Any) -> tuple[Tensor, ...]:
        if named:
            raise NoRule("called with keyword arguments")
        _plain_precision()
        if isinstance(args[3], list | tuple):  # data, batch sizes, state, weights, ...
            given: tuple[Any, ...] = (*args, False)
        else:
            given = (args[0], None, *args[1:])
        return _stack(run.differentiable, kind, *given)

    return network


def _stack(
    differentiable: bool,
    kind: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    state: Any,
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """All layers: (T, B, I) or packed (R, I) to the last one's output, and the final states (layers * directions, B, H)."""
    states = [state] if isinstance(state, Tensor) else list(state)
    if dropout and train and layers > 1 and x.is_cuda:
        raise NoRule("cuDNN draws the masks between recurrent layers in a way of its own")
    if batch_first:
        x = x.transpose(0, 1)
    sizes = (x.shape[1],) * x.shape[0] if batch_sizes is None else tuple(batch_sizes.tolist())
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    final: list[States] = []
    for layer in range(layers):
        outs = []
        for direction in range(directions):
            at = layer * directions + direction
            first = tuple(_of_samples(s[at], x[0] if x.ndim == 3 else x[: sizes[0]]) for s in states)
            out, last = _direction(kind, x, first, weights[at * each : (at + 1) * each], biases, sizes, direction == 1, differentiable)
            outs.append(out)
            final.append(last)
        x = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        if dropout and train and layer < layers - 1:
            x = F.dropout(x, dropout)
    ends = tuple(torch.stack(parts) for parts in zip(*final, strict=True))
    return (x.transpose(0, 1) if batch_first else x, *ends)


def _direction(
    kind: str,
    x: Tensor,
    first: States,
    weights: Sequence[Tensor],
    biases: bool,
    sizes: tuple[int, ...],
    reverse: bool,
    differentiable: bool,
) -> tuple[Tensor, States]:
    w_input, w_hidden = weights[:2]
    b_input, b_hidden = weights[2:4] if biases else (None, None)
    projection = weights[-1] if len(weights) in (3, 5) else None
    h, c = (*first, None)[:2]
    pre = F.linear(x, w_input, b_input)
    if differentiable:
        return _unrolled(kind, pre, first, w_hidden, (b_hidden, projection), sizes, reverse)
    bias, projected_by = (None if t is None else t.detach() for t in (b_hidden, projection))
    layer = Layer(kind, w_hidden.detach(), bias, projected_by, sizes, reverse)
    shape = x.shape[:-1]
    walked = walk(layer, pre.flatten(0, -2), h, c)
    product = recurrent_product(walked.before.unflatten(0, shape), w_hidden, b_hidden)
    projected = None if walked.inner is None else recurrent_product(walked.inner.unflatten(0, shape), projection)
    out, *last = joined(layer, walked, pre, product, projected, h, c)
    return out.unflatten(0, shape), tuple(last)


def _unrolled(
    kind: str, pre: Tensor, state: States, w_hidden: Tensor, others: tuple[Tensor | None, ...], sizes: tuple[int, ...], reverse: bool
) -> tuple[Tensor, States]:
    """The same as a plain loop over time."""
    b_hidden, projection = others
    rows = pre.unbind(0) if pre.ndim == 3 else pre.split(sizes)
    outs: list[Tensor] = [pre] * len(rows)
    for t in range(len(rows))[:: -1 if reverse else 1]:
        running = tuple(s[: sizes[t]] for s in state)
        new = _cell(kind, rows[t], F.linear(running[0], w_hidden, b_hidden), running)
        if projection is not None:
            new = (F.linear(new[0], projection), *new[1:])
        outs[t] = new[0]
        state = new if sizes[t] == len(state[0]) else tuple(torch.cat([n, s[sizes[t] :]]) for n, s in zip(new, state, strict=True))
    return torch.stack(outs) if pre.ndim == 3 else torch.cat(outs), state


def _of_samples(state: Tensor, x: Tensor) -> Tensor:
    """A first state that is zero or a parameter, added to zeros that the samples own: what it meets is a use like any other."""
    return state + torch.zeros_like(x[..., :1])


# --- cells -------------------------------------------------------------------------------------------------------


def _cell(kind: str, x: Tensor, hidden: Tensor, state: States) -> States:
    """One step from the products with the input and with the hidden state."""
    if kind == "lstm":
        i, f, g, o = (x + hidden).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), hidden.chunk(3, -1)
        n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return (n + (x_z + h_z).sigmoid() * (state[0] - n),)
    return (torch.tanh(x + hidden) if kind == "tanh" else torch.relu(x + hidden),)


def _one_step(kind: str) -> Callable[..., Any]:
    """`torch.lstm_cell`, `torch.gru_cell`, `torch.rnn_tanh_cell` or `torch.rnn_relu_cell`."""

    def cell(run: Run, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None) -> Any:
        _plain_precision()
        state = tuple(_of_samples(s, input) for s in ([hx] if isinstance(hx, Tensor) else hx))
        new = _cell(kind, F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return new if kind == "lstm" else new[0]

    return cell


def _plain_precision() -> None:
    if rounding():
        raise NoRule("autocast rounds a fused recurrent layer at places of its own")


for _kind, _names in {"lstm": "lstm", "gru": "gru", "tanh": "rnn_tanh", "relu": "rnn_relu"}.items():
    rule(getattr(torch, _names), composite=True)(_network(_kind))
    rule(getattr(torch, f"{_names}_cell"), composite=True)(_one_step(_kind))
