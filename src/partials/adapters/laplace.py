"""laplace-torch: curvature backends for any model, from factors.

    Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag", backend=PartialsGGN)

Jacobians are those of `partials.jacobian`: checked, differentiable, one forward and C reverse passes. The diagonal and the full matrix of a
batch come from factors, so that no Jacobian is formed for them. `backend_kwargs` takes options of `partials.jacobian`: `max_memory`,
`check`, `method`. Kronecker factors are refused: they approximate, by assumptions about each kind of layer.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from .._api import gradient, jacobian
from .._jacobian import Jacobian
from .._typing import Tensor
from . import host

with host("laplace-torch", "laplace"):
    from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface

Batch = Tensor | MutableMapping[str, Any]

KRON = (
    "{} has no Kronecker factors: they are an approximation by assumptions about each kind of layer, and this backend computes exact "
    "quantities only. Use hessian_structure='diag' or 'full' with it, or laplace.curvature.CurvlinopsGGN for 'kron'"
)


class PartialsInterface(CurvatureInterface):
    """What both backends share: Jacobians and gradients of every sample, by the parameters that Laplace chose.

    With `last_layer` these are the parameters of the last layer, wherever the model uses them: what comes after the layer (a scale, a
    softmax, a mean over tokens) is differentiated too.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        hosts = signature(super().__init__).parameters
        self.options = {name: value for name, value in named.items() if name not in hosts}
        super().__init__(*given, **{name: value for name, value in named.items() if name in hosts})

    def jacobians(self, x: Batch, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Dense rows (N, C, P) and outputs (N, C); P runs over the subnetwork where there is one."""
        J = self._jacobian(x, create_graph=enable_backprop)
        rows = J.dense() if J.out else J.dense().unsqueeze(1)
        return self._entries(rows, J), _columns(J.values)

    def last_layer_jacobians(self, x: Batch, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """The same for the parameters of the last layer."""
        return self.jacobians(x, enable_backprop)

    def selected_output_jacobians(self, x: Batch, outputs: Tensor, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Rows (N, K, P) of chosen outputs, `outputs` (N,) or (N, K), and all outputs (N, C): K reverse passes, not C."""
        chosen = (outputs[:, None] if outputs.ndim == 1 else outputs).to(dtype=torch.int64)
        if isinstance(x, torch.Tensor) and len(chosen) != len(x):
            raise ValueError(f"outputs are chosen for {len(chosen)} inputs, and there are {len(x)}")

        def selected(x: Batch, chosen: Tensor) -> tuple[Tensor, Tensor]:
            f = _columns(self.model(x))
            return f.gather(1, chosen.to(f.device)), f

        params = self._targets()
        J = jacobian(selected, x, chosen, params=params, output=0, create_graph=enable_backprop, **self.options)
        return self._entries(J.dense(), J), self.model(x) if enable_backprop else J.aux[1]

    def gradients(self, x: Batch, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (N, P) of each sample's loss, and the sum of the losses."""
        G = self._gradient(x, y)
        return self._entries(G.dense(), G), G.values.sum()

    def kron(self, x: Batch, y: Tensor, N: int, **kwargs: Any) -> Any:
        raise NotImplementedError(KRON.format(type(self).__name__))

    def _jacobian(self, x: Batch, **more: Any) -> Jacobian:
        found: Jacobian = jacobian(self.model, x, wrt=list(self._targets()), **more, **self.options)
        return found

    def _gradient(self, x: Batch, y: Tensor) -> Jacobian:
        found: Jacobian = gradient(self.model, x, y, loss=self._loss, wrt=list(self._targets()), **self.options)
        return found

    def _loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Laplace's loss, summed: of every prediction where a sample has several, as a sequence of tokens has."""
        regression = self.likelihood == "regression"
        found: Tensor = self.lossfunc(f, y) if regression else self.lossfunc(_columns(f).flatten(0, -2), y.flatten())
        return found

    def _targets(self) -> dict[str, nn.Parameter]:
        """The parameters with entries that are wanted, by their names in the model."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        wanted = range(len(self.params))
        if self.subnetwork_indices is not None:
            ends = torch.tensor([p.numel() for p in self.params], device="cpu").cumsum(0)
            wanted = torch.bucketize(self.subnetwork_indices.cpu(), ends, right=True).unique().tolist()
        return {names[id(self.params[i])]: self.params[i] for i in wanted}

    def _entries(self, rows: Tensor, J: Jacobian) -> Tensor:
        """(..., P of J) -> (..., the wanted entries), in Laplace's order."""
        targets = self._targets()
        if self.subnetwork_indices is None and tuple(targets) == J.names:
            return rows
        starts, start = {}, 0
        for name in J.names:
            starts[id(targets[name])], start = start, start + targets[name].numel()
        table = torch.cat([torch.arange(p.numel(), device="cpu") + starts.get(id(p), 0) for p in self.params])
        wanted = table if self.subnetwork_indices is None else table[self.subnetwork_indices.cpu()]
        return rows[..., wanted.to(rows.device)]

    def _square(self, matrix: Tensor, J: Jacobian) -> Tensor:
        return self._entries(self._entries(matrix, J).T, J)


class PartialsGGN(PartialsInterface, GGNInterface):
    """The generalised Gauss-Newton matrix J^T H J, which is the Fisher matrix of both likelihoods; `stochastic` samples H.

    Parameters
    ----------
    model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, stochastic, num_samples
        As Laplace gives them.
    options
        Of `partials.jacobian`: `max_memory`, `check`, `method`, `randomness`.
    """

    def full(self, x: Batch, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(loss, J^T H J (P, P))."""
        if self.subnetwork_indices is not None:
            return super().full(x, y)  # (rows of the subnetwork are few: the matrix of all entries would be larger)
        J = self._jacobian(x)
        return self._lost(J, y), self._square(J.normal(self._curvature(J)), J)

    def diag(self, x: Batch, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(loss, diag(J^T H J) (P,))."""
        J = self._jacobian(x)
        return self._lost(J, y), self._entries(J.diagonal(self._curvature(J)), J)

    def _lost(self, J: Jacobian, y: Tensor) -> Tensor:
        found: Tensor = self.factor * self._loss(J.values, y)
        return found

    def _curvature(self, J: Jacobian) -> Tensor | None:
        """The loss's second derivative in the outputs, (N, C, C), of every prediction for itself; None is the identity."""
        f = _columns(J.values)
        each = f.flatten(0, -2)
        H: Tensor | None = self._get_mc_functional_fisher(each) if self.stochastic else self._get_functional_hessian(each)
        if H is None or f.ndim == 2:
            return H
        n, c = len(f), f.shape[-1]
        t = each.shape[0] // max(n, 1)
        blocks = H.new_zeros(n, t, c, t, c)
        blocks.diagonal(dim1=1, dim2=3).copy_(H.reshape(n, t, c, c).permute(0, 2, 3, 1))
        return blocks.reshape(n, t * c, t * c)


class PartialsEF(PartialsInterface, EFInterface):
    """The empirical Fisher matrix, sum_n g_n g_n^T with the gradients of the samples' losses.

    Parameters are those of `PartialsGGN` without the sampling.
    """

    def full(self, x: Batch, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(loss, sum_n g_n g_n^T (P, P)), by the convention of the host both times its `factor`."""
        if self.subnetwork_indices is not None:
            return super().full(x, y)
        G = self._gradient(x, y)
        return self.factor * G.values.sum(), self.factor * self._square(G.normal(), G)

    def diag(self, x: Batch, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(loss, its diagonal (P,))."""
        G = self._gradient(x, y)
        return self.factor * G.values.sum(), self.factor * self._entries(G.diagonal(), G)


def _columns(f: Tensor) -> Tensor:
    """Outputs (N, C), also of a model that gives one number for each sample, (N,)."""
    return f.unsqueeze(-1) if f.ndim == 1 else f
