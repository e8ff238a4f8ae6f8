"""Damped least squares on residuals: minimise |r(theta)|^2 by steps that solve min |J d - r|^2 + damping |d|^2."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch

from .._errors import InputError
from .._jacobian import Jacobian
from .._typing import Tensor
from ._steps import move, own, put_back, saved, squares

Closure = Callable[[], Jacobian]


@final
class GaussNewton(torch.optim.Optimizer):
    """Gauss-Newton with a fixed damping: theta <- theta - lr d, halved until |r|^2 falls. (Nocedal & Wright 2006, section 10.3.)

    Args:
        params: the parameters that the closure's Jacobian is about.
        lr: the length of the first step that is tried.
        damping: added to the diagonal of J^T J.
        halvings: how often a step is halved; after that the parameters stay as they were.

    >>> import torch, partials as pt
    >>> x = torch.linspace(0, 1, 20, dtype=torch.float64)
    >>> a = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> residual = lambda x: a[0] * torch.exp(a[1] * x) - 2 * torch.exp(-x)
    >>> optimizer = GaussNewton([a])
    >>> for _ in range(20):
    ...     loss = optimizer.step(lambda: pt.jacobian(residual, x, params={"a": a}))
    >>> bool(torch.allclose(a.detach(), torch.tensor([2.0, -1.0], dtype=torch.float64)))
    True
    """

    def __init__(self, params: Iterable[Any], lr: float = 1.0, damping: float = 1e-8, halvings: int = 10) -> None:
        _require(lr > 0 and damping >= 0, f"lr={lr!r}, damping={damping!r}", "a positive lr and a damping of zero or more")
        super().__init__(params, {"lr": lr, "damping": damping, "halvings": halvings})

    @torch.no_grad()
    def step(self, closure: Closure, residual: Callable[[], Tensor] | None = None) -> float:  # type: ignore[override]
        """One step; returns |r|^2 before it.

        Args:
            closure: computes the Jacobian of the residual at the present parameters; `J.values` is the residual.
            residual: the residual alone, for the trials; the closure by default.
        """
        options = self.param_groups[0]
        J = _computed(closure)
        tensors = own(J, _parameters(self))
        loss, before = squares(J.values), saved(tensors)
        direction, length = J.solve(J.values, options["damping"]), options["lr"]
        for _ in range(options["halvings"] + 1):
            move(tensors, J, direction, -length)
            if _trial(closure, residual)[0] < loss:
                return loss
            put_back(tensors, before)
            length /= 2
        return loss


@final
class LevenbergMarquardt(torch.optim.Optimizer):
    """Levenberg-Marquardt: a step is kept only where |r|^2 falls, and the damping follows how well the linear model foretold the fall.

    Damping by Nielsen's rule (Madsen, Nielsen & Tingleff 2004, "Methods for non-linear least squares problems", algorithm 3.16).

    Args:
        params: the parameters that the closure's Jacobian is about.
        damping: the first one, added to the diagonal of J^T J; `optimizer.damping` is the present one.
        tries: dampings that are tried in one step before the parameters stay as they were.
        limits: the smallest and the largest damping.

    >>> import torch, partials as pt
    >>> x = torch.linspace(0, 1, 20, dtype=torch.float64)
    >>> a = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> residual = lambda x: a[0] * torch.exp(a[1] * x) - 2 * torch.exp(-x)
    >>> optimizer = LevenbergMarquardt([a])
    >>> losses = [optimizer.step(lambda: pt.jacobian(residual, x, params={"a": a})) for _ in range(20)]
    >>> losses[-1] < 1e-20
    True
    """

    def __init__(self, params: Iterable[Any], damping: float = 1e-2, tries: int = 8, limits: tuple[float, float] = (1e-14, 1e10)) -> None:
        _require(damping > 0 and tries >= 1, f"damping={damping!r}, tries={tries!r}", "a positive damping and at least one try")
        super().__init__(params, {"tries": tries, "limits": limits})
        self.damping, self._growth = damping, 2.0
        self._next: tuple[Jacobian, tuple[int, ...]] | None = None

    @torch.no_grad()
    def step(self, closure: Closure, residual: Callable[[], Tensor] | None = None) -> float:  # type: ignore[override]
        """One step; returns |r|^2 before it.

        The closure must give the same residual for the same parameters within a step. Without `residual` a trial computes a Jacobian,
        and the next step starts from that of the trial that was kept: so the closure runs once for each step that is kept.

        Args:
            closure: computes the Jacobian of the residual at the present parameters; `J.values` is the residual.
            residual: the residual alone, for the trials, where the data change from step to step or rejections are many.
        """
        J = self._start(closure, residual is None)
        tensors = own(J, _parameters(self))
        loss, before = squares(J.values), saved(tensors)
        for _ in range(self.param_groups[0]["tries"]):
            direction = J.solve(J.values, self.damping)
            foretold = loss - squares(J @ direction - J.values)
            move(tensors, J, direction, -1.0)
            after, trial = _trial(closure, residual)
            if after < loss:
                self._kept((loss - after) / max(foretold, 1e-300))
                self._next = None if trial is None else (trial, _versions(tensors))
                return loss
            put_back(tensors, before)
            self._rejected()
            J = _computed(closure)  # the factors of the last one may read parameters, which have been written to
        self._next = (J, _versions(tensors)) if residual is None else None
        return loss

    def _start(self, closure: Closure, reuse: bool) -> Jacobian:
        """The Jacobian of the last trial, if the parameters are still those."""
        if reuse and self._next is not None and self._next[1] == _versions(self._next[0].leaves):
            return self._next[0]
        return _computed(closure)

    def _kept(self, gain: float) -> None:
        self._within(self.damping * max(1 / 3, 1 - (2 * min(gain, 1.5) - 1) ** 3))
        self._growth = 2.0

    def _rejected(self) -> None:
        self._within(self.damping * self._growth)
        self._growth *= 2

    def _within(self, damping: float) -> None:
        low, high = self.param_groups[0]["limits"]
        self.damping = min(max(damping, low), high)


def _computed(closure: Closure) -> Jacobian:
    with torch.enable_grad():
        return closure()


def _trial(closure: Closure, residual: Callable[[], Tensor] | None) -> tuple[float, Jacobian | None]:
    if residual is not None:
        return squares(residual()), None
    J = _computed(closure)
    return squares(J.values), J


def _versions(tensors: Any) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors.values())


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _require(well: bool, got: str, expected: str) -> None:
    if not well:
        raise InputError("the optimiser's options are not understood", got=got, expected=expected)
