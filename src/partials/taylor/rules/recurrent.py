"""Recurrent cells and layers, written out step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..jets import Jet, NoRule, compose, linear, minus, plus, times
from ..series import sigmoid, tanh
from ..table import enter, jet_rule
from .bent import relu
from .products import linear_
from .structure import cat, pieces, stack

Cell = Callable[..., tuple[Any, ...]]
"""(x, state, weights) -> the next state; its first entry is the output."""


def _gates(x: Any, h: Any, weights: Sequence[Any], count: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """W x + b and V h + c, in `count` parts each."""
    w, v, *biases = weights
    b, c = biases if biases else (None, None)

    def parts(t: Any, weight: Any, bias: Any) -> Sequence[Any]:
        made = linear_(t, weight, bias) if isinstance(t, Jet) else torch.nn.functional.linear(t, weight, bias)
        return pieces(made, lambda s: s.chunk(count, -1)) if isinstance(made, Jet) else made.chunk(count, -1)

    return parts(x, w, b), parts(h, v, c)


def _lstm(x: Any, state: tuple[Any, ...], weights: Sequence[Any]) -> tuple[Any, ...]:
    h, c = state
    i, f, g, o = (plus(one, other) for one, other in zip(*_gates(x, h, weights, 4), strict=True))
    c = plus(times(compose(sigmoid, f), c), times(compose(sigmoid, i), compose(tanh, g)))
    return times(compose(sigmoid, o), compose(tanh, c)), c


def _gru(x: Any, state: tuple[Any, ...], weights: Sequence[Any]) -> tuple[Any, ...]:
    (h,) = state
    (xr, xz, xn), (hr, hz, hn) = _gates(x, h, weights, 3)
    r, z = compose(sigmoid, plus(xr, hr)), compose(sigmoid, plus(xz, hz))
    n = compose(tanh, plus(xn, times(r, hn)))
    return (plus(n, times(z, minus(h, n))),)


def _rnn(activation: Callable[[Any], Any], x: Any, state: tuple[Any, ...], weights: Sequence[Any]) -> tuple[Any, ...]:
    (mine,), (its,) = _gates(x, state[0], weights, 1)
    return (activation(plus(mine, its)),)


_CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_rnn, lambda f: compose(tanh, f)),
    "rnn_relu": partial(_rnn, relu),
}


def _once(cell: Cell) -> Callable[..., Any]:
    def rule(x: Any, hx: Any, w: Any, v: Any, b: Any = None, c: Any = None) -> Any:
        state = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        made = cell(x, state, [w, v] if b is None else [w, v, b, c])
        return made if len(made) > 1 else made[0]

    return rule


def _layers(cell: Cell) -> Callable[..., Any]:
    def rule(
        x: Any,
        hx: Any,
        weights: Any,
        has_biases: bool,
        count: int,
        dropout: float,
        training: bool,
        bidirectional: bool,
        batch_first: bool = False,
    ) -> Any:
        if not isinstance(weights, list | tuple) or (dropout and training):
            raise NoRule("a recurrent layer of packed sequences, or with dropout")
        if not isinstance(x, Jet):
            raise NoRule("a recurrent layer of which only the state depends on the coordinates")
        time = x.ndim - 2 if batch_first else 0
        start = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        size, ends = (4 if has_biases else 2), []
        if len(weights) != size * count * (2 if bidirectional else 1):
            raise NoRule("a recurrent layer with projections")
        for place in range(count):
            found = []
            for way in range(2 if bidirectional else 1):
                number = place * (2 if bidirectional else 1) + way
                state = tuple(_entry(s, 0, number) for s in start)
                outputs, state = _run(cell, x, time, state, weights[number * size : (number + 1) * size], backwards=bool(way))
                found.append(outputs)
                ends.append(state)
            x = found[0] if len(found) == 1 else cat(found, -1)
        return x, *(stack(list(entries), 0) for entries in zip(*ends, strict=True))

    return rule


def _run(cell: Cell, x: Jet, time: int, state: Any, weights: Sequence[Any], backwards: bool) -> tuple[Jet, Any]:
    places, outputs = range(x.shape[time]), {}
    for t in reversed(places) if backwards else places:
        state = cell(_entry(x, time, t), state, weights)
        outputs[t] = state[0]
    return stack([outputs[t] for t in places], time), state


def _entry(t: Any, dim: int, place: int) -> Any:
    return linear(t, lambda s: s.select(dim + 1, place)) if isinstance(t, Jet) else t.select(dim, place)


for _name, _cell in _CELLS.items():
    enter(_layers(_cell), getattr(torch, _name))
    enter(_once(_cell), getattr(torch, f"{_name}_cell"))


@jet_rule("glu")
def glu(f: Jet, dim: int = -1) -> Jet:
    left, right = pieces(f, lambda s: s.chunk(2, dim % f.ndim + 1))
    return times(left, compose(sigmoid, right))
