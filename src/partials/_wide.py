"""Blocks in a wider dtype: squares of half precision overflow, and what is solved may want float64."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

import torch

from ._blocks import Block, Dense
from ._conv import Conv
from ._factors import Outer
from ._gather import Gather
from ._pullback import Placed
from ._typing import Tensor


@singledispatch
def wide(block: Block, dtype: torch.dtype) -> Block:
    """The block in `dtype` or wider; what autograd carries back to its parameters (`Pullback`) stays in their dtype."""
    return block


@wide.register
def _(block: Dense, dtype: torch.dtype) -> Block:
    return Dense(_promoted(block.values, dtype))


@wide.register(Outer)
@wide.register(Conv)
def _(block: Outer | Conv, dtype: torch.dtype) -> Block:
    return replace(block, a=_promoted(block.a, dtype), g=_promoted(block.g, dtype))


@wide.register
def _(block: Gather, dtype: torch.dtype) -> Block:
    return replace(block, g=_promoted(block.g, dtype))


@wide.register
def _(block: Placed, dtype: torch.dtype) -> Block:
    return replace(block, view=wide(block.view, dtype))


def _promoted(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(torch.promote_types(t.dtype, dtype))
