"""The cases of torch's own database of operations (`op_db`): every operation with a floating-point argument, which takes a parameter.

Four ways to be asked, of each input of each operation; a way that torch itself does not run, or that has no samples, is no case:
    batch   one argument with samples put in front, another one the parameter, called as it is
    vmap    the same, the operation on one sample under `torch.vmap`
    scaled  all of the first argument, times a parameter, with samples in front
    alone   the operation on the parameter alone, times something of each sample
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from partials._signature import rebuild, walk
from tests.coverage.judge import Call
from tests.coverage.modules import projected

N = 3
WAYS = ("batch", "vmap", "scaled", "alone")
SAME = 1e-9
"""Values of a batch and of batches of one agree to this, else the function mixes samples."""
UNCHECKED = ("_segment_reduce", "native_batch_norm")
"""Operations that read past the end of lengths, or of weights, that do not fit the data."""


@dataclass(frozen=True)
class Case:
    operation: str
    index: int
    way: str

    def __str__(self) -> str:
        return f"{self.operation}[{self.index}] {self.way}"


def database() -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if torch.float64 in op.dtypes and op.supports_autograd and not op.name.startswith("as_strided")]
    # (as_strided reads memory, whatever the shape of its argument: it has no samples)


def name_of(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def samples(op: Any) -> list[Any]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(op.sample_inputs("cpu", torch.float64, requires_grad=False))


def cases(op: Any, count: int) -> Iterator[Case]:
    for index in range(count):
        for way in WAYS:
            yield Case(name_of(op), index, way)


def made(op: Any, sample: Any, case: Case) -> Call | None:
    """The call of a case, None where there is none."""
    tree = (sample.input, tuple(sample.args), dict(sample.kwargs))
    tensors = [t for _, t in walk(tree, "")]
    if any(t.layout != torch.strided for t in tensors) or (any(name in case.operation for name in UNCHECKED) and case.way != "alone"):
        return None
    places = [i for i, t in enumerate(tensors) if t.dtype == torch.float64 and t.numel()]
    if not places or sum(t.numel() for t in tensors) > 4000:
        return None

    def run(*given: torch.Tensor) -> torch.Tensor:
        first, args, kwargs = rebuild(tree, iter(given))
        return joined(sample.output_process_fn_grad(op.op(first, *args, **kwargs)))

    if case.way in ("batch", "vmap"):
        return two(run, tensors, places, case) if len(places) > 1 else None
    return scaled(run, tensors, places[0]) if case.way == "scaled" else alone(run, tensors, places[0])


def joined(out: Any) -> torch.Tensor:
    """The floating-point results of an operation as one tensor; complex numbers as pairs."""
    found = [torch.view_as_real(t) if t.is_complex() else t for _, t in walk(out, "") if t.is_floating_point() or t.is_complex()]
    found = [t for t in found if t.numel()]
    if not found or any(t.layout != torch.strided for t in found):
        raise NoCase
    return found[0] if len(found) == 1 else torch.cat([t.reshape(-1) for t in found])


class NoCase(Exception):
    """Nothing to differentiate."""


def moved(t: torch.Tensor) -> torch.Tensor:
    """N samples like t: itself, and others near it, so that what is valid stays valid."""
    factors = torch.tensor([1.0, 0.9, 0.8], dtype=t.dtype).view(-1, *(1,) * t.ndim)
    return t.detach() * factors


def two(run: Callable[..., torch.Tensor], tensors: list[torch.Tensor], places: list[int], case: Case) -> Call:
    at, of = (places[0], places[1]) if zlib.crc32(str(case).encode()) % 2 else (places[1], places[0])
    data, parameter = moved(tensors[at]), tensors[of].detach().clone().requires_grad_()

    def one(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        given = list(tensors)
        given[at], given[of] = x, p
        return run(*given)

    if case.way == "vmap":
        single = torch.vmap(lambda x, p: projected(one(x, p), False), in_dims=(0, None))
        return Call(lambda x, p: single(x, p), (data, parameter), {"p": parameter}, (0, None))
    return Call(lambda x, p: projected(samples_first(one(x, p), x), True), (data, parameter), {"p": parameter}, (0, None))


def scaled(run: Callable[..., torch.Tensor], tensors: list[torch.Tensor], at: int) -> Call:
    data = moved(tensors[at])
    shape = tensors[at].shape[-1:]
    scale = (1 - 0.01 * torch.arange(shape.numel(), dtype=torch.float64).cos().view(shape)).requires_grad_()

    def f(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        given = list(tensors)
        given[at] = x * p
        return projected(samples_first(run(*given), x), True)

    return Call(f, (data, scale), {"p": scale}, (0, None))


def alone(run: Callable[..., torch.Tensor], tensors: list[torch.Tensor], at: int) -> Call:
    parameter = tensors[at].detach().clone().requires_grad_()

    def f(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        given = list(tensors)
        given[at] = p
        return x * projected(run(*given), False)

    return Call(f, (torch.tensor([[1.0], [-0.5], [2.0]], dtype=torch.float64), parameter), {"p": parameter}, (0, None))


def samples_first(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if out.ndim == 0 or out.shape[0] != len(x):
        raise NoCase
    return out


def runs(call: Call) -> bool | None:
    """Whether torch runs the function, and gives each sample alone what it gives it in the batch; None where it does not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(1)
            whole = call.f(*call.inputs)
            again = call.f(*call.inputs)
            if not whole.requires_grad or not whole.isfinite().any() or not torch.equal(whole.nan_to_num(), again.nan_to_num()):
                return None  # (constant, empty or nothing that could be compared, or random)
            parts = [call.f(call.inputs[0][n : n + 1], call.inputs[1])[0] for n in range(N)]
            if any(p.shape != whole.shape[1:] for p in parts):
                return False
            torch.autograd.grad(whole.sum(), list(call.parameters.values()), retain_graph=True)
            for some in ([0, 1], [2]):  # (an operation that reads other sizes another way has no samples)
                call.f(call.inputs[0][some], call.inputs[1])
    except Exception:
        return None
    return torch.allclose(torch.stack(parts), whole, rtol=SAME, atol=SAME, equal_nan=True)
