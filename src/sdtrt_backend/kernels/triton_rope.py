"""RMS norm of each head and rotary embedding in Triton, of one stream of tokens or of two one behind the other.

The same code runs on CPU tensors under TRITON_INTERPRET=1, set before triton is first imported.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels.

import torch
import triton  # type: ignore[import, unused-ignore]
import triton.language as tl  # type: ignore[import, unused-ignore]

from .triton_gemm import EIGHT_BIT, check
from .triton_norm import encode

HEADS = 8  # of one token, that a program holds at a time: cos and sin of the token are read once


@triton.jit
def _rms_rope(first_ptr: tl.tensor, x_ptr: tl.tensor, first_weight_ptr: tl.tensor, weight_ptr: tl.tensor, cos_ptr: tl.tensor,
              sin_ptr: tl.tensor, out_scale_ptr: tl.tensor, y_ptr: tl.tensor, heads: tl.tensor, first_tokens: tl.tensor,
              tokens: tl.tensor, first_batch: tl.tensor, first_token: tl.tensor, first_head: tl.tensor, x_batch: tl.tensor,
              x_token: tl.tensor, x_head: tl.tensor, table_batch: tl.tensor, eps: tl.tensor, D: tl.constexpr,
              HEADS: tl.constexpr) -> None:
    token, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pairs = tl.arange(0, D // 2)
    d = tl.arange(0, D)[None, :]
    at = image * table_batch + token * D + 2 * pairs
    cos_even, cos_odd = tl.load(cos_ptr + at)[None, :], tl.load(cos_ptr + at + 1)[None, :]
    sin_even, sin_odd = tl.load(sin_ptr + at)[None, :], tl.load(sin_ptr + at + 1)[None, :]
    source, w_ptr, head_stride = x_ptr + image * x_batch + (token - first_tokens) * x_token, weight_ptr, x_head
    if first_ptr is not None and token < first_tokens:
        source = first_ptr + image * first_batch + token * first_token
        w_ptr = first_weight_ptr
        head_stride = first_head
    w_even, w_odd = tl.load(w_ptr + 2 * pairs).to(tl.float32)[None, :], tl.load(w_ptr + 2 * pairs + 1).to(tl.float32)[None, :]
    factor = 1.0
    if out_scale_ptr is not None:
        factor = tl.load(out_scale_ptr)
    y_ptr += (image * (first_tokens + tokens) + token) * heads * D
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        x = tl.load(source + head * head_stride + d, mask=head < heads, other=0.0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        even, odd = tl.split(tl.reshape(x, (HEADS, D // 2, 2)))
        even *= w_even
        odd *= w_odd
        y = tl.reshape(tl.join(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd), (HEADS, D)) * factor
        tl.store(y_ptr + head * D + d, encode(y, y_ptr), mask=head < heads)


def rms_rope(x: torch.Tensor, first: torch.Tensor | None, weight: torch.Tensor, first_weight: torch.Tensor | None,
             cos: torch.Tensor, sin: torch.Tensor, eps: float, out_scale: torch.Tensor | None,
             dtype: torch.dtype) -> torch.Tensor:
    """y = n * cos + rotated(n) * sin where n is the RMS norm of x over the last dimension, and rotated swaps neighbours,
    (a, b) -> (-b, a); 8-bit results are multiplied by out_scale, rounded and saturated.

    x [b, t, h, d] and ``first`` [b, t0, h, d], whose tokens come before those of x with a weight of their own: fp16, bf16 or
    fp32, views with a contiguous last dimension; d a power of 2; weights [d]; cos, sin fp32 [t0 + t, d], [1, t0 + t, d] or
    [b, t0 + t, d], contiguous; out_scale fp32 [1] = 1 / scale of the result. Returns ``dtype`` [b, t0 + t, h, d], contiguous.
    """
    n, tokens, heads, width = x.shape
    check(width >= 2 and width & (width - 1) == 0, f"heads as wide as a power of 2, not {width}")
    check(x.stride(3) == 1 and (first is None or first.stride(3) == 1), "the last dimension of x is contiguous")
    before = 0 if first is None else first.shape[1]
    check(first is None or (first.dtype == x.dtype and first.shape == (n, before, heads, width) and first_weight is not None),
          "first like x but for its number of tokens, with a weight")
    table = (before + tokens, width)
    check(tuple(cos.shape) in (table, (1, *table), (n, *table)) and sin.shape == cos.shape
          and all(t.dtype == torch.float32 and t.is_contiguous() for t in (cos, sin)),
          f"cos and sin are fp32 [{before + tokens}, {width}], contiguous, or one for each image")
    check(dtype not in EIGHT_BIT or out_scale is not None, "8-bit results need an out_scale")
    y = torch.empty((n, before + tokens, heads, width), dtype=dtype, device=x.device)
    of_table = cos[0].numel() if cos.dim() == 3 and len(cos) > 1 else 0
    strides = (*((0, 0, 0) if first is None else first.stride()[:3]), *x.stride()[:3], of_table)
    _rms_rope[(before + tokens, n)](first, x, first_weight, weight, cos, sin, out_scale if dtype in EIGHT_BIT else None, y, heads,
                                    before, tokens, *strides, eps, D=width, HEADS=HEADS, num_warps=2)
    return y
