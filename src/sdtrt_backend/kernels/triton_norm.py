"""Group norm, layer norm and GEGLU in Triton that write 8 or more bits: memory-bound, 16-byte accesses along the channels.

The same code runs on CPU tensors under TRITON_INTERPRET=1, set before triton is first imported.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels.

from dataclasses import dataclass
from functools import cache

import torch
import triton  # type: ignore[import, unused-ignore]
import triton.language as tl  # type: ignore[import, unused-ignore]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # type: ignore[import, unused-ignore]

from .triton_gemm import EIGHT_BIT, check, programs

CHUNKS = 64  # of an image in the first pass, at most: each program of the second pass reads the statistics of all


@dataclass(frozen=True)
class NormConfig:
    """A tile of a group norm: block_c channels by ``rows`` pixels, powers of 2; ``warps`` of 32 threads work on it.

    per_sm, per_sm_read: programs on a multiprocessor of the second pass and of the first. Few in the first: each
    of the second reads all their partial statistics. overlap: the second pass starts while the first one ends
    (programmatic dependent launch). fast_silu: 8-bit results take the hardware's tanh, relative error 2^-11.
    """

    block_c: int
    rows: int
    warps: int
    per_sm: int
    per_sm_read: int
    overlap: bool = False
    fast_silu: bool = False


NORM_CONFIGS = (
    NormConfig(64, 32, 8, 4, 2),
    NormConfig(64, 32, 8, 4, 2, overlap=True),
    NormConfig(64, 16, 4, 8, 4, overlap=True),
    NormConfig(64, 64, 8, 3, 2, overlap=True),
    NormConfig(128, 16, 8, 4, 3, overlap=True),
    NormConfig(64, 16, 4, 8, 4, overlap=True, fast_silu=True),
    NormConfig(64, 32, 8, 4, 2, overlap=True, fast_silu=True),
)


@dataclass(frozen=True)
class RowConfig:
    """A program of a layer norm: ``rows`` rows by ``warps`` of 32 threads."""

    rows: int
    warps: int


@triton.jit
def encode(y: tl.tensor, y_ptr: tl.tensor) -> tl.tensor:
    """fp32 -> the element type of y_ptr; 8-bit ones saturated and rounded to nearest even."""
    if y_ptr.dtype.element_ty == tl.int8:
        # 1.5 * 2^23: fp32 holds only integers there, so the addition rounds and the integer is the low byte; the conversion
        # instruction has an eighth of an addition's rate
        code = (tl.minimum(tl.maximum(y, -128.0), 127.0) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif y_ptr.dtype.element_ty == tl.float8e4nv:
        code = tl.minimum(tl.maximum(y, -448.0), 448.0).to(tl.float8e4nv)
    else:
        code = y.to(y_ptr.dtype.element_ty)
    return code


@triton.jit
def silu(y: tl.tensor, FAST: tl.constexpr) -> tl.tensor:
    """y * sigmoid(y), fp32."""
    if FAST:  # one instruction of the special-function unit instead of two
        half = 0.5 * y
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1)
        y = half + half * t
    else:
        r = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * y))  # r * r: a division takes three times the instructions
        y = y * (r * r)
    return y


@triton.jit
def gelu(x: tl.tensor) -> tl.tensor:
    """x * Phi(x), fp32, absolute error below 1.5e-7 |x|: Abramowitz and Stegun 7.1.26, half the work of the library's erf."""
    z = tl.abs(x) * 0.7071067811865476
    r = tl.rsqrt(1.0 + 0.3275911 * z)
    t = r * r
    p = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    # p * exp(-z^2) = Phi(-|x|)
    return tl.maximum(x, 0.0) - tl.abs(x) * (p * tl.exp2(-1.4426950408889634 * z * z))


@triton.jit
def _channel_statistics(x_ptr: tl.tensor, x2_ptr: tl.tensor, shift_ptr: tl.tensor, partial_ptr: tl.tensor, pixels: tl.tensor,
                        c1: tl.tensor, c2: tl.tensor, chunk: tl.tensor, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
                        OVERLAP: tl.constexpr) -> None:
    """Per image, chunk of pixels and channel: mean, and sum of squared distances from it.

    partial fp32 [images, chunks, 2, c1 + c2]. Sums are of x minus the chunk's first pixel: a mean that is large beside the
    deviation does not cancel.
    """
    if OVERLAP:
        gdc_launch_dependents()
    block, part, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = c1
    first = 0
    if x2_ptr is not None and block >= tl.cdiv(c1, BLOCK_C):
        block -= tl.cdiv(c1, BLOCK_C)
        x_ptr = x2_ptr
        width = c2
        first = c1
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < width
    count = tl.minimum(chunk, pixels - part * chunk)
    x_ptr += (image.to(tl.int64) * pixels + part * chunk) * width
    rows = tl.arange(0, ROWS)[:, None]
    tile = x_ptr + rows * width + c[None, :]
    x = tl.load(tile, mask=(rows < count) & inside[None, :], other=0.0)
    pivot = tl.load(x_ptr + c, mask=inside, other=0.0).to(tl.float32)
    one = tl.zeros((ROWS, BLOCK_C), tl.float32)
    two = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for row in range(0, count, ROWS):
        after = tl.load(tile + (row + ROWS) * width, mask=(rows < count - row - ROWS) & inside[None, :], other=0.0)
        away = tl.where(rows < count - row, x.to(tl.float32) - pivot[None, :], 0.0)
        one += away
        two += away * away
        x = after
    total = tl.sum(one, 0)
    share = total / count.to(tl.float32)
    mean = pivot + share
    if shift_ptr is not None:
        mean += tl.load(shift_ptr + image * c1 + c, mask=inside & (first == 0), other=0.0).to(tl.float32)
    out = partial_ptr + (image * tl.num_programs(1) + part) * 2 * (c1 + c2) + first + c
    tl.store(out, mean, mask=inside)
    tl.store(out + c1 + c2, tl.sum(two, 0) - total * share, mask=inside)


@triton.jit
def _normalise(x_ptr: tl.tensor, x2_ptr: tl.tensor, shift_ptr: tl.tensor, partial_ptr: tl.tensor, weight_ptr: tl.tensor,
               bias_ptr: tl.tensor, out_scale_ptr: tl.tensor, y_ptr: tl.tensor, pixels: tl.tensor, c1: tl.tensor, c2: tl.tensor,
               width: tl.tensor, chunks: tl.tensor, chunk_read: tl.tensor, chunk: tl.tensor, eps: tl.tensor, SILU: tl.constexpr,
               FAST: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, SPAN: tl.constexpr,
               GROUPS: tl.constexpr, OVERLAP: tl.constexpr, PER_CHANNEL: tl.constexpr) -> None:
    """The statistics of the groups that touch this block of channels (GROUPS, SPAN channels wide), then the block's pixels.

    width: channels of a group; chunk_read, chunks: of ``partial``.
    """
    # backwards: the first pass read the last pixels last, so they are the likeliest in the L2 cache
    block, image = tl.program_id(0), tl.num_programs(2) - 1 - tl.program_id(2)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * chunk
    channels = c1 + c2
    c_x = c1
    first = 0
    if x2_ptr is not None and block >= tl.cdiv(c1, BLOCK_C):
        block -= tl.cdiv(c1, BLOCK_C)
        x_ptr = x2_ptr
        c_x = c2
        first = c1
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < c_x
    count = tl.minimum(chunk, pixels - start)
    pixel = image.to(tl.int64) * pixels + start
    rows = tl.arange(0, ROWS)[:, None]
    tile = x_ptr + pixel * c_x + rows * c_x + c[None, :]
    x = tl.load(tile, mask=(rows < count) & inside[None, :], other=0.0)
    c_y = first + c
    # all that the first pass does not write is loaded before its statistics are waited for
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c_y, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c_y, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + image * c1 + c, mask=inside & (first == 0), other=0.0).to(tl.float32)
    if out_scale_ptr is not None:
        scale = tl.load(out_scale_ptr + c_y, mask=inside, other=0.0) if PER_CHANNEL else tl.load(out_scale_ptr)
    if OVERLAP:
        gdc_wait()

    group = (first + block * BLOCK_C) // width
    last_group = (first + tl.minimum(block * BLOCK_C + BLOCK_C, c_x) - 1) // width
    i = tl.arange(0, SPAN)
    there = group * width + i < (last_group + 1) * width
    at = partial_ptr + image * chunks * 2 * channels + group * width + i
    pivot = tl.load(at, mask=there, other=0.0)  # the first chunk's means: what is summed is small and does not cancel
    one = tl.zeros((CHUNKS, SPAN), tl.float32)
    two = tl.zeros((CHUNKS, SPAN), tl.float32)
    for j in range(0, chunks, CHUNKS):
        k = j + tl.arange(0, CHUNKS)[:, None]
        mask = (k < chunks) & there[None, :]
        away = tl.load(at[None, :] + k * 2 * channels, mask=mask, other=0.0) - pivot[None, :]
        spread = tl.load(at[None, :] + (k * 2 + 1) * channels, mask=mask, other=0.0)
        size = tl.maximum(tl.minimum(chunk_read, pixels - k * chunk_read), 0).to(tl.float32)  # 0 beyond the last chunk
        one += size * away
        two += spread + size * away * away
    total = tl.sum(one, 0)
    share = total / pixels  # no .to(): Triton hands a 1 over as a constant
    means = pivot + share
    spread = tl.sum(two, 0) - total * share
    g = tl.arange(0, GROUPS)[:, None]
    member = (i // width)[None, :] == g  # [GROUPS, SPAN]
    mean = tl.sum(tl.where(member, means[None, :], 0.0), 1) / width
    away = means[None, :] - mean[:, None]
    variance = tl.sum(tl.where(member, spread[None, :] / pixels + away * away, 0.0), 1) / width
    mine = (c_y // width - group)[None, :] == g  # [GROUPS, BLOCK_C]
    factor = tl.sum(tl.where(mine, tl.rsqrt(tl.maximum(variance, 0.0) + eps)[:, None], 0.0), 0)
    if weight_ptr is not None:
        factor *= weight
    centre = tl.sum(tl.where(mine, mean[:, None], 0.0), 0)
    if shift_ptr is not None:
        centre -= shift
    offset = -centre * factor
    if bias_ptr is not None:
        offset += bias
    if out_scale_ptr is not None and not SILU:
        factor *= scale
        offset *= scale

    out = y_ptr + pixel * channels + rows * channels + c_y[None, :]
    for row in range(0, count, ROWS):
        after = tl.load(tile + (row + ROWS) * c_x, mask=(rows < count - row - ROWS) & inside[None, :], other=0.0)
        y = x.to(tl.float32) * factor[None, :] + offset[None, :]
        if SILU:
            y = silu(y, FAST)
            if out_scale_ptr is not None:
                y *= scale[None, :] if PER_CHANNEL else scale
        tl.store(out + row * channels, encode(y, y_ptr), mask=(rows < count - row) & inside[None, :])
        x = after


@cache
def _spans(widths: tuple[int, ...], width: int, block: int) -> tuple[int, int, int]:
    """Blocks of channels in all parts, and the most groups, and channels of these groups, that touch one of them."""
    starts = [(sum(widths[:i]), start, c) for i, c in enumerate(widths) for start in range(0, c, block)]
    groups = max((first + min(start + block, c) - 1) // width - (first + start) // width + 1 for first, start, c in starts)
    return len(starts), groups, groups * width


def _chunk(pixels: int, count: int, rows: int) -> int:
    """Pixels of each of about ``count`` chunks of an image: whole tiles."""
    return rows * max(1, -(-pixels // (rows * max(1, count))))


def group_norm(x: torch.Tensor, x2: torch.Tensor | None, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None,
               eps: float, silu: bool, out_scale: torch.Tensor | None, dtype: torch.dtype, shift: torch.Tensor | None = None,
               config: NormConfig = NORM_CONFIGS[0]) -> torch.Tensor:
    """Group norm of x (+ shift), or of x and x2 side by side along the channels, then SiLU; 8-bit results are multiplied by
    out_scale, rounded and saturated.

    x fp16, bf16 or fp32 [n, c, h, w], x2 likewise [n, c2, h, w], both channels last (copied if not); weight, bias
    [c + c2]; shift [n, c]; out_scale fp32 [1] or [c + c2]. Returns ``dtype`` [n, c + c2, h, w],
    channels last. Deterministic; no host synchronisation.
    """
    last = torch.channels_last
    x = x.contiguous(memory_format=last)
    x2 = None if x2 is None else x2.contiguous(memory_format=last)
    n, c1, h, w = x.shape
    c2 = 0 if x2 is None else x2.shape[1]
    channels, pixels = c1 + c2, h * w
    check(channels % groups == 0, f"channels ({channels}) are a multiple of groups ({groups})")
    check(x2 is None or (x2.dtype == x.dtype and x2.shape == (n, c2, h, w)), "x and x2 differ in channels only")
    check(shift is None or shift.shape == (n, c1), f"shift is [{n}, {c1}]")
    check(dtype not in EIGHT_BIT or (out_scale is not None and out_scale.numel() in (1, channels)),
          f"8-bit results need an out_scale of 1 or {channels} elements")
    y = torch.empty((n, channels, h, w), dtype=dtype, device=x.device, memory_format=last)
    width, sms = channels // groups, programs(x.device)
    blocks, touched, span = _spans((c1, c2) if c2 else (c1,), width, config.block_c)
    span = triton.next_power_of_2(span)
    chunk_read = _chunk(pixels, min(config.per_sm_read * sms // (n * blocks), CHUNKS), config.rows)
    chunk = _chunk(pixels, config.per_sm * sms // (n * blocks), config.rows)
    chunks = triton.cdiv(pixels, chunk_read)
    shift = None if shift is None else shift.contiguous()
    partial = torch.empty((n, chunks, 2, channels), dtype=torch.float32, device=x.device)
    overlap = config.overlap and x.is_cuda
    scale = out_scale if dtype in EIGHT_BIT else None
    tile = {"BLOCK_C": config.block_c, "ROWS": config.rows, "OVERLAP": overlap, "num_warps": config.warps}
    _channel_statistics[(blocks, chunks, n)](x, x2, shift, partial, pixels, c1, c2, chunk_read, **tile)
    _normalise[(blocks, triton.cdiv(pixels, chunk), n)](
        x, x2, shift, partial, weight, bias, scale, y, pixels, c1, c2, width, chunks, chunk_read, chunk, eps, SILU=silu,
        FAST=config.fast_silu and x.is_cuda and dtype in EIGHT_BIT, PER_CHANNEL=scale is not None and scale.numel() > 1,
        CHUNKS=max(1, 256 * config.warps // span), SPAN=span, GROUPS=triton.next_power_of_2(touched),
        **({"launch_pdl": True} if overlap else {}), **tile)
    return y


@triton.jit
def _layer_norm(x_ptr: tl.tensor, residual_ptr: tl.tensor, sum_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor,
                out_scale_ptr: tl.tensor, y_ptr: tl.tensor, height: tl.tensor, width: tl.tensor, eps: tl.tensor,
                PER_CHANNEL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    inside = (rows < height) & (c < width)
    at = rows.to(tl.int64) * width + c
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    centred = tl.where(c < width, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < width, other=0.0).to(tl.float32)
    if out_scale_ptr is not None:
        y *= tl.load(out_scale_ptr + c, mask=c < width, other=0.0) if PER_CHANNEL else tl.load(out_scale_ptr)
    tl.store(y_ptr + at, encode(y, y_ptr), mask=inside)


def layer_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
               out_scale: torch.Tensor | None, dtype: torch.dtype,
               config: RowConfig | None = None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(s = x + residual, layer norm of s over the last dimension); the norm written as ``group_norm`` writes it.

    x fp16, bf16 or fp32 [..., c], c <= 4096, residual likewise; weight, bias [c]; out_scale fp32 [1] or [c]. s in the dtype
    of x, None without a residual; the norm in ``dtype``.
    """
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    width = x.shape[-1]
    check(width <= 4096, f"at most 4096 channels, not {width}")
    check(residual is None or residual.shape == x.shape, "x and residual have one shape")
    check(dtype not in EIGHT_BIT or out_scale is not None, "8-bit results need an out_scale")
    s, y = None if residual is None else torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    block = triton.next_power_of_2(width)
    # a warp per row as far as it goes: the sums then need no barrier
    config = config or RowConfig(max(1, 1024 // block), max(1, block // 1024))
    height = x.numel() // width
    scale = out_scale if dtype in EIGHT_BIT else None
    _layer_norm[(triton.cdiv(height, config.rows),)](
        x, residual, s, weight, bias, scale, y, height, width, eps, PER_CHANNEL=scale is not None and scale.numel() > 1,
        ROWS=config.rows, BLOCK=block, num_warps=config.warps)
    return s, y


@triton.jit
def _geglu(x_ptr: tl.tensor, out_scale_ptr: tl.tensor, y_ptr: tl.tensor, height: tl.tensor, width: tl.tensor,
           PER_CHANNEL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (rows < height) & (c < width)
    at = x_ptr + rows.to(tl.int64) * 2 * width + c
    gate = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    hidden = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y = hidden * gelu(gate)
    if out_scale_ptr is not None:
        y *= tl.load(out_scale_ptr + c, mask=c < width, other=0.0) if PER_CHANNEL else tl.load(out_scale_ptr)
    tl.store(y_ptr + rows.to(tl.int64) * width + c, encode(y, y_ptr), mask=inside)


def geglu(x: torch.Tensor, out_scale: torch.Tensor | None, dtype: torch.dtype, tile: int = 4096, warps: int = 8) -> torch.Tensor:
    """x [..., 2c] -> first half * gelu(second half), with erf, written as ``group_norm`` writes it: ``dtype`` [..., c].

    x fp16, bf16 or fp32; out_scale fp32 [1] or [c]; tile: results of a program, by ``warps`` of 32 threads.
    """
    check(dtype not in EIGHT_BIT or out_scale is not None, "8-bit results need an out_scale")
    x = x.contiguous()
    width = x.shape[-1] // 2
    height = x.numel() // (2 * width)
    y = x.new_empty((*x.shape[:-1], width), dtype=dtype)
    block = max(64, min(512, width & -width))  # a power of 2 that divides the usual widths: no thread idles
    rows = tile // block
    scale = out_scale if dtype in EIGHT_BIT else None
    _geglu[(triton.cdiv(height, rows), triton.cdiv(width, block))](  # only the first axis takes more than 65535
        x, scale, y, height, width, PER_CHANNEL=scale is not None and scale.numel() > 1, ROWS=rows, BLOCK=block, num_warps=warps)
    return y
