"""TRAK (`traker`): a gradient computer for any model, and a projector of factors.

    TRAKer(model, task, train_set_size=N, device="cpu", gradient_computer=GradientComputer, proj_dim=2048)

    TRAKer(..., gradient_computer=functools.partial(GradientComputer, dense=False), projector=Sketch(2048))

The first gives TRAK the rows that its own projectors take. The second never forms a row that is not needed: gradients are sketched from
factors, and a sample's gradient of P numbers exists at no time as a whole for "kronecker", or for a few samples at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .._api import gradient
from .._errors import InputError
from .._jacobian import Jacobian
from .._typing import Tensor
from . import host

with host("traker", "trak"):
    from trak.gradient_computers import AbstractGradientComputer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import AbstractProjector


class GradientComputer(AbstractGradientComputer):
    """Per-sample gradients of a TRAK task's output by this library.

    Parameters
    ----------
    model, task, grad_dim, dtype, device, grad_wrt
        As TRAKer gives them. Only gradients by `grad_wrt` are computed.
    batched
        Whether `task.get_output(model, None, None, *batch)` takes a batch and gives one number for each sample, as TRAK's tasks for
        `IterativeGradientComputer` do. The others take one sample without a batch dimension, and are run by `torch.vmap`, which
        cannot run recurrent layers.
    dense
        Whether rows are formed, as dict of (N, *shape); `Sketch` projects without.
    options
        Of `partials.gradient`: `max_memory`, `check`, `method`, `randomness`.
    """

    def __init__(
        self,
        model: nn.Module,
        task: AbstractModelOutput,
        grad_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        grad_wrt: Iterable[str] | None = None,
        *,
        batched: bool = False,
        dense: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, task, grad_dim, dtype, device)
        self.grad_wrt, self.batched, self.dense, self.options = grad_wrt, batched, dense, options
        self.load_model_params(model)

    def load_model_params(self, model: nn.Module) -> None:
        """The model whose parameters, as they then are, are differentiated."""
        self.model = model
        self.weights, self.buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def compute_per_sample_grad(self, batch: Sequence[Tensor]) -> Any:
        """{name: (N, *shape)}, or a Jacobian (N, P) where `dense` is False."""
        wanted = None if self.grad_wrt is None else set(self.grad_wrt)
        params = {name: p for name, p in self.weights.items() if wanted is None or name in wanted}
        G = gradient(self._output(), *batch, params=params, **self.options)
        return G.dict() if self.dense else G

    def compute_loss_grad(self, batch: Sequence[Tensor]) -> Tensor:
        """d loss / d output of every sample, (N, 1), as the task gives it."""
        found: Tensor = self.modelout_fn.get_out_to_loss_grad(self.model, *self._state(), batch)
        return found

    def _output(self) -> Any:
        def output(*batch: Tensor) -> Tensor:
            found: Tensor = self.modelout_fn.get_output(self.model, *self._state(), *batch)
            return found

        return output if self.batched else torch.func.vmap(output, randomness="different")

    def _state(self) -> tuple[Any, Any]:
        return (None, None) if self.batched else (self.weights, self.buffers)


class Sketch(AbstractProjector):
    """Projection by `Jacobian.sketch`, from factors, with entries of variance 1 as TRAK's own projectors have.

    Parameters
    ----------
    proj_dim, kind, seed
        As in `Jacobian.sketch`. Every checkpoint (TRAK's `model_id`) has a projection of its own.
    """

    def __init__(self, proj_dim: int, kind: str = "rademacher", seed: int = 0) -> None:
        super().__init__(0, proj_dim, seed, kind, "cpu")

    def project(self, grads: Any, model_id: int) -> Tensor:
        """(N, proj_dim)."""
        if not isinstance(grads, Jacobian):
            raise InputError(
                "Sketch projects factors",
                got=type(grads).__name__,
                expected="gradients that are not formed",
                hint="gradient_computer=functools.partial(GradientComputer, dense=False)",
            )
        return grads.sketch(self.proj_dim, self.proj_type, self.seed + 10_000 * model_id) * self.proj_dim**0.5
