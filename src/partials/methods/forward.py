"""`forward`: one Jacobian-vector product of the whole batch for every parameter entry; it wins where entries are few."""

from __future__ import annotations

from typing import Any

import torch
from torch.func import jvp, vmap

from .._blocks import Block, Dense
from .._errors import MethodError
from .._plan import Cost, Verdict
from .._probe import Facts
from .._problem import Problem
from .._state import rng_kept
from .._targets import Target
from .._typing import Tensor
from ._base import Computed, Method, entries, no_policy, per_sample, result_bytes
from ._complete import all_seen
from .vmap import chunk_size


def verdict(problem: Problem, facts: Facts) -> Verdict:
    if problem.create_graph:
        return Verdict("forward", "a forward-mode derivative differentiated again is silently wrong in torch for layer_norm and others")
    if reason := no_policy(problem):
        return Verdict("forward", reason)
    if facts.forward_unsafe:
        return Verdict("forward", f"torch's forward-mode derivative of {facts.forward_unsafe[0]} differs from the reverse-mode one")
    columns, result = entries(problem), result_bytes(problem, facts)
    flops, saved = per_sample(facts)
    each = int(problem.size * (saved + 2 * facts.outputs * torch.finfo(problem.dtype).bits // 8))
    chunk = 1 if facts.random else chunk_size(columns, each, None if problem.budget is None else problem.budget - result)
    pieces = -(-columns // chunk) if chunk else 1
    cost = Cost(
        passes=columns,
        launches=pieces * 12 * facts.operations + 20,
        flops=int(problem.size * (1 + 2 * columns) * flops),
        bytes=result + each * min(chunk or columns, columns),
    )
    return Verdict("forward", "a forward-mode pass of the whole batch for every parameter entry", cost, chunk)


def run(problem: Problem, facts: Facts, chunk: int | None) -> Computed:
    tensors = {t.name: t.tensor.detach() for t in problem.targets}
    device = problem.targets[0].tensor.device
    aliases = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    with rng_kept(device):
        values = problem(aliases)
    all_seen(problem, values, "forward", aliases)
    if not bool(values.isfinite().all()):
        raise MethodError(
            "method='forward' stops at values that are not finite",
            got="inf or NaN",
            hint="method='loop': forward and reverse mode differ there",
        )
    blocks: dict[str, tuple[Block, ...]] = {}
    for target in problem.targets:
        count = int(torch.Size(problem.shape_of(target)).numel())
        step = chunk or max(count, 1)
        columns = [_columns(problem, tensors, target, start, min(step, count - start)) for start in range(0, count, step)]
        rows = torch.cat(columns, -1) if columns else values.new_zeros(problem.size, facts.outputs, 0)
        blocks[target.name] = (Dense(rows.reshape(problem.size, facts.outputs, *problem.shape_of(target))),)
    _agrees_with_reverse_mode(problem, values, aliases, blocks)
    if facts.random:
        problem(tensors)  # the random state moves on as it would after one call of f
    return Computed(values.detach(), blocks)


def _agrees_with_reverse_mode(problem: Problem, values: Tensor, aliases: dict[str, Tensor], blocks: dict[str, tuple[Block, ...]]) -> None:
    """MethodError unless u . (J v) = (J^T u) . v for one Gaussian u and v, J^T u by one ordinary reverse pass.

    Forward mode can be wrong without an error: tangents are lost in threads that f starts, and a few operations of torch have
    another derivative there.
    """
    generator = torch.Generator(values.device).manual_seed(0)
    u = torch.randn(values.shape, generator=generator, dtype=values.dtype, device=values.device)
    pulled: list[Tensor | None] = [None] * len(aliases)
    if values.requires_grad:
        pulled[:] = list(torch.autograd.grad(values, list(aliases.values()), u, allow_unused=True))
    apart, size = 0.0, 0.0
    for target, g in zip(problem.targets, pulled, strict=True):
        v = torch.randn(target.tensor.shape, generator=generator, dtype=values.dtype, device=values.device)
        rows: Any = blocks[target.name][0]
        each = v.expand(problem.size, *v.shape)
        if target.kind == "input":
            each = v.movedim(problem.dim_of(target), 0) if problem.batched else v.unsqueeze(0)
        flat = rows.values.reshape(*rows.rows, rows.values.shape[2:].numel()).to(v)
        terms = u.reshape(rows.rows) * (flat @ each.reshape(problem.size, -1, 1)).squeeze(-1)
        apart += float(terms.sum()) - (0.0 if g is None else float((g.to(v) * v).sum()))
        size += float(terms.abs().sum())
    if not abs(apart) <= size * torch.finfo(values.dtype).eps ** 0.5:
        raise MethodError(
            "method='forward' gives another derivative than reverse mode",
            got=f"u . (J v) and (J^T u) . v are {abs(apart):.3g} apart, of {size:.3g}",
            expected="equal up to rounding",
            hint="method='auto' or method='loop'",
        )


def _columns(problem: Problem, tensors: dict[str, Tensor], target: Target, start: int, count: int) -> Tensor:
    """Columns start..start+count of one target: (N, C, count)."""
    tangents = torch.stack([_basis(problem, target, start + i) for i in range(count)])

    def column(tangent: Tensor) -> Tensor:
        def function(given: Tensor) -> Tensor:
            return problem({**tensors, target.name: given})

        derivative: Tensor = jvp(function, (tensors[target.name],), (tangent,))[1]
        return derivative.reshape(problem.size, -1)

    with rng_kept(target.tensor.device):
        try:
            found: Any = column(tangents[0]).unsqueeze(0) if count == 1 else vmap(column, randomness="same")(tangents)
        except (RuntimeError, NotImplementedError) as error:
            raise MethodError(
                f"method='forward' cannot run {problem.name}",
                got=str(error).splitlines()[0],
                expected="operations with a forward-mode derivative",
                hint="method='vmap' or method='loop'",
            ) from error
    columns: Tensor = found.detach().movedim(0, -1).to(target.tensor.dtype)
    return columns


def _basis(problem: Problem, target: Target, entry: int) -> Tensor:
    """The unit tangent of one entry; of an input, in every sample at once (samples do not mix)."""
    unit = target.tensor.new_zeros(problem.shape_of(target))
    unit.view(-1)[entry] = 1
    if target.kind == "parameter" or not problem.batched:
        return unit
    return unit.unsqueeze(problem.dim_of(target)).expand_as(target.tensor).contiguous()


METHOD = Method("forward", "torch.func.jvp, one pass for each parameter entry", verdict, run)
