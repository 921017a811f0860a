"""Attention of short rows on a processor in float32, where the step computes in 16 bits.

PyTorch's backward for a CPU takes rows of fewer than 192 queries in blocks of 32 (torch 2.13,
aten/src/ATen/native/cpu/FlashAttentionKernel.cpp), and products of 16-bit blocks that small cost it more than those of
float32 do: 8.8 against 4.1 ms for 4 rows of 116 tokens and 9 heads of 64 on one thread of an AMD EPYC (Zen 5) with
native bfloat16, a seventh of a training step of such rows. From 192 queries on both take as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SHORT = 192
"""Queries of a row from which on PyTorch takes larger blocks."""


def install_short_attention() -> None:
    """Gives sdpa, of every model in this process, what it then does with short rows where a gradient is wanted."""
    AttentionInterface.register("sdpa", _attention)


def is_widened(query: Tensor, dtype: torch.dtype) -> bool:
    """Whether attention of such a query [batch, heads, length, head_dim], in `dtype`, is computed in float32."""
    is_short = 1 < query.shape[2] < SHORT
    return is_short and query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' `sdpa_attention_forward`: returns [batch, length, heads, head_dim]."""
    found: tuple[Tensor, None]
    is_cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if is_cast else query.dtype
    if not (torch.is_grad_enabled() and is_widened(query, dtype)):
        found = sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
        return found
    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, *args, **kwargs)
    return out.to(dtype), None
