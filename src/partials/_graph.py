"""Walking the autograd graph: which of some tensors an output depends on."""

from __future__ import annotations

from collections.abc import Mapping

from ._typing import Tensor


def reached(output: Tensor, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors (leaves or not) that the graph of `output` leads to."""
    wanted_nodes = {t.grad_fn: name for name, t in tensors.items() if t.grad_fn is not None}
    wanted_leaves = {id(t): name for name, t in tensors.items() if t.grad_fn is None}
    found = {name for name, t in tensors.items() if t is output}
    stack, seen = [output.grad_fn], set()
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
