"""Blocks on another device: factors in host memory free that of an accelerator."""

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
def moved(block: Block, device: torch.device) -> Block:
    """The block with its tensors on a device; rows that autograd carries back (`Pullback`) are formed first, where its graph is."""
    return Dense(block.dense().to(device))


@moved.register(Outer)
@moved.register(Conv)
def _(block: Outer | Conv, device: torch.device) -> Block:
    return replace(block, a=block.a.to(device), g=block.g.to(device))


@moved.register
def _(block: Gather, device: torch.device) -> Block:
    return replace(block, index=block.index.to(device), g=block.g.to(device))


@moved.register
def _(block: Placed, device: torch.device) -> Block:
    return replace(block, view=moved(block.view, device), index=block.index.to(device))


def same_place(t: Tensor, device: torch.device) -> bool:
    """Whether a tensor is there already ("cuda" is its present device)."""
    return t.device.type == device.type and (device.index is None or t.device.index in (None, device.index))
