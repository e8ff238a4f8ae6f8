"""What is differentiated: a module's parameters, a function's arguments, tensors from outside, or inputs."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ._errors import InputError, listed, near
from ._modules import named_modules, named_parameters
from ._signature import lookup, walk
from ._typing import Function, Tensor


@dataclass(slots=True, eq=False)
class Target:
    """A tensor to differentiate with respect to.

    A `parameter` is shared by all samples; an `input` has a part for each. `leaf` is its name among the arguments, None for
    a tensor that the function finds by itself. A complex tensor is differentiated as pairs of real numbers: `tensor` is then
    its view (..., 2) by `torch.view_as_real`, and `pairs_of` the tensor itself.
    """

    name: str
    tensor: Tensor
    kind: Literal["parameter", "input"]
    leaf: str | None = None
    pairs_of: Tensor | None = None

    @classmethod
    def of(cls, name: str, tensor: Tensor, kind: Literal["parameter", "input"], leaf: str | None = None) -> Target:
        if is_lazy(tensor) or not tensor.is_complex():
            return cls(name, tensor, kind, leaf)
        return cls(name, torch.view_as_real(tensor), kind, leaf, tensor)

    @property
    def own(self) -> Tensor:
        """The user's tensor."""
        return self.tensor if self.pairs_of is None else self.pairs_of

    def as_used(self, given: Tensor) -> Tensor:
        """What the function uses where `given` stands for `tensor`."""
        return given if self.pairs_of is None else torch.view_as_complex(given)


Arguments = list[tuple[str, Tensor]]
"""(leaf name, tensor) for every tensor among the arguments, in the order of the signature."""


def choose(
    f: Function, arguments: Arguments, params: Any, wrt: Any, dims: dict[str, int | None] | int | None
) -> tuple[list[Target], dict[str, str]]:
    """The targets in the order of P, and aliases: every further name of a tied parameter -> its first name."""
    if params is None and not isinstance(f, nn.Module):
        return _of_arguments(f, arguments, wrt, dims), {}
    source = f if params is None else params
    for module in (f, params):
        if isinstance(module, nn.Module):
            demand_whole(module)
    outside, aliases = _outside(source)
    patterns = _patterns(wrt)
    if patterns is None:
        targets = [Target.of(n, t, "parameter") for n, t in outside.items() if t.requires_grad or not isinstance(source, nn.Module)]
        if not targets:
            raise InputError(
                f"{name_of(f)} has no parameter to differentiate",
                got=f"{len(outside)} parameters, none with requires_grad=True",
                expected="at least one trainable parameter",
                hint="wrt='name' to name a frozen parameter or an input",
            )
    else:
        by_name = dict(arguments)
        clash = [n for n in by_name if n in outside and any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        if clash:
            raise InputError(
                f"wrt is ambiguous: {listed(clash)} names both a parameter and an input",
                expected="different names",
                hint="rename the input",
            )
        chosen = _match(patterns, [*outside, *aliases, *by_name])
        targets = [Target.of(n, t, "input", n) for n, t in arguments if n in chosen]
        chosen = {aliases.get(n, n) for n in chosen}
        targets += [Target.of(n, t, "parameter") for n, t in outside.items() if n in chosen]
    return _checked(targets), aliases


def spared(source: Any, targets: list[Target]) -> tuple[Tensor, ...]:
    """The parameters of `source` that require grad and are no targets; none where one of them may have been computed from a target."""
    if not isinstance(source, nn.Module | Mapping | list | tuple):
        return ()
    own = {id(t.own) for t in targets}
    others = tuple(t for t in _outside(source)[0].values() if t.requires_grad and id(t) not in own)
    return others if all(t.is_leaf for t in others) else ()


def name_of(f: Function) -> str:
    if isinstance(f, nn.Module):
        return type(f).__name__
    name = getattr(f, "__qualname__", None) or type(f).__name__
    return str(name).rpartition("<locals>.")[2]


def _outside(source: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    if isinstance(source, nn.Module):
        first: dict[int, str] = {}
        named: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        for name, parameter in named_parameters(source):
            if id(parameter) in first:
                aliases[name] = first[id(parameter)]
            else:
                first[id(parameter)] = name
                named[name] = parameter
        return named, aliases
    if isinstance(source, Tensor):
        source = (source,)
    if isinstance(source, Mapping):
        return _distinct(dict(source))
    if isinstance(source, Iterable):
        return _distinct({str(i): tensor for i, tensor in enumerate(source)})
    raise InputError(
        "params is not understood", got=type(source).__name__, expected="a module, a mapping of names to tensors, or a sequence of tensors"
    )


def _distinct(tensors: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    first: dict[int, str] = {}
    named, aliases = {}, {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"parameter {name!r} is not a tensor", got=type(tensor).__name__, expected="a floating-point tensor")
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.requires_grad:
            raise InputError(
                f"parameter {name!r} is detached: the function's use of it cannot be traced to this tensor",
                got="requires_grad=False",
                expected="the tensor that the function uses, with requires_grad=True",
                hint="pass the original tensor, after .requires_grad_()",
            )
        first[id(tensor)] = name
        named[name] = tensor
    if not named:
        raise InputError("params holds no tensor", got="an empty collection", expected="at least one parameter")
    return named, aliases


def _of_arguments(f: Function, arguments: Arguments, wrt: Any, dims: dict[str, int | None] | int | None) -> list[Target]:
    patterns = _patterns(wrt)
    explicit = dims if isinstance(dims, dict) else {}
    if patterns is None:
        chosen = [name for name, tensor in arguments if tensor.requires_grad]
        if not chosen:
            differentiable = [name for name, tensor in arguments if tensor.is_floating_point() or tensor.is_complex()]
            raise InputError(
                f"{name_of(f)} has no parameter to differentiate",
                got=f"no tensor argument with requires_grad=True among {listed(n for n, _ in arguments)}",
                expected="arguments that require grad, or names",
                hint=f"wrt={tuple(differentiable[1:] or differentiable)!r} to name them, "
                "or params=module for tensors that the function uses from outside",
            )
        if len(chosen) == len(arguments) and not any(lookup(explicit, n)[1] is not None for n in chosen):
            raise InputError(
                f"all tensor arguments of {name_of(f)} require grad, so which are parameters is not known",
                got=listed(chosen),
                expected="parameters that require grad beside inputs that do not",
                hint=f"wrt={tuple(chosen[1:]) or tuple(chosen)!r} to name the parameters",
            )
        if not explicit:
            return _checked([Target.of(n, t, "parameter", n) for n, t in arguments if t.requires_grad])
    else:
        chosen = list(_match(patterns, [name for name, _ in arguments]))
    names = set(chosen)
    inputs = _inputs_among(arguments, names, explicit, named=patterns is not None)
    return _checked([Target.of(n, t, "input" if n in inputs else "parameter", n) for n, t in arguments if n in names])


def _inputs_among(arguments: Arguments, chosen: set[str], explicit: dict[str, int | None], *, named: bool) -> set[str]:
    """Which of the chosen arguments of a function are inputs (they have a part for each sample), not parameters.

    An explicit in_dims decides. Otherwise a chosen argument is a parameter, with one exception: where wrt names the first
    tensor argument and nothing else is left to be the batch (or everything else left requires grad, and is a parameter by
    the notebook's convention), the arguments that do not require grad are inputs: `f(x; a, b)` with wrt="x".
    """
    decided = {name: lookup(explicit, name) for name, _ in arguments}
    inputs = {name for name in chosen if decided[name][0] and decided[name][1] is not None}
    if not named or not arguments or arguments[0][0] not in chosen or any(d[1] is not None for d in decided.values()):
        return inputs
    open_names = {n for n in chosen if not decided[n][0]}
    rest = [tensor for name, tensor in arguments if name not in chosen and tensor.ndim and not decided[name][0]]
    if any(not tensor.requires_grad for tensor in rest):
        return inputs
    flags = {tensor.requires_grad for _, tensor in arguments}
    if len(flags) == 2 and not arguments[0][1].requires_grad:
        return inputs | {n for n, t in arguments if n in open_names and not t.requires_grad}
    return inputs | ({arguments[0][0]} & open_names if not rest else set())


def shared_by_convention(arguments: Arguments, targets: list[Target]) -> set[str]:
    """Arguments that are parameters of the notebook's convention though not chosen: wrt="x" leaves a and b shared."""
    if not any(target.kind == "input" and target.leaf is not None for target in targets):
        return set()
    return {name for name, tensor in arguments if tensor.requires_grad and name not in {t.leaf for t in targets}}


def _patterns(wrt: Any) -> list[str] | None:
    if wrt is None:
        return None
    names = [wrt] if isinstance(wrt, str) else list(wrt) if isinstance(wrt, Iterable) else [wrt]
    for name in names:
        if not isinstance(name, str):
            raise InputError(
                "wrt takes names",
                got=type(name).__name__,
                expected="a name, a glob, or several",
                hint="wrt='fc*.weight'; tensors go into params=",
            )
    if not names:
        raise InputError("wrt is empty", got="no name", expected="at least one name or glob")
    return names


def _match(patterns: list[str], known: list[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        names = {n for n in known if n == pattern} or {n for n in known if fnmatch.fnmatchcase(n, pattern) or n.startswith(f"{pattern}.")}
        if not names:
            raise InputError(f"wrt={pattern!r} matches nothing", got=pattern, expected=listed(known), hint=near(pattern, known))
        found |= names
    return found


def demand_values(what: str, tensor: Tensor) -> None:
    """InputError for a tensor whose numbers are not here."""
    if type(tensor) in (Tensor, nn.Parameter) and not (tensor.is_meta or tensor.is_nested) and tensor.layout is torch.strided:
        return
    if is_lazy(tensor):
        raise InputError(
            f"{what} is not initialised", got="a lazy parameter without a shape", expected="a tensor", hint="run the module once: module(x)"
        )
    if tensor.is_meta:
        raise InputError(
            f"{what} has no values", got="a tensor on the meta device", expected="a tensor with values", hint="module.to_empty(device=...)"
        )
    if type(tensor) is not Tensor and hasattr(tensor, "full_tensor"):
        raise InputError(
            f"{what} is sharded over processes",
            got=type(tensor).__name__,
            expected="a whole tensor in this process",
            hint="a module whose parameters are whole: full_tensor() of each, or FSDP's summon_full_params",
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise InputError(
            f"{what} is not a dense tensor",
            got="a nested tensor" if tensor.is_nested else str(tensor.layout),
            expected="a dense tensor",
            hint="tensor.to_padded_tensor(0.0), and its lengths as another input" if tensor.is_nested else "tensor.to_dense()",
        )


def demand_whole(module: nn.Module) -> None:
    """InputError for a parameter, asked for or not, whose numbers are not here: a run would initialise it, or gather it."""
    for name, layer in named_modules(module):
        if type(layer).__name__ == "FullyShardedDataParallel":
            raise InputError(
                f"the parameters of {name.removesuffix('.') or 'the module'} are sharded over processes",
                got=type(layer).__name__,
                expected="a whole tensor for each parameter in this process",
                hint="the module before it is wrapped: samples, not parameters, can be spread over processes",
            )
    for name, parameter in named_parameters(module):
        demand_values(f"parameter {name!r}", parameter)


def _checked(targets: list[Target]) -> list[Target]:
    for target in targets:
        demand_values(f"{target.kind} {target.name!r}", target.own)
        if not target.tensor.is_floating_point():
            raise InputError(
                f"{target.kind} {target.name!r} is {'quantised: ' if target.tensor.is_quantized else ''}not differentiable",
                got=str(target.tensor.dtype),
                expected="a floating-point tensor",
                hint="its .dequantize()" if target.tensor.is_quantized else "convert it with .float(), or leave it out of wrt",
            )
    return targets


def arguments_of(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    found: Arguments = []
    for name, value in (*zip(names, args, strict=True), *kwargs.items()):
        if isinstance(value, Tensor):
            found.append((name, value))
        else:
            found += walk(value, name)
    if not found:
        raise InputError(
            "no input was given", got="no tensor among the arguments", expected="at least one tensor", hint="pt.jacobian(f, x)"
        )
    return found
