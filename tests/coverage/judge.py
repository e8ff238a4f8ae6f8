"""Is an answer exact? One call of the library against a loop over batches of one that owes it nothing: rows, norms and Gram."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import partials as pt
from partials._signature import rebuild, walk
from tests.oracle import gradients

EXACT = 1e-11
"""Largest error allowed, in units of the row's norm in float64 (of the block's largest row where the row is zero)."""
ZERO = 1e-4
"""A row below this part of the block's largest is zero but for rounding; so is a block below its square, of the whole.

The whole counts as no less than this part of the values: where x / x is differentiated, its rounding is what is left.
"""


@dataclass
class Call:
    """f(*inputs) for N samples; `single` is the same for a batch of one cut from it, samples first in both."""

    f: Callable[..., Any]
    inputs: tuple[Any, ...]
    parameters: Mapping[str, torch.Tensor]
    """Names as the library gives them."""
    dims: tuple[Any, ...] = ()
    """Sample dimension of each input (a tree of inputs shares one): 0 where there are fewer."""
    options: dict[str, Any] = field(default_factory=dict)
    loss: Any = None
    random: bool = False
    """Random numbers are drawn: the policy is "model", the reference the whole batch from the same state."""
    whole: bool = False
    """The reference is the whole batch."""


@dataclass(frozen=True)
class Verdict:
    """What came of a call."""

    how: str
    """"rule", "expansion", the name of another method, or "refused"."""
    runner: str = ""
    error: float = 0.0
    """Worst error in units of the row's norm."""
    refusal: str = ""
    """Where refused: the kind of error and its first line."""
    alarm: bool = False
    """A check took the rounding of an exact answer for an error."""

    @property
    def wrong(self) -> bool:
        return not self.error <= EXACT


def judge(call: Call, **options: Any) -> Verdict:
    """Ask the library, ask the loop, compare."""
    torch.manual_seed(7)
    alarm = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about operations that its vmap loops over, or layouts of memory
            try:
                J = asked(call, options)
            except pt.CheckError:  # right or not: the reference below decides
                alarm = True
                torch.manual_seed(7)
                J = asked(call, {**options, "check": "never"})
    except pt.PartialsError as error:
        return Verdict("refused", refusal=f"{type(error).__name__}: {error.what}")
    torch.manual_seed(7)
    values, rows = expected(call)
    how, runner = described(J.plan) if rows else ("rule", "")  # no samples: no method is needed
    return Verdict(how, runner, worst(J, values, rows), alarm=alarm)


def asked(call: Call, options: Mapping[str, Any]) -> Any:
    chosen = {"check": "always", **call.options, **options}
    if call.random:
        chosen["randomness"] = "model"
    if call.loss is not None:
        return pt.gradient(call.f, *call.inputs, loss=call.loss, **chosen)
    if call.dims and chosen.get("batched", True):
        chosen["in_dims"] = tuple(in_dims(x, dim) for x, dim in zip(call.inputs, padded(call), strict=True))
    return pt.jacobian(call.f, *call.inputs, **chosen)


def in_dims(tree: Any, dim: Any) -> Any:
    if isinstance(tree, tuple | list):
        return type(tree)(in_dims(part, dim) for part in tree)
    return dim if isinstance(tree, torch.Tensor) and tree.ndim else None


def padded(call: Call) -> tuple[Any, ...]:
    return (*call.dims, *(0,) * (len(call.inputs) - len(call.dims)))


def described(plan: Any) -> tuple[str, str]:
    """(rule, expansion or method; runner)."""
    if plan.method != "capture":
        return plan.method, ""
    runner = "vmapped" if any(use.layout == "vmapped" for use in plan.uses) else "native"
    return "expansion" if any(use.rule == "expansion" for use in plan.uses) else "rule", runner


def samples_of(call: Call) -> int:
    for x, dim in zip(call.inputs, padded(call), strict=True):
        for _, t in walk(x, ""):
            if dim is not None and t.ndim:
                return t.shape[dim]
    raise AssertionError("a case without samples")


def expected(call: Call) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(values (N, *out), rows {name: (N, *out, *shape)})."""
    if call.options.get("batched") is False:
        out = call.f(*call.inputs) if call.loss is None else alone(call.loss, call.f(*call.inputs[:-1]), call.inputs[-1])
        return out.detach(), gradients(out, call.parameters)
    n = samples_of(call)
    if call.random or call.whole:
        out = call.f(*call.inputs)
        return out.detach(), gradients(out, call.parameters)
    values, rows = [], []
    for i in range(n):
        parts = [cut(x, i, dim) for x, dim in zip(call.inputs, padded(call), strict=True)]
        out = call.f(*parts)[0] if call.loss is None else call.loss(call.f(*parts[:-1]), parts[-1]).reshape(())
        values.append(out.detach())
        rows.append(gradients(out, call.parameters))
    if not n:
        return torch.zeros(0), {}
    return torch.stack(values), {name: torch.stack([row[name] for row in rows]) for name in call.parameters}


def alone(loss: Any, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return loss(output.unsqueeze(0), target.unsqueeze(0)).reshape(())


def cut(tree: Any, i: int, dim: Any) -> Any:
    tensors = (t.narrow(dim, i, 1) if dim is not None and t.ndim else t for _, t in walk(tree, ""))
    return rebuild(tree, iter(list(tensors)))


def worst(J: Any, values: torch.Tensor, rows: Mapping[str, torch.Tensor]) -> float:
    """The largest error of values, rows, norms and Gram, each in units of its own size; nan where only one side is finite."""
    if not rows:
        return 0.0 if len(J) == 0 else float("nan")
    shape = values.shape
    flat = {name: part.reshape(shape.numel(), -1) for name, part in rows.items()}
    dense = torch.cat(list(flat.values()), 1)
    whole = max(largest(dense.norm(dim=1)), ZERO * largest(values.abs()))
    errors = [relative(J.values, values, values.abs().clamp_min(largest(values.abs())))]
    found = J.dict()
    assert list(found) == list(rows)
    for name, part in flat.items():
        assert found[name].shape == rows[name].shape, f"{name}: {tuple(found[name].shape)}, not {tuple(rows[name].shape)}"
        errors.append(relative(found[name].reshape(part.shape), part, scales(part.norm(dim=1), whole)[:, None]))
    norms = dense.norm(dim=1)
    size = scales(norms, whole)
    errors.append(relative(J.norms().reshape(-1), norms, size))
    gram = J.gram().reshape(len(dense), len(dense))
    errors.append(relative(gram, dense @ dense.T, size[:, None] * size[None, :]))
    return max(errors, key=lambda e: float("inf") if e != e else e)


def scales(norms: torch.Tensor, whole: float) -> torch.Tensor:
    """The unit of each row: its norm; that of the largest row where it is zero; of the whole where they all are."""
    top = largest(norms)
    top = whole if top <= ZERO * ZERO * whole else top
    return torch.where(norms > ZERO * top, norms, torch.full_like(norms, top))


def largest(values: torch.Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def relative(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor) -> float:
    got, want = got.detach().double(), want.double()
    if not want.numel():
        return 0.0
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(same, torch.zeros_like(want), (got - want).abs() / (scale + 1e-300))
    return float("nan") if error.isnan().any() else float(error.max())
