"""How a program ends: from the state to one output for each sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.programs.orders import ntd


def pooled(s, outputs):
    h = ntd(s).mean(1)
    return F.linear(h, s.parameter(outputs, h.shape[1]), s.parameter(outputs))


def loss(s):
    return F.cross_entropy(pooled(s, 3), s.tokens[:, 0] % 3, reduction="none")


def position_loss(s):
    """The mean over positions of a loss at each."""
    h = ntd(s)
    logits = F.linear(h, s.parameter(3, h.shape[2])).transpose(1, 2)
    target = (s.tokens[:, :1] % 3).expand(-1, h.shape[1])
    return F.cross_entropy(logits, target, reduction="none").mean(1)


HEADS = {
    "mean": lambda s: pooled(s, 2),
    "number": lambda s: pooled(s, 1).squeeze(1),
    "all": lambda s: ntd(s)[:, :2, :2].sin(),
    "last": lambda s: ntd(s)[:, -1].tanh(),
    "loss": loss,
    "position_loss": position_loss,
    "two": lambda s: torch.cat([pooled(s, 1), ntd(s).square().sum((1, 2))[:, None]], 1),
}
