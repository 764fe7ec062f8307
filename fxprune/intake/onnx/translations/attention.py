"""Attention as one op (opset 23)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..table import NotTranslatedError, Op, translates


@translates("Attention")
def attention(op: Op, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *past: Tensor) -> Tensor:
    """[batch, heads, length, width], or heads side by side in [batch, length, heads * width]."""
    if any(p is not None for p in past) or any(op.gives(i) for i in (1, 2, 3)):
        raise NotTranslatedError("it keeps keys and values of the past, or gives its scores")
    if op.attribute("softcap", 0.0) or op.attribute("qk_matmul_output_mode", 0):
        raise NotTranslatedError("it bounds its scores")
    flat = query.dim() == 3
    heads, pairs = op.attribute("q_num_heads"), op.attribute("kv_num_heads")
    if flat:
        query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
        key = key.unflatten(-1, (pairs, -1)).transpose(1, 2)
        value = value.unflatten(-1, (pairs, -1)).transpose(1, 2)
    times = query.shape[1] // key.shape[1]
    if times > 1:
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    causal = op.flag("is_causal")
    if causal and mask is not None:
        raise NotTranslatedError("it has a mask beside that of causality")
    found = F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=op.attribute("scale"))
    return found.transpose(1, 2).flatten(2) if flat else found
