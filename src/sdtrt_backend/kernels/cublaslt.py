"""cuBLASLt through ``torch._scaled_mm``: fp8 matrix product with one scale, bias in the epilogue."""

from __future__ import annotations

from functools import cache

import torch


@cache
def _one(device: torch.device) -> torch.Tensor:
    return torch.ones((), device=device)


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
           variant: str = "") -> torch.Tensor:
    """x, weight float8_e4m3fn, scale fp32 [1], bias in ``dtype``; fp16 or bf16 out; see ``ops.linear8``."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()  # one image's pixels as tokens are columns
    y = torch._scaled_mm(flat, weight.t(), scale_a=scale.view(()), scale_b=_one(x.device), bias=bias, out_dtype=dtype,
                         use_fast_accum=True)
    return y.view(*x.shape[:-1], weight.shape[0])
