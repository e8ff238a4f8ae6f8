"""Two workers beside one, each with one thread: `python -m benchmarks.workers [SAMPLES]`. Wall clock, start-up of Python included."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

MODEL = """
import torch
torch.manual_seed(0)
net = torch.nn.Sequential(
    torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)
)
"""
SAMPLES, REPEATS, BLOCK = 1_000_000, 2, 5000
WHAT = ["--what", "norms", "--loss", "cross_entropy", "--block", str(BLOCK)]


def main(samples: int = SAMPLES) -> None:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        (folder / "model.py").write_text(MODEL)
        generator = numpy.random.default_rng(0)
        numpy.save(folder / "x.npy", generator.standard_normal((samples, 784), numpy.float32))
        numpy.save(folder / "y.npy", generator.integers(0, 10, samples))
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(REPEATS):
            for world, seen in times.items():
                seen.append(seconds(folder, world))
    finally:
        shutil.rmtree(folder)
    for world, seen in times.items():
        print(f"{world} worker{'s' * (world > 1)}: {statistics.median(seen):6.1f} s, {samples / statistics.median(seen):8.0f} samples/s")
    ratio = statistics.median(one / two for one, two in zip(times[1], times[2], strict=True))
    print(f"two workers are {ratio:.2f} times one (paired median of {REPEATS}; norms of an MLP 784-512-512-10, {os.cpu_count()} cores)")


def seconds(folder: Path, world: int) -> float:
    """Of a whole run by so many ranks, from nothing to a complete store."""
    shutil.rmtree(folder / "store", ignore_errors=True)
    words = ["run", "model.py:net", "--data", "x.npy", "--target", "y.npy", *WHAT, "--out", "store", "--resume"]
    start = time.perf_counter()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "partials", *words],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    ends = [worker.communicate()[1] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit("\n".join(ends))
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
