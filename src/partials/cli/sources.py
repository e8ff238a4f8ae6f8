"""Data of any size for `run`: files whose rows are read when they are needed, and data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from partials._errors import InputError
from partials.store.data import Data, of_arrays, of_dataset

from . import loading

TABLES = (".parquet", ".arrow", ".feather")


class Sliced:
    """A tensor of a safetensors file, of which slices are read."""

    def __init__(self, path: Path, name: str) -> None:
        from safetensors import safe_open

        file: Any = safe_open(path, framework="pt")
        self.slice = file.get_slice(name)
        self.shape, self.dtype = tuple(self.slice.get_shape()), self.slice.get_dtype()

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> Any:
        return self.slice[rows]


class Column:
    """A column of an Arrow table: numbers, or lists of one length of them."""

    def __init__(self, column: Any) -> None:
        self.column = column
        first = numpy.asarray(column[0].as_py()) if len(column) else numpy.empty(0)
        self.shape, self.dtype = (len(column), *first.shape), first.dtype

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> Any:
        part = self.column.slice(rows.start, rows.stop - rows.start)
        return numpy.asarray(part.to_pylist()) if len(self.shape) > 1 else part.to_numpy()


def data_of(specs: Sequence[str], change: Callable[[Any], Any]) -> Data:
    """The rows behind `--data`, each spec one or more inputs in order; a data set stands alone."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for spec in specs:
        found = opened(spec)
        if _is_dataset(found):
            if len(specs) > 1:
                raise InputError("a data set gives all inputs", got=f"{len(specs)} data", expected="one --data")
            return of_dataset(found, change)
        if isinstance(found, Mapping):
            kwargs.update(found)
        else:
            args += found if isinstance(found, tuple | list) else [found]
    return of_arrays(args, kwargs, change)


def opened(spec: str) -> Any:
    """An array-like, a tuple or a dict of them, or a data set; files are opened, not read."""
    path, _, key = spec.rpartition(":") if Path(spec.rpartition(":")[0]).suffix in (".safetensors", *TABLES) else (spec, "", "")
    suffix = Path(path).suffix.lower()
    if suffix in (".npy", ".safetensors", *TABLES) and not Path(path).is_file():
        return loading.data(path)  # which says what is there instead
    if suffix == ".npy":
        return _mapped(Path(path))
    if suffix == ".safetensors":
        return _picked(_sliced(Path(path)), key, path)
    if suffix in TABLES:
        return _picked(_table(Path(path), suffix), key, path)
    if suffix in (".npz", *loading.PICKLES):
        positional, keywords = loading.data(spec)
        return keywords or positional
    return loading.made(spec, loading.attribute(spec))


def _mapped(path: Path) -> numpy.ndarray:
    try:
        return numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read", got=str(error).partition("\n")[0], expected="a .npy file of numbers, without pickled objects"
        ) from None


def _sliced(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise InputError(
            f"{path} needs safetensors", got="no module named 'safetensors'", hint="pip install 'partials[safetensors]'"
        ) from None
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        return {name: Sliced(path, name) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read", got=str(error).partition("\n")[0], expected="a safetensors file") from None


def _table(path: Path, suffix: str) -> dict[str, Any]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise InputError(f"{path} needs Arrow", got="no module named 'pyarrow'", hint="pip install 'partials[arrow]'") from None
    try:
        table = (
            parquet.read_table(path, memory_map=True) if suffix == ".parquet" else ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        )
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read", got=str(error).partition("\n")[0], expected=f"a {suffix} file") from None
    return {name: Column(table[name]) for name in table.column_names}


def _picked(found: dict[str, Any], key: str, path: str) -> Any:
    return loading._picked(found, key, Path(path))


def _is_dataset(found: Any) -> bool:
    return (
        hasattr(found, "__len__")
        and hasattr(found, "__getitem__")
        and not hasattr(found, "shape")
        and not isinstance(found, tuple | list | dict)
    )
