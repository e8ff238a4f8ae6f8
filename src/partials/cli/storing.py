"""`run`, `info` and `verify`: results into a store, and what is in one."""

from __future__ import annotations

import json as json_module
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from partials._errors import InputError, near

from .console import progress, say
from .faults import CHECK_FAILED, INTERRUPTED, guarded
from .options import Asked

if TYPE_CHECKING:
    from partials.distribute.job import Job
    from partials.store.produce import Progress
    from partials.store.verify import Verified

ENGINES = ("local", "ray")
EVERY = 5.0
"""Seconds between two lines of progress where there is no terminal."""


def run(
    asked: Asked,
    out: Annotated[Path, typer.Option("--out", "-o", help="The store: a new folder, or with --resume one of the same run.")],
    what: Annotated[str, typer.Option("--what", help="jacobian, norms, sum, gram, diagonal, sketch:K or sketch:K:KIND.")] = "jacobian",
    engine: Annotated[str, typer.Option("--engine", help="local (also under torchrun, SLURM, Kubernetes), or ray.")] = "local",
    address: Annotated[str | None, typer.Option("--address", help="An existing Ray cluster; without it one is started here.")] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="A .safetensors file to load into the model.")] = None,
    block: Annotated[int | None, typer.Option("--block", min=1, help="Samples in a block; by default what makes 64 MiB.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a store of the same run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done: method, blocks, bytes, memory, time.")] = False,
) -> None:
    """Compute a quantity for every sample of DATA and write it to a store that survives interruption."""
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r} is unknown", got=engine, expected=f"one of: {', '.join(ENGINES)}", hint=near(engine, ENGINES))
    from partials._what import STORED, parsed
    from partials.distribute import job as jobs
    from partials.distribute.ranks import place
    from partials.store.produce import Stopped

    parsed(what, STORED)
    here = place()
    make = partial(job_of, out=str(out.resolve()), what=what, weights=_whole(weights), block=block, local=here.local)
    made = make(asked)
    if dry_run:
        from .outlook import outlook

        print(outlook(made, asked.json))
        return
    start, stop = time.perf_counter(), Stop()
    with stop, _told() as tell:
        try:
            if engine == "ray":
                from partials.distribute import ray

                gpus = int((asked.device or "").startswith("cuda"))
                again = partial(make, elsewhere(asked))
                done = ray.run(made, again, resume=resume, address=address, gpus=gpus, tell=tell, stopping=stop.asked)
            else:
                done = jobs.local(made, here, resume=resume or here.world > 1, tell=tell, stopping=stop.asked)
        except (Stopped, KeyboardInterrupt):
            say(f"interrupted: finished blocks are kept; go on with\n  {_resuming()}")
            raise typer.Exit(INTERRUPTED) from None
    checked = jobs.recompute(made, jobs.RECOMPUTED) if here.rank == 0 else []
    wrong = [(n, error) for n, error, tolerance in checked if not error <= tolerance]
    _summary(made, done, time.perf_counter() - start, len(checked), not wrong, asked.json)
    if wrong:
        say(f"sample {wrong[0][0]} comes out otherwise when it is computed again alone: off by {wrong[0][1]:.1e} of its norm")
        raise typer.Exit(CHECK_FAILED)


def info(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A folder that `partials run` wrote.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Say what is in a store: quantity, shape, parameters, what is missing. Nothing in it is run."""
    with guarded():
        from partials.store import Store

        found = Store(store)
        table = {name: list(shape) for name, shape in found.columns.shapes.items()}
        if json:
            fields: dict[str, Any] = {
                "what": found.what,
                "shape": list(found.main.shape),
                "out": list(found.out),
                "dtype": found.main.dtype,
            }
            fields |= {"parameters": table, "missing": found.missing, "fingerprint": found.fingerprint, "config": found.config}
            print(json_module.dumps(fields, indent=2))
            return
        print(repr(found))
        for name, shape in table.items():
            print(f"  {name if name.isprintable() else ascii(name):<40} {tuple(shape)}")
        for remark in found.remarks:
            print(f"  note: {remark}")
        for start, stop in found.missing[:8]:
            print(f"  missing: samples {start} to {stop}")


def verify(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A folder that `partials run` wrote.")],
    forget: Annotated[bool, typer.Option("--forget", help="Let a resumed run compute damaged blocks again.")] = False,
    recompute: Annotated[int, typer.Option("--recompute", min=0, help="Compute so many random rows again; needs --model and --data.")] = 0,
    model: Annotated[
        str | None, typer.Option("--model", help="For --recompute: as MODEL of `run`. A store's own words are never run.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option("--data", "-d", help="For --recompute.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="For --recompute.")] = None,
    loss: Annotated[str | None, typer.Option("--loss", help="For --recompute.")] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="For --recompute.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Compare every file of a store with its journal; exit code 1 where something is wrong."""
    with guarded():
        from partials.store.verify import verify as verified

        with progress() as tell:
            found = verified(store, tell if sys.stderr.isatty() else lambda _: None)
        if recompute and found.passed:
            if model is None or not data:
                raise InputError("--recompute needs the model and the data", got="neither from the store", expected="--model and --data")
            asked = Asked(model, data, target=target, loss=loss)
            _recomputed(found, job_of(asked, str(store), found.store.what, _whole(weights), found.store.block, None), recompute)
        print(json_module.dumps(found.to_dict(), indent=2) if json else found)
        if forget and found.findings:
            from partials.store.verify import forget as forgotten

            say(f"{forgotten(found)} blocks are no longer counted; `partials run ... --resume` computes them again")
        if not found.passed:
            raise typer.Exit(CHECK_FAILED)


def job_of(asked: Asked, out: str, what: str, weights: str | None, block: int | None, local: int | None = None) -> Job:
    """The job that the options describe: the same in every worker."""
    import torch

    import partials as pt
    from partials._plan import parse_bytes
    from partials.distribute.job import job
    from partials.store.fingerprint import of_inputs
    from partials.store.produce import BUFFERS

    from . import prepare
    from .sources import data_of, dims_of

    if asked.single:
        raise InputError("a run is over many samples", got="--single", expected="data with samples first")
    if local is not None and asked.device is None and torch.cuda.is_available():
        torch.cuda.set_device(local)
    f, params, loss, change = prepare.function_of(asked)
    if weights is not None:
        _load(f, Path(weights))
    specs = [*asked.data, asked.target] if asked.target is not None else asked.data
    options: dict[str, Any] = {"params": params, "wrt": asked.wrt or None, "output": prepare.output_of(asked)}
    options |= {"max_memory": asked.max_memory, "randomness": asked.randomness}
    if asked.in_dims is not None:
        options["in_dims"] = prepare.in_dims(asked.in_dims)

    def rows(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        if loss is None:
            return pt.jacobian(f, *inputs[0], kwargs=inputs[1], **options)
        return pt.gradient(f, *inputs[0], loss=loss, kwargs=prepare.with_labels(asked, inputs[1]), **options)

    def drawing(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """What is drawn depends on the inputs alone, not on who computes them, or when."""
        with torch.random.fork_rng():
            torch.manual_seed(int(of_inputs([*inputs[0], *inputs[1].values()]), 16) % 2**63)
            return rows(inputs)

    drawn = asked.randomness != "error"

    state = {name: t for name, t in f.state_dict().items() if isinstance(t, torch.Tensor)} if isinstance(f, torch.nn.Module) else {}
    named = {name: value for name, value in options.items() if name != "max_memory"} | {"loss": asked.loss}
    named |= {"params": asked.params, "training": getattr(f, "training", None), "dtype": asked.dtype}
    budget = parse_bytes(asked.max_memory)
    most = None if budget is None else budget // (2 * BUFFERS)
    config = {**asdict(asked), "what": what, "weights": weights, "block": block}
    data = data_of(specs, change, dims_of(f, options, loss, partial(prepare.with_labels, asked))).limited(asked.limit)
    return job(out, what, drawing if drawn else rows, data, state, named, config, block=block, most=most, drawn=drawn)


@dataclass
class Stop:
    """SIGINT and SIGTERM (and SIGUSR1, which SLURM sends before it kills) end a run between two blocks; a second SIGINT ends it at once."""

    signals: list[int] = field(default_factory=list)
    before: dict[int, Any] = field(default_factory=dict)

    def asked(self) -> bool:
        return bool(self.signals)

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])):
            self.before[number] = signal.signal(number, self._heard)

    def __exit__(self, *raised: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signals:
            raise KeyboardInterrupt
        self.signals.append(number)
        words = f"partials: {signal.Signals(number).name}: stopping; what is computed whole is kept\n"
        os.write(2, words.encode())  # (a handler may run in the middle of another line's printing)


@contextmanager
def _told() -> Iterator[Callable[[Progress], None]]:
    """On a terminal a line that is written over; else one every few seconds, however long a block takes."""
    known: list[Progress] = []
    ended = threading.Event()
    with progress() as tell:

        def every() -> None:
            while not ended.wait(EVERY):
                tell(str(known[-1]) if known else "at the first block")

        watch = threading.Thread(target=every, name="partials-progress", daemon=True)
        if not sys.stderr.isatty():
            watch.start()

        def told(state: Progress) -> None:
            known[:] = [state]
            if sys.stderr.isatty():
                tell(str(state))

        try:
            yield told
        finally:
            ended.set()


def elsewhere(asked: Asked) -> Asked:
    """The same with whole paths, for a worker in another folder."""
    specs = {name: getattr(asked, name) for name in ("model", "target", "loss", "params")}
    whole: dict[str, Any] = {name: spec if spec is None else _whole_spec(spec) for name, spec in specs.items()}
    return replace(asked, data=[_whole_spec(spec) for spec in asked.data], **whole)


def _whole_spec(spec: str) -> str:
    """`FILE:NAME` or `FILE` with the whole path of the file, where there is one."""
    place, colon, name = spec.rpartition(":")
    if colon and Path(place).is_file():
        return f"{Path(place).resolve()}:{name}"
    return str(Path(spec).resolve()) if Path(spec).is_file() else spec


def _whole(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _load(f: Any, weights: Path) -> None:
    if weights.suffix != ".safetensors":
        raise InputError(
            f"{weights} may hold code, which a file of weights must not",
            got=weights.suffix,
            expected=".safetensors",
            hint="safetensors.torch.save_file(model.state_dict(), ...)",
        )
    from .loading import _safetensors
    from .prepare import _demand_module

    module = _demand_module(f, "--weights")
    found = module.load_state_dict(_safetensors(weights), strict=False)
    if found.missing_keys or found.unexpected_keys:
        raise InputError(
            f"{weights} does not fit the model",
            got=f"missing {found.missing_keys[:3]}, unexpected {found.unexpected_keys[:3]}",
            expected="the model's state_dict",
        )


def _summary(made: Job, done: Progress, seconds: float, checked: int, equal: bool, json: bool) -> None:
    from partials._plan import human_bytes

    fields = {"store": str(made.path), "samples": done.rows, "blocks": done.done, "bytes": done.bytes, "seconds": round(seconds, 3)}
    fields |= {"nonfinite": done.nonfinite, "recomputed": checked, "equal": equal}
    if json:
        print(json_module.dumps(fields, indent=2))
        return
    strange = f", {done.nonfinite} rows with NaN or infinity" if done.nonfinite else ""
    print(
        f"{made.path}: {done.rows} samples in {done.done} blocks, {human_bytes(float(done.bytes))} in {seconds:.1f} s{strange}; "
        f"{checked} rows computed again" + ("" if not checked else ", equal" if equal else ", not all equal")
    )


def _recomputed(found: Verified, made: Job, rows: int) -> None:
    from partials.distribute.job import recompute
    from partials.store.verify import Finding

    for n, error, tolerance in recompute(made, rows, seed=int.from_bytes(os.urandom(4))):
        found.recomputed += 1
        if not error <= tolerance:
            block = n // made.block
            found.findings.append(Finding(block, f"sample {n} comes out otherwise when computed again: off by {error:.1e} of its norm"))


def _resuming() -> str:
    words = [*sys.argv[1:], *([] if "--resume" in sys.argv else ["--resume"])]
    return f"partials {shlex.join(words)}"
