"""The steps of a program: each takes the state and a step's two small numbers, and gives the next tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.programs.orders import WORKING, move, ntd
from tests.programs.weights import weight

STEPS = {}


def step(function):
    STEPS[function.__name__] = function
    return function


# --- matrices ----------------------------------------------------------------------------------------------------


@step
def linear(s, k):
    i, o = s.h.shape[-1], 1 + k.a % 4
    return F.linear(s.h, weight(s, o, i, k.b), s.parameter(o, tie=k.a // 4) if k.a % 2 else None)


@step
def tied_linear(s, k):
    i = s.h.shape[-1]
    return F.linear(s.h.tanh(), weight(s, i, i, k.b, tie=1 + k.a))


@step
def matmul(s, k):
    i, o = s.h.shape[-1], 1 + k.a % 4
    return s.h @ weight(s, o, i, k.b).mT


@step
def left_matmul(s, k):
    """A matrix over positions."""
    h = move(s, "ntd")
    return weight(s, 1 + k.a % 3, h.shape[1], k.b) @ h


@step
def einsum(s, k):
    i, o = s.h.shape[-1], 1 + k.a % 4
    return torch.einsum("...i,oi->...o", s.h, weight(s, o, i, k.b))


@step
def addmm(s, k):
    h = move(s, ("(nt)d", "(tn)d")[k.a % 2])
    o = 1 + k.b % 3
    return torch.addmm(s.parameter(o), h, s.parameter(h.shape[1], o), beta=2.0, alpha=0.5)


@step
def bmm(s, k):
    """One matrix for each position."""
    h = move(s, "tnd")
    return torch.bmm(h, s.parameter(h.shape[0], h.shape[2], 1 + k.a % 3))


# --- entry by entry ----------------------------------------------------------------------------------------------


@step
def scale(s, k):
    p = s.parameter(*((), (1,), (s.h.shape[-1],))[k.a % 3], tie=k.b % 2)
    return s.h * p


@step
def shift(s, k):
    return s.parameter(s.h.shape[-1], tie=k.b % 3) - s.h if k.a % 2 else s.h + s.parameter(tie=k.b % 2)


@step
def divide(s, k):
    p = s.parameter(s.h.shape[-1])
    return s.h / (1 + F.softplus(p)) if k.a % 2 else F.softplus(p) / (2 + s.h.cos())


@step
def choose(s, k):
    return torch.where(s.h > 0, s.h * s.parameter(), s.parameter(s.h.shape[-1], tie=k.a % 2))


@step
def in_place(s, k):
    h = s.h * 1.5
    h = h.mul_(s.parameter(h.shape[-1])) if k.a % 2 else h.add_(s.parameter(h.shape[-1]))
    return h.tanh_() if k.b % 2 else h


@step
def power(s, k):
    return (1 + s.h.square()) ** (0.3 * s.parameter(s.h.shape[-1]).tanh())


@step
def places(s, k):
    """Positions' own values, by a parameter or by a table that every sample looks up alike."""
    h = move(s, "ntd")
    p = s.parameter(h.shape[1], h.shape[2])
    return h + (p if k.a % 2 else F.embedding(torch.arange(h.shape[1]), p))


@step
def penalty(s, k):
    """A number of the parameters alone, added to every sample."""
    return s.h + 0.1 * weight(s, 2, 2, k.a, tie=k.b).square().sum()


# --- norms and activations ---------------------------------------------------------------------------------------


@step
def layer_norm(s, k):
    d = s.h.shape[-1]
    return F.layer_norm(
        s.h + s.h.square(), (d,), 1 + s.parameter(d) if k.a % 2 else s.parameter(d), s.parameter(d) if k.b % 2 else None, 0.1
    )


@step
def rms_norm(s, k):
    return F.rms_norm(s.h, (s.h.shape[-1],), s.parameter(s.h.shape[-1], tie=k.a % 2), 0.1)


@step
def group_norm(s, k):
    h = move(s, "ndt")
    d = h.shape[1]
    if h.shape[2] == 1:  # torch refuses one value for each channel where the batch is one
        return h * s.parameter()
    groups = 2 if k.a % 2 and d % 2 == 0 else 1
    return F.group_norm(h, groups, s.parameter(d), s.parameter(d) if k.b % 2 else None, 0.1)


@step
def batch_norm(s, k):
    """With statistics that are kept, not the batch's."""
    h = move(s, "ndt")
    d = h.shape[1]
    mean, var = torch.linspace(-1, 1, d, dtype=h.dtype), torch.linspace(0.5, 2, d, dtype=h.dtype)
    return F.batch_norm(h, mean, var, s.parameter(d), s.parameter(d) if k.a % 2 else None)


@step
def instance_norm(s, k):
    h = move(s, "ndt")
    d = h.shape[1]
    return h if h.shape[2] == 1 else F.instance_norm(h, weight=s.parameter(d), bias=s.parameter(d), eps=0.1)


@step
def prelu(s, k):
    h = move(s, "ndt")
    return F.prelu(h, s.parameter(h.shape[1] if k.a % 2 else 1))


ACTIVATIONS = (
    torch.tanh,
    torch.sin,
    F.gelu,
    F.softplus,
    torch.sigmoid,
    F.silu,
    torch.relu,
    lambda h: h.softmax(-1),
    lambda h: h.clone().relu_(),
)


@step
def activation(s, k):
    acts = (
        torch.tanh,
        torch.sin,
        F.gelu,
        F.softplus,
        torch.sigmoid,
        F.silu,
        torch.relu,
        lambda h: h.softmax(-1),
        lambda h: h.clone().relu_(),
    )
    return acts[k.a % len(acts)](s.h)


# --- convolutions ------------------------------------------------------------------------------------------------


@step
def conv1d(s, k):
    h = move(s, "ndt")
    size, groups = 1 + k.a % 3, 2 if k.b % 2 and h.shape[1] % 2 == 0 else 1
    o = groups * (1 + k.b % 3)
    w = weight(s, o, h.shape[1] // groups * size, k.a).reshape(o, h.shape[1] // groups, size)
    return F.conv1d(h, w, s.parameter(o) if k.a % 2 else None, 1 + k.b % 2, size - 1, 1 + (k.a + k.b) % 2, groups)


@step
def conv2d(s, k):
    """Positions as the height, features as the width, one channel in."""
    h = move(s, "ntd")[:, None]
    kernel = (1 + k.a % 2, 1 + k.b % 2)
    z = F.conv2d(h, s.parameter(2, 1, *kernel), s.parameter(2) if k.a % 2 else None, padding="same" if k.b % 3 == 0 else 1)
    return z[:, 0] * z[:, 1].sin()


@step
def conv_of_folded(s, k):
    """Every position is an image of its own."""
    h = move(s, ("(nt)d", "(tn)d")[k.a % 2])
    return F.conv1d(h[:, None], s.parameter(2, 1, 2), padding=1).sum(1)[:, : h.shape[1]]


@step
def conv_transpose(s, k):
    h = move(s, "ndt")
    return F.conv_transpose1d(h, s.parameter(h.shape[1], 1 + k.a % 3, 2), s.parameter(1 + k.a % 3), padding=int(h.shape[2] > 1))


# --- tables, attention, structure --------------------------------------------------------------------------------


@step
def embedding(s, k):
    h = move(s, "ntd")
    e = F.embedding(s.tokens, s.parameter(5, 2, tie=k.b % 2), padding_idx=1 if k.a % 2 else None).mean(1, keepdim=True)
    return torch.cat([h, e.expand(-1, h.shape[1], -1)], -1)


@step
def rows_by_index(s, k):
    h = move(s, "ntd")
    found = s.parameter(5, 2, tie=k.a % 2)[s.tokens]
    return torch.cat([h, found.sum(1, keepdim=True).expand(-1, h.shape[1], -1)], -1)


@step
def attention(s, k):
    """Queries, keys and values are chunks of one weight."""
    h = move(s, "ntd")
    d = h.shape[2]
    q, key, v = (F.linear(h, w) for w in s.parameter(3 * d, d, tie=k.b % 2).chunk(3))
    return F.scaled_dot_product_attention(q, key, v, is_causal=bool(k.a % 2))


@step
def heads(s, k):
    """Multi-head attention, time first or batch first, as torch has it."""
    h = move(s, ("tnd", "ntd")[k.a % 2])
    d = h.shape[2]
    h = h if k.a % 2 == 0 else h.transpose(0, 1)
    packed, bias, out = (s.parameter(3 * d, d), s.parameter(3 * d)), (None, None, False, 0.0), (s.parameter(d, d), s.parameter(d))
    z, _ = F.multi_head_attention_forward(h, h, h, d, 1, *packed, *bias, *out, need_weights=False)
    return z if k.a % 2 == 0 else z.transpose(0, 1)


@step
def token(s, k):
    """A learned position in front, the same for every sample."""
    h = move(s, "ntd")
    first = s.parameter(1, 1, h.shape[2])
    first = first.expand(s.n, -1, -1) if k.a % 2 else first.repeat(s.n, 1, 1)
    return torch.cat([first, h], 1)[:, :4]


@step
def residual(s, k):
    before, order = ntd(s), s.order
    s.take_all(k.body)
    after = ntd(s)
    t, d = min(before.shape[1], after.shape[1]), min(before.shape[2], after.shape[2])
    s.h, s.order = before[:, :t, :d] + after[:, :t, :d], "ntd"
    return move(s, order)


@step
def twice(s, k):
    """The same parameters two times over."""
    h = s.h
    w, b = s.parameter(h.shape[-1], h.shape[-1]), s.parameter(h.shape[-1])
    h = F.linear(h, w, b).tanh()
    return F.linear(h, w.t() if k.a % 2 else w, b)


@step
def reorder(s, k):
    return move(s, WORKING[k.a % len(WORKING)])


@step
def through_fold(s, k):
    """Samples and features side by side for a moment."""
    h = move(s, "t(nd)").sin()
    s.h = h
    return move(s, WORKING[k.a % len(WORKING)])


@step
def written(s, k):
    """Into a fresh buffer, a slice at a time."""
    h = move(s, "ntd")
    fresh = torch.zeros_like(h)
    fresh[:, ::2] = h[:, ::2] * s.parameter(h.shape[2])
    fresh[:, 1::2] = h[:, 1::2]
    return fresh


@step
def shifted_positions(s, k):
    h = move(s, "ntd")
    return torch.roll(h, 1, 1) if k.a % 2 else h.flip(1)
