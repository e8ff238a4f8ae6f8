"""When checks run: the first time for each piece of code, every time, or never.

The key of a piece of code holds what decides which operations run: code objects, module types with their settings and train
flags, dtypes, names, shapes of parameters; and the operations that did run. Not the number of samples (but for none, one and
several), nor the sizes of inputs; and a fresh lambda of the same code is not new.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from threading import Lock
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from .._problem import Problem
from .._typing import Tensor
from .levels import inspect, samples_apart
from .report import Report

Course = Callable[[], tuple[int, int]]
POLICIES = ("first", "always", "never")
SIZE, ENOUGH, DEPTH = 4096, 3, 4
"""Keys that are remembered; passed checks after which rows that are all zero are no reason to look again; nesting of functions."""


class Passed:
    """Which keys have passed: bounded, the oldest forgotten first, safe under threads."""

    def __init__(self, size: int = SIZE) -> None:
        self.size, self.lock = size, Lock()
        self.counts: OrderedDict[Hashable, int] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        with self.lock:
            return self.counts.get(key, 0) >= ENOUGH

    def add(self, key: Hashable, report: Report) -> None:
        """Remember a passed check; one that had rows of zeros only to compare told little, and counts as a part."""
        with self.lock:
            self.counts[key] = self.counts.get(key, 0) + (1 if report.vacuous else ENOUGH)
            self.counts.move_to_end(key)
            while len(self.counts) > self.size:
                self.counts.popitem(last=False)

    def clear(self) -> None:
        with self.lock:
            self.counts.clear()


PASSED = Passed()


def verify(
    problem: Problem, jacobian: Any, policy: str, *, doubtful: bool = False, course: Course = lambda: (0, 0), kept: bool = False
) -> None:
    """Run the quick check where the policy asks for it; whatever it says, look for mixing where a run of f gave cause to.

    `course` stands for what f did in the run: other operations are other code, whatever decided on them. A run that `kept` to a script
    which has passed in the same dtype has done the same.

    Raises
    ------
    CheckError
        with the report, where the Jacobian failed.
    MixingError
        where f mixes samples.
    """
    if not problem.size or (policy == "never" and not doubtful):
        return
    history, script = problem.history, (problem.history.script, jacobian.values.dtype) if kept else None
    if policy == "first" and kept and history.passed == script:
        return
    key, did = (None, (0, 0)) if policy == "always" else (key_of(problem, jacobian.plan.method, jacobian.values.dtype), course())
    if policy == "never" or (policy == "first" and (key, did[0]) in PASSED):
        if doubtful:
            _apart(problem, jacobian, (key, did[1], "apart"))
        elif kept and policy == "first":
            history.passed = script
        return
    report = inspect(problem, jacobian.plan.method, "quick", jacobian).raise_if_failed()
    if policy == "first":
        PASSED.add((key, did[0]), report)


def _apart(problem: Problem, jacobian: Any, key: Hashable) -> None:
    """Once for each piece of code: samples do not mix, or MixingError."""
    if key not in PASSED:
        report = samples_apart(problem, jacobian).raise_if_failed()
        PASSED.add(key, report)


def key_of(problem: Problem, method: str, dtype: torch.dtype) -> Hashable:
    """What a passed check holds for."""
    return (
        method,
        dtype,
        problem.batched and min(problem.size, 2),
        problem.randomness,
        problem.create_graph,
        tuple((t.name, t.kind, t.leaf, t.tensor.dtype, t.tensor.shape) for t in problem.targets),
        tuple((leaf.name, leaf.dim, leaf.tensor.dtype, leaf.tensor.ndim) for leaf in problem.leaves),
        torch.is_autocast_enabled(problem.targets[0].tensor.device.type),
        tuple(_of(problem.function)),
        tuple(_of(problem.module)) if problem.module is not problem.function else (),
        tuple(_of(problem.picker.choice)),
        tuple(_of(problem.options.get("loss"))),
    )


def _of(thing: Any, depth: int = DEPTH) -> Iterator[Hashable]:
    """What decides the behaviour of a callable, as far as it can be seen cheaply."""
    if isinstance(thing, nn.Module):
        for module in thing.modules():
            yield from _of_module(module)
    elif isinstance(thing, FunctionType):
        yield from _of_function(thing, depth)
    elif isinstance(thing, MethodType):
        yield from _of(thing.__func__, depth)
        yield from _of(thing.__self__, depth)
    elif isinstance(thing, functools.partial):
        for part in (thing.func, *thing.args, *thing.keywords.values()):
            yield from _of(part, depth)
    elif isinstance(thing, Tensor):
        yield thing.dtype
    elif thing is None or isinstance(thing, bool | str):
        yield thing
    else:
        kind: Any = type(thing)
        yield kind
        yield _code(vars(type(thing)).get("__call__"))


def _of_module(module: nn.Module) -> Iterator[Hashable]:
    kind: Any = type(module)
    yield kind
    yield module.training
    yield _code(module.forward)
    if kind.__module__.startswith("torch.nn"):  # settings such as stride, padding, eps; a user's module may count its calls
        for name, value in vars(module).items():
            if type(value) in (bool, int, float, str, tuple):
                yield name, value


def _of_function(function: FunctionType, depth: int) -> Iterator[Hashable]:
    yield _code(function)
    if not depth:
        return
    code = function.__code__
    for cell in function.__closure__ or ():
        try:
            yield from _of(cell.cell_contents, depth - 1)
        except ValueError:  # a name that is not bound yet
            yield None
    for default in function.__defaults__ or ():
        yield from _of(default, depth - 1)
    for names in (code.co_names, *(inner.co_names for inner in code.co_consts if isinstance(inner, CodeType))):
        for name in names:
            used = function.__globals__.get(name)
            if isinstance(used, FunctionType | nn.Module):
                yield from _of(used, depth - 1)


def _code(function: Any) -> Hashable:
    code = getattr(function, "__code__", None)
    return (code, code.co_filename) if isinstance(code, CodeType) else None
