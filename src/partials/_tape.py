"""`tape`: the Jacobian of something that was computed before by code of the user's own, nested reverse passes included."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import nn

from ._errors import CheckError, InputError, MethodError
from ._jacobian import Jacobian
from ._plan import Plan, Verdict
from ._problem import normalise
from ._run import wrap
from ._typing import Tensor
from .capture.engine import parameters, solve
from .capture.tape import TapeRecorder
from .capture.trace import Refused


@final
class tape:
    """Record every use of the parameters of `net` in the code inside, forward and in reverse passes, for `tape.jacobian(r)` afterwards.

    The code inside is the user's own and stays as it is: `torch.autograd.grad(..., create_graph=True)` of any depth, batched as usual.
    An ordinary `loss.backward()` of what it computed works as well.

    Args:
        net: a module; or a mapping of names to tensors, or a sequence of tensors, that the code uses.
        inputs: tensors that depend on the samples. Without any, every tensor but parameters and buffers is taken for data, which is
            right unless the code makes constants of its own and combines them with a parameter alone.

    >>> import torch, partials as pt
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> X = torch.rand(5, 2, requires_grad=True)
    >>> with pt.tape(net) as tape:
    ...     u = net(X)
    ...     (g,) = torch.autograd.grad(u.sum(), X, create_graph=True)
    ...     (h,) = torch.autograd.grad(g[:, 0].sum(), X, create_graph=True)
    ...     r = g[:, 1] - h[:, 0]  # u_t - u_xx
    >>> tape.jacobian(r).shape
    (5, 33)
    """

    def __init__(self, net: Any, *inputs: Tensor) -> None:
        self._net = net
        self._problem = normalise(_Residual(), (torch.zeros(1, device="cpu"),), {}, params=net)
        found = parameters(self._problem, self._problem.tensors())
        self._recorder = TapeRecorder(found, inputs, 0)
        self._recorder.known_samples = bool(inputs)
        if isinstance(net, nn.Module):
            self._recorder.buffers = frozenset(id(buffer) for buffer in net.buffers())
        self._tensors = found
        self._inputs = inputs

    def __enter__(self) -> tape:
        if not self._recorder.open:
            raise InputError("a tape records once", got="a second `with`", hint="pt.tape(net) anew for each computation")
        self._recorder.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._recorder.__exit__(*error)  # type: ignore[no-untyped-call]
        self._recorder.open = False

    def jacobian(self, r: Tensor, check: str = "first") -> Jacobian:
        """The Jacobian of r, (N, *out) and computed inside, by the parameters. `check="never"` leaves out one backward to compare with.

        Raises
        ------
        InputError
            where r has no samples in its first dimension.
        MethodError
            where a use was not recorded: the code reaches a parameter through something that the tape does not see or has no rule for.
        CheckError
            where the rows do not add up to one ordinary backward.
        """
        if not isinstance(r, torch.Tensor) or not r.ndim or not len(r):
            got = f"shape {tuple(r.shape)}" if isinstance(r, torch.Tensor) else type(r).__name__
            raise InputError("a tape's residual has one entry or block for each sample", got=got, expected="a tensor (N, *out)")
        problem = normalise(_Residual(), (r.detach(),), {}, params=self._net)
        try:
            computed = solve(problem, (r, None, self._recorder.trace, self._tensors), "taped")
        except Refused as refused:
            raise MethodError(
                "the tape does not hold every use of the parameters",
                got=str(refused),
                hint="pt.tape(net, X) to name the data, or pt.derivatives in place of torch.autograd.grad",
            ) from None
        shapes = {t.name: problem.shape_of(t) for t in problem.targets}
        verdict = Verdict("capture", "every forward and transposed use on a tape")
        plan = Plan(
            "a tape", "capture", (verdict,), len(r), tuple(r.shape[1:]), shapes, str(r.dtype).removeprefix("torch."), recorded=computed.uses
        )
        J: Any = wrap(problem, computed, plan)
        if check != "never":
            self._compare(J, r)
        return J

    def _compare(self, J: Jacobian, r: Tensor) -> None:
        """The rows against one ordinary backward, folded by sample."""
        u = torch.randn(r.shape, generator=torch.Generator("cpu").manual_seed(0), dtype=r.dtype, device="cpu").to(r.device)
        if not r.requires_grad:
            return
        gradients = torch.autograd.grad(r, list(self._tensors.values()), u, retain_graph=True, allow_unused=True)
        ours = J.unflatten(J.T @ u)
        for (name, tensor), gradient in zip(self._tensors.items(), gradients, strict=True):
            expected = torch.zeros_like(tensor) if gradient is None else gradient
            error, scale = (ours[name] - expected).norm(), expected.norm() + J[name].norm()
            if error > torch.finfo(r.dtype).eps ** 0.75 * scale:
                raise CheckError(
                    f"the rows of {name!r} do not add up to one backward",
                    got=f"a difference of {float(error):.2e}",
                    expected=f"at most {float(torch.finfo(r.dtype).eps ** 0.75 * scale):.2e}",
                    hint="each sample's residual must depend on its own data only; or report it",
                )


class _Residual:
    """Stands for the code on the tape, which has run already; each is a function of its own."""

    __name__ = "a tape"

    def __call__(self, r: Tensor) -> Tensor:
        return r
