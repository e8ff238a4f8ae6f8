"""Clouds: what ordinary calls of f give at one sample when every number in them moves in its last bits.

NOTE on clouds. A row may differ from an ordinary backward by far more than rounding and still be right: on a kink (the sign of a
pre-activation of 1e-9 depends on how a product was summed) or where large terms cancel. What is right then is a set: the rows that
ordinary backwards give when inputs, parameters and what each operation makes of them move in their last bits (Parker 1997, "Monte Carlo
arithmetic"). Such a cloud is drawn for the samples in question, in f's own dtype, and two rows that differ are both accepted if each is
as near to a member of the cloud as members are to each other.
This never widens a tolerance where the function is well behaved: its cloud is small there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .. import _compat
from .._part import part
from .._problem import Problem
from .._signature import rebuild, usable, walk
from .._state import drawn_from
from .._typing import Tensor
from .draws import Draws
from .own_backward import own_backward
from .subject import Subject
from .tolerance import Tolerance, distance, size

MEMBERS, SHAKE = 16, 2
"""Members of a cloud; how far numbers move, in eps."""
COPIES = 8
"""Samples in every other member's batch, all the same one: another batch size has other kernels, which round otherwise."""
LINK, FAR = 8, 8
"""Members this many times as far apart as neighbours are in one group; how many times as far from a group as its own a row may be."""
LAST, STEPS = 8, 4
"""How many times what the last operation alone moves two members may be apart by it; the fewest steps that show a quantum."""
COMPANY = 0.75
"""Part of the members whose nearest neighbours say how far apart neighbours are: on a kink few are alone on their side."""


@dataclass(frozen=True)
class Cloud:
    """What ordinary calls give at one sample: values (D, C), and gradients of sum_c u_c f_c by target, (D, entries)."""

    values: Tensor
    gradients: Mapping[str, Tensor]


def cloud(subject: Subject, n: int, u: Tensor, entries: Mapping[str, Tensor], tolerance: Tolerance, *, copies: bool = True) -> Cloud | None:
    """The cloud of sample n with weights u (C,), of the `entries` of some targets; None where f does not run on other tensors.

    Without `copies` the sample is always alone: where a function, or a backward of the user's own, may mix samples, copies of one are no
    sample by itself.
    """
    problem = subject.problem
    copies = copies and not own_backward(problem)
    hosts = [[(problem, n)]]
    if problem.batched and problem.random_state is None:
        index = torch.tensor([n], device=u.device)
        single = [(part(problem, index), 0), (part(problem, index.repeat(COPIES)), 0)]
        hosts.insert(0, single if copies else single[:1])
    for host in hosts:
        for everywhere in (True, False):
            try:
                return _cloud(_Shaking(subject.draws, tolerance, everywhere), host, u, entries)
            except Exception:  # f refuses so small a batch, or operations that move (checkpointing runs a part again and compares)
                continue
    subject.report.note(f"{problem.name} does not run on other tensors, so kinks cannot be told from faults")
    return None


class _Shaking(TorchFunctionMode):
    """Moves tensors in their last bits; as a mode, also what operations make of parameters.

    Numbers that no parameter has a part in keep their exact values (masks, positions and indices are such), as do views and what an
    operation wrote in place.
    """

    def __init__(self, draws: Draws, tolerance: Tolerance, everywhere: bool) -> None:
        super().__init__()
        self.draws, self.eps, self.everywhere = draws, tolerance.eps, everywhere

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.everywhere or type(out) not in (Tensor, tuple, list) or not torch.is_grad_enabled() or _compat.transforming():
            return out
        found = [t for _, t in walk(out, "")]
        given = [t for _, t in walk((args, kwargs), "")]
        return rebuild(out, iter([self._moved(t) if self._made(t, given) else t for t in found])) if found else out

    @staticmethod
    def _made(t: Tensor, given: Sequence[Tensor]) -> bool:
        return t.requires_grad and t.is_floating_point() and not t._is_view() and all(t is not other for other in given)

    def input(self, tensor: Tensor) -> Tensor:
        """An argument of f without history, moved unless it holds whole numbers only, which are labels, masks or counts."""
        tensor = usable(tensor).detach()
        if not tensor.is_floating_point() or bool((tensor == tensor.round()).all()):
            return tensor
        return self._moved(tensor)

    def parameter(self, tensor: Tensor) -> Tensor:
        tensor = usable(tensor).detach()
        return (self._moved(tensor) if tensor.is_floating_point() else tensor).requires_grad_()

    def _moved(self, t: Tensor) -> Tensor:
        return t * (1 + self.draws.normal(t.shape, t) * (SHAKE * max(self.eps, torch.finfo(t.dtype).eps)))


def _cloud(shaking: _Shaking, hosts: Sequence[tuple[Problem, int]], u: Tensor, entries: Mapping[str, Tensor]) -> Cloud:
    """`hosts`: problems that hold the sample, with its place in each; they take turns."""
    values: list[Tensor] = []
    gradients: dict[str, list[Tensor]] = {name: [] for name in entries}
    for member in range(MEMBERS):
        problem, at = hosts[member % len(hosts)]
        targets = [t for t in problem.targets if t.name in entries]
        tensors = {t.name: shaking.parameter(t.tensor) for t in problem.targets}
        given = [shaking.input(tensor) for tensor in problem.given]
        with drawn_from(problem.random_state, problem.targets[0].tensor.device), shaking:
            out = problem(tensors, given)
        out = out.reshape(problem.size, -1)[at]
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
    then their grain is what they are apart; but no more than `coarsest` of their size.
    """
    to_x = distance(members, x, samples=True)
    if float(to_x.min()) <= floor:
        return True
    apart = torch.stack([distance(members, member, samples=True) for member in members])  # (D, D)
    largest = float(size(members, samples=True).max())
    grain = _grain(apart, LAST * SHAKE * torch.finfo(members.dtype).eps * largest)
    grain = grain if grain <= coarsest * largest else 0.0
    neighbour = float(apart.sort(1).values[:, 1].quantile(COMPANY))
    groups = _groups(apart <= LINK * max(neighbour, grain))
    spreads = [float(apart[group][:, group].sum()) / (len(group) * (len(group) - 1)) for group in groups if len(group) > 1]
    usual = sorted(spreads)[len(spreads) // 2] if spreads else neighbour
    own = iter(spreads)
    return any(float(to_x[group].mean()) <= max(floor, FAR * max(next(own) if len(group) > 1 else usual, grain)) for group in groups)


def _grain(apart: Tensor, last: float) -> float:
    """The smallest difference that occurs: the quantum of which all are multiples, where there is one, else the smallest of all.

    What large terms leave when they cancel are multiples of their last digit, which every operation after that moves a little, by no more
    than `last`: two members on one step are that far apart, which is no grain.
    """
    beyond = apart[apart > last]
    if beyond.numel():
        steps = (beyond / beyond.min()).round()
        quantum = beyond.sum() / steps.sum()
        off = (beyond - steps * quantum).abs().max()
        if LAST * last <= float(quantum) and float(off) <= 2 * last and len(_groups(apart <= last)) >= STEPS:
            return float(quantum)
    return float(torch.where(apart > 0, apart, torch.inf).min())


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
