"""What a Jacobian that computes its rows again must find as it was: tensors, modes, autocast, and in the end f's own values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ._errors import StaleError, listed
from ._problem import Problem
from ._typing import Tensor

Sources = tuple[tuple[str, Tensor, int], ...]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state at the time of the call."""

    sources: Sources
    """Tensors with the version they had."""
    modes: tuple[tuple[nn.Module, bool], ...]
    autocast: tuple[str, bool, torch.dtype]

    @classmethod
    def of(cls, problem: Problem) -> Snapshot:
        module, device = problem.module, problem.targets[0].tensor.device.type
        named = [(f"input {leaf.name!r}", leaf.tensor) for leaf in problem.leaves]
        named += [(f"parameter {t.name!r}", t.tensor) for t in problem.targets]
        if module is not None:
            named += [(f"parameter {name!r}", p) for name, p in module.named_parameters()]
            named += [
                (f"buffer {name!r} of {type(owner).__name__}", buffer)
                for owner in module.modules()
                for name, buffer in owner._buffers.items()
                if buffer is not None and not owner.training
            ]
        once = {id(t): (name, t, t._version) for name, t in reversed(named) if not t.is_inference()}
        modes = () if module is None else tuple((m, m.training) for m in module.modules())
        state = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        return cls(tuple(once.values()), modes, state)

    def plus(self, problem: Problem) -> Snapshot:
        """Also the inputs of a problem cut from the first one."""
        more = tuple((f"input {leaf.name!r}", leaf.tensor, leaf.tensor._version) for leaf in problem.leaves)
        return replace(self, sources=(*self.sources, *more))

    def demand_unchanged(self) -> None:
        for name, tensor, version in self.sources:
            if tensor._version != version:
                raise _stale(f"{name} has been changed in place", f"version {tensor._version}", f"version {version}")
        turned = [type(m).__name__ for m, training in self.modes if m.training != training]
        if turned:
            raise _stale(f"{listed(turned)} has been put into another mode (train, eval)", "another mode", "the mode of the call")

    def demand_same(self, before: Tensor, now: Tensor) -> None:
        """f's values again, to the rounding of another batch size: whatever else f reads must not have changed."""
        now = now.detach().reshape(before.shape)
        scale = before.abs().nan_to_num(0, 0, 0).max() if before.numel() else 0
        allowed = 4 * torch.finfo(before.dtype).eps ** 0.5 * scale
        gap = torch.where((before == now) | (before.isnan() & now.isnan()), 0, before - now).abs()
        if not bool((gap <= allowed).all()):
            raise _stale("f gives other values than it did", f"a difference of {float(gap.max()):.3g}", f"at most {float(allowed):.3g}")

    @contextmanager
    def again(self) -> Iterator[None]:
        """Under the autocast of the call."""
        device, enabled, dtype = self.autocast
        if torch.is_autocast_enabled(device) == enabled:
            yield
            return
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            yield


def _stale(what: str, got: str, expected: str) -> StaleError:
    return StaleError(
        f"{what} since this Jacobian was made, and its rows are computed again for each quantity (max_memory)",
        got=got,
        expected=expected,
        hint="compute the Jacobian again, or take what you need from it (dense, norms, ...) before the change",
    )
