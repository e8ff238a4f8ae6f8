"""Other libraries, each in its best setting for a case. A peer is a function of the case that gives what is to be timed, or raises.

They are imported where they are used: the benchmarks run with whichever are installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from benchmarks.cases import Made
from partials._typing import Tensor

Run = Callable[[], Any]


def _joined(parts: Iterable[Tensor], lead: int) -> Tensor:
    return torch.cat([part.flatten(lead) if part.ndim > lead else part.unsqueeze(-1) for part in parts], -1)


def torch_func(made: Made) -> tuple[Run, Callable[[Any], Tensor]]:
    """vmap(grad) of scalars, vmap(jacrev) of vectors."""
    parameters = {name: p.detach() for name, p in made.model.named_parameters()}
    outer = Made(_Called(made.model), made.x, made.target)

    def one(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        outer.model.parameters_now = parameters  # type: ignore[assignment]
        return outer.f(*(x.unsqueeze(0) for x in sample)).squeeze(0)

    scalar = made.f(*(x[:1] for x in made.inputs)).ndim == 1
    rows = vmap((grad if scalar else jacrev)(one), (None, *[0] * len(made.inputs)), randomness="different")
    return lambda: rows(parameters, *made.inputs), lambda found: _joined((found[name] for name in parameters), 1 if scalar else 2)


class _Called(nn.Module):
    """The model with the parameters of the moment."""

    parameters_now: Any = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = [model]

    def forward(self, x: Tensor) -> Any:
        return functional_call(self.inner[0], self.parameters_now, (x,))


def functional_jacobian(made: Made) -> tuple[Run, Callable[[Any], Tensor]]:
    """torch.autograd.functional.jacobian, one reverse pass for each output."""
    names, parameters = zip(*((name, p.detach()) for name, p in made.model.named_parameters()), strict=True)
    if len(made.x) > 64:
        raise NotImplementedError("one reverse pass of the whole batch for each sample: minutes")
    outer = Made(_Called(made.model), made.x, made.target)

    def f(*parameters: Tensor) -> Tensor:
        outer.model.parameters_now = dict(zip(names, parameters, strict=True))  # type: ignore[assignment]
        return outer.f(*made.inputs)

    lead = 1 if made.f(*(x[:1] for x in made.inputs)).ndim == 1 else 2
    return lambda: torch.autograd.functional.jacobian(f, parameters), lambda found: _joined(found, lead)


def expanded_weights(made: Made) -> tuple[Run, Callable[[Any], Tensor]]:
    """torch's ExpandedWeights."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    model = copy.deepcopy(made.model)
    called = Made(call_for_per_sample_grads(model, loss_reduction="sum"), made.x, made.target)  # type: ignore[arg-type]

    def run() -> list[Tensor]:
        for p in model.parameters():
            p.grad_sample = None  # type: ignore[attr-defined]
        called.f(*made.inputs).sum().backward()
        return [p.grad_sample for p in model.parameters()]  # type: ignore[attr-defined]

    return run, lambda found: _joined(found, 1)


def opacus_hooks(made: Made) -> tuple[Run, Callable[[Any], Tensor]]:
    """Opacus, GradSampleModule."""
    from opacus import GradSampleModule

    module = GradSampleModule(copy.deepcopy(made.model), loss_reduction="sum")
    called = Made(module, made.x, made.target)

    def run() -> list[Tensor]:
        module.zero_grad(set_to_none=True)
        for p in module.parameters():
            p.grad_sample = None
        called.f(*made.inputs).sum().backward()
        return [p.grad_sample for p in module.parameters()]

    return run, lambda found: _joined(found, 1)


def opacus_ghost(made: Made) -> tuple[Run, Callable[[Any], Tensor]]:
    """Opacus, ghost norms: (N,)."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    module = GradSampleModuleFastGradientClipping(copy.deepcopy(made.model), loss_reduction="sum", use_ghost_clipping=True)
    called = Made(module, made.x, made.target)

    def run() -> Tensor:
        module.zero_grad(set_to_none=True)
        called.f(*made.inputs).sum().backward()
        return module.get_norm_sample()

    return run, lambda found: found


def backpack_grads(made: Made) -> tuple[Run, Callable[[Any], Tensor]]:
    """BackPACK, BatchGrad."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    if made.target is None:
        raise NotImplementedError("BackPACK starts from one of its own loss modules")
    if not isinstance(made.model, nn.Sequential):
        raise NotImplementedError("BackPACK knows sequences of known layers")
    model, loss = extend(copy.deepcopy(made.model)), extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> list[Tensor]:
        for p in model.parameters():
            p.grad = p.grad_batch = None
        with backpack(BatchGrad()):
            loss(model(made.x), made.target).backward()
        return [p.grad_batch for p in model.parameters()]

    return run, lambda found: _joined(found, 1)


def func_gram(made: Made) -> tuple[Run, Callable[[Any], Tensor]]:
    """vmap(grad), then a product of the rows of each parameter."""
    rows, _ = torch_func(made)

    def run() -> Tensor:
        flat = [part.flatten(1) for part in rows().values()]
        return sum(part @ part.T for part in flat)  # type: ignore[return-value]

    if made.f(*(x[:1] for x in made.inputs)).ndim != 1:
        raise NotImplementedError("for one output of each sample")
    return run, lambda found: found


def torchjd_gram(made: Made) -> tuple[Run, Callable[[Any], Tensor]]:
    """TorchJD, autogram."""
    from torchjd.autogram import Engine

    if made.f(*(x[:1] for x in made.inputs)).ndim != 1:
        raise NotImplementedError("for one output of each sample")
    model = copy.deepcopy(made.model)
    engine, called = Engine(model, batch_dim=0), Made(model, made.x, made.target)
    return lambda: engine.compute_gramian(called.f(*made.inputs)), lambda found: found


def curvlinops_product(made: Made) -> tuple[Run, Callable[[Any], Tensor]]:
    """curvlinops, J v of the network: (N, C) of a model without a loss."""
    from curvlinops import JacobianLinearOperator

    if made.target is not None:
        raise NotImplementedError("it knows networks without their loss")
    batch = [(made.x, torch.zeros(len(made.x), 1))]
    model = nn.Sequential(made.model, nn.Unflatten(0, (-1, 1))) if made.model(made.x[:1]).ndim == 1 else made.model
    operator = JacobianLinearOperator(model, list(made.model.parameters()), batch, check_deterministic=False)
    v = product_vector(sum(p.numel() for p in made.model.parameters()))
    return lambda: operator @ v, lambda found: found.reshape(made.model(made.x).shape)


def product_vector(entries: int) -> Tensor:
    """The same v for all."""
    return torch.randn(entries, generator=torch.Generator().manual_seed(3))


PEERS: dict[str, dict[str, Callable[[Made], tuple[Run, Callable[[Any], Tensor]]]]] = {
    "rows": {
        "torch.func": torch_func,
        "functional.jacobian": functional_jacobian,
        "ExpandedWeights": expanded_weights,
        "Opacus hooks": opacus_hooks,
        "BackPACK": backpack_grads,
    },
    "norms": {"Opacus ghost": opacus_ghost},
    "Gram": {"torch.func and product": func_gram, "TorchJD autogram": torchjd_gram},
    "J v": {"curvlinops": curvlinops_product},
}
"""Quantity -> peer -> its maker, which gives the run and what turns its result into one tensor."""
