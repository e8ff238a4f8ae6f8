"""Scaled dot-product attention, written out; multi-head attention is run from torch's own Python, which ends here."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..jets import Jet, NoRule, linear, plus
from ..table import jet_rule
from .products import matmul
from .reduce import softmax


@jet_rule(F.scaled_dot_product_attention)
def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Jet:
    if dropout_p or enable_gqa:
        raise NoRule("attention with dropout or grouped queries")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if isinstance(query, Jet) or isinstance(key, Jet):
        turned = linear(key, lambda t: t.mT) if isinstance(key, Jet) else key.mT
        scores: Any = linear(matmul(query, turned), lambda t: t * factor)
        like = scores.anything
    else:
        scores = like = query @ key.mT * factor
    if is_causal:
        size = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(size, dtype=torch.bool, device=like.device).tril()
    if attn_mask is not None:
        if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=like.dtype, device=like.device).masked_fill(~attn_mask, -math.inf)
        scores = plus(scores, attn_mask) if isinstance(scores, Jet) or isinstance(attn_mask, Jet) else scores + attn_mask
    weights = softmax(scores, -1) if isinstance(scores, Jet) else torch.softmax(scores, -1)
    return matmul(weights, value)
