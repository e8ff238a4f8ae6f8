"""From the shared options to a problem: load, cast, move, name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from partials._api import _problem
from partials._errors import InputError, PartialsError, near
from partials._part import part
from partials._problem import Problem
from partials._state import rng_kept, untouched

from . import loading
from .console import say
from .faults import ForeignError
from .options import Asked

LOSSES = [name for name in dir(F) if name.endswith(("_loss", "cross_entropy", "_div", "_logits")) and not name.startswith("_")]
OF_HEAD = {"labels": "mean", "labels-sum": "sum"}
"""The losses of the head of a model of transformers, by what is done over a sample's labels."""
DTYPES = ("float16", "bfloat16", "float32", "float64")


def problem_of(asked: Asked) -> Problem:
    """The problem that the options describe."""
    f, params, loss, change = function_of(asked)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    for spec in asked.data:
        positional, keywords = loading.data(spec)
        args, kwargs = args + positional, kwargs | keywords
    if asked.target is not None:
        kwargs["target"] = loading.value(asked.target)
    options: dict[str, Any] = {"params": params, "wrt": asked.wrt or None, "loss": loss, "batched": not asked.single}
    kwargs = with_labels(asked, kwargs)
    options |= {"output": output_of(asked), "max_memory": asked.max_memory, "randomness": asked.randomness}
    if asked.in_dims is not None:
        options["in_dims"] = in_dims(asked.in_dims)
    problem = _problem(f, tuple(change(a) for a in args), options | {"kwargs": {name: change(value) for name, value in kwargs.items()}})
    if asked.limit is not None and problem.batched and asked.limit < problem.size:
        problem = part(problem, torch.arange(asked.limit, device=problem.targets[0].tensor.device))
    _call_once(problem, asked)
    return problem


def function_of(asked: Asked) -> tuple[Any, Any, Callable[..., Any] | None, Callable[[Any], Any]]:
    """(model, tensors it uses from outside, loss, what makes an input fit it): loaded, in its mode, cast and moved as asked."""
    f = loading.model(asked.model)
    loss = None if asked.loss is None else _of_head(asked.loss, f) if asked.loss in OF_HEAD else _loss(asked.loss)
    if asked.target is not None and loss is None:
        raise InputError("a target is compared by a loss", got="--target without --loss", expected="both", hint="--loss cross_entropy")
    if asked.training is not None:
        _demand_module(f, "--train" if asked.training else "--eval").train(asked.training)
    params = None if asked.params is None else loading.made(asked.params, loading.attribute(asked.params))
    return f, params, loss, _change(asked, f, params)


def _call_once(problem: Problem, asked: Asked) -> None:
    """Call the model as its owner would: what goes wrong here is not this library's doing."""
    device = problem.targets[0].tensor.device
    try:
        with torch.no_grad(), untouched(problem.module), rng_kept(device):
            problem()
    except (PartialsError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ForeignError(f"calling {asked.model}", error) from error


def in_dims(text: str) -> Any:
    """`0`, `0,none` or `x=0,a=none` as the library takes it."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        if not words:
            raise ValueError
        if all("=" in word for word in words):
            return {name.strip(): _dim(dim) for name, _, dim in (word.partition("=") for word in words)}
        dims = tuple(_dim(word) for word in words)
        return dims[0] if len(dims) == 1 else dims
    except ValueError:
        raise InputError("--in-dims is not understood", got=text, expected="0,none by position, or x=0,a=none by name") from None


def _dim(word: str) -> int | None:
    return None if word.strip().lower() == "none" else int(word)


def output_of(asked: Asked) -> Any:
    """What `--output` says; of a model saved in a folder, its logits."""
    text = asked.output
    if text is None and Path(asked.model).is_dir():
        return "logits"
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


def with_labels(asked: Asked, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The labels among the data as the target, where the loss is that of the model's own head."""
    if asked.loss not in OF_HEAD or asked.target is not None:
        return kwargs
    if "labels" not in kwargs:
        names = f"data named {', '.join(kwargs)}" if kwargs else "data without names"
        raise InputError(f"--loss {asked.loss} compares with labels", got=names, expected="labels among the data, or --target")
    return {**{name: value for name, value in kwargs.items() if name != "labels"}, "target": kwargs["labels"]}


def _of_head(spec: str, f: Any) -> Callable[..., Any]:
    try:
        from partials.adapters import huggingface
    except ModuleNotFoundError:
        raise InputError(f"--loss {spec} is for models of transformers", got=type(f).__name__, expected="transformers") from None
    return huggingface.loss_of(_demand_module(f, f"--loss {spec}"), OF_HEAD[spec])


def _loss(spec: str) -> Callable[..., Any]:
    if ":" in spec:
        found = loading.attribute(spec)
        loss = found() if isinstance(found, type) and issubclass(found, nn.Module) else found
        if not callable(loss):
            raise InputError(f"{spec} is no loss", got=type(loss).__name__, expected="a function of output and target")
        return loss
    name = spec.removeprefix("F.").removeprefix("torch.nn.functional.")
    if name not in LOSSES:
        raise InputError(
            f"--loss {spec} is unknown", got=spec, expected="a loss of torch.nn.functional, or FILE.py:NAME", hint=near(name, LOSSES)
        )
    loss = getattr(F, name)
    return loss


def _demand_module(f: Any, option: str) -> nn.Module:
    if not isinstance(f, nn.Module):
        raise InputError(f"{option} sets the mode of a module, and the model is none", got=type(f).__name__, expected="an nn.Module")
    return f


def _change(asked: Asked, f: Any, params: Any) -> Callable[[Any], Any]:
    """Cast and move the model as asked; what has to be done to each input so that it fits."""
    dtype, device = _dtype(asked.dtype), _device(asked.device)
    modules = [module for module in (f, params) if isinstance(module, nn.Module)]
    for module in modules:
        module.to(device=device, dtype=dtype)
    kinds = {p.dtype for module in modules for p in module.parameters() if p.is_floating_point()}
    fits = dtype or (next(iter(kinds)) if len(kinds) == 1 else None)
    told: set[torch.dtype] = set()

    def change(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        cast = fits if value.is_floating_point() else None
        if cast is not None and cast is not value.dtype and dtype is None and value.dtype not in told:
            told.add(value.dtype)
            say(f"data of {value.dtype} are cast to {cast}, the model's type")
        moved = value.detach().to(device=device, dtype=cast)
        return value if moved.data_ptr() == value.data_ptr() and moved.dtype == value.dtype else moved.requires_grad_(value.requires_grad)

    return change


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"--dtype {name} is unknown", got=name, expected=f"one of: {', '.join(DTYPES)}", hint=near(name, DTYPES))
    return getattr(torch, name)


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {name} cannot be used", got=str(error).partition("\n")[0], expected="a device of this machine"
        ) from None
    return device
