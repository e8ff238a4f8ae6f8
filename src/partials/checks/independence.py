"""Independence: the output of one sample has no derivative by another sample. A fault here is the function's, a MixingError.

NOTE on weights. With u the seed of one reverse pass and w_n u_n that of another, an independent function gives at the inputs of sample
n the gradients g_n and w_n g_n. Any dependence of sample m's output on sample n adds (w_m - w_n) u_m (d out_m / d in_n), so
two passes see every pair of samples. What they see is confirmed by a pass whose seed leaves out sample n: it must be zero there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._mixing import mixing
from .._typing import Tensor
from .call import Call
from .places import BySample, Place
from .subject import Subject
from .tolerance import distance, over, size, typical

CONFIRMED = 8
"""Samples that are looked at again, the worst first."""


def independence(subject: Subject, call: Call, u: Tensor, first: list[Tensor | None]) -> None:
    """`first`: the gradients at `call.places` for the seed u (N, C)."""
    if call.unread:
        subject.report.note(f"independence could not be read: {call.unread}")
        return
    if not subject.problem.batched or call.problem.size < 2:
        subject.report.note("a single sample: independence of samples cannot be seen")
        return
    read = [(place, gradient) for place, gradient in zip(call.places, first, strict=True) if gradient is not None]
    if not read:
        subject.report.note("f has no derivative by its inputs that could be read: independence rests on values and on batches of one")
        return
    w = subject.draws.weights(call.problem.size, u)
    second = call.pull(w[:, None] * u, [place.at for place, _ in read])
    worst: dict[str, float] = {}
    for (place, g), again in zip(read, second, strict=True):
        again = torch.zeros_like(g) if again is None else again
        view = _view(call, place, g, again, w, subject.tolerance.value)
        if view is not None:
            error = float(view.errors.max())
            if error > subject.tolerance.value:
                error = 0.0 if place.dim is None and _in_any_order(g, again, w) else _confirm(subject, call, u, view)
            worst[place.name] = max(worst.get(place.name, 0.0), error)
    for name, error in worst.items():
        subject.row("independence", name, error)


@dataclass(frozen=True)
class _View:
    """A place, the layout under which it fits independence best, its gradients' sizes, and how far each sample is from it."""

    place: Place
    by_sample: BySample
    scale: Tensor
    """(N,)."""
    errors: Tensor
    """(N,): |g2[n] - w[n] g1[n]| over the scale."""


def _view(call: Call, place: Place, g: Tensor, again: Tensor, w: Tensor, enough: float) -> _View | None:
    """The layout that fits best, or the first whose errors are no more than `enough`."""
    found: _View | None = None
    for by_sample in place.layouts(g, call.problem.size):
        one, two = by_sample(g), by_sample(again)
        scale = typical(size(one.nan_to_num(0, 0, 0), samples=True))
        errors = over(distance(two, w[:, None].to(one) * one, samples=True), scale)
        if found is None or errors.max() < found.errors.max():
            found = _View(place, by_sample, scale, errors)
            if float(errors.max()) <= enough:
                break
    return found


def _in_any_order(g: Tensor, again: Tensor, w: Tensor) -> bool:
    """Whether each position of some dimension belongs to one sample: f may have picked rows by a mask, or read one sample by itself."""
    rounding = 1e3 * torch.finfo(g.dtype).eps
    for dim in range(g.ndim):
        one, two = (t.double().movedim(dim, 0).reshape(t.shape[dim], -1) for t in (g, again))
        ratio = (one * two).sum(1) / one.square().sum(1)
        near = w.double()[(w.double() - ratio[:, None]).abs().argmin(1)]
        if bool(((two - near[:, None] * one).norm(dim=1) <= rounding * one.norm(dim=1)).all()):
            return True
    return False


def _confirm(subject: Subject, call: Call, u: Tensor, view: _View) -> float:
    """The largest derivative across samples over the scale of each sample's own, among the samples that look worst."""
    worst = 0.0
    for n in view.errors.topk(min(CONFIRMED, len(view.errors))).indices.tolist():
        others = torch.ones_like(u)
        others[n] = 0
        leak = _read(call, u * others, view)[n]
        error = float(over(leak, view.scale[n]))
        if error > subject.tolerance.value:
            m = _source(call, u, view, n)
            raise mixing(
                subject.problem,
                m,
                f"the output of sample {m} depends on {view.place} of sample {n}",
                f"a derivative across samples of {error:.3g} of the sample's own",
                by=n,
            )
        worst = max(worst, error)
    return worst


def _read(call: Call, seed: Tensor, view: _View) -> Tensor:
    """The sizes of the gradients of all samples at a place, (N,)."""
    (found,) = call.pull(seed, [view.place.at])
    return torch.zeros_like(view.scale) if found is None else size(view.by_sample(found).nan_to_num(0), samples=True)


def _source(call: Call, u: Tensor, view: _View, n: int) -> int:
    """A sample, other than n, whose output depends on the inputs of sample n: halving the others, following the larger derivative."""

    def leak(samples: list[int]) -> float:
        mask = torch.zeros_like(u)
        mask[samples] = 1
        return float(_read(call, u * mask, view)[n])

    return descend(leak, [m for m in range(len(u)) if m != n])


def descend(badness: Callable[[list[int]], float], among: list[int]) -> int:
    """One item, found by halving and following the worse half."""
    while len(among) > 1:
        halves = among[: len(among) // 2], among[len(among) // 2 :]
        among = max(halves, key=badness)
    return among[0]
