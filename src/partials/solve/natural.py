"""Natural gradients from the per-sample Jacobian of a log-density, a wave function's logarithm, or a residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import nn

from .._api import jacobian
from .._blocks import size_of
from .._errors import InputError
from .._jacobian import Jacobian
from .._typing import Tensor
from ._steps import move, own

MODES = ("real", "complex", "holomorphic")


def log_derivatives(log_psi: nn.Module, *inputs: Any, mode: str = "real", **options: Any) -> Jacobian:
    """The per-sample Jacobian of log psi in the form that `NaturalGradient` takes.

    Args:
        log_psi: a module with one number for each sample, (N,).
        mode: `"real"`: a real one, rows (N, P). `"complex"`: complex values of real parameters; the real and the imaginary part are two
            outputs, rows (N, 2, P). `"holomorphic"`: a holomorphic function of complex parameters; rows (N, 2, 2P) by the real and
            imaginary parts of each, which are the last dimension of its name's block. In all three, real least squares on these rows
            are the complex ones: minimising |J d - e|^2 over complex d is minimising over its two parts.
        options: those of `partials.jacobian`.

    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    >>> log_derivatives(net, torch.randn(5, 3)).shape
    (5, 21)
    """
    if mode not in MODES:
        raise InputError(f"mode={mode!r} is unknown", got=repr(mode), expected=f"one of: {', '.join(MODES)}")
    if mode == "real":
        return jacobian(log_psi, *inputs, **options)
    if mode == "complex":
        return jacobian(_as_real(log_psi), *inputs, params=log_psi, **options)
    parts = {name: torch.view_as_real(p.detach()).requires_grad_() for name, p in log_psi.named_parameters() if p.is_complex()}
    if len(parts) < len(list(log_psi.parameters())):
        raise InputError("a holomorphic function has complex parameters only", got="some that are real", hint='mode="complex"')

    def of_parts(*given: Any) -> Tensor:
        whole = {name: torch.view_as_complex(part) for name, part in parts.items()}
        return torch.view_as_real(torch.func.functional_call(log_psi, whole, given))

    return jacobian(of_parts, *inputs, params=parts, **options)


def _as_real(log_psi: nn.Module) -> Callable[..., Tensor]:
    return lambda *given: torch.view_as_real(log_psi(*given))


@final
class NaturalGradient(torch.optim.Optimizer):
    """theta <- theta - lr d with d = argmin |J d - e|^2 / N + damping |d - momentum d'|^2, d' being the step before.

    With `centre`, the mean over samples is taken from J and e first, as variational Monte Carlo needs: then J J^T is the quantum geometric
    tensor's kernel and d the stochastic reconfiguration step. The smaller of J J^T (N of them) and J^T J (P) is solved with. With momentum
    this is SPRING. (Sorella 1998; Chen & Heyl 2024, minSR; Goldshlager, Abrahamsen & Lin 2024, SPRING.)

    Args:
        params: the parameters that the closure's Jacobian is about.
        lr, damping, momentum: see above.
        centre: False for residuals of equations.
        max_norm: the longest step, as lr |d|; None for no bound.

    >>> import torch, partials as pt
    >>> net = torch.nn.Linear(2, 1)
    >>> X = torch.randn(8, 2)
    >>> optimizer = NaturalGradient(net.parameters(), lr=1.0, damping=1e-6, centre=False)
    >>> def closure():
    ...     J = pt.jacobian(lambda X: net(X)[:, 0] - X.sum(1), X, params=net)
    ...     return J, J.values
    >>> for _ in range(3):
    ...     loss = optimizer.step(closure)
    >>> float(loss) < 1e-8
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        damping: float = 1e-3,
        momentum: float = 0.0,
        centre: bool = True,
        max_norm: float | None = None,
    ) -> None:
        if not (lr > 0 and damping > 0 and 0 <= momentum < 1):
            raise InputError(
                "the optimiser's options are not understood",
                got=f"lr={lr!r}, damping={damping!r}, momentum={momentum!r}",
                expected="a positive lr and damping, and a momentum in [0, 1)",
            )
        super().__init__(params, {"lr": lr, "damping": damping, "momentum": momentum, "centre": centre, "max_norm": max_norm})
        self._before: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], tuple[Jacobian, Tensor]]) -> float:  # type: ignore[override]
        """One step; returns the mean of |e|^2 (its variance where `centre` is set).

        Args:
            closure: gives J and e, (N,), real or complex (local energies, or the loss's derivative by the outputs); the J of
                `log_derivatives`, or of a residual with e its values.
        """
        options = self.param_groups[0]
        with torch.enable_grad():
            J, e = closure()
        tensors = own(J, [p for group in self.param_groups for p in group["params"]])
        e = torch.view_as_real(e) if e.is_complex() and J.out == (2,) else e
        if tuple(e.shape) != (len(J), *J.out):
            if J.out == (2,) and tuple(e.shape) == (len(J),):
                e = torch.stack([e, torch.zeros_like(e)], -1)
            else:
                raise InputError("e does not fit the Jacobian", got=f"shape {tuple(e.shape)}", expected=f"{(len(J), *J.out)}")
        direction = self._direction(J, e.to(J.values), options)
        self._before = direction if options["momentum"] else None
        length, longest = options["lr"] * float(direction.norm()), options["max_norm"]
        move(tensors, J, direction, -options["lr"] * (min(1.0, longest / length) if longest is not None and length > 0 else 1.0))
        e = e - e.mean(0) if options["centre"] else e
        return float(e.square().sum() / max(len(J), 1))

    def _direction(self, J: Jacobian, e: Tensor, options: Any) -> Tensor:
        n, momentum = len(J), options["momentum"]
        drift = self._before * momentum if momentum and self._before is not None else None
        wanted = e if drift is None else e - J @ drift
        if options["centre"]:
            found = _centred(J, wanted - wanted.mean(0), options["damping"] * n)
        else:
            found = J.solve(wanted, options["damping"] * n)
        return found if drift is None else found + drift


def _centred(J: Jacobian, e: Tensor, damping: float) -> Tensor:
    """argmin |(J - mean) d - e|^2 + damping |d|^2 for e without mean, by whichever matrix is smaller."""
    n, c, width = len(J), size_of(J.out), J.shape[-1]
    if n * c <= width:
        kernel = J.gram().reshape(n, c, n, c)
        kernel = kernel - kernel.mean(0, keepdim=True)
        kernel = (kernel - kernel.mean(2, keepdim=True)).reshape(n * c, n * c)
        kernel.diagonal().add_(damping)
        y = torch.linalg.solve(kernel, e.reshape(n * c)).reshape(e.shape)
        return J.T @ (y - y.mean(0))
    means = J.mean().reshape(c, width) * math.sqrt(n)
    normal = J.normal() - means.mT @ means
    normal.diagonal().add_(damping)
    return torch.linalg.solve(normal, J.T @ e)
