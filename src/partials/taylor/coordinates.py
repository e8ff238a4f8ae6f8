"""The inputs of one call as coordinates: their names, their components, and the call with other tensors in their place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._errors import InputError, listed, near
from .._typing import Function, Tensor
from .choice import explained
from .nested import Slot
from .specs import Alphabet, Components, name_list

Names = str | Iterable[str] | None


@dataclass(frozen=True, eq=False)
class Call:
    """A function with the arguments of one call, by name."""

    function: Function
    arguments: Mapping[str, Any]
    positional: tuple[str, ...]

    @classmethod
    def of(cls, function: Function, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        names = _positional_names(function, len(inputs))
        return cls(function, {**dict(zip(names, inputs, strict=True)), **kwargs}, names)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def __call__(self, replaced: Mapping[str, Tensor]) -> Any:
        arguments = {**self.arguments, **replaced}
        positional = [arguments.pop(name) for name in self.positional]
        return self.function(*positional, **arguments)


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The coordinates of a call: which inputs hold them, and where each component is."""

    call: Call
    alphabet: Alphabet
    slots: tuple[tuple[str, int | None], ...]
    blocks: frozenset[str]
    named: bool

    @classmethod
    def of(cls, call: Call, coords: Names, vectors: Names) -> Coordinates:
        """Coordinates by `coords` (names of inputs, or of the features of the packed input) and `vectors` (inputs that are one vector)."""
        tensors = call.tensors
        if not tensors:
            raise InputError(
                "there is no tensor among the inputs to differentiate by", expected="coordinate tensors such as x, t, or a packed X"
            )
        blocks = _blocks(vectors, tensors)
        if coords is None:
            return cls._inputs(call, {name: name for name in tensors}, blocks, named=False)
        names = name_list(coords, tensors, "coords")
        first = next(iter(tensors))
        if set(names) <= set(tensors):
            return cls._inputs(call, dict(zip(names, names, strict=True)), blocks, named=True)
        if len(names) == len(tensors) > 1 and not any(name.isidentifier() for name in tensors):
            return cls._inputs(call, dict(zip(names, tensors, strict=True)), blocks, named=True)
        if set(names) & set(tensors) <= {first}:
            return cls._packed(call, first, names, blocks)
        strange = next(name for name in names if name not in tensors)
        raise InputError(
            f"`coords` names {strange!r}, which is no tensor input",
            got=listed(names),
            expected=listed(tensors),
            hint=near(strange, tensors),
        )

    @classmethod
    def _inputs(cls, call: Call, inputs: Mapping[str, str], blocks: frozenset[str], named: bool) -> Coordinates:
        """Coordinates that are whole inputs: the input of each name."""
        slots: list[tuple[str, int | None]] = []
        components: dict[str, Components] = {}
        for name, held in {**inputs, **{block: block for block in sorted(blocks.difference(inputs.values()))}}.items():
            width = call.tensors[held].shape[-1] if held in blocks else 1
            components[name] = tuple(range(len(slots), len(slots) + width))
            slots.extend((held, feature if held in blocks else None) for feature in range(width))
        vectors = frozenset(name for name, places in components.items() if slots and places and slots[places[0]][0] in blocks)
        others = frozenset(call.arguments) - frozenset(call.tensors)
        return cls(call, Alphabet(components, vectors, others), tuple(slots), blocks, named)

    @classmethod
    def _packed(cls, call: Call, packed: str, names: tuple[str, ...], blocks: frozenset[str]) -> Coordinates:
        shape = tuple(call.tensors[packed].shape)
        if blocks:
            raise InputError(
                "`coords` names the features of a packed input and `vectors` names whole inputs",
                got=f"coords {listed(names)}; vectors {listed(sorted(blocks))}",
                expected="one of them",
            )
        if not shape or shape[-1] != len(names):
            raise InputError(
                f"`coords` does not name each feature of {packed!r} once",
                got=f"{len(names)} names ({listed(names)}) for shape {shape}",
                expected="as many names as the last dimension has entries",
            )
        slots = tuple((packed, feature) for feature in range(len(names)))
        return cls(call, Alphabet({name: (place,) for place, name in enumerate(names)}), slots, frozenset({packed}), True)

    def inputs_of(self, components: Iterable[int]) -> tuple[str, ...]:
        """The inputs that hold these components, in order."""
        held = {self.slots[component][0] for component in components}
        return tuple(name for name in dict.fromkeys(name for name, _ in self.slots) if name in held)

    def leaf_slots(self, leaves: Sequence[str]) -> tuple[Slot, ...]:
        """The slots by the number of the leaf; components of other inputs point nowhere (-1)."""
        return tuple(Slot(leaves.index(name) if name in leaves else -1, feature) for name, feature in self.slots)


def curried(at: Callable[..., Any], function: Function) -> Callable[..., Any]:
    """`at`, which takes the inputs of `function`, with its signature: so operators can be applied to operators.

    Under `torch.compile` it runs as it is, between two graphs: tracing the Python of this package takes a minute and gains nothing.
    """

    def run(*inputs: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(at)(*inputs, **kwargs)
        return at(*inputs, **kwargs)

    made: Any = run
    made.explain = explained(at)
    with suppress(TypeError, ValueError):
        made.__signature__ = _signature(function)
    return made


def _signature(function: Function) -> inspect.Signature:
    return inspect.signature(function.forward if isinstance(function, nn.Module) else function)


def _positional_names(function: Function, count: int) -> tuple[str, ...]:
    """The names of the first `count` positional inputs by the signature; `inputs[0]`, ... where it has none."""
    try:
        parameters = _signature(function).parameters.values()
    except (TypeError, ValueError):
        return tuple(f"inputs[{place}]" for place in range(count))
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    if count > len(names) and rest is None:
        raise InputError(f"the function takes {len(names)} positional inputs", got=f"{count} inputs", expected=listed(names))
    return tuple(names[:count]) + tuple(f"{rest}[{place}]" for place in range(count - len(names)))


def _blocks(vectors: Names, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    names = name_list(vectors or (), tensors, "vectors")
    for name in names:
        if name not in tensors:
            raise InputError(
                f"`vectors` names {name!r}, which is no tensor input", got=listed(names), expected=listed(tensors), hint=near(name, tensors)
            )
        if not tensors[name].dim():
            raise InputError(
                f"`vectors` names {name!r}, which has no dimension to be a vector over", got="shape ()", expected="shape (..., D)"
            )
    return frozenset(names)
