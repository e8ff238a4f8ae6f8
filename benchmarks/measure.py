"""One case: every result compared before it is timed, then times in turns, then memory, each candidate in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.func import grad, vmap

import partials as pt
from benchmarks.cases import CASES, Made, line
from benchmarks.overhead import loop, overheads
from benchmarks.peers import PEERS, product_vector
from benchmarks.timing import Times, taken
from partials._machine import measured
from partials._typing import Tensor

LINE = "the notebook's line, N=1000"
OVERHEAD = "deep networks of tiny layers"
GPT2, SKETCH = "tiny GPT-2, T=128, N=16", "two-sided sketch, k=4096"
ONE_STEP = "training step"


def made_of(name: str) -> Made:
    torch.manual_seed(0)
    return CASES[name].make()


def measure(name: str, *, quick: bool) -> dict[str, Any]:
    """{"times": {group: {candidate: seconds}}, "refused": {peer: why}, "memory": {candidate: bytes}} of a case."""
    if name == LINE:
        return {"times": _line(quick), "refused": {}, "memory": {}}
    if name == OVERHEAD:
        found = overheads(11 if quick else 31)
        return {"times": {"slopes": {what: [value] for what, value in found.items()}}, "refused": {}, "memory": {}}
    made, task, turns, seconds = made_of(name), CASES[name], 7 if quick else 31, 2.0 if quick else 4.0
    J = made.factors()
    _agree("one backward", J.T @ torch.ones_like(J.values), torch.cat([g.flatten() for g in made.step()]))
    times = {"quantities": taken(_quantities(name, made, J), turns, seconds), "given factors": taken(_given(made, J), turns, 2.0)}
    first = [_first_check(made, number) for number in range(4)][1:]  # (the very first sets up kernels)
    later = {"later call": lambda: made.factors("first"), ONE_STEP: made.step}
    times["first check"] = {"first call": first, **taken(later, 5, 2.0)}
    refused: dict[str, str] = {}
    for quantity, ours in _ours(made, J, task.dense, task.gram).items():
        candidates = {"partials": ours[0], ONE_STEP: made.step}
        for peer, maker in PEERS[quantity].items():
            try:
                run, result = maker(made)
                _agree(peer, result(run()), ours[1]())
                candidates[peer] = run
            except Exception as error:  # whatever keeps a peer from this case is what the table says of it
                refused[f"{quantity}: {peer}"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]
        if len(candidates) > 2 or quantity == "rows":
            times[quantity] = taken(candidates, turns, seconds)
    if task.dense:
        out = torch.empty(J.shape)
        candidates = {"factors": made.factors, "fill": lambda: out.zero_(), "dense(out=)": lambda: made.factors().dense(out=out)}
        times["into out="] = taken(candidates, turns, seconds)
    return {"times": times, "refused": refused, "memory": {}}


def _quantities(name: str, made: Made, J: Any) -> dict[str, Callable[[], Any]]:
    single = J.values.ndim == 1
    return {
        ONE_STEP: made.step,
        "factors": made.factors,
        "norms": lambda: made.factors().norms(),
        **({"clipped sum": lambda: made.factors().clipped_sum(1.0)} if single else {}),
        **({"Gram": lambda: made.factors().gram()} if CASES[name].gram else {}),
        **({SKETCH: lambda: made.factors().sketch(4096, kind="kronecker")} if name == GPT2 else {}),
    }


def _given(made: Made, J: Any) -> dict[str, Callable[[], Any]]:
    v, u = torch.randn(J.shape[-1]), torch.randn(J.shape[:-1])
    return {ONE_STEP: made.step, "J v": lambda: J @ v, "J^T u": lambda: J.T @ u}


def _ours(made: Made, J: Any, dense: bool, gram: bool) -> dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]]:
    """Quantity -> (what is timed, the result that peers must agree with)."""
    v, single = product_vector(J.shape[-1]), J.values.ndim == 1
    ours: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {}
    if dense:
        ours["rows"] = (lambda: made.factors().dense(), lambda: J.dense())
    if single:
        ours["norms"] = (lambda: made.factors().norms(), lambda: J.norms())
    if gram and single:
        ours["Gram"] = (lambda: made.factors().gram(), lambda: J.gram())
    if made.target is None:
        ours["J v"] = (lambda: made.factors() @ v, lambda: J @ v)
    return ours


def _agree(who: str, found: Tensor, ours: Tensor) -> None:
    if found.shape != ours.shape or not (found.detach() - ours).norm() <= 1e-4 * ours.norm():
        raise AssertionError(f"{who} gives another answer: shape {tuple(found.shape)}, off by {_off(found, ours):.1e} of the norm")


def _off(found: Tensor, ours: Tensor) -> float:
    return float((found.detach() - ours).norm() / ours.norm()) if found.shape == ours.shape else float("nan")


def _first_check(made: Made, number: int) -> float:
    """Seconds of a first call with check="first", of a function that is new: other code."""
    code = compile(f"def f(*inputs):\n    number = {number}\n    return made.f(*inputs)", "<benchmark>", "exec")
    space: dict[str, Any] = {"made": made}
    exec(code, space)
    made.factors()
    start = time.perf_counter()
    pt.jacobian(space["f"], *made.inputs, params=made.model, check="first")
    return time.perf_counter() - start


def _line(quick: bool) -> dict[str, Times]:
    x, a, b = torch.randn(1000, 1), torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True)

    def ours() -> Any:
        return pt.jacobian(line, x, a, b, check="never")

    def vectorised() -> Any:
        return vmap(grad(lambda a, b, x: line(x, a, b)[0], (0, 1)), (None, None, 0))(a, b, x)

    def reverse() -> Any:
        return torch.autograd.functional.jacobian(lambda a, b: line(x, a, b), (a, b))

    _agree("vmap(grad)", vectorised()[0].flatten(), ours()["a"].flatten())
    _agree("the loop", loop(x, a, b)[:, 0], ours()["a"].flatten())
    _agree("functional.jacobian", reverse()[0].flatten(), ours()["a"].flatten())
    fast = {"partials": ours, "vmap(grad)": vectorised, ONE_STEP: lambda: torch.autograd.grad(line(x, a, b).sum(), (a, b))}
    slow = {"partials": ours, "the loop": lambda: loop(x, a, b), "functional.jacobian": reverse}
    return {"line": taken(fast, 200 if quick else 1000), "line, slow": taken(slow, 3 if quick else 9)}


# --- in a process of its own -------------------------------------------------------------------------------------

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
"""glibc keeps what it was given: the second call writes into memory that is there already."""


def memory(name: str, rows: Times) -> dict[str, Any]:
    """Peak growth of each candidate, and each peer's time once more with an allocator that keeps its memory."""
    found: dict[str, Any] = {}
    for candidate in ["factors", *(peer for peer in rows if peer != ONE_STEP)]:
        found[candidate] = _apart(name, candidate)["bytes"]
        if candidate not in ("factors", "partials"):
            found[f"{candidate}, kept memory, seconds"] = _apart(name, candidate, **KEPT)["seconds"]
    return found


def _apart(name: str, candidate: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-c", f"from benchmarks.measure import alone; alone({name!r}, {candidate!r})"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"bytes": None, "seconds": None}


def alone(name: str, candidate: str) -> None:
    """Prints the peak growth of a first call, and the least time of five more."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    made = made_of(name)
    ours: dict[str, Callable[[], Any]] = {"factors": made.factors, "partials": lambda: made.factors().dense()}
    run = ours[candidate] if candidate in ours else PEERS["rows"][candidate](made)[0]
    with torch.no_grad():
        made.f(*(x[:2] for x in made.inputs))  # kernels that are set up once are no part of it
    _, _, peak = measured(run, torch.device("cpu"))
    least = min(measured_seconds(run) for _ in range(5))
    print(json.dumps({"bytes": peak, "seconds": least}))


def measured_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
