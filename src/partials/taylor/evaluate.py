"""One evaluation: coordinates, points, proof, reverse passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .._typing import Function, Tensor
from .coordinates import Call, Coordinates, Names
from .mixing import Proof
from .nested import nested
from .points import Points, checked_value
from .specs import Term


def coordinates_of(u: Function, inputs: Sequence[Any], kwargs: Mapping[str, Any], coords: Names, vectors: Names) -> Coordinates:
    return Coordinates.of(Call.of(u, inputs, kwargs), coords, vectors)


def evaluate(coordinates: Coordinates, wanted: Iterable[Term]) -> dict[Term, Tensor]:
    """The value, the wanted terms and those found on the way, each of the output's shape."""
    terms = tuple(dict.fromkeys(wanted))
    asked = coordinates.inputs_of(frozenset().union(*(term.components for term in terms)))
    with _outside_inference():
        points = Points.of(coordinates, asked)
        leaves = [_normal(points.tensors[name]) for name in asked]
        proof = Proof.needed(coordinates, points, asked)
        if proof is not None:
            proof.rehearse()

        def call(*tensors: Tensor) -> Tensor:
            replaced = {**points.tensors, **dict(zip(asked, tensors, strict=True))}
            return checked_value(coordinates.call(replaced), points.shape)

        found = nested(call, leaves, coordinates.leaf_slots(asked), points.shape, terms, proof.gradients if proof else None)
        if proof is not None:
            proof.values(found[Term((), ())])
    return found


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
