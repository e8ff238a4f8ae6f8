"""Capture: one forward that records the uses, C reverse passes that stop there, and blocks in factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.func import vmap as torch_vmap

from .. import _compat
from .._blocks import Block, Dense
from .._errors import PartialsError, listed
from .._machine import out_of_memory
from .._output import check_output
from .._problem import Problem
from .._state import random_state, restore
from .._typing import Tensor
from ..methods._base import Computed
from ..methods._complete import stood_in_for
from . import layout as layouts
from .build import blocks_of, features
from .describe import described
from .known import LAYOUTS, key_of
from .layout import Layout, spilt
from .recorder import Recorder, Refused, Trace, Unplaced, Use
from .reverse import cotangents, weighted
from .tape import TapeRecorder
from .walk import demand_complete

Run = tuple[Tensor, Any, Trace, dict[str, Tensor]]


def native(problem: Problem, kind: type[Recorder] = Recorder) -> Run:
    """f on the user's own batch: native kernels, the model's own masks, in-place writes and data-dependent branches."""
    narrowed = problem.narrowed()
    if narrowed is problem:
        return _watched(problem, kind)
    before = random_state(problem.targets[0].tensor.device)
    try:
        return _watched(narrowed, kind)
    except (Refused, PartialsError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
    restore(before, problem.targets[0].tensor.device)
    return _watched(problem, kind)  # an f that needs the graph of what was not asked for (it differentiates within), or that fails anyway


def _watched(problem: Problem, kind: type[Recorder]) -> Run:
    tensors, leaves = problem.tensors(), problem.given
    shared = {t.leaf for t in problem.parameters}
    of_samples = [leaf for leaf in problem.leaves if leaf.name not in shared and (leaf.dim is not None or not problem.batched)]
    by_name = {leaf.name: given for leaf, given in zip(problem.leaves, leaves, strict=True)} | {
        t.leaf: tensors[t.name] for t in problem.inputs
    }
    samples = [by_name[leaf.name] for leaf in of_samples]
    recorder = kind(parameters(problem, tensors), samples, problem.size, attached=problem.create_graph)
    with recorder:
        returned, whole = problem.raw(tensors, leaves)
    recorder.open = False
    out = problem.picker(returned)
    values = check_output(out if problem.batched else out.unsqueeze(0), problem.size, problem.name, batched=problem.batched)
    return values, whole, recorder.trace, tensors


def taped(problem: Problem) -> Run:
    """The same, through reverse passes of f's own (torch.autograd.grad with create_graph=True)."""
    if problem.create_graph:
        raise Refused("create_graph=True through f's own reverse passes")
    return native(problem, TapeRecorder)


def vmapped(problem: Problem) -> Run:
    """f under `torch.func.vmap`, each sample with a batch dimension of one: layouts are known, unknown operations are expanded."""
    if not problem.batched:
        raise Refused("a single sample has nothing to vectorise over")
    if not _compat.PRIVATE:
        raise Refused("this torch does not show what vmap does with its tensors")
    if problem.randomness == "model":
        raise Refused('randomness="model" needs the masks of the whole batch')
    tensors = problem.tensors()
    inputs = {t.name: problem.dim_of(t) for t in problem.inputs}
    recorder = Recorder(parameters(problem, tensors), (), problem.size, expand_unknown=True, attached=problem.create_graph)
    leaves = problem.given

    def one(given: dict[str, Tensor], *sample: Tensor) -> Tensor:
        whole = [leaf if dim is None else leaf.unsqueeze(dim) for leaf, dim in zip(sample, problem.dims, strict=True)]
        put = {name: given[name].unsqueeze(inputs[name]) if name in inputs else tensor for name, tensor in tensors.items()}
        recorder.level = _compat.current_level()
        with recorder:
            out = problem(put, whole)
        return check_output(out, 1, problem.name, batched=True).squeeze(0)

    given = {name: tensors[name] for name in inputs}
    try:
        values = (
            torch_vmap(one, in_dims=(inputs, *problem.dims), randomness=problem.randomness)(given, *leaves)
            if given
            else torch_vmap(lambda *sample: one({}, *sample), in_dims=tuple(problem.dims), randomness=problem.randomness)(*leaves)
        )
    except Refused:
        raise
    except Exception as error:  # f runs on the plain batch and on a plain sample: what fails only here is no fault of f
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise Refused(f"f cannot be run under torch.func.vmap ({first})") from error
    return values, None, recorder.trace, tensors


def solve(problem: Problem, run: Run, runner: str) -> Computed:
    """Completeness, layouts, reverse passes, blocks."""
    values, whole, trace, tensors = run
    wanted = parameters(problem, tensors)
    demand_complete(values, wanted, trace, stood_in_for(problem, tensors))
    for use in trace.uses:
        if any(t._version != version for t, version in use.saved):
            raise Refused(f"an input of {use.operation} was changed in place after the operation read it")
    inputs = [tensors[t.name] for t in problem.inputs]
    edges = list(dict.fromkeys(use.edge for use in trace.uses))
    where = {edge: i for i, edge in enumerate(edges)}
    size = problem.size
    measured = _layouts(problem, values, trace, edges, where)
    found = cotangents(values, [*edges, *inputs], create_graph=problem.create_graph, one_by_one=trace.one_by_one)
    groups: dict[str, list[Block]] = {name: [] for name in wanted}
    if any(placed is None and found[where[use.edge]] is not None for use, placed in zip(trace.uses, measured, strict=True)):
        measured = _layouts(problem, values, trace, edges, where, anew=True)  # a use that led nowhere when layouts were remembered
    for use, placed in zip(trace.uses, measured, strict=True):
        g = found[where[use.edge]]
        if g is None or placed is None:
            continue
        if placed.owned is not None and spilt(_canonical(use, g), placed):
            raise Refused(f"{use.operation}: positions of its output belong to no sample")
        for name, block in blocks_of(use, _canonical(use, g), placed, size, wanted, attached=problem.create_graph).items():
            groups[name].append(block)
    outputs = int(torch.Size(values.shape[1:]).numel())
    blocks: dict[str, tuple[Block, ...]] = {
        name: tuple(group) or (_zero(wanted[name], size, outputs),) for name, group in merged(groups).items()
    }
    for target, g in zip(problem.inputs, found[len(edges) :], strict=True):
        blocks[target.name] = (_input_block(problem, target, g, outputs),)
    notes = [f"no rule, expanded: {listed(sorted(set(trace.expanded)))}"] if trace.expanded else []
    if not values.requires_grad:
        notes.append("f's output carries no graph (it is detached, computed under no_grad, or uses no parameter): all rows are zero")
    sources = tuple((f"an input of {use.operation}", t, t._version) for use in trace.uses for t, _ in use.saved)
    lines = described(trace, wanted, size, measured, runner)
    doubtful = any(placed is not None and placed.owned is not None for placed in measured)
    return Computed(values if problem.create_graph else values.detach(), blocks, notes, whole, sources, lines, doubtful)


def merged(groups: Mapping[str, list[Block]]) -> dict[str, list[Block]]:
    """Dense blocks of one parameter are one dense block."""
    done: dict[str, list[Block]] = {}
    for name, group in groups.items():
        dense = [b for b in group if type(b) is Dense]
        rest: list[Block] = [b for b in group if type(b) is not Dense]
        done[name] = rest + (
            [dense[0]] if len(dense) == 1 else [Dense(sum((b.values for b in dense[1:]), dense[0].values))] if dense else []
        )
    return done


def _layouts(
    problem: Problem, values: Tensor, trace: Trace, edges: list[Any], where: dict[Any, int], *, anew: bool = False
) -> list[Layout | None]:
    """A layout for every use: known in a vmapped run, remembered from an earlier call, or measured by two reverse passes.

    None stands for a use that the values do not depend on.
    """
    n, uses = problem.size, trace.uses
    if n == 0:
        return [Layout(0)] * len(uses)
    open_uses = [use for use in uses if use.layout is None]
    if not open_uses:
        return _spread(uses, [])
    signs = [(use.operation, len(use.shape), tuple(s % n == 0 for s in use.shape)) for use in open_uses]
    key = None if trace.routed else key_of(problem, [*signs, *trace.answers])
    remembered = LAYOUTS.get(key)
    if remembered is not None and not anew:
        known = [None if p is None else layouts.resolve(p, use.shape, n) for p, use in zip(remembered, open_uses, strict=True)]
        if all(k is not None or p is None for k, p in zip(known, remembered, strict=True)):
            return _spread(uses, known)
    found, proved = _measure(problem, values, open_uses, edges, where, layouts.tolerance(trace.dtypes))
    if proved and key is not None:
        LAYOUTS.put(key, tuple(None if layout is None else layouts.pattern(layout) for layout in found))
    return _spread(uses, found)


def _measure(
    problem: Problem, values: Tensor, uses: list[Use], edges: list[Any], where: dict[Any, int], within: float
) -> tuple[list[Layout | None], bool]:
    n = problem.size
    if n == 1:
        return [layouts.candidates(use.shape, 1)[0] for use in uses], False
    if not values.requires_grad:
        return [Layout(0)] * len(uses), False
    generator = torch.Generator(device=values.device).manual_seed(n)
    seeds = torch.randn(values.shape, generator=generator, dtype=values.dtype, device=values.device)
    weights = 1 + torch.arange(n, dtype=torch.float64, device=values.device) / n
    first = weighted(values, edges, seeds)
    second = weighted(values, edges, seeds * weights.to(values.dtype).reshape(-1, *(1,) * (values.ndim - 1)))
    found: list[Layout | None] = []
    proved = True
    for use in uses:
        one, two = first[where[use.edge]], second[where[use.edge]]
        if one is None or two is None:
            found.append(None)
            continue
        one, two = (_canonical(use, g.detach().unsqueeze(0)).squeeze(0) for g in (one, two))
        layout, sure = layouts.find(one, two, weights, features(use.part, len(use.shape)), within)
        if layout is None:
            raise Unplaced(
                f"{use.operation}: no dimension of its output of shape {use.shape}, but for the parameter's own, holds {n} samples apart"
            )
        found.append(layout)
        proved &= sure
    return found, proved


def _spread(uses: list[Use], found: Sequence[Layout | None]) -> list[Layout | None]:
    rest = iter(found)
    return [next(rest) if use.layout is None else use.layout for use in uses]


def _canonical(use: Use, g: Tensor) -> Tensor:
    """(C, *edge shape) with mapped dimensions in front, as the block sees it: (C, *use.shape)."""
    if use.order is None:
        return g
    g = g.permute(0, *(1 + d for d in use.order))
    return g.flatten(1, 2) if use.merged else g


def parameters(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {t.name: tensors[t.name] for t in problem.parameters}


def _input_block(problem: Problem, target: Any, g: Tensor | None, outputs: int) -> Block:
    """The cotangent of an input, (C, *whole input), as rows of each sample."""
    if g is None:
        return Dense(target.tensor.new_zeros(1).expand(problem.size, outputs, *problem.shape_of(target)))
    return Dense(g.movedim(1 + problem.dim_of(target), 0) if problem.batched else g.unsqueeze(0))


def _zero(parameter: Tensor, n: int, outputs: int) -> Block:
    return Dense(
        parameter.detach().new_zeros(1).expand(n, outputs, *parameter.shape) if parameter.ndim else parameter.detach().new_zeros(n, outputs)
    )
