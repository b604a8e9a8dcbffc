"""Attention in Triton that writes 8 or more bits: all keys in one block where they are few (text tokens), else a flash loop.

The same code runs on CPU tensors under TRITON_INTERPRET=1, set before triton is first imported.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels.

from dataclasses import dataclass

import torch
import triton  # type: ignore[import, unused-ignore]
import triton.language as tl  # type: ignore[import, unused-ignore]

from .triton_gemm import EIGHT_BIT, check
from .triton_norm import encode

LOG2_E = 1.4426950408889634
MAX_SHORT = 128  # keys that fit one block


@dataclass(frozen=True)
class AttentionConfig:
    """A tile: block_m queries, worked on by ``warps`` of 32 threads; powers of 2.

    block_n: keys of a step of the flash loop, loaded ``stages`` - 1 steps ahead; 0: all keys in one block. tiles: of
    queries that a program of the latter takes one after the other, with the same keys, loaded ``stages`` - 1 tiles ahead.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tiles: int = 1


SHORT_CONFIGS = (
    AttentionConfig(128, 0, 4, 1),
    AttentionConfig(64, 0, 4, 1),
    AttentionConfig(128, 0, 8, 1),
    AttentionConfig(64, 0, 4, 2, tiles=2),
    AttentionConfig(128, 0, 4, 2, tiles=2),
    AttentionConfig(128, 0, 8, 2, tiles=2),
    AttentionConfig(64, 0, 4, 3, tiles=4),
    AttentionConfig(128, 0, 8, 3, tiles=4),
)
FLASH_CONFIGS = (
    AttentionConfig(128, 64, 4, 3),
    AttentionConfig(128, 128, 8, 3),
    AttentionConfig(128, 128, 8, 2),
    AttentionConfig(64, 64, 4, 3),
    AttentionConfig(64, 128, 4, 2),
    AttentionConfig(128, 64, 8, 3),
)
WIDE = AttentionConfig(64, 32, 4, 2)  # heads wider than 128 leave no room for more


@triton.jit
def _short(q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, out_scale_ptr: tl.tensor, y_ptr: tl.tensor, heads: tl.tensor,
           queries: tl.tensor, tokens: tl.tensor, scale: tl.tensor, q_image: tl.tensor, q_head: tl.tensor, q_row: tl.tensor,
           k_image: tl.tensor, k_head: tl.tensor, k_row: tl.tensor, v_image: tl.tensor, v_head: tl.tensor, v_row: tl.tensor,
           UNIT: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, TOKENS: tl.constexpr,
           TAIL: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, PER_CHANNEL: tl.constexpr) -> None:
    """A head's keys are a block of TOKENS and, where TAIL is not 0, one of TAIL: 77 fit 64 + 16, not 128.

    Strides are in UNITs of elements, so that a unit of 8 tells the compiler that rows are 16-byte aligned. scale includes
    log2(e).
    """
    image, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    d = tl.arange(0, WIDTH)[None, :]
    t = tl.arange(0, TOKENS)[:, None]
    m = tl.arange(0, BLOCK_M)[:, None]
    first = tl.program_id(0) * (BLOCK_M * TILES)
    k_ptr += (image * k_image + head * k_head) * UNIT
    v_ptr += (image * v_image + head * v_head) * UNIT
    k = tl.load(k_ptr + t * (k_row * UNIT) + d, mask=(t < tokens) & (d < D), other=0.0)
    v = tl.load(v_ptr + t * (v_row * UNIT) + d, mask=(t < tokens) & (d < D), other=0.0)
    if TAIL:
        u = TOKENS + tl.arange(0, TAIL)[:, None]
        k_tail = tl.load(k_ptr + u * (k_row * UNIT) + d, mask=(u < tokens) & (d < D), other=0.0)
        v_tail = tl.load(v_ptr + u * (v_row * UNIT) + d, mask=(u < tokens) & (d < D), other=0.0)
    q_ptr += (image * q_image + head * q_head + first.to(tl.int64) * q_row) * UNIT
    y_ptr += ((image * queries + first) * heads + head) * D
    if out_scale_ptr is not None:
        out_scale = tl.load(out_scale_ptr + head * D + d, mask=d < D, other=0.0) if PER_CHANNEL else tl.load(out_scale_ptr)
    for row in tl.range(0, BLOCK_M * TILES, BLOCK_M, num_stages=STAGES):
        inside = (m < queries - first - row) & (d < D)
        q = tl.load(q_ptr + (row + m) * (q_row * UNIT) + d, mask=inside, other=0.0)
        s = tl.dot(q, k.T) * scale
        if not TAIL:  # with a tail, all of the first block are keys
            s = tl.where(tokens > t.T, s, float("-inf"))
        top = tl.max(s, 1)
        if TAIL:
            s_tail = tl.where(tokens > u.T, tl.dot(q, k_tail.T) * scale, float("-inf"))
            top = tl.maximum(top, tl.max(s_tail, 1))
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        y = tl.dot(p.to(v.dtype), v)
        if TAIL:
            p_tail = tl.exp2(s_tail - top[:, None])
            total += tl.sum(p_tail, 1)
            y = tl.dot(p_tail.to(v.dtype), v_tail, y)
        y *= (1.0 / total)[:, None]
        if out_scale_ptr is not None:
            y *= out_scale
        tl.store(y_ptr + (row + m) * (heads * D) + d, encode(y, y_ptr), mask=inside)


@triton.jit
def _flash(q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, out_scale_ptr: tl.tensor, y_ptr: tl.tensor, heads: tl.tensor,
           queries: tl.tensor, tokens: tl.tensor, scale: tl.tensor, q_image: tl.tensor, q_head: tl.tensor, q_row: tl.tensor,
           k_image: tl.tensor, k_head: tl.tensor, k_row: tl.tensor, v_image: tl.tensor, v_head: tl.tensor, v_row: tl.tensor,
           UNIT: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
           EVEN: tl.constexpr, STAGES: tl.constexpr, PER_CHANNEL: tl.constexpr) -> None:
    """EVEN: tokens is a multiple of BLOCK_N. Strides and scale as in ``_short``."""
    image, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    d = tl.arange(0, WIDTH)[None, :]
    t = tl.arange(0, BLOCK_N)[:, None]
    m = tl.arange(0, BLOCK_M)[:, None]
    first = tl.program_id(0) * BLOCK_M
    inside = (m < queries - first) & (d < D)
    q_ptr += (image * q_image + head * q_head + first.to(tl.int64) * q_row) * UNIT
    k_ptr += (image * k_image + head * k_head) * UNIT
    v_ptr += (image * v_image + head * v_head) * UNIT
    q = tl.load(q_ptr + m * (q_row * UNIT) + d, mask=inside, other=0.0)
    k_tile = k_ptr + t * (k_row * UNIT) + d
    v_tile = v_ptr + t * (v_row * UNIT) + d
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    y = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for n in tl.range(0, tokens, BLOCK_N, num_stages=STAGES):
        if EVEN and D == WIDTH:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        else:
            k = tl.load(k_tile, mask=(t < tokens - n) & (d < D), other=0.0)
            v = tl.load(v_tile, mask=(t < tokens - n) & (d < D), other=0.0)
        s = tl.dot(q, k.T)
        if not EVEN:
            s = tl.where(tokens - n > t.T, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None])
        top = new_top
        k_tile += BLOCK_N * (k_row * UNIT)
        v_tile += BLOCK_N * (v_row * UNIT)
    y *= (1.0 / total)[:, None]
    if out_scale_ptr is not None:
        y *= tl.load(out_scale_ptr + head * D + d, mask=d < D, other=0.0) if PER_CHANNEL else tl.load(out_scale_ptr)
    y_ptr += ((image * queries + first) * heads + head) * D
    tl.store(y_ptr + m * (heads * D) + d, encode(y, y_ptr), mask=inside)


def default_config(queries: int, tokens: int, width: int) -> AttentionConfig:
    """The config for heads of ``width`` where none is given."""
    if tokens <= MAX_SHORT:
        return SHORT_CONFIGS[0] if width <= 128 and queries > 64 else SHORT_CONFIGS[1]
    return FLASH_CONFIGS[0] if width <= 64 else FLASH_CONFIGS[1] if width <= 128 else WIDE


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out_scale: torch.Tensor | None,
              dtype: torch.dtype, config: AttentionConfig | None = None) -> torch.Tensor:
    """softmax(q k^T * scale) v, no mask; 8-bit results are multiplied by out_scale, rounded and saturated.

    q fp16 or bf16 [b, h, queries, d], k and v likewise [b, h, tokens, d], views with a contiguous last dimension; d a
    multiple of 8, 16 to 256; scale > 0; out_scale fp32 [1] or [h * d] = 1 / scale of the result. Returns ``dtype``
    [b, h, queries, d] as a view of [b, queries, h, d]; no host synchronisation.
    """
    n, heads, queries, width = q.shape
    tokens = k.shape[2]
    check(16 <= width <= 256 and width % 8 == 0, f"heads 16 to 256 wide, a multiple of 8, not {width}")
    check(all(t.shape == (n, heads, tokens, width) and t.dtype == q.dtype for t in (k, v)), "k and v like q, of any tokens")
    check(q.dtype in (torch.float16, torch.bfloat16), f"fp16 or bf16, not {q.dtype}")
    check(all(t.stride(3) == 1 for t in (q, k, v)), "the last dimension of q, k and v is contiguous")
    check(tokens > 0 and scale > 0, "one key or more, and a positive scale")
    check(dtype not in EIGHT_BIT or out_scale is not None, "8-bit results need an out_scale")
    config = config or default_config(queries, tokens, width)
    strides = [s for t in (q, k, v) for s in t.stride()[:3]]
    unit = 8 if all(s % 8 == 0 for s in strides) else 1
    y = torch.empty((n, queries, heads, width), dtype=dtype, device=q.device)
    out_scale = out_scale if dtype in EIGHT_BIT else None
    arguments = (q, k, v, out_scale, y, heads, queries, tokens, scale * LOG2_E, *(s // unit for s in strides))
    options = {"UNIT": unit, "D": width, "WIDTH": triton.next_power_of_2(width), "BLOCK_M": config.block_m,
               "STAGES": config.stages, "PER_CHANNEL": out_scale is not None and out_scale.numel() > 1, "num_warps": config.warps}
    if config.block_n:
        grid = (triton.cdiv(queries, config.block_m), n * heads)
        _flash[grid](*arguments, BLOCK_N=config.block_n, EVEN=tokens % config.block_n == 0, **options)
    else:
        check(tokens <= MAX_SHORT, f"at most {MAX_SHORT} keys in one block, not {tokens}")
        block, tail = key_blocks(tokens)
        grid = (triton.cdiv(queries, config.block_m * config.tiles), n * heads)
        _short[grid](*arguments, TOKENS=block, TAIL=tail, TILES=config.tiles, **options)
    return y.transpose(1, 2)


def key_blocks(tokens: int) -> tuple[int, int]:
    """Powers of 2 from 16 that cover ``tokens`` with least waste: one, or a full one and a smaller one."""
    block = max(16, triton.next_power_of_2(tokens))
    tail = max(16, triton.next_power_of_2(tokens - block // 2))
    return (block // 2, tail) if block // 2 + tail < block else (block, 0)
