"""The Triton kernels with the signatures of the operators in ``ops.py``."""

from __future__ import annotations

import torch

from . import triton_attention, triton_conv, triton_gemm, triton_norm

TILES = ("0", "1", "2", "3", "4")  # places in GEMM_CONFIGS and CONV_CONFIGS
# "s": all keys in one block, "f": the flash loop; the number is the place in the kernel's own table
SHORT, FLASH = ("s0", "s3"), ("f1", "f3")


def attention_variants(tokens: int, width: int) -> tuple[str, ...]:
    """Names of the configurations to time for heads of ``width`` and that many keys."""
    if width % 8 or not 16 <= width <= 128:
        return ()
    return SHORT if tokens <= triton_attention.MAX_SHORT else FLASH


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
           variant: str) -> torch.Tensor:
    """See ``ops.linear8``."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()  # one image's pixels as tokens are columns
    y = triton_gemm.gemm(flat, weight, scale, bias, dtype=dtype, config=triton_gemm.GEMM_CONFIGS[int(variant)])
    return y.view(*x.shape[:-1], weight.shape[0])


def conv(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
         stride: list[int], padding: list[int], dtype: torch.dtype, variant: str) -> torch.Tensor:
    """See ``ops.conv8``."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    return triton_conv.conv2d(x, weight, scale, bias, residual, (stride[0], stride[1]), (padding[0], padding[1]), dtype,
                              config=triton_conv.CONV_CONFIGS[int(variant)])


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out_scale: torch.Tensor | None,
              dtype: torch.dtype, variant: str) -> torch.Tensor:
    """See ``ops.attention8``."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    table = triton_attention.SHORT_CONFIGS if variant[0] == "s" else triton_attention.FLASH_CONFIGS
    y = triton_attention.attention(q, k, v, scale, out_scale, dtype, table[int(variant[1:])])
    return y.transpose(1, 2).flatten(2)


def group_norm(x: torch.Tensor, x2: torch.Tensor | None, shift: torch.Tensor | None, groups: int, weight: torch.Tensor | None,
               bias: torch.Tensor | None, eps: float, silu: bool, out_scale: torch.Tensor | None,
               dtype: torch.dtype) -> torch.Tensor:
    """See ``ops.group_norm8``."""
    return triton_norm.group_norm(x, x2, groups, weight, bias, eps, silu, out_scale, dtype, shift)


def layer_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
               out_scale: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.add_layer_norm8``."""
    total, y = triton_norm.layer_norm(x, residual, weight, bias, eps, out_scale, dtype)
    return x if total is None else total, y
