"""Completeness: after the run, no wanted parameter may be reachable from the outputs but through a recorded use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.autograd.function import BackwardCFunction

from .._errors import listed
from .._graph import HIDES
from .._typing import Tensor
from .trace import Refused, Trace


class Hidden(Refused):
    """A use that no torch function showed; `blind` says that no way of running f under a transform would see it either."""

    def __init__(self, what: str, *, blind: bool) -> None:
        super().__init__(what)
        self.blind = blind


def demand_complete(output: Tensor, wanted: Mapping[str, Tensor], trace: Trace, originals: Mapping[str, Tensor]) -> None:
    """Refused if the graph of `output` reaches a parameter outside the recorded uses: the words say which, and by what."""
    lost = missed(output, wanted, trace, originals)
    if not lost:
        return
    by = {node for node in lost.values() if node is not None}
    words = f"{listed(sorted(lost))} is reached outside the recorded uses"
    if trace.nested:
        why = "f differentiates inside (torch.autograd.grad), where parameters are used again in the backward graph"
        raise Refused(f"{words}: {why}", nested=True)
    names = listed(sorted({node.name() for node in by}))
    if by and all(isinstance(node, BackwardCFunction) for node in by):
        raise Hidden(f"{words}, by {names} (an autograd.Function)", blind=False)
    raise Hidden(f"{words}, by {names}: no torch function shows that use (torch.jit, a thread started in f, an extension)", blind=True)


def missed(output: Tensor, wanted: Mapping[str, Tensor], trace: Trace, originals: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Names of wanted parameters, or of the `originals` that they stand in for, that the graph reaches outside the recorded uses.

    With each goes the node of the operation that uses it.
    """
    nodes = {t.grad_fn: name for name, t in wanted.items() if t.grad_fn is not None}
    leaves = {id(t): name for tensors in (wanted, originals or {}) for name, t in tensors.items() if t.grad_fn is None}
    found: dict[str, Any] = {name: None for name, t in wanted.items() if t is output}
    stack: list[tuple[Any, Any]] = [(output.grad_fn, None)]
    seen: set[Any] = set()
    while stack:
        node, user = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if HIDES in node.name():
            raise Refused("reentrant checkpointing runs its part of f again in the reverse pass, where the graph does not show it")
        if node in trace.stops:
            stack.extend((following, node) for following in trace.stops[node])
            continue
        if node in nodes:
            found[nodes[node]] = user
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in leaves:
            found[leaves[id(leaf)]] = user
        stack.extend((following, node) for following, _ in node.next_functions)
    return found
