"""Walking the autograd graph: which of some tensors an output depends on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch.autograd.function import BackwardCFunction

from ._typing import Tensor

HIDES = "Checkpoint"
"""In the name of a graph node: reentrant checkpointing, which computes again in the reverse pass what the graph does not show."""


def nodes(output: Tensor) -> Iterator[Any]:
    """The nodes of the output's graph, each once."""
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def hides_uses(output: Tensor) -> bool:
    """Whether a node of the output's graph runs a reverse pass of its own, in which parameters may be used."""
    return any(HIDES in node.name() for node in nodes(output))


def of_python(output: Tensor) -> bool:
    """Whether an autograd.Function, whose backward is somebody's Python, is in the output's graph."""
    return any(isinstance(node, BackwardCFunction) for node in nodes(output))


def reached(output: Tensor, tensors: Mapping[str, Tensor], stops: Collection[Any] = ()) -> set[str]:
    """Names of the tensors (leaves or not) that the graph of `output` leads to, without passing the nodes `stops`."""
    wanted_nodes = {t.grad_fn: name for name, t in tensors.items() if t.grad_fn is not None}
    wanted_leaves = {id(t): name for name, t in tensors.items() if t.grad_fn is None}
    found = {name for name, t in tensors.items() if t is output}
    stack, seen = [output.grad_fn], set(stops)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted_nodes:
            found.add(wanted_nodes[node])
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in wanted_leaves:
            found.add(wanted_leaves[id(leaf)])
        stack.extend(following for following, _ in node.next_functions)
    return found


def strided(gradient: Tensor | None) -> Tensor | None:
    """A gradient as a dense tensor: an embedding with `sparse=True` gives a sparse one."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
