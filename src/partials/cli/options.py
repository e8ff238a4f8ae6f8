"""The options that commands share, declared once; typer reads them from a signature that is put together here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from .faults import guarded

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; all other words go to stderr.")]
Method = Annotated[str, typer.Option("--method", help="The method to use, by name.")]


@dataclass(frozen=True)
class Asked:
    """What the shared options say."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="FILE.py:NAME or MODULE:NAME: a module or function, or a function without arguments that returns one; "
            "or a folder that save_pretrained wrote.",
        ),
    ]
    data: Annotated[list[str], typer.Option("--data", "-d", help=".npy, .npz, .safetensors, or FILE.py:NAME; several are inputs in order.")]
    target: Annotated[str | None, typer.Option("--target", help="Data that the loss compares with.")] = None
    loss: Annotated[
        str | None,
        typer.Option("--loss", help="A function of torch.nn.functional, FILE.py:NAME, or labels (the loss of a saved model's head)."),
    ] = None
    params: Annotated[str | None, typer.Option("--params", help="FILE.py:NAME of the tensors that MODEL uses from outside.")] = None
    wrt: Annotated[list[str] | None, typer.Option("--wrt", help="Names or globs of what to differentiate; may be repeated.")] = None
    output: Annotated[str | None, typer.Option("--output", help="Key, index or attribute of the output to differentiate.")] = None
    in_dims: Annotated[str | None, typer.Option("--in-dims", help="Sample dimensions: 0,none by position, or x=0,a=none by name.")] = None
    max_memory: Annotated[str | None, typer.Option("--max-memory", help="Bound on the growth of memory, such as 2GiB.")] = None
    randomness: Annotated[str, typer.Option("--randomness", help="error, model, same or different.")] = "error"
    single: Annotated[bool, typer.Option("--single", help="The data are one sample, without a sample dimension.")] = False
    training: Annotated[bool | None, typer.Option("--train/--eval", help="The module's mode; by default it stays as it is.")] = None
    dtype: Annotated[str | None, typer.Option("--dtype", help="Cast model and data: float64, float32, ...")] = None
    device: Annotated[str | None, typer.Option("--device", help="Move model and data: cpu, cuda, ...")] = None
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use the first samples only.")] = None
    json: Json = False


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """`command(asked, ...)` as a function with the shared options in its signature, its faults turned into exit codes."""
    shared = get_type_hints(Asked, include_extras=True)
    own = get_type_hints(command, include_extras=True)
    entries = {f.name: (shared[f.name], inspect.Parameter.empty if f.default is MISSING else f.default) for f in fields(Asked)}
    entries |= {p.name: (own[p.name], p.default) for p in list(inspect.signature(command).parameters.values())[1:]}

    def asked_command(**given: Any) -> None:
        with guarded():
            command(Asked(**{f.name: given.pop(f.name) for f in fields(Asked)}), **given)

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in entries.items()
    ]
    asked_command.__name__, asked_command.__doc__ = command.__name__, command.__doc__
    asked_command.__annotations__ = {name: kind for name, (kind, _) in entries.items()}
    asked_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return asked_command
