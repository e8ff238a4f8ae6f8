"""One ordinary call of f with its graph kept: what identities are compared with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from .._algebra import sum_of
from .._errors import PartialsError
from .._graph import hides_uses, strided
from .._output import check_output
from .._problem import Problem
from .._signature import usable
from .._state import drawn_from
from .._targets import Target
from .._typing import Tensor
from .places import Marks, Place, Readable, behind


@dataclass
class Call:
    """f on the batch of a problem, with the user's own parameters, without any transform."""

    problem: Problem
    tensors: dict[str, Tensor]
    """What stands for each target: the user's own parameter, or an alias of an argument."""
    out: Tensor
    """(N, C), with its graph."""
    places: list[Place] = field(default_factory=list)
    unread: str = ""
    """Why derivatives with respect to samples could not be made readable."""
    again: Callable[[], Call] | None = None
    """The same call once more."""
    pulled: bool = False
    """Whether a reverse pass has run."""

    @property
    def values(self) -> Tensor:
        """(N, C)."""
        return self.out.detach()

    def pull(self, u: Tensor, wanted: Sequence[Readable]) -> list[Tensor | None]:
        """One ordinary backward of sum u f."""
        if not self.out.requires_grad or not wanted:
            return [None] * len(wanted)
        if hides_uses(self.out):
            return self._pull_whole(u, wanted)
        before, self.pulled = self.pulled, True
        places: Any = list(wanted)
        try:
            return [strided(g) for g in torch.autograd.grad(self.out, places, u, retain_graph=True, allow_unused=True)]
        except RuntimeError:
            if not before or self.again is None:
                raise
        return self._pull_anew(u, wanted)  # (a fused loss, or a Function of the user's, that allows one reverse pass)

    def _pull_anew(self, u: Tensor, wanted: Sequence[Readable]) -> list[Tensor | None]:
        """By another call of f, whose tensors and places are taken for this one's."""
        assert self.again is not None
        call = self.again()
        mine, its = ([*other.tensors.values(), *(place.at for place in other.places)] for other in (self, call))
        if len(mine) != len(its):
            raise PartialsError("f, called twice, reads its inputs in different ways", hint="method='loop'")
        return call.pull(u, [its[next(i for i, at in enumerate(mine) if at is place)] for place in wanted])

    def _pull_whole(self, u: Tensor, wanted: Sequence[Readable]) -> list[Tensor | None]:
        """By a whole `.backward()`, where reentrant checkpointing allows no other: gradients of leaves only."""
        leaves = [t for t in wanted if isinstance(t, Tensor)]
        for t in leaves:
            t.grad = None
        torch.autograd.backward(self.out, u, retain_graph=True)
        found = [t.grad if isinstance(t, Tensor) else None for t in wanted]
        for t in leaves:
            t.grad = None
        return found

    def gradients(self, u: Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """d sum u f / d target by name (of all targets), zeros where f does not use one; an input's with samples first."""
        targets = [t for t in self.problem.targets if names is None or t.name in names]
        return self.named(self.pull(u, [self.tensors[t.name] for t in targets]), targets)

    def named(self, found: Sequence[Tensor | None], targets: Sequence[Target] | None = None) -> dict[str, Tensor]:
        """Gradients in the order of the targets (all of them), by name."""
        by_name: dict[str, Tensor] = {}
        for target, gradient in zip(self.problem.targets if targets is None else targets, found, strict=True):
            full = torch.zeros_like(self.tensors[target.name]) if gradient is None else gradient.detach()
            full = full.to_dense() if full.is_sparse else full
            if target.kind == "input":
                full = full.movedim(self.problem.dim_of(target), 0) if self.problem.batched else full.unsqueeze(0)
            by_name[target.name] = full
        return by_name


def call(problem: Problem, *, reading: bool = False) -> Call:
    """Run f once. With `reading`, its batched inputs are replaced by copies in the graph; where f does not run on those, they are not."""
    if reading and problem.batched and problem.size > 1:
        try:
            return _run(problem, reading=True)
        except PartialsError:
            raise
        except Exception as error:  # f's own refusal of inputs that require grad; what else is wrong shows again below
            plain = _run(problem, reading=False)
            plain.unread = f"{problem.name} does not run on inputs that require grad ({in_short(error)})"
            return plain
    return _run(problem, reading=False)


def _run(problem: Problem, *, reading: bool) -> Call:
    tensors = stand_ins(problem)
    leaves, places, copies, sources = _leaves(problem) if reading else (problem.given, [], [], {})
    marks = Marks(sources, problem.size, [place.at for place in places if isinstance(place.at, Tensor)]) if sources else None
    with drawn_from(problem.random_state, problem.targets[0].tensor.device), marks or nullcontext():
        out = problem(tensors, leaves)
    if hides_uses(out):  # then a backward writes into .grad, which must not be the user's
        tensors = problem.tensors(fresh=True)
        with drawn_from(problem.random_state, problem.targets[0].tensor.device):
            out, marks = problem(tensors, leaves), None
    else:
        places = [behind(place, copy, out) for place, copy in zip(places, copies, strict=True)]
    out = check_output(out, problem.size, problem.name, batched=problem.batched)
    places += marks.places if marks is not None else []
    if reading:
        places += [Place(t.name, tensors[t.name], problem.dim_of(t)) for t in problem.inputs]
    flat = out.reshape(problem.size, -1) if problem.size else out.flatten(1)
    return Call(problem, tensors, flat, places, again=lambda: _run(problem, reading=reading))


def gradients_of(calls: Sequence[Call], seeds: Sequence[Tensor]) -> dict[str, Tensor]:
    """d sum_i sum u_i f_i / d target of some calls by name, in one backward where they allow it.

    An input's samples come one call after another.
    """
    first = calls[0]
    inputs = {t.name for t in first.problem.inputs}
    shared = all(call.tensors[name] is tensor for call in calls for name, tensor in first.tensors.items())
    if inputs or not shared or any(hides_uses(call.out) or not call.out.requires_grad for call in calls):
        own = [call.gradients(u) for call, u in zip(calls, seeds, strict=True)]
        return {name: torch.cat([g[name] for g in own]) if name in inputs else sum_of(g[name] for g in own) for name in own[0]}
    wanted: Any = list(first.tensors.values())
    found = torch.autograd.grad([call.out for call in calls], wanted, list(seeds), retain_graph=True, allow_unused=True)
    for call in calls:
        call.pulled = True
    return first.named([strided(g) for g in found])


def stand_ins(problem: Problem) -> dict[str, Tensor]:
    """The user's own tensor for a parameter that f reaches from outside; a detached alias for an argument."""

    def alias(tensor: Tensor) -> Tensor:
        return usable(tensor).detach().requires_grad_()

    return {
        t.name: t.tensor if t.leaf is None and t.tensor.requires_grad and not t.own.is_inference() else alias(t.tensor)
        for t in problem.targets
    }


def _leaves(problem: Problem) -> tuple[list[Tensor], list[Place], list[Any], dict[str, Tensor]]:
    """What f is given: copies of its batched float inputs; the places at which those can be read; their nodes; batched integer inputs."""
    given, places, copies, sources = [], [], [], {}
    targets = {t.leaf for t in problem.targets}
    for leaf, tensor in zip(problem.leaves, problem.given, strict=True):
        if leaf.dim is None or leaf.name in targets:
            given.append(tensor)
        elif tensor.is_floating_point():
            alias = usable(tensor).detach().requires_grad_()
            places.append(Place(leaf.name, alias, leaf.dim))
            given.append(alias.clone())
            copies.append(given[-1].grad_fn)
        else:
            sources[leaf.name] = tensor
            given.append(tensor)
    return given, places, copies, sources


def in_short(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
