"""A second look at what exceeds its tolerance: is it the method's fault, or the function's own rounding?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .._algebra import sum_of
from .._compat import has_hooks
from .._errors import listed
from .._part import part
from .._typing import Tensor
from .cloud import SHAKE, belongs, cloud
from .gaps import Gap, Key, gap_of_product, in_dtype, weighted, weighted_each
from .identities import Identities, Search
from .other_precision import call_in, in_precision, told_by_precision
from .own_backward import own_backward
from .precision import inside
from .subject import Subject
from .tolerance import Tolerance, apart, distance, name_of

PRODUCTS = 8
"""How many times as many eps the gap of a product may be as in a lower precision."""
SUSPECTS = 16
"""Samples that are looked at, the worst first."""
SUM = "a sum over samples, each part of which keeps to the tolerance by itself"
CLOUD = f"an ordinary backward moves as far when inputs and parameters move by {SHAKE} eps (a kink, or terms that cancel)"
PARTS = "ordinary backwards whose seeds add up to one are as far from it (terms that cancel)"
SPLITS, WIDTH, FAR, SHRINKS = 6, 16, 3, 1000
"""Seeds that are split in two; outputs up to which one is also taken apart; how much further off than the worst of these a row may be;
how many times smaller rounding is in float64 than in float32, at the least (nine digits are more)."""
DOUBLE = "an ordinary backward as it is, adding up the batch, is as far from one in float64, to which this sum keeps"
ENTRIES = 2**16
"""Entries of a parameter that are looked at, those that differ most."""


def settle(identities: Identities, failing: dict[Key, Gap], check: str = "backward") -> None:
    """Rows for identities that exceeded their tolerance: passed at f's inner precision, explained by rounding, or failed.

    `check` is what "backward" is called in them.
    """
    subject = identities.sides.subject
    tolerance = coarser(subject)
    for key in [key for key, gap in failing.items() if gap.over(tolerance) <= 1]:
        gap = failing.pop(key)
        subject.row(check if key[0] == "backward" else key[0], key[1], gap.error, tolerance=tolerance.summing(gap.terms))
    _products(identities, failing, tolerance)
    if check == "backward":
        _in_double(identities, failing, tolerance)
    if not failing:
        return
    found = _searched(identities, list(failing), tolerance)
    for key, gap in failing.items():
        allowed, row = tolerance.summing(gap.terms), (check if key[0] == "backward" else key[0], key[1], gap.error)
        if key in found.strangers:
            where = identities.locate(key, found.strangers[key])
            subject.row(*row, where, passed=False, remark=_hooks(subject, key[1]), tolerance=allowed)
        else:
            remarks = [f"at sample {listed(samples)} {words}" for words, samples in found.why[key].items()] or [SUM]
            subject.row(*row, passed=True, remark="rounding of f itself: " + "; ".join(remarks), tolerance=allowed)


def _in_double(identities: Identities, failing: dict[Key, Gap], tolerance: Tolerance) -> None:
    """Explain the sums that keep to an ordinary backward in float64: there is no need to look for the parts that do not.

    Two more training steps; a search by halves takes two backwards of the batch for each halving.
    """
    sides, u = replace(identities.sides, pushed=()), identities.u
    subject = sides.subject
    names = [name for check, name in failing if check == "backward" and not _hooks(subject, name)]
    if not names or len(u) == 1 or u.dtype is torch.float64:
        return
    found = in_precision(identities.call.problem, u, torch.float64, names)
    for key, gap in sides.gaps(found, u, identities.kept, names).items() if found is not None else ():
        if gap.over(tolerance) <= 1:
            allowed = tolerance.summing(gap.terms)
            subject.row(*key, failing.pop(key).error, passed=True, remark=f"rounding of f itself: {DOUBLE}", tolerance=allowed)


@dataclass(frozen=True)
class _Found:
    """What a search for the samples that break identities found."""

    why: dict[Key, dict[str, list[int]]]
    """The samples that are explained, by the words that explain them."""
    strangers: dict[Key, int]
    """A sample (of the call's) that is not."""


def _searched(identities: Identities, keys: Sequence[Key], tolerance: Tolerance) -> _Found:
    found = _Found({key: {} for key in keys}, {})
    search = Search(identities, set(keys), tolerance)
    for n in search:
        gaps = identities.gaps([name for _, name in search.keys], identities.mask([n]))
        broken = [key for key in search.keys if gaps[key].over(tolerance) > 1]
        words = _explained(identities, n, broken, tolerance)
        for key in broken:
            if key in words:
                found.why[key].setdefault(words[key], []).append(identities.sample(n))
            else:
                found.strangers[key] = n
                search.keys.discard(key)
        if len(search.found) == SUSPECTS:
            break
    for key in search.keys:
        if not _rest_keeps(search, key) or not search.adds_up(key):
            found.strangers[key] = search.found[-1] if search.found else search.parts[0][1][0]
    return found


def _rest_keeps(search: Search, key: Key) -> bool:
    """Whether what was not looked at, since there were too many suspects, keeps to the tolerance as one part."""
    rest = [n for over, samples in search.parts if over < -1 for n in samples]
    gaps = search.identities.gaps([key[1]], search.identities.mask(rest)) if rest else {}
    return not rest or gaps[key].over(search.tolerance) <= 1


def _products(identities: Identities, failing: dict[Key, Gap], tolerance: Tolerance) -> None:
    """Explain the products whose gap is rounding: two ways through the same blocks, which cancel in their own dtype.

    In another precision the gap of a product that is right is as many eps of that one; a fault stays what it is.
    """
    sides = identities.sides
    for key in [key for key in failing if key[0] == "product"]:
        group, v, gap = sides.group(key[1], identities.kept), sides.v(key[1]), failing[key]
        wide = v.dtype is torch.float64
        other = torch.float32 if wide else torch.float64
        group = tuple(in_dtype(block, other) for block in group)
        gaps = []
        for _ in range(8 if wide else 1):
            u = sides.subject.draws.gaussian(identities.u.shape, identities.u).to(other)
            gaps.append(gap_of_product(group, u, v.to(other), sides.scale(key[1], u, identities.kept)))
        allowed = PRODUCTS * max(gaps) / torch.finfo(other).eps * tolerance.eps
        if gap.error <= allowed if wide else max(gaps) <= tolerance.value:
            failing.pop(key)
            remark = "terms that cancel: J v and J^T u come together in higher precision"
            sides.subject.row(*key, gap.error, passed=True, remark=remark, tolerance=tolerance.summing(gap.terms))


def _explained(identities: Identities, n: int, keys: Sequence[Key], tolerance: Tolerance) -> dict[Key, str]:
    """Why the two rows at the call's sample n differ, for those of the keys where it is rounding.

    The Jacobian's row is right if it is that of a backward in float64; or if it and the ordinary backward's belong to a cloud.
    """
    sides, u, sample = identities.sides, identities.u[n], identities.sample(n)
    own = identities.call.gradients(identities.u * identities.mask([n]), [name for _, name in keys])
    inputs = {t.name for t in sides.subject.problem.inputs}
    both: dict[str, tuple[Tensor, Tensor]] = {}
    for name in [name for check, name in keys if check != "product"]:
        group = sides.group(name, [sample])
        row = weighted_each(group, u[None]) if name in inputs else weighted(group, u[None])
        both[name] = row.reshape(-1), (own[name][n] if name in inputs else own[name]).reshape(-1)
    scales = {name: sides.scale(name, u[None], [sample]) for name in both}
    plain = {
        name: rows for name, rows in both.items() if not _hooks(sides.subject, name)
    }  # (no copy in another precision has the user's hooks)
    told = told_by_precision(sides.subject.problem, sample, u, plain, scales, tolerance.value)
    both = {name: rows for name, rows in both.items() if name not in told}
    noise = _rounding(identities, n, {name: rows[1] for name, rows in both.items() if name in plain})
    told |= {name: PARTS for name, rows in both.items() if name in noise and bool(distance(*rows) <= FAR * noise[name])}
    both = {name: rows for name, rows in both.items() if name not in told}
    entries = {name: apart(*rows).abs().topk(min(ENTRIES, len(rows[0]))).indices for name, rows in both.items()}
    found = cloud(sides.subject, sample, u, entries, tolerance) if entries else None
    for name, rows in both.items():
        floor = tolerance.value * float(scales[name])
        if found is not None and all(belongs(row[entries[name]], found.gradients[name], floor) for row in rows):
            told[name] = CLOUD
    return {("backward", name): words for name, words in told.items()}


def _rounding(identities: Identities, n: int, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far an ordinary backward at the call's sample n is from the sum of several whose seeds add up to its own: f's own rounding.

    It is some eps of a row, and all of one whose terms cancel: before a softmax that is sure, or of a bias that a softmax takes away
    again. No kink is in it: inputs and parameters stay as they are. But a backward of the user's own may not be linear in its cotangent (a
    hook that clamps it, say). Then only what is less in a higher precision is rounding.
    """
    subject, sample = identities.sides.subject, identities.sample(n)
    problem, inputs = subject.problem, {t.name for t in subject.problem.inputs}
    if not whole:
        return {}
    mask, u = identities.mask([n]), identities.u[n]
    width = len(u)
    ways = [list(torch.eye(width, dtype=u.dtype, device=u.device) * u)] if width <= WIDTH else []
    for _ in range(SPLITS):
        one = subject.draws.normal(u.shape, u) * (u != 0) * u.abs().amax()
        ways.append([one, u - one])

    def as_it_is(seed: Tensor) -> dict[str, Tensor]:
        found = identities.call.gradients(seed * mask, list(whole))
        return {name: found[name][n] if name in inputs else found[name] for name in whole}

    here = _apart(ways, u, as_it_is)
    if not own_backward(problem):
        return here
    double = problem.dtype is torch.float64
    single = part(problem, torch.tensor([sample], device=u.device)) if problem.batched else problem
    other = call_in(single, torch.float32 if double else torch.float64)
    there = {} if other is None else _apart(ways, u, lambda seed: other(seed[None]))
    pairs = {name: (there[name], here[name]) if double else (here[name], there[name]) for name in whole if name in there}
    return {name: here[name] for name, (coarse, fine) in pairs.items() if bool(fine * SHRINKS <= coarse)}


def _apart(ways: list[list[Tensor]], u: Tensor, gradients: Callable[[Tensor], Mapping[str, Tensor] | None]) -> dict[str, Tensor]:
    """By name, the largest distance between the gradients for u and the sums of those for seeds that add up to it; {} without any."""
    found: dict[str, Tensor] = {}
    whole = gradients(u)
    for seeds in ways:
        parts = [part for part in map(gradients, seeds) if part is not None]
        if whole is None or len(parts) < len(seeds):
            return {}
        for name, one in whole.items():
            gap = distance(sum_of([part[name].reshape(-1) for part in parts]), one.reshape(-1)).to(torch.float64)
            found[name] = gap if name not in found else torch.maximum(found[name], gap)
    return found


def coarser(subject: Subject) -> Tolerance:
    """The tolerance of the least precise arithmetic inside f, which a note names where it is not that of its output."""
    dtype, why = inside(subject.problem)
    tolerance = subject.tolerance
    if torch.finfo(dtype).eps <= tolerance.eps:
        return tolerance
    exceeded = f"{tolerance.factor:g} eps of {name_of(tolerance.dtype)}"
    subject.report.note(f"f computes in {why or name_of(dtype)} inside: what exceeded {exceeded} was judged by that")
    return Tolerance(dtype, tolerance.factor)


def _hooks(subject: Subject, name: str) -> str:
    target = next(t for t in subject.problem.targets if t.name == name)
    if not has_hooks(target.own):
        return ""
    return "this tensor has hooks, which change its gradient in an ordinary backward; rows are derivatives of f without them"
