"""`vmap`: `torch.func` reverse mode of one sample, vectorised over samples, in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch.func import vjp
from torch.func import vmap as torch_vmap

from .._blocks import Block, Dense
from .._errors import MethodError, PartialsError, RandomnessError
from .._output import check_output
from .._plan import Cost, Verdict
from .._probe import Facts
from .._problem import Problem
from .._typing import Tensor
from ._base import Computed, Method, no_pieces, per_sample, result_bytes
from ._complete import all_seen
from ._composite import Composite

Tensors = dict[str, Tensor]


def verdict(problem: Problem, facts: Facts) -> Verdict:
    if reason := no_pieces(problem, facts):
        return Verdict("vmap", reason)
    if facts.vmap_unsafe:
        return Verdict("vmap", f"torch's derivative of {facts.vmap_unsafe[0]} under vmap is wrong")
    flops, saved = per_sample(facts)
    outputs, result = facts.outputs, result_bytes(problem, facts)
    each = int(saved * (1 + outputs)) + result // max(problem.size, 1)
    chunk = chunk_size(problem.size, each, None if problem.budget is None else problem.budget - result)
    pieces = -(-problem.size // chunk) if chunk else 1
    cost = Cost(
        passes=2 * pieces,
        launches=pieces * 12 * facts.operations + 20,
        flops=int(problem.size * (1 + 2 * outputs) * flops),
        bytes=result + each * min(chunk or problem.size, problem.size),
    )
    return Verdict("vmap", "torch.func: every sample and output in one vectorised pass", cost, chunk)


def chunk_size(size: int, bytes_each: int, room: int | None) -> int | None:
    """Samples at a time so that a chunk stays below `room` bytes, or below 256 MiB where there is no budget; None for all."""
    limit = 256 * 2**20 if room is None else max(room, 1)
    fits = max(1, limit // max(bytes_each, 1))
    return None if fits >= size else int(fits)


def run(problem: Problem, facts: Facts, chunk: int | None) -> Computed:
    tensors = problem.tensors() if problem.create_graph else {t.name: t.tensor.detach() for t in problem.targets}
    leaves = [leaf.tensor if problem.create_graph else leaf.tensor.detach() for leaf in problem.leaves]
    size, step = problem.size, chunk or max(problem.size, 1)
    values: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {t.name: [] for t in problem.targets}
    filled: Tensors = {}
    for start in range(0, size, step):
        count = min(step, size - start)
        out, found = _chunk(problem, facts.outputs, *_cut(problem, tensors, leaves, start, count))
        all_seen(problem, out, "vmap") if not problem.create_graph else None
        values.append(out if problem.create_graph else out.detach())
        for name, part in found.items():
            if count == size or problem.create_graph:
                rows[name].append(part)
                continue
            if name not in filled:
                filled[name] = part.new_empty(size, *part.shape[1:])
            filled[name][start : start + count] = part.detach()
    done = filled or {name: (parts[0] if len(parts) == 1 else torch.cat(parts)) for name, parts in rows.items()}
    blocks: dict[str, tuple[Block, ...]] = {name: (Dense(part if problem.create_graph else part.detach()),) for name, part in done.items()}
    return Computed(torch.cat(values) if len(values) > 1 else values[0], blocks)


def _cut(problem: Problem, tensors: Tensors, leaves: list[Tensor], start: int, count: int) -> tuple[Tensors, list[Tensor]]:
    if not problem.batched or count == problem.size:
        return tensors, leaves
    dims = {t.name: problem.dim_of(t) for t in problem.inputs}
    part = {name: tensor.narrow(dims[name], start, count) if name in dims else tensor for name, tensor in tensors.items()}
    return part, [leaf if dim is None else leaf.narrow(dim, start, count) for leaf, dim in zip(leaves, problem.dims, strict=True)]


def _chunk(problem: Problem, outputs: int, tensors: Tensors, leaves: list[Tensor]) -> tuple[Tensor, Tensors]:
    """Values (N, *out) and rows {name: (N, C, *shape)} of the samples in `leaves`."""
    dims = problem.dims
    inputs = {t.name: problem.dim_of(t) for t in problem.inputs} if problem.batched else {}

    def one(given: Tensors, *sample: Tensor) -> tuple[Tensor, Tensors]:
        whole = [leaf if dim is None else leaf.unsqueeze(dim) for leaf, dim in zip(sample, dims, strict=True)]

        def function(wanted: Tensors) -> tuple[Tensor, Tensor]:
            with Composite():
                out = problem({n: t.unsqueeze(inputs[n]) if n in inputs else t for n, t in wanted.items()}, whole)
            out = check_output(out, 1, problem.name, batched=problem.batched).squeeze(0)
            return out.reshape(-1), out

        flat, pull, out = _vjp(function, given)
        if outputs == 1:
            return out, {name: row.unsqueeze(0) for name, row in pull(torch.ones_like(flat))[0].items()}
        seeds = torch.eye(outputs, dtype=flat.dtype, device=flat.device)
        return out, torch_vmap(lambda seed: pull(seed)[0], randomness="same")(seeds)

    if not problem.batched:
        out, found = one(tensors, *leaves)
        return out.unsqueeze(0), {name: row.unsqueeze(0) for name, row in found.items()}
    in_dims: Any = ({name: inputs.get(name) for name in tensors}, *dims)
    try:
        return torch_vmap(one, in_dims=in_dims, randomness=problem.randomness)(tensors, *leaves)
    except PartialsError:
        raise
    except RuntimeError as error:
        raise translated(problem, error) from error


def _vjp(function: Any, given: Tensors) -> tuple[Tensor, Any, Tensor]:
    """vjp with what the function also returns (torch's annotation knows only the pair)."""
    found: Any = vjp(function, given, has_aux=True)
    flat, pull, aux = found
    return flat, pull, aux


def translated(problem: Problem, error: RuntimeError) -> PartialsError:
    """vmap's refusal in our words; the function ran on the plain sample just before, so the fault is not the function's."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "randomness" in str(error):
        return RandomnessError(
            f"{problem.name} draws random numbers under vmap", got=first, expected="a policy", hint='randomness="same" or "different"'
        )
    return MethodError(
        f"method='vmap' cannot run {problem.name}", got=first, expected="operations that torch.func.vmap supports", hint="method='loop'"
    )


METHOD = Method("vmap", "torch.func.vmap of the reverse-mode Jacobian of one sample, in chunks", verdict, run)
