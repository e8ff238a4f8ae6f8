"""`python -m benchmarks [--quick] [--json PATH]`: correctness first, then every quantity in units of one training step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.func import grad, vmap

import partials as pt
from benchmarks.cases import CASES, line
from benchmarks.timing import Timing, paired
from partials._machine import describe, sentence


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    turns = 7 if options.quick else 21
    torch.set_num_threads(min(2, torch.get_num_threads()))
    machine = sentence(describe(torch.device("cpu")))
    print(machine)
    figures: dict[str, list[Timing]] = {}
    for name, make in CASES.items():
        torch.manual_seed(0)
        figures[name] = _timed(*make(), turns=turns)
        _print(name, figures[name])
    figures["the notebook's line, N=1000"] = _line(turns)
    _print("the notebook's line, N=1000", figures["the notebook's line, N=1000"])
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, **{n: [asdict(t) for t in ts] for n, ts in figures.items()}}, indent=2))


def _timed(f: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], module: Any, *, turns: int) -> list[Timing]:
    """One training step first: the others are told in its units."""
    parameters = list(module.parameters())

    def step() -> Any:
        return torch.autograd.grad(f(*inputs).sum(), parameters)

    def factors() -> Any:
        return pt.jacobian(f, *inputs, params=module, check="never")

    J = factors()
    total = torch.cat([g.flatten() for g in step()])
    assert (J.sum() - total).norm() <= 1e-5 * total.norm(), "the rows do not add up to one backward"
    v, u, out = torch.randn(J.shape[-1]), torch.randn(J.shape[:-1]), torch.empty(J.shape)
    return paired(
        {
            "training step": step,
            "factors": factors,
            "norms": lambda: factors().norms(),
            "clipped sum": lambda: factors().clipped_sum(1.0),
            **({"Gram": lambda: factors().gram()} if len(J) <= 512 else {}),
            "J @ v, given factors": lambda: J @ v,
            "J.T @ u, given factors": lambda: J.T @ u,
            "fill of the result": lambda: out.zero_(),
            "dense into out=": lambda: factors().dense(out=out),
        },
        turns,
    )


def _line(turns: int) -> list[Timing]:
    x, a, b = torch.randn(1000, 1), torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True)

    def ours() -> Any:
        return pt.jacobian(line, x, a, b, check="never")

    def vectorised() -> Any:
        return vmap(grad(lambda a, b, x: line(x, a, b)[0], (0, 1)), (None, None, 0))(a, b, x)

    assert torch.equal(ours()["a"].flatten(), vectorised()[0].flatten())
    slow = paired(
        {"functional.jacobian": lambda: torch.autograd.functional.jacobian(lambda a, b: line(x, a, b), (a, b)), "partials": ours}, 3
    )
    quick = paired(
        {"vmap(grad)": vectorised, "partials": ours, "training step": lambda: torch.autograd.grad(line(x, a, b).sum(), (a, b))}, 40 * turns
    )
    return [*quick, slow[0]]


def _print(name: str, timings: list[Timing]) -> None:
    print(f"\n{name}")
    for t in timings:
        print(f"  {t.name:<26}{1e3 * t.seconds:>10.3f} ms   x {t.ratio:<8.2f} (spread {t.spread:.2f})")


main()
