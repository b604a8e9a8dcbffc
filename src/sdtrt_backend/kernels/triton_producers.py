"""Norms, GEGLU and short-key attention in Triton that write 8 bits: memory-bound, so each tensor is read once (a group norm's
twice) in 16-byte accesses and written once.

The same code runs on CPU tensors under TRITON_INTERPRET=1, set before triton is first imported.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels.

import torch
import triton  # type: ignore[import, unused-ignore]
import triton.language as tl  # type: ignore[import, unused-ignore]

from .triton_gemm import check, gelu

CHANNELS = 64  # of a group norm's tile: 128 bytes of 16-bit channels, a cache line
ROWS = 32
PROGRAMS = 1056  # that fill a GPU of 132 multiprocessors with 8 each
QUERIES = 128
MAX_TOKENS = 128


@triton.jit
def encode(y: tl.tensor, y_ptr: tl.tensor) -> tl.tensor:
    """fp32 -> the element type of y_ptr; 8-bit ones saturated, int8 rounded to nearest even."""
    if y_ptr.dtype.element_ty == tl.int8:
        y = tl.minimum(tl.maximum(y, -128.0), 127.0)
        y = (y + 12582912.0) - 12582912.0  # 1.5 * 2^23: fp32 holds only integers there, so the addition rounds
    elif y_ptr.dtype.element_ty == tl.float8e4nv:
        y = tl.minimum(tl.maximum(y, -448.0), 448.0)
    return y.to(y_ptr.dtype.element_ty)


@triton.jit
def _layer_norm(x_ptr: tl.tensor, residual_ptr: tl.tensor, sum_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor,
                out_scale_ptr: tl.tensor, y_ptr: tl.tensor, width: tl.tensor, eps: tl.tensor, PER_CHANNEL: tl.constexpr,
                BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * width
    c = tl.arange(0, BLOCK)
    inside = c < width
    x = tl.load(x_ptr + at + c, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at + c, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at + c, rounded, mask=inside)
        x = rounded.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x) / width, 0.0)
    y = centred * (1.0 / tl.sqrt(tl.sum(centred * centred) / width + eps))
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    if out_scale_ptr is not None:
        y *= tl.load(out_scale_ptr + c, mask=inside, other=0.0) if PER_CHANNEL else tl.load(out_scale_ptr)
    tl.store(y_ptr + at + c, encode(y, y_ptr), mask=inside)


def layer_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
               out_scale: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + residual, its norm); see ``ops.add_layer_norm8``."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    width = x.shape[-1]
    y, total = torch.empty_like(x, dtype=dtype), x if residual is None else torch.empty_like(x)
    _layer_norm[(x.numel() // width,)](x, residual, total, weight, bias, out_scale, y, width, eps,
                                       PER_CHANNEL=out_scale is not None and out_scale.numel() > 1,
                                       BLOCK=triton.next_power_of_2(width), num_warps=4 if width <= 2048 else 8)
    return total, y


@triton.jit
def _geglu(x_ptr: tl.tensor, out_scale_ptr: tl.tensor, y_ptr: tl.tensor, width: tl.tensor, PER_CHANNEL: tl.constexpr,
           BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    hidden = tl.load(x_ptr + row * 2 * width + c, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * 2 * width + width + c, mask=inside, other=0.0).to(tl.float32)
    y = hidden * gelu(gate)
    if out_scale_ptr is not None:
        y *= tl.load(out_scale_ptr + c, mask=inside, other=0.0) if PER_CHANNEL else tl.load(out_scale_ptr)
    tl.store(y_ptr + row * width + c, encode(y, y_ptr), mask=inside)


def geglu(x: torch.Tensor, out_scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """See ``ops.geglu8``."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], width), dtype=dtype)
    block = min(1024, triton.next_power_of_2(width))
    _geglu[(x.numel() // (2 * width), triton.cdiv(width, block))](
        x, out_scale, y, width, PER_CHANNEL=out_scale is not None and out_scale.numel() > 1, BLOCK=block, num_warps=4)
    return y


@triton.jit
def _channel_sums(x_ptr: tl.tensor, pivot_ptr: tl.tensor, sums_ptr: tl.tensor, pixels: tl.tensor, channels: tl.tensor,
                  first: tl.tensor, all_channels: tl.tensor, chunk: tl.tensor, CHANNELS: tl.constexpr,
                  ROWS: tl.constexpr) -> None:
    """Per image, chunk of pixels and channel: sum and sum of squares of x minus the channel's first value, which keeps
    a mean that is large beside the deviation from cancelling. sums [images, chunks, 2, all channels]."""
    image = tl.program_id(0)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    x_ptr += image.to(tl.int64) * pixels * channels
    pivot = tl.load(x_ptr + c, mask=inside, other=0.0).to(tl.float32)
    # summed over the rows only at the end: a reduction between warps in the loop would cost more than its loads
    one = tl.zeros((ROWS, CHANNELS), tl.float32)
    two = tl.zeros((ROWS, CHANNELS), tl.float32)
    start = tl.program_id(1) * chunk
    end = tl.minimum(start + chunk, pixels)
    for row in tl.range(start, end, ROWS, loop_unroll_factor=4):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & inside[None, :]
        x = tl.load(x_ptr + (rows[:, None] * channels + c[None, :]), mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - pivot[None, :], 0.0)
        one += x
        two += x * x
    out = sums_ptr + ((image * tl.num_programs(1) + tl.program_id(1)) * 2) * all_channels + first + c
    tl.store(out, tl.sum(one, 0), mask=inside)
    tl.store(out + all_channels, tl.sum(two, 0), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(pivot_ptr + image * all_channels + first + c, pivot, mask=inside)


@triton.jit
def _group_factors(sums_ptr: tl.tensor, pivot_ptr: tl.tensor, shift_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor,
                   factor_ptr: tl.tensor, offset_ptr: tl.tensor, pixels: tl.tensor, channels: tl.tensor, chunks: tl.tensor,
                   width: tl.tensor, eps: tl.tensor, WIDTH: tl.constexpr, CHUNKS: tl.constexpr) -> None:
    """Per image and group of ``width`` channels: the factor and offset of each channel that normalise and apply the affine."""
    image, group = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, WIDTH)
    inside = i < width
    c = group * width + i
    j = tl.arange(0, CHUNKS)
    at = sums_ptr + ((image * chunks + j[:, None]) * 2) * channels + c[None, :]
    mask = (j < chunks)[:, None] & inside[None, :]
    one = tl.sum(tl.load(at, mask=mask, other=0.0), 0)
    two = tl.sum(tl.load(at + channels, mask=mask, other=0.0), 0)
    mean = tl.load(pivot_ptr + image * channels + c, mask=inside, other=0.0) + one / pixels
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + image * channels + c, mask=inside, other=0.0).to(tl.float32)
        mean += shift
    spread = tl.sum(tl.where(inside, two - one * one / pixels, 0.0))
    group_mean = tl.sum(tl.where(inside, mean, 0.0)) / width
    away = tl.where(inside, mean - group_mean, 0.0)
    variance = (spread + pixels * tl.sum(away * away)) / (pixels * width)
    factor = tl.zeros((WIDTH,), tl.float32) + 1.0 / tl.sqrt(variance + eps)
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    offset = -group_mean * factor
    if shift_ptr is not None:
        offset += shift * factor
    if bias_ptr is not None:
        offset += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(factor_ptr + image * channels + c, factor, mask=inside)
    tl.store(offset_ptr + image * channels + c, offset, mask=inside)


@triton.jit
def _normalise(x_ptr: tl.tensor, factor_ptr: tl.tensor, offset_ptr: tl.tensor, out_scale_ptr: tl.tensor, y_ptr: tl.tensor,
               pixels: tl.tensor, channels: tl.tensor, first: tl.tensor, all_channels: tl.tensor, chunk: tl.tensor,
               SILU: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr) -> None:
    image = tl.program_id(0)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    factor = tl.load(factor_ptr + image * all_channels + first + c, mask=inside, other=0.0)
    offset = tl.load(offset_ptr + image * all_channels + first + c, mask=inside, other=0.0)
    scale = 1.0 if out_scale_ptr is None else tl.load(out_scale_ptr)
    start = tl.program_id(1) * chunk
    end = tl.minimum(start + chunk, pixels)
    x_ptr += image.to(tl.int64) * pixels * channels
    y_ptr += image.to(tl.int64) * pixels * all_channels + first
    for row in tl.range(start, end, ROWS, loop_unroll_factor=4):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & inside[None, :]
        x = tl.load(x_ptr + (rows[:, None] * channels + c[None, :]), mask=mask, other=0.0).to(tl.float32)
        y = x * factor[None, :] + offset[None, :]
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(y_ptr + (rows[:, None] * all_channels + c[None, :]), encode(y * scale, y_ptr), mask=mask)


def group_norm(x: torch.Tensor, x2: torch.Tensor | None, shift: torch.Tensor | None, groups: int, weight: torch.Tensor | None,
               bias: torch.Tensor | None, eps: float, silu: bool, out_scale: torch.Tensor | None,
               dtype: torch.dtype) -> torch.Tensor:
    """See ``ops.group_norm8``; out_scale has one element. Deterministic: partial sums are added in a fixed order."""
    parts = [t.contiguous(memory_format=torch.channels_last) for t in (x, x2) if t is not None]
    n, _, h, w = x.shape
    widths = [t.shape[1] for t in parts]
    channels, pixels = sum(widths), h * w
    check(channels % groups == 0, f"channels ({channels}) are a multiple of groups ({groups})")
    y = torch.empty((n, channels, h, w), dtype=dtype, device=x.device, memory_format=torch.channels_last)
    blocks = n * triton.cdiv(channels, CHANNELS)
    chunk = triton.cdiv(pixels, max(1, min(PROGRAMS // blocks, triton.cdiv(pixels, ROWS))))
    chunk = triton.cdiv(chunk, ROWS) * ROWS
    chunks = triton.cdiv(pixels, chunk)
    floats = {"dtype": torch.float32, "device": x.device}
    sums, pivot = torch.empty((n, chunks, 2, channels), **floats), torch.empty((n, channels), **floats)
    factor, offset = torch.empty((n, channels), **floats), torch.empty((n, channels), **floats)
    first = [0, widths[0]][: len(parts)]
    tile = {"CHANNELS": CHANNELS, "ROWS": ROWS, "num_warps": 4}
    for part, width, start in zip(parts, widths, first, strict=True):
        _channel_sums[(n, chunks, triton.cdiv(width, CHANNELS))](part, pivot, sums, pixels, width, start, channels, chunk, **tile)
    _group_factors[(n, groups)](sums, pivot, None if shift is None else shift.contiguous(), weight, bias, factor, offset, pixels,
                                channels, chunks, channels // groups, eps, WIDTH=triton.next_power_of_2(channels // groups),
                                CHUNKS=triton.next_power_of_2(chunks), num_warps=4)
    for part, width, start in zip(parts, widths, first, strict=True):
        _normalise[(n, chunks, triton.cdiv(width, CHANNELS))](part, factor, offset, out_scale, y, pixels, width, start, channels,
                                                             chunk, SILU=silu, **tile)
    return y


@triton.jit
def _short_attention(q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, out_scale_ptr: tl.tensor, y_ptr: tl.tensor,
                     heads: tl.tensor, queries: tl.tensor, tokens: tl.tensor, width: tl.tensor, scale: tl.tensor,
                     q_image: tl.tensor, q_head: tl.tensor, q_row: tl.tensor, k_image: tl.tensor, k_head: tl.tensor,
                     k_row: tl.tensor, v_image: tl.tensor, v_head: tl.tensor, v_row: tl.tensor, PER_CHANNEL: tl.constexpr,
                     QUERIES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """All keys of a head in one block. scale includes log2(e)."""
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    m = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    t = tl.arange(0, TOKENS)
    d = tl.arange(0, WIDTH)
    token = (t < tokens)[:, None] & (d < width)[None, :]
    query = (m < queries)[:, None] & (d < width)[None, :]
    image, head = image.to(tl.int64), head.to(tl.int64)
    k = tl.load(k_ptr + image * k_image + head * k_head + t[:, None] * k_row + d[None, :], mask=token, other=0.0)
    v = tl.load(v_ptr + image * v_image + head * v_head + t[:, None] * v_row + d[None, :], mask=token, other=0.0)
    q = tl.load(q_ptr + image * q_image + head * q_head + m.to(tl.int64)[:, None] * q_row + d[None, :], mask=query, other=0.0)
    s = tl.where((t < tokens)[None, :], tl.dot(q, k.T) * scale, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    y = tl.dot(p.to(v.dtype), v) / tl.sum(p, 1)[:, None]
    column = head * width + d
    if out_scale_ptr is not None:
        if PER_CHANNEL:
            y *= tl.load(out_scale_ptr + column, mask=d < width, other=0.0)[None, :]
        else:
            y *= tl.load(out_scale_ptr)
    at = (image * queries + m.to(tl.int64)) * heads * width
    tl.store(y_ptr + at[:, None] + column[None, :], encode(y, y_ptr), mask=query)


def short_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out_scale: torch.Tensor | None,
                    dtype: torch.dtype, variant: str = "") -> torch.Tensor:
    """Attention over at most 128 keys; see ``ops.attention8``. variant: queries of a program."""
    n, heads, queries, width = q.shape
    tokens = k.shape[2]
    check(tokens <= MAX_TOKENS, f"at most {MAX_TOKENS} keys, not {tokens}")
    check(all(t.stride(3) == 1 for t in (q, k, v)), "the last dimension of q, k and v is contiguous")
    y = q.new_empty((n, queries, heads * width), dtype=dtype)
    block = int(variant or QUERIES)
    _short_attention[(triton.cdiv(queries, block), n * heads)](
        q, k, v, out_scale, y, heads, queries, tokens, width, scale * 1.4426950408889634, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], PER_CHANNEL=out_scale is not None and out_scale.numel() > 1, QUERIES=block,
        TOKENS=max(16, triton.next_power_of_2(tokens)), WIDTH=max(16, triton.next_power_of_2(width)), num_warps=4 if block <= 64 else 8)
    return y
