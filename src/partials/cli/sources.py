"""Data of any size for `run`: files whose rows are read when they are needed, and data sets."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.lib import format as npy

from partials._api import _problem
from partials._errors import InputError
from partials._signature import walk
from partials.store.data import Data, Dims, of_arrays, of_dataset
from partials.store.metadata import loads

from . import loading

TABLES = (".parquet", ".arrow", ".feather")
CHUNK, LONGEST_HEADER = 2**30, 100 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of safetensors."""


class FileRows:
    """A C-ordered array within a file, whose rows are read when they are asked for: nothing of it is mapped or held."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.offset, self.path = shape, dtype, offset, path
        self.row = prod(shape[1:]) * dtype.itemsize
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        if shape and offset + shape[0] * self.row > (size := os.fstat(self.file).st_size):
            raise InputError(f"{path} is cut short", got=f"{size} bytes", expected=f"{offset + shape[0] * self.row} for shape {shape}")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(len(self))
        count = max(0, stop - start)
        raw = torch.empty(count * self.row, dtype=torch.uint8, device="cpu")
        view, at = raw.numpy().data, self.offset + start * self.row
        while view:
            if not (read := os.preadv(self.file, [view[:CHUNK]], at)):
                raise InputError(f"{self.path} is cut short", got=f"no byte at {at}", expected="as many as when it was opened")
            view, at = view[read:], at + read
        return raw.view(self.dtype).view(count, *self.shape[1:])


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


def data_of(specs: Sequence[str], change: Callable[[Any], Any], dims: Dims | None = None) -> Data:
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
    return of_arrays(args, kwargs, change, dims)


def dims_of(f: Any, options: Mapping[str, Any], loss: Any, named: Callable[[dict[str, Any]], dict[str, Any]]) -> Dims:
    """The sample dimensions that a call of `jacobian` or `gradient` with these options would see; `named`: keywords as it gets them."""

    def dims(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | None]:
        problem = _problem(f, args, {**options, "loss": loss, "kwargs": named(dict(kwargs))})
        found = {id(leaf.tensor): leaf.dim for leaf in problem.leaves}
        return [found[id(tensor)] for _, tensor in walk((args, kwargs), "")]

    return dims


def opened(spec: str) -> Any:
    """An array-like, a tuple or a dict of them, or a data set; files are opened, not read."""
    path, _, key = spec.rpartition(":") if Path(spec.rpartition(":")[0]).suffix in (".safetensors", *TABLES) else (spec, "", "")
    suffix = Path(path).suffix.lower()
    if suffix in (".npy", ".safetensors", *TABLES) and not Path(path).is_file():
        return loading.data(path)  # which says what is there instead
    if suffix == ".npy":
        return _npy(Path(path))
    if suffix == ".safetensors":
        return _picked(_safetensors(Path(path)), key, path)
    if suffix in TABLES:
        return _picked(_table(Path(path), suffix), key, path)
    if suffix in (".npz", *loading.PICKLES):
        positional, keywords = loading.data(spec)
        return keywords or positional
    return loading.made(spec, loading.attribute(spec))


def _npy(path: Path) -> FileRows | numpy.ndarray:
    """The rows of a .npy file; as a memory map where they are not one after the other, or of a type that torch reads otherwise."""
    try:
        with path.open("rb") as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, columns_first, dtype = read(file, max_header_size=LONGEST_HEADER)
            offset = file.tell()
        plain = dtype.isnative and not dtype.hasobject and shape and not columns_first
        if not plain or dtype.kind not in "fiub":
            return numpy.load(path, mmap_mode="r", allow_pickle=False)
        return FileRows(path, offset, shape, torch.from_numpy(numpy.empty(0, dtype)).dtype)
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read", got=str(error).partition("\n")[0], expected="a .npy file of numbers, without pickled objects"
        ) from None


def _safetensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, unread (https://huggingface.co/docs/safetensors/index#format)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read", got=str(error).partition("\n")[0], expected="a safetensors file") from None


def _stored(path: Path, base: int, entry: Any) -> FileRows | torch.Tensor:
    (start, stop), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), DTYPES[entry["dtype"]]
    sane = all(type(n) is int and 0 <= n < 2**63 for n in (start, stop, *shape)) and stop - start == prod(shape) * dtype.itemsize
    if not sane:
        raise ValueError(f"a tensor of shape {shape} in bytes {start} to {stop}")
    return FileRows(path, base + start, shape, dtype) if shape else FileRows(path, base + start, (1,), dtype)[0:1].reshape(())


def _table(path: Path, suffix: str) -> dict[str, Any]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise InputError(f"{path} needs Arrow", got="no module named 'pyarrow'", hint="pip install 'partials[arrow]'") from None
    try:
        if suffix == ".parquet":
            file = parquet.ParquetFile(path)
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
