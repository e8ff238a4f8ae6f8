"""Scaled dot-product attention, which has no parameters of its own: where one stands among its arguments, and under `vmap`.

torch's `vmap` runs the fused kernels one sample after another; merged with the dimensions that f sees, the samples take one run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .._typing import Tensor
from ._parts import NoRule
from ._table import PHYSICAL, Run, rule

attention = F.scaled_dot_product_attention


@rule(attention, composite=True)
def with_parameters(
    run: Run, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
) -> Tensor:
    """A parameter among the arguments (a learned bias on the scores, learned queries) is added to zeros that the samples own."""
    given = [t for t in (query, key, value, attn_mask) if t is not None]
    zero = sum((_corner(t, query.dtype) for t in given[1:]), start=_corner(query, query.dtype))
    parts: list[Any] = [t if t is None or not t.requires_grad else t + zero for t in (query, key, value, attn_mask)]
    return attention(*parts, *args, **options)


def _corner(t: Tensor, dtype: torch.dtype) -> Tensor:
    index: Any = (..., *(slice(1),) * min(t.ndim, 3))
    return torch.zeros_like(t[index], dtype=dtype)


def merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of (N, *batch, heads, T, D) in one run of the kernel; masks broadcast within a sample."""
    if dropout_p or len({t.shape[:-3] for t in (query, key, value)}) > 1:
        raise NoRule("dropout draws by the policy of vmap; batches that broadcast are left to torch")
    lead = query.shape[:-3] if query.ndim > 3 else query.shape[:1]
    if attn_mask is not None:
        missing = query.ndim - attn_mask.ndim
        attn_mask = attn_mask.reshape(len(attn_mask), *(1,) * missing, *attn_mask.shape[1:])
        if query.ndim > 3:
            attn_mask = attn_mask.expand(*lead, -1, -1, -1)
    mask = None if attn_mask is None else _four(attn_mask)
    out = attention(_four(query), _four(key), _four(value), mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.unflatten(0, lead) if query.ndim > 3 else out.squeeze(1)


def _four(t: Tensor) -> Tensor:
    """(N * batch, heads, T, D): what the fused kernels take."""
    return t.flatten(0, -4) if t.ndim > 3 else t.unsqueeze(1)


PHYSICAL[attention] = merged
