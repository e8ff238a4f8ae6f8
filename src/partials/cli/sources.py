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
        if len(self.shape) == 1:
            return part.to_numpy()
        found = numpy.asarray(part.to_pylist()) if len(self.shape) > 2 or part.null_count else self._lists(part)
        return found.reshape(len(part), *self.shape[1:])

    def _lists(self, part: Any) -> numpy.ndarray:
        """Lists of numbers, all of one length, without a Python object for each number."""
        chunks = part.chunks if hasattr(part, "chunks") else [part]
        lengths = {n for chunk in chunks for n in chunk.value_lengths().unique().to_pylist()}
        if lengths - {self.shape[1]}:
            raise InputError("a column holds lists of several lengths", got=str(sorted(lengths)), expected=f"{self.shape[1]} numbers each")
        return numpy.concatenate([numpy.empty(0, self.dtype), *(chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks)])


class Grouped:
    """A column of a Parquet file, of which only the row groups that hold the rows asked for are read; those read last are kept."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name = file, name
        self.last: tuple[list[int], Any] = ([], None)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self.starts = [0, *numpy.cumsum(sizes).tolist()]
        first = Column(next(file.iter_batches(1, columns=[name]))[0]) if self.starts[-1] else Column([])
        self.shape, self.dtype = (self.starts[-1], *first.shape[1:]), first.dtype

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> Any:
        start, stop = rows.start, min(rows.stop, len(self))
        groups = [i for i, first in enumerate(self.starts[:-1]) if first < stop and self.starts[i + 1] > start]
        if groups != self.last[0]:
            self.last = ([], None)  # (before the next is read: two of them need not fit)
            self.last = (groups, self.file.read_row_groups(groups, columns=[self.name])[self.name])
        before = self.starts[groups[0]] if groups else 0
        return Column(self.last[1])[slice(start - before, stop - before)]


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
        if suffix == ".parquet":
            file = parquet.ParquetFile(path, memory_map=True)
            return {name: Grouped(file, name) for name in file.schema_arrow.names}
        table = ipc.open_file(pyarrow.memory_map(str(path))).read_all()
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
