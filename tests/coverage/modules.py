"""The cases of torch's own database of modules (`torch.testing._internal.common_modules.module_db`), with samples put where each module
wants them: all its inputs, evaluation and training, inputs that require grad and that do not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from partials._signature import walk
from tests.coverage.judge import Call

N = 3
OUTPUTS = 4
"""More outputs than this are projected onto as many fixed vectors: each entry takes part, and the loop stays short."""
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
TRANSFORMERS = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
TIMED = (*RECURRENT, *TRANSFORMERS, nn.MultiheadAttention)
CELLS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)


@dataclass(frozen=True)
class Case:
    """One input of one module in one mode."""

    module: str
    index: int
    training: bool
    requires_grad: bool
    style: str = "batch"
    """"batch", or "single": one sample without a batch dimension, as the module itself takes it."""

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        return (
            f"{self.module}[{self.index}] {mode}{' grad' if self.requires_grad else ''}{'' if self.style == 'batch' else ' ' + self.style}"
        )


def projected(out: torch.Tensor, batched: bool) -> torch.Tensor:
    """(N, *out) -> (N, at most OUTPUTS)."""
    rows = out.flatten(1) if batched and out.ndim > 1 else out.unsqueeze(1) if batched else out.reshape(-1)
    if rows.shape[-1] <= OUTPUTS:
        return rows
    columns = 1.3 + torch.arange(rows.shape[-1] * OUTPUTS, dtype=rows.dtype).cos().view(rows.shape[-1], OUTPUTS)
    return rows @ columns


class Called(nn.Module):
    """A module's call as a function of its tensors alone: samples first in what it gives, several outputs side by side.

    `scale`, where there is one, multiplies the first floating-point tensor: the parameter of a module that has none.
    """

    def __init__(self, module: nn.Module, tree: Any, batched: bool, scale: torch.Tensor | None = None, out_dims: Any = 0) -> None:
        super().__init__()
        self.module = module
        self.scale = None if scale is None else nn.Parameter(scale)
        self.tree, self.batched, self.out_dims = tree, batched, out_dims

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = list(tensors)
        if self.scale is not None:
            first = next(i for i, t in enumerate(given) if t.is_floating_point())
            given[first] = given[first] * self.scale
        args, kwargs = filled(self.tree, iter(given))
        found = [t for _, t in walk(self.module(*args, **kwargs), "") if t.is_floating_point()]
        if self.batched:
            dims = self.out_dims if isinstance(self.out_dims, tuple) else (self.out_dims,) * len(found)
            found = [t.movedim(dim, 0) for t, dim in zip(found, dims, strict=True)]
        parts = [projected(t, self.batched) for t in found]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Slot:
    """Where a tensor stands in a tree of arguments."""


def emptied(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return Slot()
    if isinstance(tree, dict):
        return {key: emptied(value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(emptied(value) for value in tree)
    return tree


def filled(tree: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(tree, Slot):
        return next(tensors)
    if isinstance(tree, dict):
        return {key: filled(value, tensors) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(filled(value, tensors) for value in tree)
    return tree


def database() -> list[Any]:
    from torch.testing._internal.common_modules import module_db

    return list(module_db)


def drawn(info: Any, training: bool, seeds: range = range(N)) -> list[list[Any]]:
    """The module's inputs, drawn once for each seed."""
    lists = []
    for seed in seeds:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=training)
        lists.append(list(made))
    return lists


def arguments(item: Any) -> Any:
    """(args, kwargs), with lengths given as lists of numbers as tensors, which have a sample dimension."""
    args = tuple(torch.tensor(x) if isinstance(x, list | tuple) and x and isinstance(x[0], int) else x for x in item.forward_input.args)
    return args, item.forward_input.kwargs


def build(info: Any, item: Any, training: bool) -> nn.Module:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = info.module_cls(*item.constructor_input.args, **item.constructor_input.kwargs)
        if any(nn.parameter.is_lazy(p) for p in module.parameters()):
            args, kwargs = arguments(item)
            module.double()(*args, **kwargs)
    module = module.double().train(training)
    if hasattr(module, "_random_samples"):
        module._random_samples = None  # (those of the database are for its own batch size)
    for name, buffer in module.named_buffers():  # statistics that are not those of a fresh module
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_()
    return module


def is_single(module: nn.Module, item: Any) -> bool:
    """Whether the input is one sample without a batch dimension."""
    first = next(t for _, t in walk(arguments(item), ""))
    if isinstance(module, TIMED):
        return first.ndim == 2
    if isinstance(module, CELLS):
        return first.ndim == 1
    return (
        first.ndim == 0 or "no_batch_dim" in item.desc or (type(module).__name__ in SINGLE and first.ndim == SINGLE[type(module).__name__])
    )


SINGLE = {
    **{f"{kind}Pad{d}d": d + 1 for d in (1, 2, 3) for kind in ("Reflection", "Replication", "Zero", "Circular", "Constant")},
    "MaxPool2d": 3,
    "MultiLabelMarginLoss": 1,
    "LinearCrossEntropyLoss": 1,
}
"""Modules that take one sample without saying so in their description: the rank of such an input."""


def batch_dims(module: nn.Module, tree: Any) -> tuple[list[Any], Any]:
    """(sample dimension of each tensor of (args, kwargs), None where all samples share it; sample dimension of the outputs)."""
    names = [name for name, _ in walk(tree, "")]
    if isinstance(module, RECURRENT):
        time = 0 if module.batch_first else 1
        return [time if name == ".0.0" else 1 for name in names], (time, *(1,) * (2 if isinstance(module, nn.LSTM) else 1))
    if isinstance(module, nn.CTCLoss):
        return [1 if name == ".0.0" else 0 for name in names], 0
    if isinstance(module, (*TRANSFORMERS, nn.MultiheadAttention)):
        time = 0 if first_attention(module).batch_first else 1
        keys = isinstance(module, nn.MultiheadAttention)
        dims = [time if name.startswith(".0.") else 0 if "key_padding" in name else None for name in names]
        return dims, (time, 0) if keys else time
    return [0] * len(names), 0


def first_attention(module: nn.Module) -> nn.MultiheadAttention:
    return next(m for m in module.modules() if isinstance(m, nn.MultiheadAttention))


def gathered(trees: list[Any], dims: list[Any], single: bool) -> list[torch.Tensor]:
    """The tensors of several draws of one input as one batch of N."""
    columns = zip(*([t for _, t in walk(tree, "")] for tree in trees), strict=True)
    found = []
    for dim, column in zip(dims, columns, strict=True):
        if dim is None:
            shared = column[0]
            found.append(shared[0] if shared.ndim == 3 else shared)  # a mask for each head: one for all
        elif single:
            found.append(torch.stack(column, dim))
        elif column[0].ndim == 0 or column[0].shape[dim] == 0:
            found.append(column[0])
        else:
            found.append(torch.cat(column, dim).narrow(dim, 0, N))
    return found


def made(info: Any, lists: list[list[Any]], case: Case) -> Call | None:
    """The call of a case, None where the module's input has no such style."""
    items = [column[case.index] for column in lists]
    module = build(info, items[0], case.training)
    single = is_single(module, items[0])
    trees = [arguments(item) for item in items]
    if (case.style == "single" and not single) or cannot_be_cut(module, items[0]):
        return None
    dims, out_dims = batch_dims(module, trees[0])
    if case.style == "single":
        tensors, dims = [t for _, t in walk(trees[0], "")], []
    else:
        tensors = gathered(trees, dims, single)
    loss = type(module).__name__.endswith("Loss")
    tensors = [t.clone() for t in tensors]
    for t in tensors[:1] if loss else tensors:  # (some losses have no derivative by their target)
        t.requires_grad_(case.requires_grad and t.is_floating_point())
    scale = None if any(True for _ in module.parameters()) else scaling(tensors, case.style == "batch")
    if loss:
        return loss_call(module, emptied(trees[0]), tensors, dims, case, scale)
    f = Called(module, emptied(trees[0]), case.style == "batch", scale, out_dims)
    return finished(f, tensors, dims, case, random=hasattr(module, "_random_samples"))


def finished(f: nn.Module, tensors: list[torch.Tensor], dims: list[Any], case: Case, **rest: Any) -> Call:
    f.train(case.training)
    parameters = {name: p for name, p in f.named_parameters() if p.requires_grad}
    options = {"batched": False} if case.style == "single" else {}
    return Call(f, tuple(tensors), parameters, tuple(dims), options, **rest)


def scaling(tensors: list[torch.Tensor], batched: bool) -> torch.Tensor:
    """Near one, so that probabilities stay probabilities; a number for each last feature of a sample."""
    first = next(t for t in tensors if t.is_floating_point())
    shape = first.shape[-1:] if first.ndim > batched else ()
    return 1 - 0.01 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Losses(nn.Module):
    """A loss of each sample alone: what a training loop without a batch would write. `scale` is as in `Called`."""

    def __init__(self, called: nn.Module, dims: list[Any], scale: torch.Tensor | None) -> None:
        super().__init__()
        self.called, self.dims = called, dims
        self.scale = None if scale is None else nn.Parameter(scale)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = list(tensors)
        if self.scale is not None:
            given[0] = given[0] * self.scale
        size = next(t.shape[d] for t, d in zip(given, self.dims, strict=True) if d is not None and t.ndim)
        cut = [[t if d is None or not t.ndim else t.narrow(d, n, 1) for t, d in zip(given, self.dims, strict=True)] for n in range(size)]
        return torch.stack([self.called(*parts).reshape(-1) for parts in cut])


class Scaled(nn.Module):
    """The least of a model: what a loss is asked about."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def loss_call(module: nn.Module, tree: Any, tensors: list[torch.Tensor], dims: list[Any], case: Case, scale: Any) -> Call:
    """A loss: behind a scaled input by `gradient(loss=)` where it takes an output and a target; else sample by sample."""
    reduced = getattr(module, "reduction", "mean") != "none"
    if scale is not None and len(tensors) == 2 and reduced:
        return finished(Scaled(scale), tensors, dims if case.style == "single" else [0, 0], case, loss=module)
    if case.style == "single":
        return finished(Called(module, tree, False, scale), tensors, dims, case)
    return finished(Losses(Called(module, tree, False), dims, scale), tensors, dims, case)


def cannot_be_cut(module: nn.Module, item: Any) -> bool:
    """CTCLoss takes targets one after the other in one vector: no dimension of it holds samples."""
    return isinstance(module, nn.CTCLoss) and item.forward_input.args[1].ndim == 1


def cases(info: Any, count: dict[bool, int]) -> Iterator[Case]:
    """Every case of a module; training only where the database knows that it differs, or the module has parameters."""
    for training in (False, True):
        for index in range(count[training]):
            for requires_grad in (False, True):
                for style in ("batch", "single"):
                    yield Case(info.name, index, training, requires_grad, style)
