"""Completeness: after the run, no wanted parameter may be reachable from the outputs but through a recorded use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._typing import Tensor
from .recorder import Trace


def missed(output: Tensor, wanted: Mapping[str, Tensor], trace: Trace) -> set[str]:
    """Names of wanted parameters that the graph of `output` reaches outside the recorded uses."""
    nodes = {t.grad_fn: name for name, t in wanted.items() if t.grad_fn is not None}
    leaves = {id(t): name for name, t in wanted.items() if t.grad_fn is None}
    found = {name for name, t in wanted.items() if t is output}
    stack: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in trace.stops:
            stack.extend(trace.stops[node])
            continue
        if node in nodes:
            found.add(nodes[node])
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in leaves:
            found.add(leaves[id(leaf)])
        stack.extend(following for following, _ in node.next_functions)
    return found
