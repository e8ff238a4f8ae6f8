"""From a call `f(*args, **kwargs)` to named tensor leaves: names come from the signature, nested containers are walked."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from ._errors import InputError, listed, near
from ._typing import Function, Tensor


@dataclass(slots=True, eq=False)
class Leaf:
    """One tensor among the arguments: its name, the argument it belongs to, its value, and its sample dimension."""

    name: str
    argument: str
    tensor: Tensor
    dim: int | None


_PARAMETERS: dict[Any, list[inspect.Parameter] | None] = {}
_NAMES: dict[Any, tuple[str, ...]] = {}


def parameters_of(f: Function) -> list[inspect.Parameter] | None:
    """The parameters of f's signature (a module's `forward`), or None where Python knows none."""
    called: Any = f.forward if isinstance(f, nn.Module) else f
    key = _signature_key(called)
    if key is not None:
        if key not in _PARAMETERS:
            _PARAMETERS[key] = list(inspect.signature(called).parameters.values())
        return _PARAMETERS[key]
    try:
        return list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        return None


def _signature_key(called: Any) -> Any:
    """What the names and kinds of parameters depend on; None where that is more than the code."""
    code = getattr(getattr(called, "__func__", called), "__code__", None)
    return None if code is None or hasattr(called, "__wrapped__") else (code, isinstance(called, MethodType))


def argument_names(f: Function, count: int) -> tuple[str, ...]:
    """Names of the first `count` positional arguments: from the signature, else their positions."""
    key = _signature_key(f.forward if isinstance(f, nn.Module) else f)
    if key is None:
        return _argument_names(f, count)
    found = _NAMES.get((key, count))
    if found is None:
        found = _NAMES[key, count] = _argument_names(f, count)
    return found


def _argument_names(f: Function, count: int) -> tuple[str, ...]:
    names: list[str] = []
    for parameter in parameters_of(f) or ():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(count - len(names))]
    return tuple((names + [str(i) for i in range(len(names), count)])[:count])


def walk(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested tuples, lists and mappings, with its dotted name."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from walk(value, f"{path}.{key}")
    elif isinstance(tree, tuple | list):
        for i, value in enumerate(tree):
            yield from walk(value, f"{path}.{i}")


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors of `walk` without names, quickly: what a mode asks of the arguments of every operation."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in _PLAIN:
            continue
        else:
            found += [tensor for _, tensor in walk(value, "")]
    return found


_PLAIN = frozenset({int, float, bool, str, type(None), slice, torch.dtype, torch.device, torch.Size})


def rebuild(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nested containers around other tensors, taken in the order of `walk`."""
    if isinstance(tree, Tensor):
        return next(tensors)
    if type(tree) in _PLAIN:
        return tree
    if type(tree) is tuple:
        return tuple([rebuild(value, tensors) for value in tree])
    if isinstance(tree, Mapping):
        pairs = {key: rebuild(value, tensors) for key, value in tree.items()}
        return pairs if type(tree) is dict else type(tree)(pairs)  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(rebuild(value, tensors) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)([rebuild(value, tensors) for value in tree])
    return tree


def first_tensor(tree: Any) -> Tensor | None:
    return next((tensor for _, tensor in walk(tree, "")), None)


def explicit_dims(
    in_dims: Any, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, int | None] | int | None:
    """`in_dims` as {leaf or argument name: dim}, or the single number that holds for every tensor."""
    if in_dims is None or (isinstance(in_dims, int) and not isinstance(in_dims, bool)):
        return in_dims
    if isinstance(in_dims, Mapping):
        known = {
            name for arg, value in (*zip(names, args, strict=True), *kwargs.items()) for name in (arg, *(n for n, _ in walk(value, arg)))
        }
        for name in in_dims:
            if name not in known:
                raise InputError(
                    f"in_dims names {name!r}, which is no argument of the call", got=name, expected=listed(known), hint=near(name, known)
                )
        return dict(in_dims)
    if not isinstance(in_dims, tuple | list):
        raise InputError(
            "in_dims is not understood",
            got=type(in_dims).__name__,
            expected="an int, None, a tuple or a dict by name",
            hint="in_dims={'x': 0}",
        )
    if len(in_dims) != len(args):
        raise InputError(
            "in_dims must have one entry for each positional input",
            got=f"{len(in_dims)} entries for {len(args)} inputs",
            expected=f"{len(args)} entries, for {listed(names)}",
            hint="a dict by name for some of them: in_dims={'x': 0}",
        )
    found: dict[str, int | None] = {}
    for name, value, dims in zip(names, args, in_dims, strict=True):
        _prefix(dims, value, name, found)
    return found


def _prefix(dims: Any, value: Any, name: str, found: dict[str, int | None]) -> None:
    if dims is None or isinstance(dims, int):
        found[name] = dims
    elif isinstance(dims, Mapping) and isinstance(value, Mapping) and dims.keys() == value.keys():
        for key, inner in dims.items():
            _prefix(inner, value[key], f"{name}.{key}", found)
    elif isinstance(dims, tuple | list) and isinstance(value, tuple | list) and len(dims) == len(value):
        for i, (inner, part) in enumerate(zip(dims, value, strict=True)):
            _prefix(inner, part, f"{name}.{i}", found)
    else:
        raise InputError(
            f"in_dims does not match the structure of input {name!r}", got=repr(dims), expected="an int, None, or the input's own structure"
        )


def lookup(dims: dict[str, int | None], name: str) -> tuple[bool, int | None]:
    """Whether `name`, or a container that holds it, has an explicit dim, and which."""
    while True:
        if name in dims:
            return True, dims[name]
        if "." not in name:
            return False, None
        name = name.rpartition(".")[0]


def checked_dim(dim: int | None, tensor: Tensor, name: str) -> int | None:
    if dim is None:
        return None
    if not -tensor.ndim <= dim < tensor.ndim:
        raise InputError(
            f"in_dims gives dimension {dim} for {name!r}, which it does not have",
            got=f"shape {tuple(tensor.shape)}",
            expected=f"a dimension in [{-tensor.ndim}, {tensor.ndim})" if tensor.ndim else "None: it has no dimension",
        )
    return dim % tensor.ndim


def batch_size(leaves: Sequence[Leaf], function: str) -> int:
    """The number of samples, the same in every batched input."""
    counts = {leaf.tensor.shape[leaf.dim] for leaf in leaves if leaf.dim is not None}
    if len(counts) == 1:
        return int(counts.pop())
    sizes = {leaf.name: int(leaf.tensor.shape[leaf.dim]) for leaf in leaves if leaf.dim is not None}
    if not sizes:
        raise InputError(
            f"{function} was given no batched input",
            got=f"tensors: {listed(leaf.name for leaf in leaves)}",
            expected="at least one tensor with a sample dimension",
            hint=f"in_dims={{{leaves[0].name!r}: 0}} to name it, or batched=False for a single sample",
        )
    raise InputError(
        "the inputs have different batch sizes",
        got=listed(f"{name}: {size}" for name, size in sizes.items()),
        expected="one number of samples",
        hint="in_dims={'" + min(sizes, key=lambda n: sizes[n]) + "': None} for an input that all samples share",
    )


def usable(tensor: Tensor) -> Tensor:
    """An inference-mode tensor cannot be saved for backward: a normal copy of it; any other tensor as it is."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
