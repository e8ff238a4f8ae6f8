"""One evaluation: coordinates, points, proof, and the derivatives by one of two methods."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from .._compat import watched
from .._errors import CheckError, InputError, MethodError, listed
from .._typing import Function, Tensor
from .choice import PLANS, InputPlan, planned
from .coordinates import Call, Coordinates, Names
from .engine import taylor
from .jets import NoRule
from .mixing import Known, Proof
from .mode import Bends, inside_jets
from .nested import nested
from .points import Points, checked_value
from .rehearsal import rehearse, without_trace
from .specs import VALUE, Term
from .transforms import inside_transform, largest

METHODS = ("auto", "taylor", "nested")
CHECKS = ("first", "always", "never")


class Found(dict[Term, Tensor]):
    """The value and the derivatives of one evaluation, and how they were computed."""

    plan: InputPlan


def coordinates_of(u: Function, inputs: Sequence[Any], kwargs: Mapping[str, Any], coords: Names, vectors: Names) -> Coordinates:
    return Coordinates.of(Call.of(u, inputs, kwargs), coords, vectors)


def evaluate(coordinates: Coordinates, wanted: Iterable[Term], method: str = "auto", check: str = "first") -> Found:
    """The value, the wanted terms and those found on the way, each of the output's shape."""
    _require_policy(method, check)
    terms = tuple(dict.fromkeys(wanted))
    asked = coordinates.inputs_of(frozenset().union(*(term.components for term in terms)))
    with _outside_inference():
        evaluation = _Evaluation(coordinates, Points.of(coordinates, asked), asked, terms)
        evaluation.require_precision()
        evaluation.prove()
        return evaluation.run(method, check)


class _Evaluation:
    """The state of one evaluation."""

    def __init__(self, coordinates: Coordinates, points: Points, asked: tuple[str, ...], terms: tuple[Term, ...]) -> None:
        self.coordinates, self.points, self.asked, self.terms = coordinates, points, asked, terms
        self.leaves = [_normal(points.tensors[name]) for name in asked]
        self.slots = coordinates.leaf_slots(asked)
        self.known = Known.of(coordinates, points, asked)

    def call(self, *tensors: Tensor) -> Tensor:
        replaced = {**self.points.tensors, **dict(zip(self.asked, tensors, strict=True))}
        return checked_value(self.coordinates.call(replaced), self.points.shape)

    def require_precision(self) -> None:
        """Rounding grows with the order about as its factorial does."""
        dtype, order = self.leaves[0].dtype, max(term.order for term in self.terms)
        if math.factorial(order) * torch.finfo(dtype).eps > 0.02:
            raise InputError(
                f"a derivative of order {order} means nothing in {str(dtype).removeprefix('torch.')}",
                got=f"rounding of about {order}! times {torch.finfo(dtype).eps:.0e}",
                expected="an order whose factorial is far below the inverse of the dtype's precision",
                hint="float64 coordinates and parameters",
            )

    def prove(self) -> None:
        """That points do not mix, the first time."""
        proof = Proof.needed(self.coordinates, self.points, self.asked, self.known)
        if proof is None:
            return
        proof.rehearse()
        first = Term((), (min(frozenset().union(*(term.components for term in self.terms))),))
        with without_trace(self.coordinates.call):
            found = nested(self.call, self.leaves, self.slots, self.points.shape, (first,), proof.gradients)
        proof.values(found[VALUE])
        self.known.proved = proof.informative

    def run(self, method: str, check: str) -> Found:
        plan = self.plan(method)
        made: dict[Term, Tensor] | None = None
        bent, drawn = frozenset[str](), False
        if plan.method == "taylor":
            before = torch.get_rng_state() if self.first(check) else None
            try:
                made, bent = taylor(self.call, self.leaves, self.slots, self.terms)
            except NoRule as missing:
                if inside_jets():
                    raise
                if before is not None:
                    torch.set_rng_state(before)
                self.known.refused = f"no rule for {missing}"
                if method == "taylor":
                    raise _unable(self.known.refused) from None
                plan = self.plan(method)
            drawn = before is not None and not torch.equal(before, torch.get_rng_state())
        if made is None:
            made = nested(self.call, self.leaves, self.slots, self.points.shape, self.terms)
        found = Found(made)
        found.plan = plan
        if (plans := PLANS.get()) is not None:
            plans.append(plan)
        self.learn(found)
        if self.first(check):
            if plan.method == "taylor" and not drawn:
                self.compare(found)
            self.warn_of_zeros(found, bent)
            self.known.checked.add(self.terms)
        return found

    def plan(self, method: str) -> InputPlan:
        training = torch.is_grad_enabled() and self.known.attached
        refusal = self.known.refused
        if inside_transform():
            refusal = "a torch.func transform is running around this call"
        elif inside_jets():
            raise NoRule("derivatives inside a function that is differentiated itself")
        if refusal and method == "taylor":
            raise _unable(refusal)
        if not refusal and method == "auto" and watched():
            method = "taylor"  # linear layers pass through the mode around us as uses that it can record
        return planned(self.terms, self.known.width, training, refusal, method)

    def first(self, check: str) -> bool:
        if check == "never" or inside_transform() or not self.points.count or self.leaves[0].is_meta:
            return False
        return check == "always" or self.terms not in self.known.checked

    def learn(self, found: Found) -> None:
        value = found[VALUE]
        self.known.width = (2 if value.is_complex() else 1) * max(value.numel() // max(self.points.count, 1), 1)
        if torch.is_grad_enabled():
            self.known.attached = any(tensor.requires_grad for tensor in found.values())

    def compare(self, found: Found) -> None:
        """Two random points again, by nested reverse mode."""
        chosen = np.random.default_rng(3).choice(self.points.count, min(2, self.points.count), replace=False)
        with without_trace(self.coordinates.call), torch.no_grad():
            try:
                right = self.at(chosen)
            except Exception:  # the function takes the points as they are or not at all
                chosen = np.arange(self.points.count)
                right = nested(self.call, self.leaves, self.slots, self.points.shape, self.terms)
            for term in self.terms:
                ours = found[term].detach()
                rows = ours.reshape(self.points.count, -1)[torch.from_numpy(chosen).to(ours.device)]
                expected = right[term].reshape(rows.shape)
                scale = max(largest(ours.abs().nan_to_num(0.0, 0.0)), largest(expected.abs().nan_to_num(0.0, 0.0)))
                error = largest((rows - expected).abs().nan_to_num(0.0, 0.0))
                if error > torch.finfo(ours.dtype).eps ** 0.5 * scale and error > 64 * self.rounding(chosen, term):
                    raise CheckError(
                        f"Taylor mode and nested reverse mode disagree about {term}",
                        got=f"a difference of {error:.2e} at points {listed(chosen.tolist())}",
                        expected=f"at most {torch.finfo(ours.dtype).eps ** 0.5 * scale:.2e}",
                        hint='method="nested", and a report of the function to the authors',
                    )

    def rounding(self, chosen: np.ndarray, term: Term) -> float:
        """How far rounding alone moves a derivative, which may be nothing but that: by stretching the coordinates by a few last digits."""
        eps, found = torch.finfo(self.leaves[0].dtype).eps, [0.0]
        with suppress(Exception):  # as for the comparison: then rounding is no excuse
            for jets in (False, True):
                first, *steps = (self.at(chosen, 1 + 3 * k * eps, jets)[term] for k in range(6))
                found += [largest((step - first).abs().nan_to_num(0.0, 0.0)) for step in steps]
        return max(found)

    def at(self, chosen: np.ndarray, stretch: float = 1.0, jets: bool = False) -> dict[Term, Tensor]:
        """The derivatives at some points alone, by nested reverse mode or by jets."""
        index, rank = torch.from_numpy(chosen), len(self.points.shape)
        shape = (len(chosen), *(1,) * (rank - 1)) if rank else ()

        def cut(tensor: Tensor) -> Tensor:
            inner = tensor.shape[rank:]
            rows = tensor.detach().reshape(self.points.count, *inner)[index.to(tensor.device)].reshape(*shape, *inner)
            return rows * stretch if stretch != 1 else rows

        points = {name: cut(tensor) for name, tensor in self.points.tensors.items()}

        def call(*tensors: Tensor) -> Tensor:
            return checked_value(self.coordinates.call({**points, **dict(zip(self.asked, tensors, strict=True))}), shape)

        leaves = [points[name] for name in self.asked]
        return taylor(call, leaves, self.slots, self.terms)[0] if jets else nested(call, leaves, self.slots, shape, self.terms)

    def warn_of_zeros(self, found: Found, bent: Iterable[str]) -> None:
        zeros = [term for term in self.terms if term.order > 1 and not largest(found[term].detach().abs().nan_to_num(1.0))]
        if not zeros:
            return
        names = sorted(bent or _bends(self.coordinates.call))
        if names:
            warnings.warn(
                f"a derivative of order {zeros[0].order} is zero at every point: the function is made of straight pieces "
                f"({', '.join(names)}), whose second derivatives vanish; a smooth activation such as tanh or SiLU has them",
                stacklevel=2,
            )


def _unable(refusal: str) -> MethodError:
    return MethodError("the function cannot run in Taylor mode", got=refusal, hint='method="auto" or "nested"')


def _bends(call: Call) -> set[str]:
    """The functions of straight pieces that a call runs through."""
    with Bends() as seen:
        rehearse(call, {}, watched=True)
    return seen.names


def _require_policy(method: str, check: str) -> None:
    for what, got, known in (("method", method, METHODS), ("check", check, CHECKS)):
        if got not in known:
            raise InputError(f"{what}={got!r} is unknown", got=repr(got), expected=f"one of: {', '.join(known)}")


@contextmanager
def _outside_inference() -> Iterator[None]:
    """Autograd needs ordinary tensors: leave inference mode, with gradients off as there."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _normal(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
