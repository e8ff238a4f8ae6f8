"""`pt.open(path)`: a store as its rows, read from disk when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy
import torch

from .._columns import Columns
from .._errors import InputError, StoreError
from .._plan import human_bytes
from .._rows import Transposed
from .._typing import Shape, Tensor
from . import journal
from .format import Array
from .writer import array_of, config_of, damaged

MAIN = ("jacobian", "norms", "gram", "sketch", "parts")


class Store:
    """Results on disk, lazily: rows, columns by parameter, and quantities straight from the files.

    Letters as in `Jacobian`: N samples, `*out` the output shape of one sample, P parameter entries. Rows that have not been
    computed read as NaN; quantities of all rows are refused until they are there.

    >>> store = pt.open("results.store")  # doctest: +SKIP
    >>> store.shape, store[2:5].shape, store["weight"].shape, store.norms().shape  # doctest: +SKIP
    ((10, 2, 8), torch.Size([3, 2, 8]), torch.Size([10, 2, 2, 3]), torch.Size([10, 2]))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "zarr.json").is_file():
            raise StoreError(f"{path} is no store", got="no zarr.json", expected="a folder that `partials run` or pt.stream(to=...) wrote")
        record = config_of(self.path)
        self.config: dict[str, Any] = record["config"]
        self.fingerprint: dict[str, Any] = record["fingerprint"]
        self.arrays: dict[str, Array] = {name: array_of(self.path, name) for name in record["arrays"]}
        self.entries, self.remarks = journal.read(self.path)
        self.main = next(self.arrays[name] for name in MAIN if name in self.arrays)
        self._maps: dict[tuple[str, int], numpy.ndarray] = {}

    @property
    def what(self) -> str:
        """The quantity: "jacobian", "norms", "sum", "gram", "diagonal", "sketch:K"."""
        return str(self.main.attributes["what"])

    @property
    def out(self) -> Shape:
        return tuple(self.main.attributes["out"])

    @property
    def columns(self) -> Columns:
        table: Mapping[str, Any] = self.main.attributes["columns"]
        shapes = {name: tuple(column["shape"]) for name, column in table.items()}
        return Columns(shapes, self.main.attributes.get("aliases", {}))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.columns.shapes)

    def __len__(self) -> int:
        """The number of samples."""
        return self.arrays["values"].shape[0]

    @property
    def shape(self) -> Shape:
        """That of the rows: (N, *out, P) of a Jacobian, (N, *out) of norms, (N, *out, K) of sketches, (N, *out, N, *out) of "gram"."""
        last = {"jacobian": self.main.shape[2:], "sketch": self.main.shape[2:], "gram": (len(self), *self.out)}
        return (len(self), *self.out, *last.get(self.main.name, ()))

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.main.dtype)

    @property
    def values(self) -> Tensor:
        """f's output for every sample: (N, *out), NaN where it has not been computed."""
        return self._all(self.arrays["values"]).reshape(len(self), *self.out)

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Ranges of samples that have not been computed."""
        found: list[tuple[int, int]] = []
        per = self.arrays["values"]
        for block in range(per.blocks):
            if block not in self.entries:
                start, stop = per.rows(block)
                found[-1:] = [(found[-1][0], stop)] if found and found[-1][1] == start else [*found[-1:], (start, stop)]
        return found

    @property
    def complete(self) -> bool:
        return not self.missing

    def __getitem__(self, key: Any) -> Tensor:
        """`store[name]`: one parameter's rows, (N, *out, *shape); `store[n]`, `store[2:5]`, `store[index]`: rows of samples, copied."""
        self._demand_rows()
        if isinstance(key, str):
            return self._column(key)
        try:
            index = torch.arange(len(self))[key]
        except (IndexError, TypeError):
            raise InputError(
                "the index does not choose samples", got=repr(key), expected=f"a parameter's name, or samples within {len(self)}"
            ) from None
        rows = [self._row(self.main, int(n)) for n in index.reshape(-1)]
        found = torch.from_numpy(numpy.stack(rows) if rows else numpy.empty((0, *self.main.shape[1:]), self.main.dtype))
        return found.reshape(*index.shape, *self.shape[1:])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(samples, their rows) block by block, mapped, not copied: (n, *out, ...)."""
        self._demand_rows()
        for block in range(self.main.blocks):
            start, stop = self.main.rows(block)
            if block in self.entries:
                yield slice(start, stop), torch.from_numpy(self._map(self.main, block)).reshape(stop - start, *self.shape[1:])

    def dense(self) -> Tensor:
        """All rows in memory."""
        self._demand_rows()
        return self._all(self.main).reshape(self.shape)

    def result(self) -> Tensor:
        """A reduction's result: (*out, P) of "sum", (P,) of "diagonal"; of anything else, all rows."""
        if self.main.name != "parts":
            self._demand_complete()
            return self.dense()
        self._demand_complete()
        total = numpy.zeros(self.main.shape[1:], self.main.dtype)
        for block in range(self.main.blocks):  # in order, so that the sum does not depend on who computed what
            total += self._map(self.main, block)[0]
        return torch.from_numpy(total).reshape(tuple(self.main.attributes["result"]))

    def norms(self) -> Tensor:
        """The norm of every row: (N, *out)."""
        self._demand_complete()
        if self.main.name == "norms":
            return self.dense()
        self._demand("jacobian")
        return torch.cat([torch.linalg.vector_norm(rows, dim=-1) for _, rows in self.blocks()])

    def gram(self) -> Tensor:
        """All rows with all rows: (N, *out, N, *out); of sketches, an unbiased estimate of it."""
        self._demand_complete()
        if self.main.name == "gram":
            return self.dense()
        self._demand("jacobian", "sketch")
        c = prod(self.out)
        found = torch.empty(len(self), c, len(self), c, dtype=self.dtype)
        for left, mine in self.blocks():
            for right, theirs in self.blocks():
                product = mine.reshape(-1, mine.shape[-1]) @ theirs.reshape(-1, theirs.shape[-1]).T
                found[left, :, right] = product.reshape(-1, c, theirs.shape[0], c)
        return found.reshape(self.shape[: 1 + len(self.out)] * 2)

    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        """J v: (P,), (P, k) or tensors by name -> (N, *out) or (N, *out, k)."""
        self._demand_complete()
        self._demand("jacobian")
        parts, columns = self.columns.vector(v)
        flat = self.columns.join(parts, 0).to(self.dtype)
        found = torch.cat([rows @ flat for _, rows in self.blocks()])
        return found if columns else found.squeeze(-1)

    @property
    def T(self) -> Transposed:
        """`store.T @ u`, J^T u: (N, *out) or (N, *out, k) -> (P,) or (P, k)."""
        return Transposed(self._rmatmul, (self.shape[-1], len(self), *self.out))

    def _rmatmul(self, u: Tensor) -> Tensor:
        self._demand_complete()
        self._demand("jacobian")
        lead = (len(self), *self.out)
        if tuple(u.shape[: len(lead)]) != lead or u.ndim > len(lead) + 1:
            raise InputError("u has another shape than the store asks for", got=f"shape {tuple(u.shape)}", expected=f"shape {lead}")
        total: Tensor = torch.zeros(self.shape[-1], *u.shape[len(lead) :], dtype=self.dtype)
        for samples, rows in self.blocks():
            part = u[samples].reshape(-1, *u.shape[len(lead) :]).to(self.dtype)
            total += rows.reshape(-1, rows.shape[-1]).T @ part
        return total

    def __repr__(self) -> str:
        size = sum(size for entry in self.entries.values() for size, _, _ in entry.files.values())
        state = "complete" if self.complete else f"{sum(stop - start for start, stop in self.missing)} samples missing"
        return (
            f"Store {self.what} {self.shape} {self.dtype}, {human_bytes(float(size))} in {len(self.entries)} blocks, {state}: {self.path}"
        )

    def _demand(self, *names: str) -> None:
        if self.main.name not in names:
            raise StoreError("the store holds another quantity", got=self.what, expected=" or ".join(names))

    def _demand_rows(self) -> None:
        if self.main.name == "parts":
            raise StoreError("the store holds a reduction, which has no rows", got=self.what, expected="rows", hint="store.result()")

    def _demand_complete(self) -> None:
        if self.missing:
            ranges = ", ".join(f"{start} to {stop}" for start, stop in self.missing[:4])
            raise StoreError(
                "some rows have not been computed",
                got=f"missing: samples {ranges}",
                expected="all rows",
                hint="resume the run, or store[index]",
            )

    def _column(self, name: str) -> Tensor:
        self._demand("jacobian")
        name = self.columns.name(name)
        offset, shape = int(self.main.attributes["columns"][name]["offset"]), self.columns.shapes[name]
        found = numpy.full((*self.main.shape[:2], prod(shape)), numpy.nan, self.main.dtype)
        for block in self.entries:
            start, stop = self.main.rows(block)
            found[start:stop] = self._map(self.main, block)[:, :, offset : offset + prod(shape)]
        return torch.from_numpy(found).reshape(len(self), *self.out, *shape)

    def _all(self, a: Array) -> Tensor:
        found = numpy.full(a.shape, numpy.nan, a.dtype)
        for block in self.entries:
            start, stop = a.rows(block)
            found[start:stop] = self._map(a, block)
        return torch.from_numpy(found)

    def _row(self, a: Array, n: int) -> numpy.ndarray:
        block = n // a.block
        if block not in self.entries:
            return numpy.full(a.shape[1:], numpy.nan, a.dtype)
        return self._map(a, block)[n - a.rows(block)[0]]

    def _map(self, a: Array, block: int) -> numpy.ndarray:
        """A block's rows, mapped; its size is compared with what the journal and the shape say before that."""
        key = (a.name, block)
        if key not in self._maps:
            start, stop = a.rows(block)
            path, said = self.path / a.key(block), self.entries[block].files.get(a.key(block), (-1, "", 0))[0]
            found = path.stat().st_size if path.is_file() and not path.is_symlink() else None
            if found is None or not found == said == a.shard_bytes(stop - start):
                raise damaged(block, a.key(block), "no such file" if found is None else f"{found} bytes", f"{said} bytes", self.path)
            if 0 in a.shape:
                return numpy.empty((stop - start, *a.shape[1:]), a.dtype)
            self._maps[key] = numpy.memmap(path, a.dtype, "c", shape=(stop - start, *a.shape[1:]))  # what is written stays in memory
        return self._maps[key]


def open_store(path: str | Path) -> Store:
    """Open a store that `partials run` or `pt.stream(..., to=path)` wrote; nothing is read until it is asked for.

    Raises
    ------
    StoreError
        where there is none, or its metadata or journals are damaged.

    >>> import tempfile, torch, partials as pt
    >>> path = tempfile.mkdtemp() + "/norms"
    >>> written = pt.stream(torch.nn.Linear(3, 2), torch.randn(10, 3).split(4), "norms", to=path)
    >>> pt.open(path).shape, pt.open(path).complete
    ((10, 2), True)
    """
    return Store(path)
