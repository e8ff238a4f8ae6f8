"""Clouds: what ordinary calls of f give at one sample when inputs and parameters move in their last bits.

NOTE on clouds. A row may differ from an ordinary backward by far more than rounding and still be right: on a kink (the sign of a
pre-activation of 1e-9 depends on how a product was summed) or where large terms cancel. What is right then is a set: the rows that
ordinary backwards give when inputs and parameters move in their last bits. Such a cloud is drawn for the samples in question, in f's own
dtype, and two rows that differ are both accepted if each is as near to a member of the cloud as members are to each other.
This never widens a tolerance where the function is well behaved: its cloud is small there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .._part import part
from .._problem import Problem
from .._signature import usable
from .._state import drawn_from
from .._typing import Tensor
from .subject import Subject
from .tolerance import Tolerance, distance, size

MEMBERS, SHAKE = 16, 2
"""Members of a cloud; how far inputs and parameters move, in eps."""
COPIES = 8
"""Samples in every other member's batch, all the same one: another batch size has other kernels, which round otherwise."""
LINK, FAR = 8, 8
"""Members this many times as far apart as neighbours are in one group; how many times as far from a group as its own a row may be."""


@dataclass(frozen=True)
class Cloud:
    """What ordinary calls give at one sample: values (D, C), and gradients of sum_c u_c f_c by target, (D, entries)."""

    values: Tensor
    gradients: Mapping[str, Tensor]


def cloud(subject: Subject, n: int, u: Tensor, entries: Mapping[str, Tensor], tolerance: Tolerance, *, copies: bool = True) -> Cloud | None:
    """The cloud of sample n with weights u (C,), of the `entries` of some targets; None where f does not run on other tensors.

    Without `copies` the sample is always alone: where a function may mix samples, copies of one are no sample by itself.
    """
    problem = subject.problem
    try:
        if problem.batched and problem.random_state is None:
            index = torch.tensor([n], device=u.device)
            try:
                hosts = [(part(problem, index), 0), (part(problem, index.repeat(COPIES)), 0)]
                return _cloud(subject, hosts if copies else hosts[:1], u, entries, tolerance)
            except Exception:  # f refuses so small a batch
                pass
        return _cloud(subject, [(problem, n)], u, entries, tolerance)
    except Exception:
        subject.report.note(f"{subject.problem.name} does not run on other tensors, so kinks cannot be told from faults")
        return None


def _cloud(subject: Subject, hosts: Sequence[tuple[Problem, int]], u: Tensor, entries: Mapping[str, Tensor], tolerance: Tolerance) -> Cloud:
    """`hosts`: problems that hold the sample, with its place in each; they take turns."""
    values: list[Tensor] = []
    gradients: dict[str, list[Tensor]] = {name: [] for name in entries}

    def shaken(tensor: Tensor) -> Tensor:
        tensor = usable(tensor).detach()
        if not tensor.is_floating_point():
            return tensor
        return tensor + tensor * subject.draws.normal(tensor.shape, tensor) * (SHAKE * max(tolerance.eps, torch.finfo(tensor.dtype).eps))

    for member in range(MEMBERS):
        problem, at = hosts[member % len(hosts)]
        targets = [t for t in problem.targets if t.name in entries]
        tensors = {t.name: shaken(t.tensor).requires_grad_() for t in problem.targets}
        with drawn_from(problem.random_state, problem.targets[0].tensor.device):
            out = problem(tensors, [shaken(tensor) for tensor in problem.given]).reshape(problem.size, -1)[at]
        values.append(out.detach())
        wanted = [tensors[t.name] for t in targets if out.requires_grad]
        found = torch.autograd.grad(out, wanted, u.to(out), allow_unused=True) if wanted else [None] * len(targets)
        for target, gradient in zip(targets, found, strict=True):
            full = torch.zeros_like(tensors[target.name]) if gradient is None else gradient
            own = full.select(problem.dim_of(target), at) if target.kind == "input" and problem.batched else full
            gradients[target.name].append(own.reshape(-1)[entries[target.name]])
    return Cloud(torch.stack(values), {name: torch.stack(parts) for name, parts in gradients.items()})


def belongs(x: Tensor, members: Tensor, floor: float, *, coarsest: float = 0.1) -> bool:
    """Whether x (p,) could be one of the members (D, p): as near to one group of them as they are to each other, or within `floor`.

    On a kink the members are in groups, and x must be in one of them. Where terms cancel, numbers have few digits and coincide:
    then their grain, the smallest difference that occurs, is what they are apart; but no more than `coarsest` of their size.
    """
    to_x = distance(members, x, samples=True)
    if float(to_x.min()) <= floor:
        return True
    apart = torch.stack([distance(members, member, samples=True) for member in members])  # (D, D)
    grain = float(torch.where(apart > 0, apart, torch.inf).min())
    grain = grain if grain <= coarsest * float(size(members, samples=True).max()) else 0.0
    neighbour = float(apart.sort(1).values[:, 1].median())
    groups = _groups(apart <= LINK * max(neighbour, grain))
    spreads = [float(apart[group][:, group].sum()) / (len(group) * (len(group) - 1)) for group in groups if len(group) > 1]
    usual = sorted(spreads)[len(spreads) // 2] if spreads else neighbour
    own = iter(spreads)
    return any(float(to_x[group].mean()) <= max(floor, FAR * max(next(own) if len(group) > 1 else usual, grain)) for group in groups)


def _groups(linked: Tensor) -> list[list[int]]:
    """Connected groups of a symmetric relation, (D, D)."""
    left, groups = set(range(len(linked))), list[list[int]]()
    while left:
        group = [left.pop()]
        for member in group:
            found = [other for other in left if bool(linked[member, other])]
            left.difference_update(found)
            group += found
        groups.append(group)
    return groups
