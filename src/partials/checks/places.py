"""Places: tensors at which the derivative with respect to a sample can be read, and the ways in which they may hold samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, resolve_name

from .._graph import reached
from .._signature import rebuild, walk
from .._typing import Tensor

Readable = Tensor | GradientEdge
BySample = Callable[[Tensor], Tensor]
"""(...) -> (N, entries)."""


@dataclass(frozen=True)
class Place:
    """A float input, or the first floating tensor that was made from an integer input."""

    name: str
    """The input's name."""
    at: Readable
    dim: int | None
    """The sample dimension; None where it must be found among the dimensions of the right size."""
    via: str = ""
    """The operation that made the floating tensor."""

    def __str__(self) -> str:
        return f"input {self.name!r}" + (f" (read behind {self.via})" if self.via else "")

    def layouts(self, gradient: Tensor, count: int) -> Iterator[BySample]:
        """The ways in which the gradient can belong to `count` samples."""
        if self.dim is not None:
            yield _along(self.dim, count)
            return
        for dim, length in enumerate(gradient.shape):
            if length == count:
                yield _along(dim, count)
            elif length > count and length % count == 0:
                yield lambda g, dim=dim: _along(dim, count)(g.unflatten(dim, (count, -1)))  # type: ignore[misc]
                yield lambda g, dim=dim: _along(dim + 1, count)(g.unflatten(dim, (-1, count)))  # type: ignore[misc]


def _along(dim: int, count: int) -> BySample:
    return lambda gradient: gradient.movedim(dim, 0).reshape(count, gradient.numel() // count)


APART = {("ConvolutionBackward0", 0), ("AddmmBackward0", 1), ("MmBackward0", 0)}
"""Nodes of the graph, and which of their operands is meant: operations that treat the first dimension of it apart, and keep it."""


def behind(place: Place, copy: Any, out: Tensor) -> Place:
    """The place behind the first layer where that alone reads the input: a reverse pass need not go through it.

    `copy` is the node of what f was given, `out` what it made of it. Whatever depends on a sample of the input does so by what the layer
    makes of that sample.
    """
    if place.dim != 0:
        return place
    readers, stack, seen = set(), [out.grad_fn], set()
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for operand, (following, _) in enumerate(node.next_functions):
            readers |= {(node, operand)} if following is copy else set()
            stack.append(following)
    if len(readers) != 1:
        return place
    ((node, operand),) = readers
    return replace(place, at=GradientEdge(node, 0)) if (node.name(), operand) in APART else place


class Marks(TorchFunctionMode):
    """Follows what is made from integer inputs up to the first floating tensors, and makes those readable.

    A floating tensor that does not require grad is put in the graph as a copy, so that later in-place operations are allowed.
    What was floating before and is read at a place already (sequences that are sorted by length) is no new place.
    """

    def __init__(self, sources: dict[str, Tensor], count: int, read: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.count = count
        self.read = {str(i): tensor for i, tensor in enumerate(read)}
        self.places: list[Place] = []
        self.derived = {id(tensor): (name, tensor) for name, tensor in sources.items()}
        # (the tensors are kept, so that their ids stay their own)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [tensor for _, tensor in walk((args, kwargs), "")]
        name = next((self.derived[id(tensor)][0] for tensor in given if id(tensor) in self.derived), None)
        found = [tensor for _, tensor in walk(out, "")] if isinstance(out, Tensor | tuple | list) else []
        if name is None or not found:
            return out
        via = (resolve_name(func) or getattr(func, "__name__", "an operation")).removeprefix("torch.")
        if any(tensor.grad_fn is not None and reached(tensor, self.read) for tensor in given):
            return out
        marked = [self._mark(name, via, tensor, any(tensor is other for other in given)) for tensor in found]
        if all(new is old for new, old in zip(marked, found, strict=True)):
            return out
        return rebuild(out, iter(marked)) if type(out) in (Tensor, tuple, list) else out

    def _mark(self, name: str, via: str, tensor: Tensor, in_place: bool) -> Tensor:
        if in_place or not tensor.is_floating_point() or not any(n and n % self.count == 0 for n in tensor.shape):
            self.derived[id(tensor)] = (name, tensor)
            return tensor
        number = str(len(self.read))
        if not tensor.requires_grad:
            leaf = tensor.detach().requires_grad_()
            self.places.append(Place(name, leaf, None, via))
            self.read[number] = leaf
            with torch.enable_grad():
                return leaf.clone()
        self.places.append(Place(name, get_gradient_edge(tensor), None, via))
        self.read[number] = tensor
        return tensor
