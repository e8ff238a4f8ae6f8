"""Ray: blocks as tasks of a cluster. A lost worker's block is done again by another; the driver alone writes the journal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .._errors import InputError
from ..store.produce import Progress, Stopped, finish
from ..store.writer import write_shard
from .job import Job
from .ranks import Place

RETRIES = 5
"""Times that a block is tried again after its worker has died."""

_JOBS: dict[str, Job] = {}
"""In a worker: the job, made once."""


def run(
    job: Job,
    make: Callable[[], Job],
    *,
    resume: bool,
    address: str | None = None,
    tell: Callable[[Progress], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Progress:
    """Do the blocks that are not there yet; `make` builds the job anew in a worker (it is pickled, the job is not)."""
    try:
        import ray
    except ImportError:
        raise InputError("the engine 'ray' needs Ray", got="no module named 'ray'", hint="pip install 'partials[ray]'") from None
    writer, started = job.writer(Place(), resume), not ray.is_initialized()
    if started:
        ray.init(
            address=address, log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": ":".join(sys.path)}}
        )
    try:
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_block)
        numbers = [n for n in range(job.blocks) if n not in writer.done]
        progress = Progress(len(numbers))
        waiting = {task.remote(make, str(job.path), number): number for number in numbers}
        while waiting and not stopping():
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1)
            for reference in ready:
                number = waiting.pop(reference)
                files, info, size = ray.get(reference)
                writer.commit(number, job.rows(number), files, info)
                start, stop = job.rows(number)
                progress.done, progress.rows, progress.bytes = progress.done + 1, progress.rows + stop - start, progress.bytes + size
                progress.nonfinite += info["nonfinite"]
                tell(progress)
        if waiting:
            for reference in waiting:
                ray.cancel(reference)
            raise Stopped
        finish(writer)
    finally:
        writer.close()
        if started:
            ray.shutdown()
    return progress


def _block(make: Callable[[], Job], path: str, number: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    """One block in a worker: its shards on disk, and what its line will say."""
    if path not in _JOBS:
        _JOBS[path] = make()
    job = _JOBS[path]
    values, info = job.work.compute(job.inputs(number))
    arrays = {a.name: a for a in job.arrays}
    files = {arrays[name].key(number): write_shard(job.path, arrays[name], number, part) for name, part in values.items()}
    return files, info, sum(part.nbytes for part in values.values())
