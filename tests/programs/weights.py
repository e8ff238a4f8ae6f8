"""Weights that are computed from parameters alone: views, positive, low-rank, normalised, masked, gathered, joined."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def weight(state, o, i, form, tie=0):
    """An (o, i) weight in the given form."""
    return FORMS[form % len(FORMS)](state, o, i, tie)


def plain(state, o, i, tie):
    return state.parameter(o, i, tie=tie)


def transposed(state, o, i, tie):
    return state.parameter(i, o, tie=tie).t()


def positive(state, o, i, tie):
    return F.softplus(state.parameter(o, i, tie=tie))


def low_rank(state, o, i, tie):
    return state.parameter(o, i, tie=tie) + 0.5 * state.parameter(o, 2) @ state.parameter(2, i)


def normalised(state, o, i, tie):
    v = state.parameter(o, i, tie=tie)
    return state.parameter(o, 1) * v / v.norm(dim=1, keepdim=True)


def masked(state, o, i, tie):
    w = state.parameter(o, i, tie=tie)
    return w * (torch.arange(o * i, dtype=w.dtype).reshape(o, i) % 3)


def chunk(state, o, i, tie):
    return state.parameter(2 * o, i, tie=tie).chunk(2)[1]


def both_chunks(state, o, i, tie):
    first, second = state.parameter(2, o, i).unbind()
    return first + second.sin()


def reshaped(state, o, i, tie):
    return state.parameter(o * i, tie=tie).view(i, o).permute(1, 0)


def columns(state, o, i, tie):
    return state.parameter(o, i + 1, tie=tie)[:, 1:]


def gathered(state, o, i, tie):
    return state.parameter(3, i, tie=tie)[torch.arange(o) % 3]


def joined(state, o, i, tie):
    return torch.cat([state.parameter(1, i, tie=tie), state.parameter(o, i)])[:o]


def softened(state, o, i, tie):
    return state.parameter(o, i, tie=tie).softmax(-1)


def partly_detached(state, o, i, tie):
    w = state.parameter(o, i, tie=tie)
    return w * w.detach().cos()


def stepped(state, o, i, tie):
    return state.parameter(2 * o, i, tie=tie)[::2]


FORMS = (
    plain,
    transposed,
    positive,
    low_rank,
    normalised,
    masked,
    chunk,
    both_chunks,
    reshaped,
    columns,
    gathered,
    joined,
    softened,
    partly_detached,
    stepped,
)
