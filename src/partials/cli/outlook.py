"""`--dry-run`: what a run would take, from a part of one block that is computed and thrown away."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from partials._errors import StoreError
from partials._machine import measured, resident
from partials._plan import human_bytes, human_time
from partials.distribute.job import RECOMPUTED
from partials.distribute.ranks import Place
from partials.store.produce import BUFFERS

if TYPE_CHECKING:
    from partials.distribute.job import Job

FEW, LONG = 8, 10.0
"""Samples that are tried at the least; seconds for which more are, told from one sample."""
DISK, PROBE, MUCH = 1e9, 2**24, 2**26
"""Bytes a second that a disk is taken to write where it cannot be tried; bytes that are tried; bytes of results for which it is."""


def outlook(job: Job, as_json: bool) -> str:
    """Method, blocks, bytes, memory and time of the whole run by one worker."""
    most = min(job.together, job.block, job.data.length)
    row, alone, _ = _tried(job, 1)
    part = min(most, max(FEW, int(LONG / max(alone, 1e-6))))
    _, first, checking = _tried(job, part)  # (the first call of many samples finds where they lie, and checks)
    (_, info), seconds, growth = _tried(job, part)
    growth = max(growth, checking)
    size = job.bytes()
    disk = _disk(job.path) if size > MUCH else DISK
    opening, commit = _committed(job, row)
    again = 0.0 if job.arrays[0].name == "parts" else RECOMPUTED * alone
    total = opening + max(max(first - seconds, 0.0) + _seconds(job, seconds, part), size / disk, job.blocks * commit) + commit + again
    written = sum(a.row_bytes * (1 if a.name == "parts" else job.block) for a in job.arrays)
    kept = BUFFERS * written if job.work.kind == "jacobian" else 2 * written
    memory = resident() + growth * most // part + kept
    found: dict[str, Any] = {"method": info["method"], "samples": job.data.length, "blocks": job.blocks, "samples in a block": job.block}
    found |= {"bytes": size, "peak memory": memory, "seconds": total}
    if as_json:
        return json.dumps(found, indent=2)
    found |= {"bytes": human_bytes(float(size)), "peak memory": f"about {human_bytes(float(memory))} of this process"}
    if (device := job.device).type == "cuda":
        on_device = torch.cuda.max_memory_allocated(device) * most // part
        found["device memory"] = f"about {human_bytes(float(on_device))} of {torch.cuda.get_device_name(device)}"
    found["seconds"] = f"about {human_time(total)} by one worker, from {part} samples, if the disk writes {human_bytes(disk)}/s"
    return "\n".join(f"{name:<20}{value}" for name, value in found.items())


def _disk(path: Path) -> float:
    """Bytes that are written and synced in a second beside `path`: into a file without a name, of which nothing is left."""
    try:
        with tempfile.TemporaryFile(dir=_folder(path), buffering=0) as file:
            start = time.perf_counter()
            file.write(os.urandom(PROBE))
            os.fsync(file.fileno())
            return PROBE / (time.perf_counter() - start)
    except OSError:
        return DISK


def _committed(job: Job, row: tuple[dict[str, Any], dict[str, Any]]) -> tuple[float, float]:
    """Seconds that the store takes to be made, and a block to be committed: tried beside it with one row, in a folder that is removed."""
    try:
        with tempfile.TemporaryDirectory(dir=_folder(job.path), prefix="partials-") as place:
            start = time.perf_counter()
            writer = replace(job, path=Path(place) / "store").writer(Place(), False)
            made = time.perf_counter()
            values, info = row
            whole = {a.name: (*values[a.name].shape[:1], *a.shape[1:]) for a in job.arrays}
            writer.write(0, (0, 1), {name: numpy.resize(values[name], shape) for name, shape in whole.items()}, info)
            writer.close()
            return made - start, time.perf_counter() - made
    except (OSError, StoreError):
        return 0.0, 0.0


def _folder(path: Path) -> Path:
    return next(place for place in path.absolute().parents if place.is_dir())


def _tried(job: Job, samples: int) -> tuple[tuple[dict[str, Any], dict[str, Any]], float, int]:
    """(what a block is committed from, seconds, growth of memory) of the first samples as one part; for "gram", with themselves alone."""
    inputs = job.data.take(0, samples)
    work = job.work if job.work.others is None else replace(job.work, others=lambda: [(0, samples, inputs)])
    found, seconds, growth = measured(lambda: work.compute([inputs]), torch.device("cpu"))
    return found, seconds, growth or 0


def _seconds(job: Job, seconds: float, samples: int) -> float:
    """Of all samples; for "gram", of all blocks with all blocks, whose rows are computed for each pair."""
    if job.work.others is None:
        return seconds * job.data.length / samples
    start = time.perf_counter()
    job.work.jacobian(job.data.take(0, samples))
    rows = min(time.perf_counter() - start, seconds / 2)
    pairs = (job.data.length / samples) ** 2 * samples / job.block
    return rows * job.data.length / samples + (seconds - rows) * pairs
