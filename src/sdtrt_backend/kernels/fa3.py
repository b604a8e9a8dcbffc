"""FlashAttention-3 of the package ``fa3-fwd``: fp8 attention of Hopper that writes 16 bits."""

from __future__ import annotations

import torch


def attention_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: torch.Tensor, scale: float,
                  dtype: torch.dtype) -> torch.Tensor:
    """See ``ops.attention_fp8``; dtype: bfloat16, it writes no other."""
    from fa3_fwd_interface import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

    if dtype is not torch.bfloat16:
        raise ValueError(f"FlashAttention-3 writes bfloat16 over fp8 codes, not {dtype}")
    b, h, queries, d = q.shape
    of_q, of_k, _ = (s.expand(b, h) for s in scales.split(1))  # codes of v are summed as they are: the result has v's scale
    y: torch.Tensor = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=scale, q_descale=of_q,
                                      k_descale=of_k)
    return y.view(b, queries, h * d)
