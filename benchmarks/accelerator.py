"""`python -m benchmarks.accelerator [--device cuda] [--small] [--case WORD] [--json PATH]`: larger sizes, for an accelerator.

Results are compared before they are timed; every time waits for the device; ratios are medians over turns, by one training step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

import partials as pt
from benchmarks import models, peers
from benchmarks.cases import Made
from benchmarks.timing import ratio, taken
from partials._machine import describe, finish, free, measured, out_of_memory, sentence
from partials._plan import human_bytes
from partials._typing import Tensor

K, CLIP = 4096, 1.0
TURNS, SECONDS = 7, 15.0
"""Turns of every candidate, and seconds for all of a quantity's."""
Run = Callable[[], Any]


def cases(small: bool, device: torch.device) -> dict[str, Callable[[], Made]]:
    n, pixels, sequences, tokens = (64, 8, 2, 32) if small else (8192, 256, 8, 512)
    size = {"d": 64, "vocabulary": 500} if small else {"d": 768, "vocabulary": 50257, "layers": 12, "heads": 12}

    def classified(model: torch.nn.Module, *shape: int) -> Made:
        return Made(model.to(device), torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device))

    return {
        f"MLP 784-512-512-10, N={n}": lambda: classified(models.mlp(), n, 784),
        f"ResNet-18, N={pixels}": lambda: classified(models.resnet18(8 if small else 64), pixels, 3, 32, 32),
        f"GPT-2 {'of two layers' if small else '124M'}, N={sequences}, T={tokens}": lambda: Made(
            models.TinyGPT2(tokens, **size).to(device), torch.randint(size["vocabulary"], (sequences, tokens), device=device)
        ),
    }


def first(made: Made, n: int) -> Made:
    return Made(made.model, made.x[:n], None if made.target is None else made.target[:n])


def candidates(made: Made) -> dict[str, dict[str, Run]]:
    """{quantity: {who: what computes it}}; who cannot be made is left out, with the reason printed."""
    names = list(dict(made.model.named_parameters()))
    found: dict[str, dict[str, Run]] = {
        "norms": {"partials": lambda: made.factors().norms()},
        "clipped sum": {"partials": lambda: made.factors().clipped_sum(CLIP)},
        f"two-sided sketch, k={K}": {"partials": lambda: made.factors().sketch(K, "kronecker")},
    }
    rows, _ = peers.torch_func(made)

    def by_rows() -> tuple[dict[str, Tensor], Tensor]:
        parts = rows()
        squares = sum(parts[name].flatten(1).square().sum(1) for name in names)
        return parts, torch.as_tensor(squares).sqrt()

    def summed() -> Tensor:
        parts, norms = by_rows()
        return torch.cat([torch.einsum("n,np->p", (CLIP / norms).clamp(max=1), parts[name].flatten(1)) for name in names])

    found["norms"]["vmap(grad)"], found["clipped sum"]["vmap(grad)"] = lambda: by_rows()[1], summed
    try:
        ghost, _ = peers.opacus_ghost(made)
        ghost()
    except Exception as error:
        print(f"  Opacus ghost does not run: {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}")
        return found

    def reweighted() -> Tensor:
        factors = (CLIP / ghost().detach()).clamp(max=1)
        return torch.cat([g.flatten() for g in torch.autograd.grad((made.f(*made.inputs) * factors).sum(), list(made.model.parameters()))])

    found["norms"]["Opacus ghost"], found["clipped sum"]["Opacus ghost"] = ghost, reweighted
    return found


def agreed(runs: dict[str, Run], made: Made, what: str) -> dict[str, Run]:
    """The candidates that give what the first gives, to rounding; where it is alone, it is compared with rows of two samples."""
    if len(runs) == 1:
        two = first(made, 2)
        same(
            two.factors().sketch(K, "kronecker"),
            pt.jacobian(two.f, *two.inputs, params=two.model, method="loop").sketch(K, "kronecker"),
            what,
        )
        return runs
    kept, expected = {}, None
    for who, run in runs.items():
        try:
            found = run().detach()
        except Exception as error:
            if not out_of_memory(error):
                raise
            print(f"  {what}, {who}: out of memory")
            continue
        expected = found if expected is None else expected
        same(found, expected, f"{what}, {who}")
        kept[who] = run
    return kept


def proper() -> AbstractContextManager[object]:
    """Inside, float32 is float32: without TF32, which cuDNN may use and which moves sums that cancel by a hundredth."""
    return torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)


def same(found: Tensor, expected: Tensor, what: str) -> None:
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not error < 1e-3:
        raise SystemExit(f"{what}: off by {error:.1e}")


def timed(runs: dict[str, Run], device: torch.device) -> dict[str, Any]:
    def waiting(run: Run) -> Run:
        return lambda: (run(), finish(device))

    times = taken({name: waiting(run) for name, run in runs.items()}, TURNS, SECONDS)
    peaks = {name: measured(lambda run=run: run() is None, device)[2] for name, run in runs.items()}
    return {name: {"seconds": statistics.median(times[name]), "steps": ratio(times, name, "step")[0], "peak": peaks[name]} for name in runs}


def dense(made: Made, device: torch.device) -> dict[str, float]:
    """Bytes a second of dense rows into memory that is there, beside filling and copying it."""
    width = sum(p.numel() for p in made.model.parameters())
    n = max(1, min(len(made.x), free(device) // 4 // (4 * width)))
    out, other = (torch.empty(n, width, device=device) for _ in range(2))
    with proper():
        same(first(made, n).factors().dense(out=out)[:2], first(made, 2).factors().dense(), "dense rows")
    J = first(made, n).factors()
    runs: dict[str, Run] = {"step": lambda: out.zero_(), "copy": lambda: other.copy_(out), "dense": lambda: J.dense(out=out)}
    found = timed(runs, device)
    return {name: out.nbytes / found[run]["seconds"] for name, run in (("fill", "step"), ("copy", "copy"), ("dense rows", "dense"))}


def autocast(made: Made, device: torch.device) -> dict[str, Any]:
    """Norms and clipped sums of f in bfloat16 beside those in float32."""

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made.model

        def forward(self, x: Tensor) -> Any:
            with torch.autocast(device.type, torch.bfloat16):
                return self.inner(x)

    half = Made(Half(), made.x, made.target)
    found, expected = half.factors().norms(), made.factors().norms()
    error = float((found - expected).norm() / expected.norm())
    runs: dict[str, Run] = {"step": half.step, "norms": lambda: half.factors().norms(), "sum": lambda: half.factors().clipped_sum(CLIP)}
    return {"dtype": str(found.dtype), "off by": error, **timed(runs, device)}


def figures(make: Callable[[], Made], device: torch.device) -> Iterator[tuple[str, Any]]:
    torch.manual_seed(0)
    made = make()
    made.factors(check="first")
    for what, runs in candidates(made).items():
        with proper():
            runs = agreed(runs, made, what)
        yield what, timed({"step": made.step, **runs}, device)
    yield "dense rows, bytes/s", dense(made, device)
    yield "bfloat16 autocast", autocast(made, device)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.accelerator", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="sizes that any machine has; to see that it works")
    parser.add_argument("--case", default="", help="only the cases whose names have this word")
    parser.add_argument("--json", type=Path, help="the figures, and the machine")
    options = parser.parse_args()
    device = torch.device(options.device)
    known: dict[str, Any] = {"machine": sentence(describe(device))}
    print(known["machine"], flush=True)
    for name, make in cases(options.small, device).items():
        if options.case in name:
            print(name, flush=True)
            known[name] = {}
            for what, its in figures(make, device):
                known[name][what] = its
                print(f"  {what}: {line(its)}", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(known, indent=2))


def line(found: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['seconds'] * 1e3:.1f} ms, {value['steps']:.2f} steps, {human_bytes(float(value['peak'] or 0))}"
        return value if isinstance(value, str) else f"{human_bytes(value)}/s" if value > 1e3 else f"{value:.1e}"

    return "; ".join(f"{name} {one(value)}" for name, value in found.items())


if __name__ == "__main__":
    main()
