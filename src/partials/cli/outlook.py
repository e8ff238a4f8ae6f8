"""`--dry-run`: what a run would take, from a part of one block that is computed and thrown away."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from partials._machine import measured, resident
from partials._plan import human_bytes, human_time
from partials.store.produce import BUFFERS

if TYPE_CHECKING:
    from partials.distribute.job import Job

FIRST, LONG = 8, 2.0
"""Samples that are timed first; seconds that the dry run may take for more of them."""
DISK = 1e9
"""Bytes that a disk is taken to write in a second, each block synced."""


def outlook(job: Job, as_json: bool) -> str:
    """Method, blocks, bytes, memory and time of the whole run by one worker."""
    most = min(job.together, job.block, job.data.length)
    part = min(FIRST, most)
    _, seconds, growth = _tried(job, part)  # (the first call compiles, probes and checks)
    more = min(most, max(part, int(part * LONG / max(seconds, 1e-3))))
    method, seconds, growth = _tried(job, more)
    size = job.bytes()
    total = max(_seconds(job, seconds, more), size / DISK)
    written = sum(a.row_bytes * (1 if a.name == "parts" else job.block) for a in job.arrays)
    kept = BUFFERS * written if job.work.kind == "jacobian" else 2 * written
    memory = resident() + growth * most // more + kept
    found: dict[str, Any] = {"method": method, "samples": job.data.length, "blocks": job.blocks, "samples in a block": job.block}
    found |= {"bytes": size, "peak memory": memory, "seconds": total}
    if as_json:
        return json.dumps(found, indent=2)
    found |= {"bytes": human_bytes(float(size)), "peak memory": f"about {human_bytes(float(memory))} of this process"}
    if (device := job.device).type == "cuda":
        on_device = torch.cuda.max_memory_allocated(device) * most // more
        found["device memory"] = f"about {human_bytes(float(on_device))} of {torch.cuda.get_device_name(device)}"
    found["seconds"] = f"about {human_time(total)} by one worker, from {more} samples, if the disk writes {human_bytes(DISK)}/s"
    return "\n".join(f"{name:<20}{value}" for name, value in found.items())


def _tried(job: Job, samples: int) -> tuple[str, float, int]:
    """(method, seconds, growth of memory) of the first samples as one part; for "gram", with themselves as the only others."""
    inputs = job.data.take(0, samples)
    work = job.work if job.work.others is None else replace(job.work, others=lambda: [(0, samples, inputs)])
    (_, info), seconds, growth = measured(lambda: work.compute([inputs]), torch.device("cpu"))
    return info["method"], seconds, growth or 0


def _seconds(job: Job, seconds: float, samples: int) -> float:
    """Of all samples; for "gram", of all blocks with all blocks, whose rows are computed for each pair."""
    if job.work.others is None:
        return seconds * job.data.length / samples
    start = time.perf_counter()
    job.work.jacobian(job.data.take(0, samples))
    rows = min(time.perf_counter() - start, seconds / 2)
    pairs = (job.data.length / samples) ** 2 * samples / job.block
    return rows * job.data.length / samples + (seconds - rows) * pairs
