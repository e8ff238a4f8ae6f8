"""What torch cannot differentiate as often as is asked, written out in elementary operations, for nested reverse mode.

`layer_norm` and `instance_norm` are silently wrong from the third reverse pass on (torch 2.13); the others say that they have no further
derivative: `cdist` and `hardsigmoid` have one, and attention by its fast kernels too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .._compat import body_of
from .._typing import Tensor
from ..methods._composite import TABLE, Composite


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    if inplace:
        return F.hardsigmoid(input, True)
    return torch.where((input > -3) & (input < 3), input / 6 + 0.5, (input >= 3).to(input.dtype))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or enable_gqa:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value


def multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    """torch's own Python, under a mode that sees the attention inside."""
    body = body_of(F.multi_head_attention_forward) or F.multi_head_attention_forward
    with Composite(EVERY_ORDER):
        return body(*args, **kwargs)


EVERY_ORDER: dict[Any, Any] = {
    **TABLE,
    torch.cdist: cdist,
    F.hardsigmoid: hardsigmoid,
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
}
