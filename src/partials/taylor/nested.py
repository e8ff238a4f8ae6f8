"""Nested reverse mode: every wanted term from as few reverse passes as will do.

Samples are independent, so one reverse pass seeded with ones over the samples differentiates one output column at all points at once. A
node is a term; passes go from a node of order k to nodes of order k + 1, and a node that several terms need is differentiated once. A
Laplacian is one node: its second derivatives are summed before anything else differentiates them.

The same recursion runs on two reverse modes: `torch.autograd.grad` on fresh leaves, and `torch.func.vjp` where a transform is active,
inside which `torch.autograd.grad` has no meaning. Forward mode is never nested.

What torch cannot differentiate so often, or does wrongly, is written out in elementary operations (`written_out`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, TypeAlias, final

import torch

from .._errors import MethodError
from .._typing import Shape, Tensor
from ..methods._composite import Composite
from .specs import VALUE, Term
from .transforms import inside_transform
from .written_out import EVERY_ORDER


class Slot(NamedTuple):
    """Where a component lives: an input, and the feature of its last dimension (None: the input is one scalar coordinate)."""

    leaf: int
    feature: int | None


Edges: TypeAlias = dict[Term, list[tuple[int, Term]]]
"""The passes of one order: a node, and what is read from its pass: the component and the term that it adds to."""
Found: TypeAlias = dict[Term, list[Tensor]]
"""The nodes so far, each as one tensor over the points for every output column."""
Layered: TypeAlias = tuple[list[Tensor], Found]
Layer: TypeAlias = Callable[..., Layered]
"""A function of the leaves: the columns that the next order differentiates, and everything found on the way."""
Seeds: TypeAlias = dict[int, Tensor]
"""Cotangents by the number of the column."""
Pull: TypeAlias = Callable[[Seeds, Sequence[int], bool], Sequence[Tensor]]
"""Seeds, the numbers of the leaves and `create_graph`: the gradients with respect to those leaves."""
Inspect: TypeAlias = Callable[[list[Tensor], Callable[[Seeds], Sequence[Tensor]]], None]
"""Sees the columns of the value and how to pull cotangents back to all leaves, before any derivative is taken."""


@lru_cache(maxsize=256)
def passes(wanted: frozenset[Term]) -> tuple[Edges, ...]:
    """The reverse passes for the wanted terms, order by order: a small cover, chosen from the highest order down.

    >>> [list(level) for level in passes(frozenset({Term((), (0,)), Term((), (0, 0)), Term((), (0, 1))}))]
    [[Term(laplacians=(), along=())], [Term(laplacians=(), along=(0,))]]
    """
    by_order: dict[int, set[Term]] = {}
    for term in wanted:
        by_order.setdefault(term.order, set()).add(term)
    levels: list[Edges] = []
    for order in range(max(by_order, default=0), 0, -1):
        level: Edges = {}
        targets = sorted(by_order.get(order, ()))
        for term in targets:
            if not term.along:
                *rest, block = term.laplacians
                for component in block:
                    level.setdefault(Term(tuple(rest), (component,)), []).append((component, term))
        lower = by_order.setdefault(order - 1, set())
        _cover([term for term in targets if term.along], level, lower)
        lower.update(level)
        levels.append(dict(sorted(level.items())))
    return tuple(reversed(levels))


def _cover(targets: list[Term], level: Edges, asked: set[Term]) -> None:
    """Give each target one parent, greedily: nodes that are differentiated anyway, then those that serve most targets."""
    options: dict[Term, list[tuple[int, Term]]] = {}
    for term in targets:
        for component in sorted(set(term.along)):
            options.setdefault(_without(term, component), []).append((component, term))
    counts = {node: len(served) for node, served in options.items()}
    waiting = set(targets)
    while waiting:
        best = max(counts, key=lambda node: (node in level, counts[node], node in asked, _reversed(node)))
        del counts[best]
        served = [(component, term) for component, term in options[best] if term in waiting]
        if not served:
            continue
        level.setdefault(best, []).extend(served)
        for _, term in served:
            waiting.remove(term)
            for component in set(term.along):
                other = _without(term, component)
                if other in counts:
                    counts[other] -= 1


def _without(term: Term, component: int) -> Term:
    place = term.along.index(component)
    return Term(term.laplacians, term.along[:place] + term.along[place + 1 :])


def _reversed(node: Term) -> tuple[int, ...]:
    """Ties go to the node that comes first."""
    return tuple(-component for component in node.along)


def nested(
    call: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    slots: Sequence[Slot],
    points: Shape,
    wanted: Iterable[Term],
    inspect: Inspect | None = None,
) -> dict[Term, Tensor]:
    """The value of `call(*tensors)` (the term `VALUE`), the wanted terms and those found on the way, each of the value's shape and dtype.

    `points` is the shape of the samples: the value has it in front, and each tensor holds one entry, or one feature vector, for each
    sample.
    """
    reverse = _Functional() if inside_transform() else _Tape()
    like: list[Tensor] = []

    def layer(*leaves: Tensor) -> Layered:
        with Composite(EVERY_ORDER):
            value = call(*leaves)
        like[:] = [value]
        columns = _columns(value, points)
        reverse.look(columns, leaves)
        return columns, {VALUE: columns}

    levels = passes(frozenset(wanted))
    for order, level in enumerate(levels, start=1):
        following = levels[order] if order < len(levels) else {}
        layer = _raised(layer, reverse, level, following, slots, points, inspect if order == 1 else None)
    _, found = _attempted(layer, reverse.leaves(tensors))
    results = {term: _assembled(columns, like[0]) for term, columns in found.items()}
    return results if _kept(reverse) else {term: tensor.detach() for term, tensor in results.items()}


def _attempted(layer: Layer, leaves: Sequence[Tensor]) -> Layered:
    """The layer at the leaves; an operation without a further derivative is named, with a way out."""
    try:
        return layer(*leaves)
    except RuntimeError as error:
        missing = re.search(r"derivative for (\S+) is not implemented", str(error))
        if missing is None:
            raise
        raise MethodError(
            "the function holds an operation whose derivative cannot be differentiated again",
            got=missing.group(1),
            expected="operations with derivatives of every order",
            hint="with torch.nn.attention.sdpa_kernel(SDPBackend.MATH): around the call" if "attention" in missing.group(1) else "",
        ) from error


def _raised(
    lower: Layer, reverse: Reverse, level: Edges, following: Edges, slots: Sequence[Slot], points: Shape, inspect: Inspect | None
) -> Layer:
    """The layer one order up: all that `lower` finds, and what the passes of `level` read."""

    def layer(*leaves: Tensor) -> Layered:
        columns, pull, lower_found = reverse.vjp(lower, leaves)
        if inspect is not None:
            inspect(columns, lambda seeds: pull(seeds, range(len(leaves)), False))
        found, width = dict(lower_found), len(columns) // len(level)
        create = bool(following) or _kept(reverse)
        for position, edges in enumerate(level.values()):
            needed = sorted({slots[component].leaf for component, _ in edges})
            for column in range(width):
                place = position * width + column
                gradients = dict(zip(needed, pull({place: torch.ones_like(columns[place])}, needed, create), strict=True))
                for component, term in edges:
                    _add(found.setdefault(term, []), column, _read(gradients, slots[component], points))
        return [tensor for node in following for tensor in found[node]], found

    return layer


def _kept(reverse: Reverse) -> bool:
    """Whether the caller can differentiate the results any further."""
    return torch.is_grad_enabled() and reverse.attached


def _read(gradients: dict[int, Tensor], slot: Slot, points: Shape) -> Tensor:
    gradient = gradients[slot.leaf]
    return _shaped(gradient if slot.feature is None else gradient[..., slot.feature], points)


def _add(columns: list[Tensor], column: int, tensor: Tensor) -> None:
    if column < len(columns):
        columns[column] = columns[column] + tensor
    else:
        columns.append(tensor)


def _columns(value: Tensor, points: Shape) -> list[Tensor]:
    """The value as real tensors over the points, one for every output entry (two for a complex one)."""
    real = torch.view_as_real(value) if value.is_complex() else value
    width = prod(real.shape[len(points) :])
    return [_shaped(real, points)] if width == 1 else list(real.reshape(*points, width).unbind(-1))


def _assembled(columns: list[Tensor], like: Tensor) -> Tensor:
    """Columns over the points, put together to the shape and the dtype of the value."""
    stacked = columns[0] if len(columns) == 1 else torch.stack(columns, -1)
    if like.is_complex():
        return torch.view_as_complex(stacked.reshape(*like.shape, 2)).to(like.dtype)
    return _shaped(stacked, like.shape).to(like.dtype)


def _shaped(tensor: Tensor, shape: Shape) -> Tensor:
    """A view only where the shape differs: each view would be a node in the graph of the next order."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


@final
class _Tape:
    """Reverse mode by `torch.autograd.grad`: works with whatever autograd works with."""

    attached = True
    """Whether the value depends on anything that requires grad besides our own leaves."""

    def leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What is differentiated by: fresh leaves, or views of inputs that the user's own graph should reach."""
        outer = torch.is_grad_enabled()
        return [tensor.view_as(tensor) if outer and tensor.requires_grad else tensor.detach().requires_grad_() for tensor in tensors]

    def look(self, columns: list[Tensor], leaves: Sequence[Tensor]) -> None:
        self.attached = _reaches_others(columns, leaves)

    def vjp(self, layer: Layer, leaves: Sequence[Tensor]) -> tuple[list[Tensor], Pull, Found]:
        with torch.enable_grad():
            columns, found = layer(*leaves)

        def pull(seeds: Seeds, which: Sequence[int], create: bool) -> Sequence[Tensor]:
            inputs = [leaves[number] for number in which]
            seeded = [(columns[place], seed) for place, seed in seeds.items() if columns[place].requires_grad]
            if not seeded:
                return [torch.zeros_like(leaf, requires_grad=create) for leaf in inputs]
            outputs, cotangents = zip(*seeded, strict=True)
            return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, create_graph=create, materialize_grads=True)

        return columns, pull, found


@final
class _Functional:
    """Reverse mode by `torch.func.vjp`: composes with the transforms around it, which also decide what the results are attached to."""

    attached = True

    def leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def look(self, columns: list[Tensor], leaves: Sequence[Tensor]) -> None:
        pass

    def vjp(self, layer: Layer, leaves: Sequence[Tensor]) -> tuple[list[Tensor], Pull, Found]:
        vjp: Callable[..., Any] = torch.func.vjp
        columns, pullback, found = vjp(layer, *leaves, has_aux=True)

        def pull(seeds: Seeds, which: Sequence[int], create: bool) -> Sequence[Tensor]:
            zeros = (torch.zeros_like(column) for column in columns)
            gradients = pullback([seeds.get(place, zero) for place, zero in enumerate(zeros)], create_graph=create)
            return [gradients[number] for number in which]

        return columns, pull, found


Reverse: TypeAlias = _Tape | _Functional


def _reaches_others(columns: list[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether the graph of the columns ends at any leaf tensor that is not one of ours: a parameter, or an input of the user's."""
    ours = {id(leaf) for leaf in leaves}
    if any(column.is_leaf and column.requires_grad and id(column) not in ours for column in columns):
        return True
    waiting: list[Any] = [column.grad_fn for column in columns if column.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in ours:
            return True
        following = {successor for successor, _ in node.next_functions if successor is not None} - seen
        seen |= following
        waiting.extend(following)
    return False
