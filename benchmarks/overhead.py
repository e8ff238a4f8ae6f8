"""`python -m benchmarks.overhead`: what the library adds to torch's own work: for each use of a parameter, and for one whole small call.

The overhead of a use is a slope: the time of deep networks of tiny layers over their depth, less the slope of a training step. What a
call costs in all shows on the smallest function there is, the line a x + b at a thousand samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import grad, vmap

import partials as pt
from benchmarks.cases import line
from benchmarks.timing import paired, taken
from partials._machine import describe, sentence

Made = tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...], nn.Module]
DEPTHS, SWEEPS = (1, 8, 16, 32, 64), 5


def main() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print(sentence(describe(torch.device("cpu"))))
    print(f"\nmicroseconds for each layer more than a training step's, depths {DEPTHS[0]} to {DEPTHS[-1]}")
    for what, seconds in overheads().items():
        print(f"  {what:<28}{1e6 * seconds:8.1f}   (bar {BARS[what]})")
    the_line()


def overheads(turns: int = 41) -> dict[str, float]:
    """Seconds for each further layer of a deep network, in a call whose plan is known, less those of a training step.

    The median over several sweeps through the depths: a busy moment spoils the one that it hits.
    """
    found = {}
    for what, (made, options) in KINDS.items():
        candidates = [_candidates(made(depth), options) for depth in DEPTHS]
        slopes = []
        for _ in range(SWEEPS):
            times = [taken(its, turns // SWEEPS) for its in candidates]
            of = {name: _slope([statistics.median(its[name]) for its in times]) for name in ("capture", "step")}
            slopes.append(of["capture"] - of["step"])
        found[what] = statistics.median(slopes)
    return found


def _candidates(made: Made, options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    f, inputs, module = made
    parameters = list(module.parameters())
    return {
        "step": lambda: torch.autograd.grad(f(*inputs).sum(), parameters),
        "capture": lambda: pt.jacobian(f, *inputs, params=module, check="never", **options),
    }


def the_line(turns: int = 800) -> None:
    """The notebook's function at a thousand samples."""
    x, a, b = torch.randn(1000, 1), torch.randn(1, requires_grad=True), torch.randn(1, requires_grad=True)

    def ours() -> Any:
        return pt.jacobian(line, x, a, b, check="never")

    def vectorised() -> Any:
        return vmap(grad(lambda a, b, x: line(x, a, b)[0], (0, 1)), (None, None, 0))(a, b, x)

    assert torch.equal(ours()["a"].flatten(), vectorised()[0].flatten())
    print("\nthe line a x + b, N=1000")
    quick = paired(
        {"vmap(grad)": vectorised, "partials": ours, "training step": lambda: torch.autograd.grad(line(x, a, b).sum(), (a, b))}, turns
    )
    for t in quick:
        print(f"  {t.name:<26}{1e6 * t.seconds:>10.1f} us   x {t.ratio:<8.2f} (spread {t.spread:.2f})")
    slow = paired(
        {
            "partials": ours,
            "functional.jacobian": lambda: torch.autograd.functional.jacobian(lambda a, b: line(x, a, b), (a, b)),
            "a loop of backward": lambda: loop(x, a, b),
        },
        3,
    )
    for t in slow[1:]:
        print(f"  {t.name:<26}{1e3 * t.seconds:>10.1f} ms   {t.seconds / quick[1].seconds:.0f} times partials")


def _deep(depth: int) -> Made:
    net = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 1), nn.Flatten(0))
    return net, (torch.randn(16, 8),), net


class _Scales(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.randn(8) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale in self.scales:
            x = torch.tanh(x * scale)
        return x.sum(1)


def _scales(depth: int) -> Made:
    net = _Scales(depth)
    return net, (torch.randn(16, 8),), net


def loop(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The notebook's own loop: a vector-Jacobian product with each unit vector, through `.grad`."""
    y, rows = line(x, a, b), torch.empty(len(x), 2)
    for i in range(len(x)):
        y.backward(torch.eye(len(x))[i].reshape(len(x), 1), retain_graph=True)
        rows[i, 0], rows[i, 1] = a.grad, b.grad
        a.grad.zero_()
        b.grad.zero_()
    a.grad = b.grad = None
    return rows


KINDS: dict[str, tuple[Callable[[int], Made], dict[str, Any]]] = {
    "linear and tanh, native": (_deep, {}),
    "linear and tanh, vmapped": (_deep, {"randomness": "different"}),
    "scale and tanh, native": (_scales, {}),
}
BARS = {"linear and tanh, native": 10.0, "linear and tanh, vmapped": 50.0, "scale and tanh, native": 10.0}


def _slope(times: list[float]) -> float:
    """Of the least-squares line through (depth, time)."""
    return statistics.linear_regression(DEPTHS, times).slope


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"\n({time.perf_counter() - start:.0f} s)")
