"""Ray: blocks as tasks of a cluster. A lost worker's block is done again by another; the driver alone writes the journal."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from itertools import islice
from typing import Any

from .._errors import InputError, MethodError, PartialsError
from ..store.fingerprint import demand_same
from ..store.produce import Progress, Stopped, finish
from ..store.writer import Writer, write_shard
from .job import Job, demand_same_function
from .ranks import Place

RETRIES = 5
"""Times that a block is tried again after its worker has died."""
ANSWER = 10
"""Seconds that a cluster may take to answer at all."""

_JOBS: dict[tuple[str, ...], Job] = {}
"""In a worker: the job, made once."""


def run(
    job: Job,
    make: Callable[[], Job],
    *,
    resume: bool,
    address: str | None = None,
    gpus: int = 0,
    tell: Callable[[Progress], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Progress:
    """Do the blocks that are not there yet; `make` builds the job anew in a worker (it is pickled, the job is not)."""
    try:
        import ray
    except ImportError:
        raise InputError("the engine 'ray' needs Ray", got="no module named 'ray'", hint="pip install 'partials[ray]'") from None
    writer, started = job.writer(Place(), resume), not ray.is_initialized()
    try:
        demand_same_function(job, writer)
        numbers = [n for n in range(job.blocks) if n not in writer.done]
        progress = job.progress(numbers)
        if numbers:
            if started:
                _connect(ray, address)
            _submit(ray, writer, job, make, numbers, progress, gpus, tell, stopping)
        finish(writer)
    finally:
        writer.close()
        if started and ray.is_initialized():
            ray.shutdown()
    return progress


def _connect(ray: Any, address: str | None) -> None:
    environment = {"env_vars": {"PYTHONPATH": ":".join(sys.path)}}
    try:
        _demand_answer(address)
        ray.init(address=address, log_to_driver=False, include_dashboard=False, runtime_env=environment)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            "there is no Ray cluster to be had" + (f" at {address}" if address else ""),
            got=str(error).partition("\n")[0],
            expected="a cluster that runs, or no address: then one is started here",
        ) from None


def _demand_answer(address: str | None) -> None:
    """OSError where nothing answers at HOST:PORT: Ray itself would go on asking for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()


def _submit(
    ray: Any,
    writer: Writer,
    job: Job,
    make: Callable[[], Job],
    numbers: list[int],
    progress: Progress,
    gpus: int,
    tell: Callable[[Progress], None],
    stopping: Callable[[], bool],
) -> None:
    """Hand out the blocks, some more than there are workers at a time, and write a line for each that comes back."""
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_block)
    most = 16 + 2 * int(ray.cluster_resources().get("CPU", 1))
    same = {name: job.identity[name] for name in ("parameters", "data", "samples", "torch")}
    left, waiting = iter(numbers), dict[Any, int]()
    while not stopping():
        for number in islice(left, most - len(waiting)):
            waiting[task.remote(make, str(job.path), number, same)] = number
        if not waiting:
            return
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1)
        for reference in ready:
            number = waiting.pop(reference)
            files, info, size = _result(ray, reference, number)
            writer.commit(number, job.rows(number), files, info)
            progress.committed(job.rows(number), size, info["nonfinite"])
            tell(progress)
    for reference in waiting:
        ray.cancel(reference)
    raise Stopped


def _result(ray: Any, reference: Any, number: int) -> Any:
    """What a block's task returned; its own error where it failed, and a sentence where its workers died."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PartialsError):
            raise error.cause from None
        raise MethodError(
            f"block {number} failed in a worker, in code that is not this library's or could not be told apart from it",
            got=f"{type(error.cause).__name__}: {error.cause}",
            hint="--engine local, which shows where; finished blocks are kept",
        ) from None
    except ray.exceptions.RayError as error:
        raise MethodError(
            f"block {number} could not be computed: its worker died {RETRIES + 1} times",
            got=str(error).partition("\n")[0],
            expected="a worker with enough memory",
            hint="--max-memory, or a smaller --block; finished blocks are kept, and --resume goes on",
        ) from None


def _block(make: Callable[[], Job], path: str, number: int, same: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """One block in a worker: its shards on disk, and what its line will say. `same` is what the worker's own job must be made of."""
    key = (path, *map(str, same.values()))
    if key not in _JOBS:
        found = make()
        demand_same({name: found.identity[name] for name in same}, same, "this worker's job")
        _JOBS[key] = found
    job = _JOBS[key]
    values, info = job.work.compute(job.inputs(number))
    arrays = {a.name: a for a in job.arrays}
    files = {arrays[name].key(number): write_shard(job.path, arrays[name], number, part) for name, part in values.items()}
    return files, info, sum(part.nbytes for part in values.values())
