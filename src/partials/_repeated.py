"""Calls that were made before: the problem is not read from the call anew, and what its last run has shown is at hand.

A call is known by what decides how it is read: code, options, and the form of every input; a module's tree and the flags of its
parameters are compared one by one each time, since anybody may change them in between. Calls of other kinds are read every time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import call, is_
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from ._compat import has_hooks, rounded
from ._modules import modules
from ._output import per_sample_loss
from ._problem import Problem, normalise
from ._signature import Leaf
from ._state import rounding, without_backward
from ._targets import Target
from ._typing import Function, Tensor

LIMIT, MISSES, PATIENCE = 256, 3, 4
"""Calls that are remembered of functions, and of one module; runs that may leave their script, and one more for so many that keep to it."""
USUAL = {
    "wrt": None,
    "in_dims": 0,
    "batched": True,
    "output": None,
    "randomness": "error",
    "create_graph": False,
    "budget": None,
}
"""Options, but for `params`, where nothing is asked for."""


@dataclass(eq=False)
class History:
    """What runs of one call have shown."""

    script: Any = None
    """The script of the last run that was written down, where there is one to keep to."""
    passed: Any = None
    """The script, and the dtype, of which a first check is known to have passed."""
    calls: int = 0
    kept: int = 0
    missed: int = 0
    form: Any = None
    """The columns of a result, and what a plan says of such a call, once they have been asked for."""
    plan: dict[str, Any] | None = None
    """The attributes that plans of a capture have in common."""
    refused: dict[str, str] = field(default_factory=dict)
    """Methods that could not run, and why, where another one could."""
    doubtful: bool = False
    """Whether capture found samples in no order, which may mean that they mix."""
    asked: int = 0
    measured: dict[Hashable, tuple[float, float]] = field(default_factory=dict)
    """Method -> bytes of a sample and of none, where there is a budget."""
    bufferless: bool = False
    """The module has no buffers that a run could write to, and no recurrent layers that cuDNN cannot differentiate."""
    straight: bool = True
    """f can be run on the user's own tensors as they are: where only some are asked for, the graph of the others takes memory."""

    def told(self) -> bool:
        """Whether methods that have refused need not be asked this time: they are the second, fourth, eighth time."""
        if not self.refused:
            return False
        self.asked += 1
        return bool(self.asked & (self.asked - 1))

    def due(self) -> bool:
        """Whether this run is to be written down: not the first, and not where runs have differed time and again."""
        self.calls += 1
        return self.straight and self.calls > 1 and self.missed <= MISSES + self.kept // PATIENCE

    def lost(self) -> None:
        """A run has left the script."""
        self.script, self.missed = None, self.missed + 1


class Tree:
    """A module's parts as they were. Modules are not held: one may lead back to the root, which would then never be let go."""

    def __init__(self, root: nn.Module) -> None:
        owners = modules(root)
        self.below = [ref(owner) for owner in owners[1:]]
        self.parts = [_parts(owner) for owner in owners]
        self.parameters = [(p, p.requires_grad, p.shape) for _, parameters, _, _ in self.parts for p in parameters if p is not None]
        self.bufferless = not any(owner._buffers for owner in owners)

    @staticmethod
    def readable(root: nn.Module) -> bool:
        """Whether the parts are all there is: no module has its own idea of them, nothing changes gradients."""
        own = ("_parameters", "_modules", "_buffers")
        plain = all(
            type(owner).named_parameters is nn.Module.named_parameters
            and type(owner).named_modules is nn.Module.named_modules
            and all(isinstance(owner.__dict__.get(name), dict) for name in own)  # (scripted ones differ)
            for owner in modules(root)
        )
        return plain and not any(_hooked(p) or p.grad_fn is not None for p in root.parameters())

    def same(self, root: nn.Module) -> bool:
        """Whether nothing has changed: the same objects by the same names in the same order."""
        bufferless = self.bufferless
        for owner, (names, parameters, children_names, children) in zip(chain((root,), map(call, self.below)), self.parts, strict=True):
            if owner is None:
                return False
            own = owner.__dict__
            now = own["_parameters"]
            if (now or names) and not (tuple(now) == names and all(map(is_, now.values(), parameters))):
                return False
            now = own["_modules"]
            if (now or children_names) and not (tuple(now) == children_names and tuple(map(id, now.values())) == children):
                return False
            if bufferless and own["_buffers"]:
                return False
        for p, flag, shape in self.parameters:
            if p.requires_grad is not flag or p.shape != shape or p._backward_hooks or p.grad_fn is not None:
                return False
        return True


def _parts(owner: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """Names and values of its parameters, names and addresses of its modules (which are in use while those are alive)."""
    own, children = owner._parameters, owner._modules
    return tuple(own), tuple(own.values()), tuple(children), tuple(map(id, children.values()))


def _hooked(p: Tensor) -> bool:
    return has_hooks(p) or bool(getattr(p, "_post_accumulate_grad_hooks", None))


@dataclass(eq=False)
class Known:
    """A call as it was read: all but its tensors."""

    attributes: dict[str, Any]
    leaves: tuple[tuple[str, str, int, int | None], ...]
    """(name, argument, position, sample dimension)."""
    targets: tuple[tuple[str, int], ...]
    """(name, position) of the arguments that are parameters, where there is no module."""
    tree: Tree | None
    history: History = field(default_factory=History)

    def problem(self, f: Function, inputs: tuple[Any, ...], module: nn.Module | None) -> Problem:
        """The problem of a call of the same kind."""
        problem = object.__new__(Problem)
        problem.__dict__ = own = self.attributes.copy()
        own["function"], own["module"] = f, module
        leaves, targets = [], []  # (a comprehension is a call of a function)
        for name, argument, at, dim in self.leaves:
            leaves.append(Leaf(name, argument, inputs[at], dim))
        own["leaves"] = leaves
        if self.tree is None:
            for name, at in self.targets:
                targets.append(Target(name, inputs[at], "parameter", name))
            own["targets"] = own["parameters"] = tuple(targets)
        if "loss" in self.attributes["options"]:
            own["args"], own["loss_target"] = inputs[:-1], inputs[-1]
        else:
            own["args"] = inputs
        return problem


_LOCK = threading.Lock()
_OF_CODE: dict[Hashable, Known] = {}
_OF_MODULES: WeakKeyDictionary[nn.Module, dict[Hashable, Known]] = WeakKeyDictionary()


def problem_of(
    f: Function, inputs: tuple[Any, ...], keywords: dict[str, Any], *, loss: Callable[..., Any] | None = None, **asked: Any
) -> Problem:
    """The problem of a call: `normalise` of it, or what that gave for such a call before."""
    root: Any = f if isinstance(f, nn.Module) else asked.get("params")
    root = root if isinstance(root, nn.Module) else None
    key = _key(f, inputs, keywords, loss, asked, root)
    known = None
    if key is not None:
        with _LOCK:
            known = (_OF_CODE if root is None else _OF_MODULES.get(root, {})).get(key)
        if known is not None and (known.tree is None or (root is not None and known.tree.same(root))):
            return known.problem(f, inputs, root)
    if loss is not None:
        asked |= {"loss": per_sample_loss(loss, batched=asked.get("batched", True)), "has_target": True}
    problem = normalise(f, inputs, keywords, **asked)
    if key is not None:
        _remember(key, root, problem, f, inputs)
    return problem


def forget() -> None:
    """Read every call anew."""
    with _LOCK:
        _OF_CODE.clear()
        _OF_MODULES.clear()


def _key(
    f: Function, inputs: tuple[Any, ...], keywords: Mapping[str, Any], loss: Any, asked: Mapping[str, Any], root: nn.Module | None
) -> Hashable | None:
    """What decides how a call is read, but for the module; None where that is more than is looked at here."""
    params: Any = asked.get("params")
    options: tuple[Hashable, ...] = ()
    usual = all(map(is_, map(asked.get, USUAL), USUAL.values()))
    if keywords or not (usual or (options := _options(asked))):
        return None
    if isinstance(f, nn.Module):
        if params is not None and params is not f:
            return None
        code: Any = getattr(f.forward, "__func__", None)
    elif type(f) is FunctionType and (params is None or isinstance(params, nn.Module)):
        code = None if hasattr(f, "__wrapped__") else f.__code__
    elif type(f) is MethodType and type(f.__func__) is FunctionType and isinstance(params, nn.Module):
        code = None if hasattr(f, "__wrapped__") else f.__func__.__code__
    else:
        return None
    if root is not None and type(root).__hash__ is not object.__hash__:  # (equal modules need not be one module)
        return None
    if code is None or not (loss is None or type(loss) is type(len) or (type(loss) is FunctionType and not _holds(loss))):
        return None
    alone = params is None and not isinstance(f, nn.Module)
    forms: list[Hashable] = [code, loss, params is None, options, rounding() if rounded() else ()]
    for t in inputs:
        kind = type(t)
        if kind is not Tensor and (kind is not nn.Parameter or not alone):
            return None
        needs = t.requires_grad
        if needs and (not alone or t.grad_fn is not None or t._backward_hooks):
            return None
        if t.is_nested or t.is_inference():
            return None
        forms += (t.shape, t.dtype, t.device, t.layout, needs)
    return tuple(forms) if len({*map(id, inputs)}) == len(inputs) else None


def _options(asked: Mapping[str, Any]) -> tuple[Hashable, ...]:
    """Options that decide how a call is read; nothing where it must be read each time."""
    asked = {**USUAL, **asked}
    wrt, output, randomness = asked["wrt"], asked["output"], asked["randomness"]
    plain = (wrt is None or type(wrt) is str) and (output is None or type(output) in (str, int))
    if not plain or any(asked[name] is not USUAL[name] for name in ("in_dims", "batched", "create_graph")):
        return ()
    if randomness not in ("error", "same", "different"):  # (the masks of a "model" are those of the moment)
        return ()
    return wrt, output, asked["budget"], randomness


def _holds(function: FunctionType) -> bool:
    """Whether a function holds values of its own, which must not be kept: they may lead to the module."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return bool(function.__closure__) or any(type(value) not in (int, float, str, bool, type(None)) for value in defaults)


def _remember(key: Hashable, root: nn.Module | None, problem: Problem, f: Function, inputs: tuple[Any, ...]) -> None:
    """Keep how the call was read, where that holds for every call like it."""
    places = {id(t): at for at, t in enumerate(inputs)}
    usual = problem.function is f and problem.module is root
    real = all(t.pairs_of is None and not t.tensor.is_inference() for t in problem.targets)
    whole = all(id(leaf.tensor) in places for leaf in problem.leaves)
    if not (usual and real and whole) or problem.inputs or (root is None and any(t.leaf is None for t in problem.targets)):
        return
    if root is not None and not Tree.readable(root):
        return
    tree = None if root is None else Tree(root)
    problem.shapes, problem.parameters, problem.sampled  # noqa: B018 (asked for once, for all calls)
    attributes = {**vars(problem), "function": None, "module": None, "args": (), "leaves": (), "loss_target": None}
    targets: tuple[tuple[str, int], ...] = ()
    if tree is None:
        targets = tuple((t.name, places[id(t.own)]) for t in problem.targets)
        attributes |= {"targets": (), "parameters": ()}
    leaves = tuple((leaf.name, leaf.argument, places[id(leaf.tensor)], leaf.dim) for leaf in problem.leaves)
    plain = problem.module is None or not without_backward(problem.module, twice=problem.create_graph)
    history = History(bufferless=plain and (tree is None or tree.bufferless), straight=not problem.spared or problem.budget is None)
    known = Known({**attributes, "history": history}, leaves, targets, tree, history)
    problem.history = history
    with _LOCK:
        entries = _OF_CODE if root is None else _OF_MODULES.setdefault(root, {})
        while len(entries) >= LIMIT:
            del entries[next(iter(entries))]
        entries[key] = known
