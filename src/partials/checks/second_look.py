"""A second look at what exceeds its tolerance: is it the method's fault, or the function's own rounding?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._compat import has_hooks
from .._errors import listed
from .._typing import Tensor
from .cloud import SHAKE, belongs, cloud
from .gaps import Gap, Key, gap_of_product, in_dtype, weighted, weighted_each
from .identities import Identities
from .precision import inside
from .subject import Subject
from .tolerance import Tolerance, apart, name_of

PRODUCTS = 8
"""How many times as many eps the gap of a product may be as in a lower precision."""
SUSPECTS = 3
"""Samples that are looked at, the worst first."""
ENTRIES = 2**16
"""Entries of a parameter that are looked at, those that differ most."""


def settle(identities: Identities, failing: dict[Key, Gap], check: str = "") -> None:
    """Rows for identities that exceeded their tolerance: passed at f's inner precision, explained by clouds, or failed."""
    subject = identities.sides.subject
    tolerance = coarser(subject)
    for key in [key for key, gap in failing.items() if gap.over(tolerance) <= 1]:
        gap = failing.pop(key)
        subject.row(check or key[0], key[1], gap.error, tolerance=tolerance.summing(gap.terms))
    _products(identities, failing, tolerance)
    if not failing:
        return
    names = [name for _, name in failing]
    suspects = identities.suspects(list(failing), tolerance, SUSPECTS)
    breaks: dict[Key, dict[int, bool]] = {key: {} for key in failing}
    for n in suspects:
        gaps = identities.gaps(names, identities.mask([n]))
        for key in failing:
            if gaps[key].over(tolerance) > 1:
                breaks[key][n] = False
        for key in _known(identities, n, [key for key in failing if n in breaks[key]], tolerance):
            breaks[key][n] = True
    rest = [n for n in range(len(identities.u)) if n not in suspects]
    still = identities.gaps(names, identities.mask(rest)) if rest and len(suspects) < SUSPECTS else {}
    for key, gap in failing.items():
        allowed, row = tolerance.summing(gap.terms), (check or key[0], key[1], gap.error)
        strangers = [n for n, known in breaks[key].items() if not known]
        if breaks[key] and not strangers and (key not in still or still[key].over(tolerance) <= 1):
            remark = _explanation([identities.sample(n) for n in breaks[key]])
            subject.row(*row, passed=True, remark=remark, tolerance=allowed)
        else:
            where = identities.locate(key, (strangers or list(breaks[key]) or suspects)[0])
            subject.row(*row, where, passed=False, remark=_hooks(subject, key[1]), tolerance=allowed)


def _products(identities: Identities, failing: dict[Key, Gap], tolerance: Tolerance) -> None:
    """Explain the products whose gap is rounding: two ways through the same blocks, which cancel in their own dtype.

    In another precision the gap of a product that is right is as many eps of that one; a fault stays what it is.
    """
    sides = identities.sides
    for key in [key for key in failing if key[0] == "product"]:
        group, v, gap = sides.subject.blocks[key[1]], sides.v[key[1]], failing[key]
        if identities.kept is not None:
            index = torch.tensor(identities.kept, device=v.device)
            group = tuple(block.select(index) for block in group)
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


def _known(identities: Identities, n: int, keys: Sequence[Key], tolerance: Tolerance) -> list[Key]:
    """Those of the keys where the Jacobian's row and the ordinary backward's at the call's sample n both belong to the cloud."""
    sides, u, sample = identities.sides, identities.u[n], identities.sample(n)
    own = identities.call.gradients(identities.u * identities.mask([n]))
    both: dict[str, tuple[Tensor, Tensor]] = {}
    entries: dict[str, Tensor] = {}
    for name in [name for check, name in keys if check != "product"]:
        target = next(t for t in sides.subject.targets if t.name == name)
        group = tuple(block.select(torch.tensor([sample], device=u.device)) for block in sides.subject.blocks[name])
        row = weighted(group, u[None]) if target.kind == "parameter" else weighted_each(group, u[None])
        other = own[name] if target.kind == "parameter" else own[name][n]
        worst = apart(row.reshape(-1), other.reshape(-1)).abs()
        entries[name] = worst.topk(min(ENTRIES, len(worst))).indices
        both[name] = row.reshape(-1)[entries[name]], other.reshape(-1)[entries[name]]
    found = cloud(sides.subject, sample, u, entries, tolerance) if entries else None
    if found is None:
        return []
    floors = {name: tolerance.value * float(sides.scale(name, u[None], [sample])) for name in both}
    return [("backward", name) for name, rows in both.items() if all(belongs(x, found.gradients[name], floors[name]) for x in rows)]


def coarser(subject: Subject) -> Tolerance:
    """The tolerance of the least precise arithmetic inside f, which a note names where it is not that of its output."""
    dtype, why = inside(subject.problem)
    tolerance = subject.tolerance
    if torch.finfo(dtype).eps <= tolerance.eps:
        return tolerance
    exceeded = f"{tolerance.factor:g} eps of {name_of(tolerance.dtype)}"
    subject.report.note(f"f computes in {why or name_of(dtype)} inside: what exceeded {exceeded} was judged by that")
    return Tolerance(dtype, tolerance.factor)


def _explanation(samples: Sequence[int]) -> str:
    return (
        f"rounding of f itself: at sample {listed(samples)} an ordinary backward moves as far when inputs and parameters move by"
        f" {SHAKE} eps (a kink, or terms that cancel)"
    )


def _hooks(subject: Subject, name: str) -> str:
    target = next(t for t in subject.problem.targets if t.name == name)
    if not has_hooks(target.own):
        return ""
    return "this tensor has hooks, which change its gradient in an ordinary backward; rows are derivatives of f without them"
