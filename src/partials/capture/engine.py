"""Capture: one forward that records the uses, C reverse passes that stop there, and blocks in factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.func import vmap as torch_vmap

from .. import _compat
from .._blocks import Block, Dense
from .._errors import PartialsError
from .._machine import out_of_memory
from .._output import check_output
from .._problem import Problem
from .._state import random_state, restore
from .._typing import Tensor
from ..methods._base import Computed
from ..methods._complete import stood_in_for
from . import layout as layouts
from .build import READ_AGAIN, block_of, canonical, carried_to, features, merged, release, zero
from .course import digest, form
from .describe import described, held
from .known import LAYOUTS
from .layout import Layout, spilt
from .recorder import Recorder
from .reverse import cotangents, single, weighted
from .tape import TapeRecorder
from .trace import NO_GRAPH, Refused, Trace, Unplaced, Use, without_rule
from .walk import demand_complete


class Watch(Protocol):
    """A mode that f runs in."""

    def begins(self, samples: Sequence[Tensor], level: int | None) -> None:
        """What holds samples, as f is given it, and the number of our own vmap."""

    def ends(self, values: Tensor) -> None:
        """What f has returned."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> Any: ...


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
    inputs = {t.leaf: tensors[t.name] for t in problem.inputs}
    samples = [
        inputs.get(leaf.name, given)
        for leaf, given in zip(problem.leaves, leaves, strict=True)
        if (leaf.dim is not None or not problem.batched) and leaf.name not in shared
    ]
    recorder = kind(parameters(problem, tensors), samples, problem.size, attached=problem.create_graph)
    with recorder:
        returned, whole = problem.raw(tensors, leaves)
    recorder.open = False
    out = problem.picker(returned)
    values = check_output(out if problem.batched else out.unsqueeze(0), problem.size, problem.name, batched=problem.batched)
    recorder.ends(values)
    return values, whole, recorder.trace, tensors


def taped(problem: Problem, kind: type[Recorder] = Recorder) -> Run:
    """The same, through reverse passes of f's own (torch.autograd.grad with create_graph=True)."""
    if problem.create_graph:
        raise Refused("create_graph=True through f's own reverse passes")
    return native(problem, TapeRecorder)


def vmapped(problem: Problem, kind: type[Recorder] = Recorder) -> Run:
    """f under `torch.func.vmap`, each sample with a batch dimension of one: layouts are known, unknown operations are expanded."""
    if not problem.batched:
        raise Refused("a single sample has nothing to vectorise over")
    if not _compat.PRIVATE:
        raise Refused("this torch does not show what vmap does with its tensors")
    if problem.randomness == "model":
        raise Refused('randomness="model" needs the masks of the whole batch')
    tensors = problem.tensors()
    recorder = kind(parameters(problem, tensors), (), problem.size, expand_unknown=True, attached=problem.create_graph)
    try:
        values = apart(problem, tensors, recorder)
    except Refused:
        raise
    except Exception as error:  # f runs on the plain batch and on a plain sample: what fails only here is no fault of f
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise Refused(f"f cannot be run under torch.func.vmap ({first})") from error
    return values, None, recorder.trace, tensors


def apart(problem: Problem, tensors: Mapping[str, Tensor], mode: Watch) -> Tensor:
    """f's output, (N, *out), of samples that are run apart by vmap, under a mode that watches them."""
    inputs = {t.name: problem.dim_of(t) for t in problem.inputs}
    leaves, dims = problem.given, problem.dims

    def one(given: dict[str, Tensor], *sample: Tensor) -> Tensor:
        whole = [leaf if dim is None else leaf.unsqueeze(dim) for leaf, dim in zip(sample, dims, strict=True)]
        put = {name: given[name].unsqueeze(inputs[name]) if name in inputs else tensor for name, tensor in tensors.items()}
        mode.begins([leaf for leaf, dim in zip(whole, dims, strict=True) if dim is not None], _compat.current_level())
        with mode:
            out = problem(put, whole)
        out = check_output(out, 1, problem.name, batched=True)
        mode.ends(out)
        return out.squeeze(0)

    if not inputs:
        return torch_vmap(lambda *sample: one({}, *sample), in_dims=tuple(dims), randomness=problem.randomness)(*leaves)
    return torch_vmap(one, in_dims=(inputs, *dims), randomness=problem.randomness)({name: tensors[name] for name in inputs}, *leaves)


def solve(problem: Problem, run: Run, runner: str) -> Computed:
    """Completeness, layouts; then the answer."""
    values, _, trace, tensors = run
    demand_complete(values, parameters(problem, tensors), trace, stood_in_for(problem, tensors))
    measured, lasting = _layouts(problem, values, trace)
    entries = trace.course

    def course() -> tuple[int, int]:
        return digest(entries), digest(entries, fine=True)

    if lasting and trace.draft is not None:
        wanted, needed = parameters(problem, tensors), sum(map(held, trace.uses))
        problem.history.script = trace.draft.script(trace, runner, values, wanted, measured, needed, course())
    return answer(problem, run, runner, measured, course)


def answer(problem: Problem, run: Run, runner: str, measured: Sequence[Layout | None], course: Callable[[], tuple[int, int]]) -> Computed:
    """Reverse passes and blocks of a run that is known to be complete, with the layouts of its uses."""
    values, whole, trace, tensors = run
    uses, wanted, outputs = trace.uses, parameters(problem, tensors), values.shape[1:].numel()
    size = problem.size
    for use in uses:
        for t, version in use.saved:
            if t._version != version:
                raise Refused(f"an input of {use.operation} was changed in place after the operation read it")
    edges = [*trace.edges, *(tensors[t.name] for t in problem.inputs)] if problem.inputs else trace.edges
    found: Sequence[Tensor | None] = (
        single(values, edges, create_graph=problem.create_graph)
        if outputs == 1
        else cotangents(values, edges, create_graph=problem.create_graph, one_by_one=trace.one_by_one)
    )
    found = unfolded(trace.folded, found, 0 if outputs == 1 else 1)
    for use, placed in zip(uses, measured, strict=True):
        if placed is None and found[use.slot] is not None:  # a use that led nowhere when layouts were remembered
            measured, _ = _layouts(problem, values, trace, anew=True)
            break
    blocks = _blocks(problem, uses, wanted, measured, found, outputs)
    for target, g in zip(problem.inputs, found[len(trace.edges) :], strict=True):
        blocks[target.name] = (_input_block(problem, target, g, outputs),)
    notes = without_rule(trace.expanded)
    if not values.requires_grad:
        notes.append(NO_GRAPH)
    read = [use for use in uses if type(use.part) in READ_AGAIN]
    sources = [(f"an input of {use.operation}", t, version) for use in read for t, version in use.saved]
    for use in uses:
        release(use)
    return Computed(
        values if problem.create_graph else values.detach(),
        blocks,
        notes,
        whole,
        tuple(sources),
        lambda: described(uses, wanted, size, measured, runner),
        doubtful=any(placed is not None and placed.owned is not None for placed in measured),
        course=course,
    )


def _blocks(
    problem: Problem,
    uses: list[Use],
    wanted: Mapping[str, Tensor],
    measured: Sequence[Layout | None],
    found: Sequence[Tensor | None],
    outputs: int,
) -> dict[str, tuple[Block, ...]]:
    """The blocks of every wanted parameter: one of each use, carried on where an operation used what was computed from it."""
    size, one = problem.size, outputs == 1
    groups: dict[str, list[Block]] = {name: [] for name in wanted}
    names = {id(t): name for name, t in wanted.items()}
    for use, placed in zip(uses, measured, strict=True):
        g = found[use.slot]
        if g is None or placed is None:
            continue
        if placed.owned is not None and spilt(canonical(use, g.unsqueeze(0) if one else g), placed):
            raise Refused(f"{use.operation}: positions of its output belong to no sample")
        block = block_of(use, g, placed, size, single=one)
        name = names.get(id(use.part.parameter))
        if name is not None:
            groups[name].append(block)
        else:
            for name, carried in carried_to(use, block, wanted, attached=problem.create_graph).items():
                groups[name].append(carried)
    return {name: tuple(merged(group)) or (zero(wanted[name], size, outputs),) for name, group in groups.items()}


def _layouts(problem: Problem, values: Tensor, trace: Trace, *, anew: bool = False) -> tuple[list[Layout | None], bool]:
    """A layout for every use: known in a vmapped run, remembered from a run of the same course, or measured by two reverse passes.

    None stands for a use that the values do not depend on. Beside them, whether every run of this course has the same.
    """
    n = problem.size
    if n == 0:
        return [layouts.FIRST for _ in trace.uses], False
    open_uses = [use for use in trace.uses if use.layout is None]
    if not open_uses:
        return _spread(trace.uses, []), bool(trace.uses)
    key = (tuple(problem.dims), tuple(form(leaf.tensor.shape, n) for leaf in problem.leaves), form(values.shape, n), *trace.course)
    remembered = None if trace.routed or anew else LAYOUTS.get(key)
    if remembered is not None and len(remembered) == len(open_uses):
        known = [None if p is None else layouts.resolve(p, use.shape, n) for p, use in zip(remembered, open_uses, strict=True)]
        if all(k is not None or p is None for k, p in zip(known, remembered, strict=True)):
            return _spread(trace.uses, known), True
    measured, proved = _measure(problem, values, open_uses, trace, layouts.tolerance(trace.dtypes))
    proved &= not trace.routed
    if proved:
        LAYOUTS.put(key, tuple([None if layout is None else layouts.pattern(layout) for layout in measured]))
    return _spread(trace.uses, measured), proved


def _measure(problem: Problem, values: Tensor, uses: list[Use], trace: Trace, within: float) -> tuple[list[Layout | None], bool]:
    n = problem.size
    if n == 1:
        return [layouts.candidates(use.shape, 1)[0] for use in uses], False
    if not values.requires_grad:
        return [layouts.FIRST] * len(uses), False
    generator = torch.Generator(device=values.device).manual_seed(n)
    seeds = torch.randn(values.shape, generator=generator, dtype=values.dtype, device=values.device)
    weights = 1 + torch.arange(n, dtype=torch.float64, device=values.device) / n
    first = unfolded(trace.folded, weighted(values, trace.edges, seeds))
    second = unfolded(trace.folded, weighted(values, trace.edges, seeds * weights.to(values.dtype).reshape(-1, *(1,) * (values.ndim - 1))))
    found: list[Layout | None] = []
    proved = True
    for use in uses:
        one, two = first[use.slot], second[use.slot]
        if one is None or two is None:
            found.append(None)
            continue
        one, two = (canonical(use, g.detach().unsqueeze(0)).squeeze(0) for g in (one, two))
        layout, sure = layouts.find(one, two, weights, features(use.part, len(use.shape)), within)
        if layout is None:
            raise Unplaced(
                f"{use.operation}: no dimension of its output of shape {use.shape}, but for the parameter's own, holds {n} samples apart"
            )
        found.append(layout)
        proved &= sure
    return found, proved


def unfolded(folded: Mapping[int, torch.Size], found: Sequence[Tensor | None], lead: int = 0) -> Sequence[Tensor | None]:
    """The cotangents of a reverse pass in the shapes of what f saw, behind the first `lead` dimensions."""
    if not folded:
        return found
    seen = list(found)
    for slot, shape in folded.items():
        g = seen[slot]
        seen[slot] = None if g is None else g.reshape(*g.shape[:lead], *shape)
    return seen


def _spread(uses: list[Use], found: Sequence[Layout | None]) -> list[Layout | None]:
    rest = iter(found)
    return [next(rest) if use.layout is None else use.layout for use in uses]


def parameters(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {t.name: tensors[t.name] for t in problem.parameters}


def _input_block(problem: Problem, target: Any, g: Tensor | None, outputs: int) -> Block:
    """The cotangent of an input, (C, *whole input), as rows of each sample."""
    if g is None:
        return Dense(target.tensor.new_zeros(1).expand(problem.size, outputs, *problem.shape_of(target)))
    if outputs == 1:
        g = g.unsqueeze(0)
    return Dense(g.movedim(1 + problem.dim_of(target), 0) if problem.batched else g.unsqueeze(0))
