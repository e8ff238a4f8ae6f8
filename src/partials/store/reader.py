"""`pt.open(path)`: a store as its rows, read from disk when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy
import torch

from .._columns import Columns
from .._errors import InputError, MemoryBudgetError, StoreError
from .._machine import share
from .._plan import LARGE, human_bytes
from .._rows import Transposed
from .._typing import Shape, Tensor
from . import journal
from .format import Array
from .metadata import agreeing, array_of, columns_of, config_of, within
from .writer import damaged, demand_known

MAPPED = 256
"""Shards that stay mapped: systems have a limit."""


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
        self.entries, self.remarks = journal.read(self.path)  # (first: while a run goes on, arrays grow before lines are added)
        record = config_of(self.path)
        self.config: dict[str, Any] = record["config"]
        self.fingerprint: dict[str, Any] = record["fingerprint"]
        self.arrays: dict[str, Array]
        self.main, self.arrays = agreeing(self.path, {name: array_of(self.path, name) for name in record["arrays"]})
        demand_known(self.path, self.arrays, self.entries)
        self.columns: Columns = columns_of(self.main)
        self._maps: dict[tuple[str, int], numpy.ndarray] = {}

    @property
    def what(self) -> str:
        """The quantity: "jacobian", "norms", "sum", "gram", "diagonal", "sketch:K"."""
        return str(self.main.attributes["what"])

    @property
    def out(self) -> Shape:
        return tuple(self.main.attributes["out"])

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
        found: torch.dtype = getattr(torch, self.main.dtype)
        return found

    @property
    def _working(self) -> torch.dtype:
        """Sums of half precision are taken in float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def values(self) -> Tensor:
        """f's output for every sample: (N, *out), NaN where it has not been computed."""
        return self._all(self.arrays["values"]).reshape(len(self), *self.out)

    @property
    def values_width(self) -> int:
        """C, the number of entries of one sample's output."""
        return self.arrays["values"].shape[1]

    @property
    def block(self) -> int:
        """Samples in a block."""
        return self.arrays["values"].block

    def rows_of_values(self, samples: slice) -> Tensor:
        """f's output for some samples: (n, C), NaN where it has not been computed."""
        a = self.arrays["values"]
        rows = [self._row(a, n) for n in range(len(self))[samples]]
        return torch.from_numpy(numpy.stack(rows) if rows else numpy.empty((0, *a.shape[1:]), a.dtype))

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Ranges of samples that have not been computed."""
        found: list[tuple[int, int]] = []
        per, last = self.arrays["values"], -1
        for block in (*sorted(self.entries), per.blocks):
            if block > last + 1:
                found.append((per.rows(last + 1)[0], per.rows(block - 1)[1]))
            last = block
        return found

    @property
    def complete(self) -> bool:
        return not self.missing

    def __getitem__(self, key: Any) -> Tensor:
        """`store[name]`: one parameter's rows, (N, *out, *shape); `store[n]`, `store[2:5]`, `store[index]`: rows of samples, copied."""
        self._demand_rows()
        if isinstance(key, str):
            return self._column(key)
        shape, numbers = self._chosen(key)
        self._demand_room(len(numbers) * self.main.row_bytes)
        rows = [self._row(self.main, n) for n in numbers]
        found = torch.from_numpy(numpy.stack(rows) if rows else numpy.empty((0, *self.main.shape[1:]), self.main.dtype))
        return found.reshape(*shape, *self.shape[1:])

    def _chosen(self, key: Any) -> tuple[Shape, Sequence[int]]:
        """(shape of an index, the samples that it chooses); without a number for each sample of the store, unless it is a mask."""
        n = len(self)
        try:
            if isinstance(key, slice):
                chosen = range(n)[key]
                return (len(chosen),), chosen
            index = torch.as_tensor(key, device="cpu")
            if index.dtype == torch.bool and tuple(index.shape) == (n,):
                index = index.nonzero().squeeze(1)
            index = index.to(torch.int64) if not index.numel() else index
            numbers = [int(i) for i in index.reshape(-1).tolist()]
            if index.is_floating_point() or index.dtype == torch.bool or not all(-n <= i < n for i in numbers):
                raise IndexError
            return tuple(index.shape), [i % n for i in numbers]
        except (IndexError, TypeError, ValueError, RuntimeError):
            raise InputError(
                "the index does not choose samples", got=repr(key), expected=f"a parameter's name, or samples within {n}"
            ) from None

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
        with numpy.errstate(all="ignore"):  # (NaN and infinity pass through)
            for block in range(self.main.blocks):  # in order, so that the sum does not depend on who computed what
                total += self._map(self.main, block)[0]
        return torch.from_numpy(total).reshape((*self.out, self.columns.width) if self.what == "sum" else -1)

    def norms(self) -> Tensor:
        """The norm of every row: (N, *out)."""
        self._demand_complete()
        if self.main.name == "norms":
            return self.dense()
        self._demand("jacobian")
        return torch.cat([torch.linalg.vector_norm(rows, dim=-1, dtype=self._working) for _, rows in self.blocks()])

    def gram(self) -> Tensor:
        """All rows with all rows: (N, *out, N, *out); of sketches, an unbiased estimate of it."""
        self._demand_complete()
        if self.main.name == "gram":
            return self.dense()
        self._demand("jacobian", "sketch")
        c = prod(self.out)
        self._demand_room((len(self) * c) ** 2 * self._working.itemsize)
        found = torch.empty(len(self), c, len(self), c, dtype=self._working, device="cpu")
        for left, mine in self.blocks():
            flat = mine.flatten(0, -2).to(self._working)
            for right, theirs in self.blocks():
                product = flat @ theirs.flatten(0, -2).to(self._working).T
                found[left, :, right] = product.reshape(len(mine), c, len(theirs), c)
        return found.reshape(self.shape[: 1 + len(self.out)] * 2)

    def __matmul__(self, v: Tensor | Mapping[str, Tensor]) -> Tensor:
        """J v: (P,), (P, k) or tensors by name -> (N, *out) or (N, *out, k)."""
        self._demand_complete()
        self._demand("jacobian")
        parts, columns = self.columns.vector(v)
        flat = self.columns.join(parts, 0).to("cpu", self._working)
        found = torch.cat([rows.to(self._working) @ flat for _, rows in self.blocks()])
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
        total: Tensor = torch.zeros(self.shape[-1], *u.shape[len(lead) :], dtype=self._working, device="cpu")
        for samples, rows in self.blocks():
            part = u[samples].reshape(len(rows) * self.values_width, *u.shape[len(lead) :]).to("cpu", self._working)
            total += rows.flatten(0, -2).to(self._working).T @ part
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
        self._demand_room(prod(self.main.shape[:2]) * prod(shape) * self.dtype.itemsize)
        found = numpy.full((*self.main.shape[:2], prod(shape)), numpy.nan, self.main.dtype)
        for block in self.entries:
            start, stop = self.main.rows(block)
            found[start:stop] = self._map(self.main, block)[:, :, offset : offset + prod(shape)]
        return torch.from_numpy(found).reshape(len(self), *self.out, *shape)

    def _all(self, a: Array) -> Tensor:
        self._demand_room(a.shape[0] * a.row_bytes)
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
            path, said = within(self.path, a.key(block)), self.entries[block].files[a.key(block)][0]
            found = path.stat().st_size if path.is_file() else None
            if found is None or not found == said == a.shard_bytes(stop - start):
                raise damaged(block, a.key(block), "no such file" if found is None else f"{found} bytes", f"{said} bytes", self.path)
            if 0 in a.shape:
                return numpy.empty((stop - start, *a.shape[1:]), a.dtype)
            if len(self._maps) >= MAPPED:
                del self._maps[next(iter(self._maps))]
            self._maps[key] = numpy.memmap(path, a.dtype, "c", shape=(stop - start, *a.shape[1:]))  # what is written stays in memory
        return self._maps[key]

    def _demand_room(self, needed: int) -> None:
        """Before memory for many rows is taken, which may be more than there is, or than the files ever held."""
        if needed > LARGE and needed > (room := share(torch.device("cpu"))):
            raise MemoryBudgetError(
                "the rows do not fit in memory",
                got=human_bytes(needed),
                expected=f"at most {human_bytes(room)}, half of what is free",
                hint="store.blocks(), store[start:stop], or a quantity that needs no rows",
            )


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
