"""The device "pretend": an accelerator's rules on the CPU's memory, so that tensors made on the wrong device are errors on any machine."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import sys
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "pretend"
Tensor = torch.Tensor


def why_not() -> str | None:
    """What is lacking to build the device; None where nothing is."""
    missing = [program for program in ("g++", "ninja") if shutil.which(program) is None]
    return f"no {' and no '.join(missing)} to build the device {NAME!r} with" if missing else None


_KERNELS = torch.library.Library("aten", "IMPL")


def _lstm_cell(
    gates: Tensor, hidden: Tensor, cx: Tensor, bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The cells that torch takes on every device but the CPU, whose own kernels lack them."""
    gates = gates + hidden if bias is None else gates + bias + (hidden + hidden_bias)
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(
    grad_hy: Tensor | None, grad_cy: Tensor | None, cx: Tensor, cy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    i, f, g, o = workspace.chunk(4, 1)
    tanh, grad_hy = cy.tanh(), torch.zeros_like(cy) if grad_hy is None else grad_hy
    to_cell = grad_hy * o * (1 - tanh**2) + (0 if grad_cy is None else grad_cy)
    parts = [to_cell * g * i * (1 - i), to_cell * cx * f * (1 - f), to_cell * i * (1 - g**2), grad_hy * tanh * o * (1 - o)]
    gates = torch.cat(parts, 1)
    return gates, to_cell * f, gates.sum(0)


def _gru_cell(
    gates: Tensor, hidden: Tensor, hx: Tensor, bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if bias is not None and hidden_bias is not None:
        gates, hidden = gates + bias, hidden + hidden_bias
    (ir, iz, n), (hr, hz, hn) = gates.chunk(3, 1), hidden.chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (n + r * hn).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, hn], 1)


def _gru_cell_backward(grad: Tensor, workspace: Tensor, has_bias: bool) -> tuple[Tensor, ...]:
    r, z, n, hx, hn = workspace.chunk(5, 1)
    to_n, to_z = grad * (1 - z) * (1 - n**2), grad * (hx - n) * z * (1 - z)
    to_r = to_n * hn * r * (1 - r)
    gates, hidden = torch.cat([to_r, to_z, to_n], 1), torch.cat([to_r, to_z, to_n * r], 1)
    return gates, hidden, grad * z, gates.sum(0), hidden.sum(0)


@functools.cache
def load() -> torch.device:
    """The device, built where torch's cache of extensions does not hold it yet."""
    source = Path(__file__).with_suffix(".cpp")
    version = hashlib.sha256(source.read_bytes()).hexdigest()[:8]  # (another tree's does not take its place while it is in use)
    cpp_extension.load(f"{NAME}_{version}", [str(source)], extra_cflags=["-O1"], is_python_module=False)
    for kernel in (_lstm_cell, _lstm_cell_backward, _gru_cell, _gru_cell_backward):
        _KERNELS.impl(
            kernel.__name__.replace("_", "_thnn_fused_", 1) + ("_impl" if kernel is _lstm_cell_backward else ""), kernel, "PrivateUse1"
        )
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        device=contextlib.nullcontext,
        synchronize=lambda device=NAME: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16, torch.float32],
        get_rng_state=lambda device=NAME: torch.ops.pretend.get_state(),
        set_rng_state=lambda state, device=NAME: torch.ops.pretend.set_state(state),
        manual_seed_all=torch.ops.pretend.seed,
        manual_seed=torch.ops.pretend.seed,
        _is_in_bad_fork=lambda: False,
    )
    torch._register_device_module(NAME, module)
    sys.modules[f"torch.{NAME}"] = module
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device(NAME, 0)
