"""The memory orders of N samples, T positions and D features, and the way from each to (N, T, D) and back."""

from __future__ import annotations


def halves(d):
    return 2 if d % 2 == 0 else 1


TO = {
    "ntd": lambda h, n: h,
    "tnd": lambda h, n: h.transpose(0, 1),
    "ndt": lambda h, n: h.mT,
    "(nt)d": lambda h, n: h.reshape(n, h.shape[0] // n, h.shape[1]),
    "(tn)d": lambda h, n: h.view(h.shape[0] // n, n, h.shape[1]).permute(1, 0, 2),
    "(nh)td": lambda h, n: h.unflatten(0, (n, h.shape[0] // n)).transpose(1, 2).flatten(2),
    "t(nd)": lambda h, n: h.view(h.shape[0], n, -1).transpose(0, 1),
}
"""From h in an order to (N, T, D)."""

FROM = {
    "ntd": lambda h: h.contiguous(),
    "tnd": lambda h: h.transpose(0, 1),
    "ndt": lambda h: h.transpose(1, 2),
    "(nt)d": lambda h: h.flatten(0, 1),
    "(tn)d": lambda h: h.permute(1, 0, 2).reshape(-1, h.shape[2]),
    "(nh)td": lambda h: h.unflatten(2, (halves(h.shape[2]), -1)).transpose(1, 2).reshape(-1, h.shape[1], h.shape[2] // halves(h.shape[2])),
    "t(nd)": lambda h: h.transpose(0, 1).reshape(h.shape[1], -1),
}
"""From (N, T, D) to an order."""

WORKING = ("ntd", "tnd", "ndt", "(nt)d", "(tn)d", "(nh)td")
"""The orders that steps work in: the last dimension holds no samples."""


def ntd(state):
    return TO[state.order](state.h, state.n)


def move(state, order):
    """Brings the state's tensor into an order and returns it."""
    state.h, state.order = FROM[order](ntd(state)), order
    return state.h
