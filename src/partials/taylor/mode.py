"""The mode under which a function runs in Taylor mode: it sees every torch function, and carries jets through it.

The function itself is given ordinary tensors, the values; each carries its jet as an attribute. That nothing is lost on the way is proved:
a value is a leaf that requires grad, so whatever is computed from it unseen (by a custom autograd.Function, say) has a graph that leads
back to such a leaf; no such tensor may enter an operation, or be the result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from .. import _compat
from .._typing import Tensor
from . import rules as _rules  # noqa: F401 - fills the table
from .frame import Frame
from .jets import Jet, NoRule
from .rules.structure import setitem
from .table import ATTRIBUTES, BENT, JET_RULES, VALUE_ONLY, JetRule, found, parameters_of

_MARK = "_partials_jet"
_RUNNING = threading.local()


def inside_jets() -> bool:
    """Whether a function is running in Taylor mode in this thread."""
    return getattr(_RUNNING, "depth", 0) > 0


class JetMode(TorchFunctionMode):
    """Carries jets of one frame. `bent` collects the functions of straight pieces that were met."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame
        self.graph = torch.is_grad_enabled()
        self.token = object()
        self.bent: set[str] = set()
        self._free: dict[int, Tensor] = {}
        self._unseen: Callable[[], AbstractContextManager[Any]] = _compat.unwatched if _compat.watched() else nullcontext

    def __enter__(self) -> JetMode:
        _RUNNING.depth = getattr(_RUNNING, "depth", 0) + 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _RUNNING.depth -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def expose(self, jet: Jet) -> Tensor:
        """The value as an ordinary tensor that carries the jet."""
        with self._unseen():
            value = jet.bare()
            if value.is_floating_point() or value.is_complex():
                value.requires_grad_()
            setattr(value, _MARK, (self.token, jet))
        return value

    def jet_of(self, value: Any) -> Jet | None:
        """The jet that a tensor carries; None for a constant."""
        token, jet = getattr(value, _MARK, (None, None))
        with self._unseen():
            if token is self.token:
                if value.grad_fn is not None:  # a custom autograd.Function ran the rules in its forward and has a derivative of its own
                    raise NoRule(f"{type(value.grad_fn).__name__}, which torch functions do not show")
                return jet
            if value.requires_grad and value.grad_fn is not None:
                self._demand_free(value)
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        met: list[Jet] = []
        swapped = [self._swap(value, met) for value in args]
        named = {name: self._swap(value, met) for name, value in kwargs.items()} if kwargs else kwargs
        if not met:
            return func(*args, **kwargs)
        with torch.set_grad_enabled(self.graph):
            if func in ATTRIBUTES:
                with self._unseen():
                    return func(*args, **kwargs)
            if func in VALUE_ONLY:
                with torch.no_grad():
                    return func(*_values(swapped), **{name: _values(value) for name, value in named.items()})
            rule = JET_RULES.get(func)
            if func is torch.Tensor.__setitem__:
                return self._written(func, args[0], swapped[0], through(setitem, func, swapped, named))
            if rule is not None:
                if func in BENT:
                    self.bent.add(BENT[func])
                if named.pop("inplace", False):
                    return self._written(func, args[0], swapped[0], through(rule, func, swapped, named))
                return self._exposed(through(rule, func, swapped, named))
            if (rule := _counterpart(func)) is not None:
                return self._written(func, args[0], swapped[0], through(rule, func, swapped, named))
        body = _compat.body_of(func) if isinstance(func, FunctionType) else None
        if body is None:
            raise NoRule(label(func))
        with self:
            return body(*args, **kwargs)

    def _written(self, func: Any, tensor: Tensor, old: Any, jet: Any) -> Tensor:
        """An operation that writes to its first argument: the tensor gets another jet, if nothing else looks at its memory.

        Its old memory is left as it is: it may be that of other jets, or be kept for a reverse pass.
        """
        if (
            not isinstance(old, Jet)
            or not isinstance(jet, Jet)
            or old.aliased
            or jet.shape != old.shape
            or jet.anything.dtype != old.anything.dtype
        ):
            raise NoRule(f"{label(func)}, which writes in place")
        with self._unseen(), torch.no_grad():
            tensor.data = jet.bare()
            setattr(tensor, _MARK, (self.token, jet))
        return tensor

    def _swap(self, value: Any, met: list[Jet]) -> Any:
        """The argument with jets in the place of the tensors that carry one."""
        if isinstance(value, torch.Tensor):
            jet = self.jet_of(value)
            if jet is None:
                return value
            met.append(jet)
            return jet
        if type(value) is tuple or type(value) is list:
            return type(value)([self._swap(entry, met) for entry in value])
        return value

    def _exposed(self, result: Any) -> Any:
        if isinstance(result, Jet):
            return self.expose(result)
        if type(result) is tuple or type(result) is list:
            return type(result)([self._exposed(entry) for entry in result])
        if isinstance(result, tuple) and hasattr(result, "_fields"):
            return type(result)(*(self._exposed(entry) for entry in result))
        return result

    def _demand_free(self, value: Tensor) -> None:
        """A tensor without a jet must not be computed from one that has one."""
        if self._free.get(id(value)) is value:
            return
        waiting, seen = [value.grad_fn], set()
        while waiting:
            node: Any = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and getattr(leaf, _MARK, (None,))[0] is self.token:
                raise NoRule(f"{type(value.grad_fn).__name__}, which torch functions do not show")
            waiting.extend(following for following, _ in node.next_functions)
        self._free[id(value)] = value


class Bends(TorchFunctionMode):
    """Notes the functions of straight pieces that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BENT:
            self.names.add(BENT[func])
        return func(*args, **(kwargs or {}))


def through(rule: JetRule, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What a rule makes of a call. Arguments that it cannot take (a weight that is a jet, an option that it does not know) are no rule
    for the call; if the call itself is at fault, nested reverse mode runs into it and the function's own error is seen."""
    kwargs = dict(kwargs)
    for place, names in enumerate(_LEADING):
        for name in names:
            if name in kwargs and len(args) == place and name not in parameters_of(rule):
                args = [*args, kwargs.pop(name)]
    try:
        return rule(*args, **kwargs)
    except (TypeError, AttributeError, IndexError, ValueError, KeyError) as error:
        raise NoRule(f"{label(func)} with these arguments ({type(error).__name__}: {error})") from error


_LEADING = (("input", "self"), ("other", "exponent", "mat2", "vec", "tensor1", "end"))
"""Other names of the first and the second argument."""


def _counterpart(func: Any) -> JetRule | None:
    """The rule of the operation that a function applies in place: of `mul` for `mul_` and `__imul__`."""
    name = getattr(func, "__name__", "")
    if name.startswith("__i") and name.endswith("__"):
        return JET_RULES.get(getattr(torch.Tensor, f"__{name[3:]}", None))
    if name.endswith("_") and not name.endswith("__"):
        return next((JET_RULES[function] for function in found(name[:-1]) if function in JET_RULES), None)
    return None


def _values(tree: Any) -> Any:
    """Jets replaced by their values, outside of any graph."""
    if isinstance(tree, Jet):
        return tree.bare()
    if type(tree) is tuple or type(tree) is list:
        return type(tree)([_values(entry) for entry in tree])
    return tree


def label(func: Any) -> str:
    """A function's name as a user would write it."""
    name = resolve_name(func) or getattr(func, "__name__", str(func))
    return str(name).replace("torch.nn.functional.", "F.").removeprefix("torch.").replace("Tensor.__get__", "attribute")
