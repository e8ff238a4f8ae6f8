"""Opacus: its sampling, its noise and its accountants, on clipped sums of any model, from factors.

    optimizer, loader = make_private(engine, module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.1, max_grad_norm=1.0)
    for x, y in loader:
        logits = backward(optimizer, model, x, y, loss=F.cross_entropy)
        optimizer.step()
        optimizer.zero_grad()
    engine.get_epsilon(delta)

The model is neither wrapped nor validated by module type: tied weights, embedding bags and recurrent layers are right, and a model whose
samples mix (batch normalisation in training) is refused by `backward`. Large batches go through Opacus's `BatchMemoryManager`, or through
`backward(..., max_memory=...)`; an empty Poisson batch gives zeros, to which the noise is added as to any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from .._api import gradient
from .._errors import InputError, listed
from .._jacobian import Jacobian
from .._typing import Function, Tensor
from . import host

with host("opacus", "opacus"):
    from opacus import PrivacyEngine
    from opacus.data_loader import DPDataLoader
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

EPSILON = 1e-6
"""What Opacus adds to a norm before it divides by it."""


class ClippedSumOptimizer(DPOptimizerFastGradientClipping):
    """Opacus's optimizer for sums that are clipped already: it accumulates them, adds the noise, divides, and steps.

    `max_grad_norm` is one bound for whole gradients, or a sequence with one for each parameter: the noise is then that of their root of
    the sum of squares, as in Opacus's `DPPerLayerOptimizer`. All else is as in `DPOptimizer`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float | Sequence[float], **options: Any) -> None:
        self.bounds = None if isinstance(max_grad_norm, int | float) else tuple(float(bound) for bound in max_grad_norm)
        whole = float(max_grad_norm) if self.bounds is None else torch.tensor(self.bounds, device="cpu").norm().item()  # type: ignore[arg-type]
        super().__init__(optimizer, max_grad_norm=whole, **options)
        if self.bounds is not None and len(self.bounds) != len(self.params):
            raise InputError(
                "clipping by parameter needs a bound for each", got=f"{len(self.bounds)} bounds", expected=f"{len(self.params)}"
            )


def make_private(
    engine: PrivacyEngine,
    *,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    noise_multiplier: float,
    max_grad_norm: float | Sequence[float],
    poisson_sampling: bool = True,
    loss_reduction: str = "mean",
    noise_generator: torch.Generator | None = None,
) -> tuple[ClippedSumOptimizer, DataLoader[Any]]:
    """What `engine.make_private` does, without a wrapped module: the optimizer and the data loader of private training.

    Parameters
    ----------
    engine
        Opacus's; its accountant counts the steps of the optimizer, so that `engine.get_epsilon(delta)` is what has been spent.
    module, optimizer
        The parameters of the optimizer that require grad are clipped and noised; they must be the module's.
    data_loader
        Sampled anew by Poisson sampling, unless `poisson_sampling=False`, to which the accounting does not apply.
    noise_multiplier
        The noise's standard deviation over `max_grad_norm`.
    max_grad_norm
        One bound for whole gradients, or a sequence with one for each parameter of the optimizer.
    loss_reduction, noise_generator
        As in Opacus.

    Raises
    ------
    InputError
        if the optimizer has parameters that the module has not, or there are more or fewer bounds than parameters.
    """
    own = {id(p) for p in module.parameters()}
    foreign = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise InputError("the optimizer has other parameters than the module", got=f"{foreign} of others", expected="the module's")
    if noise_generator is not None and engine.secure_mode:
        raise InputError("a seed is prohibited in secure mode", got="noise_generator=...", expected="secure_mode=False, or no generator")
    loader = DPDataLoader.from_data_loader(data_loader, generator=engine.secure_rng) if poisson_sampling else data_loader
    rate = 1 / len(loader)
    private = ClippedSumOptimizer(
        optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer,
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=int(len(loader.dataset) * rate),  # type: ignore[arg-type]
        loss_reduction=loss_reduction,
        generator=engine.secure_rng if engine.secure_mode else noise_generator,
        secure_mode=engine.secure_mode,
    )
    private.attach_step_hook(engine.accountant.get_optimizer_hook_fn(sample_rate=rate))
    return private, loader


def backward(optimizer: DPOptimizer, f: Function, *inputs: Any, loss: Callable[..., Any], output: Any = None, **options: Any) -> Any:
    """What `loss.backward()` is to ordinary training: per-sample gradients of this batch, where the optimizer looks for them.

    For the optimizer of `make_private` their clipped sum goes to `p.grad`, from factors. For Opacus's own `DPOptimizer`,
    `DPPerLayerOptimizer` and `AdaClipDPOptimizer` rows go to `p.grad_sample`, and it clips them itself.

    Parameters
    ----------
    optimizer
        Which parameters are differentiated, and the bounds.
    f, inputs, loss, output, options
        As in `partials.gradient`: the last input (or `target=`) is the target, and `loss` is that of one sample. Dropout needs
        `randomness="model"`.

    Returns
    -------
    Tensor
        What f returned, detached: the logits, from the same forward.

    Raises
    ------
    InputError
        if gradients of a batch are there already (`optimizer.step()` and `zero_grad()` come between two batches), or rows are not finite.
    """
    names = {id(p): name for name, p in f.named_parameters()} if isinstance(f, torch.nn.Module) else {}
    parameters = {names.get(id(p), str(i)): p for i, p in enumerate(optimizer.params)}
    summed = isinstance(optimizer, DPOptimizerFastGradientClipping)
    held = [name for name, p in parameters.items() if _holds(p.grad if summed else getattr(p, "grad_sample", None))]
    if held:
        raise InputError(
            "the gradients of another batch are still there",
            got=f"gradients of parameters {listed(held)} of the optimizer",
            expected="none",
            hint="optimizer.step() and optimizer.zero_grad() after each batch; opacus.utils.batch_memory_manager for parts of a batch",
        )
    G = gradient(f, *inputs, loss=loss, params=parameters, output=_all if output is None else output, **options)
    if not summed:
        for name, p in parameters.items():
            p.grad_sample = G[name]
        return G.aux
    for p, part in zip(parameters.values(), G.unflatten(_clipped_sum(G, optimizer)).values(), strict=True):
        p.grad = part.to(p.dtype)
    return G.aux


def _clipped_sum(G: Jacobian, optimizer: DPOptimizer) -> Tensor:
    bounds = getattr(optimizer, "bounds", None)
    if bounds is None:
        whole: Tensor = G.clipped_sum(optimizer.max_grad_norm, epsilon=EPSILON)
        return whole
    apart: Tensor = G.clipped_sum(dict(zip(G.names, bounds, strict=True)), per="parameter", epsilon=EPSILON)
    return apart


def _all(returned: Any) -> Any:
    """As `output`, keeps in `G.aux` what f returned."""
    return returned


def _holds(gradients: Any) -> bool:
    return gradients is not None and (not isinstance(gradients, torch.Tensor) or bool(gradients.count_nonzero()))
