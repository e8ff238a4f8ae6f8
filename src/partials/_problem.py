"""The problem: what was asked, as data. Every rule of what is differentiated ends here, and every method starts here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ._compat import has_hooks
from ._errors import InputError, listed
from ._output import Picker, check_output
from ._signature import Leaf, argument_names, batch_size, checked_dim, explicit_dims, lookup, rebuild, usable
from ._state import RandomState, Rounding, Running, autocast, random_state, rounding
from ._substitute import call_with, with_constants
from ._targets import Arguments, Target, arguments_of, choose, demand_values, name_of, shared_by_convention, spared
from ._typing import Function, Tensor

RANDOMNESS = ("error", "model", "same", "different")


@dataclass(eq=False)
class Problem:
    """d f(inputs) / d targets for `size` samples; nothing in it is written to once it is made.

    Calling it runs the function: `problem()` on the batch, `problem(tensors)` with other tensors for the targets,
    `problem(leaves=...)` with other inputs; the answer always has the sample dimension first.
    """

    function: Function
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: tuple[Leaf, ...]
    targets: tuple[Target, ...]
    aliases: Mapping[str, str]
    size: int
    batched: bool
    picker: Picker
    randomness: str = "error"
    create_graph: bool = False
    module: nn.Module | None = None
    """The module whose parameters are differentiated, where there is one."""
    loss_target: Any = None
    """The last positional input where a loss reads it; it is not passed to the function."""
    budget: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    """What f runs in: a mode, where an operation of torch's must be written out to be differentiated as often as f needs."""
    rounding: Rounding = ()
    """The autocast of the call: f runs in it, and what is computed from its factors does not."""
    random_state: RandomState | None = None
    """With randomness="model", the state that f's random numbers are drawn from."""
    spared: tuple[Tensor, ...] = ()
    """Parameters that require grad and were not asked for: a run needs to keep nothing for them."""
    history: Any = field(default=None, init=False)
    """What earlier runs of the same call have shown (`_repeated.History`); a problem that is made from this one knows nothing of it."""

    @cached_property
    def parameters(self) -> tuple[Target, ...]:
        return tuple(t for t in self.targets if t.kind == "parameter")

    @cached_property
    def inputs(self) -> tuple[Target, ...]:
        return tuple(t for t in self.targets if t.kind == "input")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each target's part in one row of the Jacobian, by name."""
        return {t.name: self.shape_of(t) for t in self.targets}

    @property
    def dims(self) -> list[int | None]:
        return [leaf.dim for leaf in self.leaves]

    @property
    def dtype(self) -> torch.dtype:
        return self.targets[0].tensor.dtype

    @property
    def given(self) -> list[Tensor]:
        """The tensors among the arguments: constants, whatever they were computed from, unless results carry a graph."""
        return [leaf.tensor if self.create_graph or not leaf.tensor.requires_grad else leaf.tensor.detach() for leaf in self.leaves]

    def tensors(self, *, fresh: bool = False, requires_grad: bool = True) -> dict[str, Tensor]:
        """A tensor for each target to differentiate with respect to: the user's own where it requires grad, else an alias.

        With `fresh`, always a detached alias that shares memory and carries no hooks, no `.grad` and no history.
        """
        found: dict[str, Tensor] = {}
        twice = len({id(t.own) for t in self.targets}) < len(self.targets)
        for t in self.targets:
            if fresh or not t.tensor.requires_grad or t.own.is_inference():
                found[t.name] = usable(t.tensor).detach().requires_grad_(requires_grad)
            elif (twice and sum(t.own is other.own for other in self.targets) > 1) or has_hooks(t.own):
                # one tensor passed as two arguments is two parameters: a view for each, so that their parts stay apart;
                # and hooks of a parameter change gradients, they are no part of f: before a view they are not run
                found[t.name] = t.tensor.view_as(t.tensor)
            else:
                found[t.name] = t.tensor
        return found

    def sample(self, n: int, tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The leaves of sample n alone (a batch of one), and the targets with the inputs among them cut likewise."""
        pairs = zip(self.leaves, self.given, strict=True)
        leaves = [tensor if leaf.dim is None else tensor.narrow(leaf.dim, n, 1) for leaf, tensor in pairs]
        cut = dict(tensors)
        for target in self.inputs:
            piece = tensors[target.name]
            if self.batched:
                piece = piece.narrow(self.dim_of(target), n, 1)
            cut[target.name] = piece if self.create_graph else piece.detach().requires_grad_()
        return leaves, cut

    def dim_of(self, target: Target) -> int:
        """The sample dimension of an input target."""
        dim = next(leaf.dim for leaf in self.leaves if leaf.name == target.leaf)
        return 0 if dim is None else dim

    def shape_of(self, target: Target) -> tuple[int, ...]:
        """The shape of a target's part in one row of the Jacobian: an input's without its sample dimension."""
        shape = tuple(target.tensor.shape)
        if target.kind == "input" and self.batched:
            dim = self.dim_of(target)
            return (*shape[:dim], *shape[dim + 1 :])
        return shape

    def __call__(self, tensors: Mapping[str, Tensor] | None = None, leaves: Sequence[Tensor] | None = None) -> Tensor:
        """f's output, (N, *out), whatever `tensors` and `leaves` stand in for the user's."""
        out = self.picker(self.raw(tensors, leaves)[0])
        return out if self.batched else out.unsqueeze(0)

    def raw(self, tensors: Mapping[str, Tensor] | None = None, leaves: Sequence[Tensor] | None = None) -> tuple[Any, Any]:
        """(what the function with its loss returns, what the function alone returns)."""
        outside: list[tuple[Tensor, Tensor]] = []
        args, kwargs, wanted = self.args, self.kwargs, self.loss_target
        if tensors is not None or leaves is not None:
            values = self.given if leaves is None else list(leaves)
            if tensors is not None:
                values, outside = self._standing_in(tensors, values)
            if any(value is not leaf.tensor for leaf, value in zip(self.leaves, values, strict=True)):
                args, kwargs, wanted = rebuild((args, kwargs, wanted), iter(values))
        loss: Callable[[Any, Any], Any] | None = self.options.get("loss")
        with self.within(), autocast(self.rounding):
            returned = call_with(self.function, outside, args, kwargs, attached=self.create_graph)
            return (returned if loss is None else loss(self.picker.select(returned), wanted)), returned

    @cached_property
    def sampled(self) -> tuple[int, ...]:
        """Which of the leaves hold samples, where none of them is differentiated."""
        shared = {t.leaf for t in self.parameters}
        return tuple([at for at, leaf in enumerate(self.leaves) if leaf.dim is not None and leaf.name not in shared])

    def plainly(self) -> tuple[Any, Any]:
        """`raw` on the user's own tensors, nothing standing in for anything."""
        if self.rounding:
            return self.raw()
        returned = self.function(*self.args, **self.kwargs)
        loss: Callable[[Any, Any], Any] | None = self.options.get("loss")
        return (returned if loss is None else loss(self.picker.select(returned), self.loss_target)), returned

    def _standing_in(self, tensors: Mapping[str, Tensor], values: list[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The values of the leaves, and (original, stand-in) of tensors that the function finds by itself."""
        outside: list[tuple[Tensor, Tensor]] = []
        passed = {id(leaf.tensor) for leaf in self.leaves}  # (a parameter from outside may also be passed as an argument)
        by_name: dict[str | None, Tensor] = {}
        by_id: dict[int, Tensor] = {}
        for target in self.targets:
            given = target.as_used(tensors[target.name])
            if target.leaf is not None:
                by_name[target.leaf] = given
                continue
            if id(target.own) in passed:
                by_id[id(target.own)] = given
            outside.append((target.own, given))
        if all(own is given for own, given in outside):
            outside = []
        pairs = zip(self.leaves, values, strict=True)
        return [by_id.get(id(leaf.tensor), by_name.get(leaf.name, value)) for leaf, value in pairs], outside

    def narrowed(self) -> Problem:
        """The same with f's `spared` parameters as constants, so that autograd keeps nothing below those that were asked for."""
        if not self.spared or self.create_graph:
            return self
        function = with_constants(self.function, self.spared, [t.own for t in self.targets if t.leaf is None])
        return self if function is None else replace(self, function=function, spared=())

    def values(self) -> Tensor:
        """f's output on the user's own batch, checked: (N, *out)."""
        return check_output(self(), self.size, self.name, batched=self.batched)

    def running(self, doing: str) -> AbstractContextManager[object]:
        """Gradients on, inference mode off, the module's buffers as they were afterwards; f's own errors get a note."""
        module = None if self.history is not None and self.history.bufferless else self.module
        return Running(self.told(doing), module, twice=self.create_graph)

    def told(self, doing: str) -> str:
        """What an error that came up meanwhile is to say."""
        return f"partials was {doing} for {self.name} ({self.size} samples)"


def normalise(
    f: Function,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    params: Any = None,
    wrt: Any = None,
    in_dims: Any = 0,
    batched: bool = True,
    output: Any = None,
    randomness: str = "error",
    create_graph: bool = False,
    budget: int | None = None,
    loss: Callable[..., Any] | None = None,
    has_target: bool = False,
) -> Problem:
    """A call, checked and turned into a `Problem`."""
    if not callable(f):
        raise InputError(
            "the function is not callable", got=type(f).__name__, expected="an nn.Module or a callable", hint="pt.jacobian(f, x)"
        )
    if randomness not in RANDOMNESS:
        raise InputError(f"randomness={randomness!r} is unknown", got=repr(randomness), expected=f"one of: {listed(RANDOMNESS)}")
    args, kwargs = tuple(args), dict(kwargs)
    names = [*argument_names(f, len(args) - has_target), *["target"] * has_target]
    arguments = arguments_of(names, args, kwargs)
    if any(tensor.is_inference() for _, tensor in arguments):
        arguments = [(name, usable(tensor)) for name, tensor in arguments]
        args, kwargs = rebuild((args, kwargs), iter([tensor for _, tensor in arguments]))
    explicit = explicit_dims(in_dims, names, args, kwargs) if batched else {}
    differentiable = [(name, tensor) for name, tensor in arguments if not _under(name, "target")] if has_target else arguments
    for name, tensor in arguments:
        demand_values(f"input {name!r}", tensor)
    targets, aliases = choose(f, differentiable, params, wrt, explicit if batched else {name: None for name, _ in arguments})
    if not batched:
        targets = [replace(t, kind=_kind_unbatched(t, params, f)) for t in targets]
    shared = _shared(arguments, targets)
    leaves = tuple([Leaf(n, n.partition(".")[0], t, _dim(n, t, explicit, shared) if batched else None) for n, t in arguments])
    name = name_of(f)
    return Problem(
        function=_unwrapped(f),
        name=name,
        args=args[:-1] if has_target else args,
        kwargs=dict(kwargs),
        leaves=_in_call_order(leaves, has_target),
        targets=tuple(targets),
        aliases=aliases,
        size=batch_size(leaves, name) if batched else 1,
        batched=batched,
        picker=Picker(output, name, chained=loss is not None),
        randomness=randomness,
        create_graph=create_graph,
        module=f if isinstance(f, nn.Module) else params if isinstance(params, nn.Module) else None,
        loss_target=args[-1] if has_target else None,
        budget=budget,
        options={} if loss is None else {"loss": loss},
        rounding=rounding(),
        random_state=random_state(targets[0].tensor.device) if randomness == "model" else None,
        spared=() if wrt is None else spared(f if params is None else params, targets),
    )


def _unwrapped(f: Function) -> Function:
    """The module within a data-parallel wrapper, whose scattering and reducing are no part of the function."""
    return f.module if isinstance(f, nn.DataParallel | nn.parallel.DistributedDataParallel) else f


def _shared(arguments: Arguments, targets: list[Target]) -> set[str | None]:
    """The arguments that hold no samples though they are tensors: parameters, chosen or by convention, or found by identity."""
    outside = {id(t.own) for t in targets if t.leaf is None}
    shared = {t.leaf for t in targets if t.kind == "parameter"} | shared_by_convention(arguments, targets)
    return shared | {name for name, tensor in arguments if id(tensor) in outside} if outside else shared


def _dim(name: str, tensor: Tensor, explicit: dict[str, int | None] | int | None, shared: set[str | None]) -> int | None:
    if isinstance(explicit, dict):
        found, dim = lookup(explicit, name)
        if found:
            return checked_dim(dim, tensor, name)
        default: int | None = 0
    else:
        default = explicit
    if name in shared or tensor.ndim == 0:
        return None
    return checked_dim(default, tensor, name)


def _kind_unbatched(target: Target, params: Any, f: Function) -> Any:
    """For one sample an argument of a function is a parameter like any other; a module's or closure's input stays an input."""
    return target.kind if params is not None or isinstance(f, nn.Module) else "parameter"


def _in_call_order(leaves: tuple[Leaf, ...], has_target: bool) -> tuple[Leaf, ...]:
    """The order in which `rebuild` meets them: arguments, keywords, and the loss's target last."""
    if not has_target:
        return leaves
    return tuple(leaf for leaf in leaves if not _under(leaf.name, "target")) + tuple(leaf for leaf in leaves if _under(leaf.name, "target"))


def _under(name: str, container: str) -> bool:
    return name == container or name.startswith(f"{container}.")
