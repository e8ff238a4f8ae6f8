"""What the user names: `FILE.py:NAME` and `MODULE:NAME` are code that is run; data files are only read, never unpickled."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import BadZipFile

from partials._errors import InputError, near

from .faults import ForeignError, shown

FILES = (".npy", ".npz", ".safetensors")
PICKLES = (".pt", ".pt2", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
FORMS = "FILE.py:NAME or MODULE:NAME"
_LOADED: dict[Path, ModuleType] = {}


def model(spec: str) -> Any:
    """A module or function: the attribute itself, or what it returns if it needs no arguments; of a folder, the model saved there."""
    if Path(spec).is_dir():
        return _pretrained(Path(spec))
    found = made(spec, attribute(spec))
    if not callable(found):
        raise InputError(
            f"{spec} is no model",
            got=type(found).__name__,
            expected="an nn.Module, a function, or a function without arguments that returns one",
        )
    return found


def _pretrained(folder: Path) -> Any:
    try:
        from partials.adapters import huggingface
    except ModuleNotFoundError:
        raise InputError(
            f"{folder} is a folder, and models saved in one need transformers",
            got="no module named 'transformers'",
            expected=FORMS,
            hint="pip install 'partials[huggingface]'",
        ) from None
    return huggingface.load(folder)


def data(spec: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional inputs, keyword inputs): a tensor, a tuple of them, or keyword inputs by name."""
    path, key = _path_and_key(spec)
    suffix = Path(path).suffix.lower()
    if suffix in PICKLES:
        raise InputError(
            f"{path} may hold code, which a data file must not",
            got=suffix,
            expected=f"one of: {', '.join(FILES)}",
            hint="safetensors.torch.save_file, or FILE.py:NAME",
        )
    found = _of_file(Path(path), suffix, key) if suffix in FILES else made(spec, attribute(spec))
    return _inputs(found, spec)


def value(spec: str) -> Any:
    """One thing, for `--target`: what `data` calls one positional input."""
    positional, keywords = data(spec)
    if len(positional) != 1 or keywords:
        names = f"names {', '.join(keywords)}" if keywords else f"{len(positional)} inputs"
        raise InputError(f"{spec} is not one tensor", got=names, expected="one tensor", hint="FILE.npz:NAME picks one of several")
    return positional[0]


def made(spec: str, found: Any) -> Any:
    """What a function without arguments returns; anything else as it is."""
    import torch

    if isinstance(found, torch.nn.Module | torch.Tensor) or not callable(found) or _needed(found):
        if isinstance(found, type):
            raise InputError(
                f"{spec} is a class that needs arguments",
                got=f"arguments {', '.join(_needed(found))}",
                expected="an instance",
                hint="a function without arguments that makes one",
            )
        return found
    try:
        return found()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ForeignError(f"calling {spec}", error) from error


def attribute(spec: str) -> Any:
    """The object behind `FILE.py:a.b` or `package.module:a.b`."""
    place, colon, path = spec.rpartition(":")
    if not colon or not place or not path:
        raise InputError(f"{spec!r} does not say where to look", got=spec, expected=FORMS, hint=_form_hint(spec))
    found: Any = _file(Path(place)) if place.endswith(".py") or Path(place).is_file() else _module(place)
    walked = place
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            names = [n for n in dir(found) if not n.startswith("_")]
            raise InputError(
                f"{walked} has no {name!r}", got=spec, expected="the name of something that it defines", hint=near(name, names)
            ) from None
        walked = f"{walked}:{name}" if walked == place else f"{walked}.{name}"
    return found


def _file(path: Path) -> ModuleType:
    path = path.expanduser()
    if not path.is_file():
        raise _missing(path, "*.py")
    full = path.resolve()
    if full in _LOADED:
        return _LOADED[full]
    for folder in (str(Path.cwd()), str(full.parent)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"file_{abs(hash(full))}"
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        del sys.modules[name]
        raise ForeignError(f"loading {shown(path)}", error) from error
    return _LOADED.setdefault(full, module)


def _module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise ForeignError(f"importing {name}", error) from error
        here = [p.stem for p in Path.cwd().glob("*.py")] + [p.parent.name for p in Path.cwd().glob("*/__init__.py")]
        raise InputError(
            f"could not import module {error.name!r}", got=name, expected="a module that is installed or lies here", hint=near(name, here)
        ) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ForeignError(f"importing {name}", error) from error


def _of_file(path: Path, suffix: str, key: str) -> Any:
    if not path.is_file():
        raise _missing(path, f"*{suffix}")
    if suffix == ".safetensors":
        return _picked(_safetensors(path), key, path)
    import numpy
    import torch

    try:
        with path.open("rb") as file:
            loaded = numpy.load(file, allow_pickle=False)
            if isinstance(loaded, numpy.ndarray):
                return torch.from_numpy(loaded)
            tensors = {name: torch.from_numpy(loaded[name]) for name in loaded.files}
    except (ValueError, TypeError, EOFError, OSError, BadZipFile) as error:
        expected = f"a {suffix} file of numbers, without pickled objects"
        raise InputError(f"{path} cannot be read", got=str(error).partition("\n")[0], expected=expected) from None
    return _picked(tensors, key, path)


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(
            f"{path} needs safetensors", got="no module named 'safetensors'", hint="pip install 'partials[safetensors]'"
        ) from None
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read", got=str(error).partition("\n")[0], expected="a safetensors file") from None


def _picked(tensors: Mapping[str, Any], key: str, path: Path) -> Any:
    """One tensor where a key picks it or there is only one; else all, by name."""
    if key and key not in tensors:
        raise InputError(f"{path} holds no {key!r}", got=key, expected="the name of one of its tensors", hint=near(key, tensors))
    return tensors[key] if key else next(iter(tensors.values())) if len(tensors) == 1 else dict(tensors)


def _path_and_key(spec: str) -> tuple[str, str]:
    """`file.npz:name` in its two parts; a colon may be part of a path, too."""
    path, _, key = spec.rpartition(":")
    return (path, key) if Path(path).suffix.lower() in (*FILES, *PICKLES) else (spec, "")


def _inputs(found: Any, spec: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import numpy
    import torch

    if isinstance(found, numpy.ndarray):
        found = torch.from_numpy(found)
    if isinstance(found, torch.Tensor):
        return (found,), {}
    if isinstance(found, Mapping) and all(isinstance(name, str) for name in found):
        return (), {name: torch.from_numpy(part) if isinstance(part, numpy.ndarray) else part for name, part in found.items()}
    if isinstance(found, tuple | list):
        return tuple(torch.from_numpy(part) if isinstance(part, numpy.ndarray) else part for part in found), {}
    raise InputError(f"{spec} is no data", got=type(found).__name__, expected="a tensor, a tuple of tensors, or a dict of keyword inputs")


def _needed(function: Any) -> list[str]:
    """The arguments that a call cannot leave out."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ["?"]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    varied = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
    return [p.name for p in parameters if p.kind in plain and p.default is p.empty] or (varied if not isinstance(function, type) else [])


def _missing(path: Path, pattern: str) -> InputError:
    beside = [str(path.with_name(p.name)) for p in path.parent.glob(pattern)] if path.parent.is_dir() else []
    return InputError(
        f"there is no file {path}", got=str(path), expected="a file that exists", hint=near(str(path), beside) if beside else ""
    )


def _form_hint(spec: str) -> str:
    return f"{spec}:model" if spec.endswith(".py") else ""
