"""Which operation mixes samples: f runs twice, operation by operation, and the first output that differs is the culprit's.

The second run has the same sample in every place of the batch. What belongs to that sample alone is the same in both runs; what
another sample has a part in is not. Nothing here runs before mixing has been found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from ._errors import MixingError, listed
from ._part import part
from ._problem import Problem
from ._signature import tensors_in
from ._state import rng_kept
from ._typing import Tensor

SAMPLES, TRIES, ROUNDING = 16, 4, 256
"""Samples that are traced; those that are tried in turn; units of eps, over the largest entry, from which two outputs differ."""
OWN, TORCH = Path(__file__).parent, Path(torch.__file__).parent
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Culprit:
    """An operation, the line of the user's code that calls it, and the innermost module around it."""

    operation: str
    file: str
    line: int
    module: str = ""

    def __str__(self) -> str:
        return f"{self.operation} at {self.file}:{self.line}" + (f" in {self.module}" if self.module else "")


def mixing(
    problem: Problem,
    sample: int,
    what: str,
    got: str,
    expected: str = "zero: each output depends on its own sample",
    *,
    by: int | None = None,
) -> MixingError:
    """The error where the output for `sample` was seen to depend on others (on `by`): it names the operation, if it can be told."""
    layers = _batch_statistics(problem)
    way_out = "module.eval() for batch norm, or GroupNorm or LayerNorm" if layers else "a function that treats samples apart"
    found = blame(problem, sample, by)
    error = MixingError(
        f"{problem.name} mixes samples: {what}",
        got=got + (f"; batch statistics in {listed(layers)}" if layers else "") + (f"; first in {found}" if found else ""),
        expected=f"{expected}, else there is no Jacobian for each sample",
        hint=f"{way_out}; batched=False to treat the whole batch as one sample",
    )
    error.culprit = found
    return error


def blame(problem: Problem, sample: int, by: int | None = None) -> Culprit | None:
    """The operation that mixes, as far as it can be told from the sample, else (a rank may stay as it was) from those near it."""
    if not problem.batched or problem.size < 2:
        return None
    device = problem.targets[0].tensor.device
    near = sorted(range(problem.size), key=lambda n: (n not in (sample, by), abs(n - sample)))[:SAMPLES]
    index = torch.tensor(sorted(near), device=device)
    seed = problem.random_state is None
    with rng_kept(device):
        for at in dict.fromkeys([sample, *near[:TRIES]]):
            mixed, alike = (partial(_run, part(problem, chosen), seed) for chosen in (index, torch.full_like(index, at)))
            found = first_difference(mixed, alike, len(index), sorted(near).index(at), problem.module)
            if found is not None:
                return found
    return None


def _run(problem: Problem, seed: bool) -> Tensor:
    if seed:
        torch.manual_seed(0)
    return problem(problem.tensors())


def first_difference(
    mixed: Callable[[], Any], alike: Callable[[], Any], size: int, sample: int, module: nn.Module | None = None
) -> Culprit | None:
    """The first operation, among those that the output of `mixed` is computed from, with no part for the sample that `alike` shares.

    `alike` is the same run with the sample's inputs in the places of all `size` samples. None where no operation can be told.
    """
    with suppress(Exception):  # the error that is being raised matters more than where it comes from
        traces = (_Trace(), _Trace())
        with traces[0]:
            out = mixed()
        with traces[1]:
            alike()
        needed = _ancestors(traces[0].steps, out)
        for i, (one, two) in enumerate(zip(traces[0].steps, traces[1].steps, strict=False)):
            if one.operation != two.operation:
                return None
            # (a step without a place is the library's own)
            if i in needed and one.frames[0] and not all(_shared(a, b, size, sample) for a, b in zip(one.copies, two.copies, strict=True)):
                file, line, owner = one.frames
                return Culprit(one.operation, file, line, _named(owner, module))
    return None


@dataclass
class _Step:
    """One operation: its name, where it was called, the tensors that it read and gave (by identity), and copies of the latter."""

    operation: str
    frames: tuple[str, int, str]
    read: list[int]
    gave: list[int]
    copies: list[Tensor]


class _Trace(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.kept: list[Any] = []
        """What was read and given, kept so that identities stay their own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = tensors_in((*args, *kwargs.values()))
        out = func(*args, **kwargs)
        gave = tensors_in((out,))
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            gave = [t for t in (read[0], read[0]._base) if t is not None]
        if gave:
            label = (resolve_name(func) or name).replace("torch.nn.functional.", "F.").removeprefix("torch.")
            self.steps.append(_Step(label, _place(), [*map(id, read)], [*map(id, gave)], [t.detach().clone() for t in gave]))
            self.kept += [read, gave, *(t._base for t in read)]
            self.steps[-1].read += [id(t._base) for t in read if t._base is not None]
        return out


def _ancestors(steps: list[_Step], out: Tensor) -> set[int]:
    """Positions of the steps that `out` is computed from: a number that only decides a branch is not among them."""
    wanted, found = {id(out), id(out._base)}, set()
    for i in reversed(range(len(steps))):
        if wanted & set(steps[i].gave):
            found.add(i)
            wanted |= set(steps[i].read)
    return found


def _shared(one: Tensor, two: Tensor, size: int, sample: int) -> bool:
    """Whether the part of one sample of so many, in one of the layouts that sizes allow, is the same in both."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return True  # (sizes that depend on the data: nothing can be said here)
    allowed: Any = 0
    if one.is_floating_point() and one.numel():
        allowed = ROUNDING * torch.finfo(one.dtype).eps * float(one.abs().nan_to_num(0, 0, 0).max())
    alike = (one == two) | (one != one) & (two != two)
    if one.is_floating_point():
        alike |= (one - two).abs() <= allowed
    pieces = list(_parts(alike, size, sample))
    if not pieces:  # (cut, or reshaped across samples: the sample's share of entries must be alike)
        return 0 < alike.numel() <= size * int(alike.sum())
    return any(bool(piece.all()) for piece in pieces)


def _parts(t: Tensor, size: int, sample: int) -> Iterator[Tensor]:
    """The sample's part in every layout that the sizes allow: a dimension of N, or folded with others before or after."""
    for dim, length in enumerate(t.shape):
        if length and length % size == 0:
            fold = length // size
            for outer in (o for o in range(1, fold + 1) if fold % o == 0):
                yield t.unflatten(dim, (outer, size, fold // outer)).select(dim + 1, sample)


def _place() -> tuple[str, int, str]:
    """(file, line) of the innermost frame outside of torch and this library, else of torch's module; and that module's identity."""
    frame: FrameType | None = sys._getframe(2)
    fallback: tuple[str, int] | None = None
    module = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        me = frame.f_locals.get("self")
        if not module and isinstance(me, nn.Module):
            module = str(id(me))
        if OWN in path.parents:
            break
        if TORCH not in path.parents:
            return str(path), frame.f_lineno, module
        if path.parent.name == "modules":
            fallback = fallback or (str(path.relative_to(TORCH.parent)), frame.f_lineno)
        frame = frame.f_back
    return *(fallback or ("", 0)), module


def _named(identity: str, module: nn.Module | None) -> str:
    """The name of the module that ran the operation, where it is one of the user's."""
    modules = module.named_modules() if module is not None else ()
    return next((f"{name or 'the module'} ({type(layer).__name__})" for name, layer in modules if str(id(layer)) == identity), "")


def _batch_statistics(problem: Problem) -> list[str]:
    """The batch norms that use the statistics of the batch, by name."""
    module = problem.module
    if module is None:
        return []
    return [
        f"{name or 'the module'} ({type(layer).__name__})"
        for name, layer in module.named_modules()
        if isinstance(layer, NORMS) and (layer.training or layer.running_mean is None)
    ]
