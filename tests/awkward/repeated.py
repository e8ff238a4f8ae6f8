"""Calls in a row: whatever is remembered of one call must never tell in the next.

Each case is a sequence of calls with changes in between. Every answer is compared with the loop of batches of one; what was handed out
before must stay as it was, also when the user writes over later results, and a Jacobian that is still held gives its own rows or says
that they are stale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import partials as pt
from partials._errors import StaleError
from partials.capture.known import LAYOUTS
from partials.checks.first import PASSED

from .exact import EXACT, loop, same, trainable

N = 4


@dataclass
class Call:
    """One call: what is asked, and what the loop is asked instead; or the error that it must be."""

    f: Any
    inputs: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    parameters: list[Any] | None = None
    dims: Any = ()
    pick: Callable[[Any], Any] = lambda out: out
    oracle: Any = None
    verb: Any = pt.jacobian
    bound: float = EXACT
    refused: type[Exception] | None = None
    words: str = ""
    unchecked: bool = True
    """Whether it is refused with check="never" too."""

    def rows(self):
        parameters = self.parameters
        if parameters is None:
            parameters = trainable(self.f) if isinstance(self.f, nn.Module) else [x for x in self.inputs if x.requires_grad]
        return loop(self.oracle or self.f, self.inputs, parameters, self.dims, self.pick)


def play(calls, check):
    """Make the calls, with nothing remembered before the first."""
    torch.manual_seed(0)
    LAYOUTS.clear()
    PASSED.clear()
    held = []
    for number, call in enumerate(calls):
        if call.refused is not None:
            if check == "first" or call.unchecked:
                with pytest.raises(call.refused, match=call.words or "."):
                    call.verb(call.f, *call.inputs, check=check, **call.options)
            continue
        rows = call.rows()
        J = call.verb(call.f, *call.inputs, check=check, **call.options)
        try:
            compare(J, rows, call.bound)
        except AssertionError as error:
            raise AssertionError(f"call {number}: {error}") from error
        dense = J.dense()
        held.append((J, rows, dense, dense.clone(), call.bound))
        for old, expected, handed, copy, bound in held[:2] + held[2:][-3:]:
            assert torch.equal(handed, copy), f"call {number} wrote over what was handed out before"
            try:
                same(old, expected, bound)
            except StaleError:
                continue


def compare(J, rows, bound):
    """Rows, norms, Gram, products; twice, with the user writing over what he was given in between."""
    n, c, p = rows.shape
    same(J, rows, bound)
    for spoilt in (J.dense(), J.norms(), J.gram()):
        spoilt.fill_(torch.nan)
    same(J, rows, bound)
    u, v = torch.randn(n, c), torch.randn(p)
    scale = rows.norm() * bound * 10
    assert (J.T @ u.reshape(J.values.shape).to(J.values) - torch.einsum("nc,ncp->p", u, rows.double())).double().norm() <= scale * u.norm()
    assert ((J @ v.to(J.values.dtype)).reshape(n, c).double() - rows.double() @ v).norm() <= scale * v.norm()
    assert (J.sum().reshape(c, p).double() - rows.double().sum(0)).norm() <= scale * max(n, 1)


def mlp(i=3, o=2):
    return nn.Sequential(nn.Linear(i, 5), nn.Tanh(), nn.Linear(5, o))


class Switched(nn.Module):
    """A module with a setting that users change between calls; `ways` are what forward does for each."""

    def __init__(self, *ways, features=3, **attributes):
        super().__init__()
        self.a, self.b = nn.Linear(features, 5), nn.Linear(5, 2)
        self.way, self.ways = 0, ways
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.ways[self.way](self, x)


def apart(model):
    """What a `Switched` computes where its samples only change places on the way."""
    return lambda x: model.b(model.a(x).tanh())


def straight(model):
    """The same, summed over positions."""
    return lambda x: apart(model)(x).sum(1)
