"""Writing and reading a store beside raw files of the same bytes, equally synced, in one run: `python -m benchmarks.store [FOLDER]`."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy

from partials.store import durable
from partials.store.format import array
from partials.store.reader import Store
from partials.store.writer import Writer

BLOCKS, ROWS, WIDTH, REPEATS = 8, 256, 65536, 7


def main(folder: Path) -> None:
    rows = numpy.random.default_rng(0).standard_normal((ROWS, 1, WIDTH), numpy.float32)
    values = numpy.zeros((ROWS, 1), numpy.float32)
    times: dict[str, list[float]] = {"raw write": [], "store write": [], "memory map read": [], "store read": []}
    for _ in range(REPEATS):
        shutil.rmtree(folder, ignore_errors=True)
        times["raw write"].append(timed(lambda: raw(folder / "raw", rows)))
        times["store write"].append(timed(lambda: stored(folder / "store", rows, values)))
        maps = [numpy.memmap(folder / "raw" / str(block), "float32", "r") for block in range(BLOCKS)]
        times["memory map read"].append(timed(lambda maps=maps: [float(one.max()) for one in maps], 2))
        store = Store(folder / "store")
        times["store read"].append(timed(lambda store=store: [float(part.numpy().max()) for _, part in store.blocks()], 2))
    shutil.rmtree(folder, ignore_errors=True)
    for name, seconds in times.items():
        print(f"{name:<18}{statistics.median(seconds):8.3f} s   {BLOCKS * rows.nbytes / statistics.median(seconds) / 1e9:6.2f} GB/s")
    for mine, theirs in (("store write", "raw write"), ("store read", "memory map read")):
        ratio = statistics.median(b / a for a, b in zip(times[mine], times[theirs], strict=True))
        print(f"{mine} / {theirs}, paired median of speeds: {ratio:.2f}")


def raw(folder: Path, rows: numpy.ndarray) -> None:
    """The same bytes into files, each synced, as is the folder."""
    folder.mkdir(parents=True)
    for block in range(BLOCKS):
        with (folder / str(block)).open("wb", buffering=0) as file:
            file.write(rows.data)
            os.fsync(file.fileno())
        durable.sync_folder(folder)


def stored(folder: Path, rows: numpy.ndarray, values: numpy.ndarray) -> None:
    attributes = {"what": "jacobian", "out": [1], "columns": {"weight": {"offset": 0, "shape": [WIDTH]}}}
    arrays = [
        array("jacobian", (BLOCKS * ROWS, 1, WIDTH), "float32", ROWS, attributes),
        array("values", (BLOCKS * ROWS, 1), "float32", ROWS),
    ]
    writer = Writer(folder, arrays, {}, {})
    for block in range(BLOCKS):
        writer.write(block, (block * ROWS, (block + 1) * ROWS), {"jacobian": rows, "values": values}, {})
    writer.close()


def timed(function, times: int = 1) -> float:  # type: ignore[no-untyped-def]
    """Seconds of the last of some calls: a hot one, where there is more than one."""
    for _ in range(times):
        start = time.perf_counter()
        function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/dev/shm/partials-benchmark"))
