"""8-bit convolutions in Triton for Hopper and later: a matrix product whose rows are read from the image in place.

One sum runs over all taps and input channels. The same code runs on CPU tensors under TRITON_INTERPRET=1.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels.

import math
from dataclasses import dataclass

import torch
import triton  # type: ignore[import, unused-ignore]
import triton.language as tl  # type: ignore[import, unused-ignore]
from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import, unused-ignore]

from .triton_gemm import EIGHT_BIT, cast, check, programs


@dataclass(frozen=True)
class ConvConfig:
    """A tile: block_m pixels of the result by block_n output channels, block_k input channels of one tap at a time.

    tma: the image comes through a tensor descriptor too, in boxes of pixels whose outside is zero; only where the stride
    divides height and width. Otherwise its pixels are gathered by pointers. The rest as in GemmConfig.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    tma: bool = True
    flatten: bool = True
    per_sm: int = 1
    specialize: bool = False


CONV_CONFIGS = (
    ConvConfig(128, 256, 128, 3, 8),
    ConvConfig(256, 128, 128, 3, 8),
    ConvConfig(128, 128, 128, 3, 4, flatten=False, per_sm=2),
    ConvConfig(128, 128, 128, 4, 8),
    ConvConfig(128, 128, 128, 3, 4, tma=False, flatten=False, per_sm=2),
)


@triton.jit
def _conv(x_ptr: tl.tensor, x_desc: tl.tensor_descriptor, w_desc: tl.tensor_descriptor, y_ptr: tl.tensor, scale_ptr: tl.tensor,
          bias_ptr: tl.tensor, residual_ptr: tl.tensor, out_scale_ptr: tl.tensor, IMAGES: tl.tensor, C: tl.tensor, H: tl.tensor,
          W: tl.tensor, N: tl.tensor, Y_H: tl.tensor, Y_W: tl.tensor, bias_stride: tl.tensor, KH: tl.constexpr,
          KW: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, INT8: tl.constexpr,
          PER_COLUMN: tl.constexpr, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr) -> None:
    """A tile's rows are a box of BOX_N images by BOX_H by BOX_W pixels of the result. A pointer that is None is not there.

    x_desc [images, H / STRIDE, STRIDE, W / STRIDE, STRIDE * C]; w_desc [KH * KW, N, C]; bias_stride: 0 where all images
    share the bias.
    """
    ACC: tl.constexpr = tl.int32 if INT8 else tl.float32
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    # Triton 3.6 reads a box of several rows in place only as the right operand of a product, else through registers
    TRANSPOSE: tl.constexpr = x_desc is not None and BOX_W < BLOCK_M
    boxes_h = tl.cdiv(Y_H, BOX_H)
    boxes_w = tl.cdiv(Y_W, BOX_W)
    tiles_m = tl.cdiv(IMAGES, BOX_N) * boxes_h * boxes_w
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(C, BLOCK_K)
    in_group = GROUP * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE):
        # GROUP rows of tiles at a time, column by column: neighbours in time share weights and pixels in the L2 cache
        first_m = tile // in_group * GROUP
        rows_in_group = tl.minimum(tiles_m - first_m, GROUP)
        m = first_m + tile % in_group % rows_in_group
        n = tile % in_group // rows_in_group * BLOCK_N
        image = m // (boxes_h * boxes_w) * BOX_N
        top = m // boxes_w % boxes_h * BOX_H
        left = m % boxes_w * BOX_W
        row = tl.arange(0, BLOCK_M)
        row_image = image + row // (BOX_H * BOX_W)
        row_top = top + row // BOX_W % BOX_H
        row_left = left + row % BOX_W
        acc = tl.zeros((BLOCK_N, BLOCK_M) if TRANSPOSE else (BLOCK_M, BLOCK_N), ACC)
        for step in range(0, KH * KW * steps):
            tap = step // steps
            c = (step - tap * steps) * BLOCK_K
            down = tap // KW - PAD_H
            right = tap % KW - PAD_W
            if x_desc is not None:
                # of the input pixel S y + d, S = STRIDE: index y + d // S, phase d % S; PAD * S keeps // and % positive
                h = top + (down + PAD_H * STRIDE) // STRIDE - PAD_H
                w = left + (right + PAD_W * STRIDE) // STRIDE - PAD_W
                phase_h = (down + PAD_H * STRIDE) % STRIDE
                phase_w = (right + PAD_W * STRIDE) % STRIDE
                # channels beyond C meet the weight's zeros, so it does not matter that the next phase follows them
                x = x_desc.load([image, h, phase_h, w, phase_w * C + c]).reshape(BLOCK_M, BLOCK_K)
            else:
                h = row_top * STRIDE + down
                w = row_left * STRIDE + right
                k = c + tl.arange(0, BLOCK_K)
                inside = (row_image < IMAGES) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                at = ((row_image * H + h) * W + w).to(tl.int64) * C
                x = tl.load(x_ptr + at[:, None] + k[None, :], mask=inside[:, None] & (k < C)[None, :], other=0.0)
            weight = w_desc.load([tap, n, c]).reshape(BLOCK_N, BLOCK_K)
            acc = tl.dot(weight, x.T, acc, out_dtype=ACC) if TRANSPOSE else tl.dot(x, weight.T, acc, out_dtype=ACC)
        columns = n + tl.arange(0, BLOCK_N)
        present = columns < N
        inside = ((row_image < IMAGES) & (row_top < Y_H) & (row_left < Y_W))[:, None] & present[None, :]
        if TRANSPOSE:
            acc = acc.T
        y = acc.to(tl.float32)
        if PER_COLUMN:
            y *= tl.load(scale_ptr + columns, mask=present, other=0.0)[None, :]
        else:
            y *= tl.load(scale_ptr)
        if bias_ptr is not None:
            if BOX_N == 1:
                y += tl.load(bias_ptr + image * bias_stride + columns, mask=present, other=0.0)[None, :]
            else:
                y += tl.load(bias_ptr + row_image[:, None] * bias_stride + columns[None, :], mask=inside, other=0.0)
        at = ((row_image * Y_H + row_top) * Y_W + row_left).to(tl.int64)[:, None] * N + columns[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, cast(y, y_ptr, out_scale_ptr), mask=inside)


def box(images: int, height: int, width: int, pixels: int) -> tuple[int, int, int]:
    """(images, rows, columns), powers of 2 with product ``pixels``, that cover images x height x width with least waste."""
    sizes = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (h * w), h, w) for h in sizes for w in sizes if h * w <= pixels]
    return min(boxes, key=lambda b: (count(b, images, height, width), -b[2], -b[1]))


def count(box: tuple[int, int, int], images: int, height: int, width: int) -> int:
    """Boxes that cover images x height x width."""
    return math.prod(-(-size // side) for size, side in zip((images, height, width), box, strict=True))


def conv2d(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None,
           residual: torch.Tensor | None = None, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0),
           dtype: torch.dtype = torch.float16, out_scale: torch.Tensor | None = None,
           config: ConvConfig = CONV_CONFIGS[0], out: torch.Tensor | None = None) -> torch.Tensor:
    """conv(x, W) * scale + bias + residual; 8-bit results are multiplied by out_scale, rounded and saturated.

    x int8 or float8_e4m3fn [n, c, h, w], weight likewise [out, c, kh, kw], both channels last, 16-byte aligned, c a
    multiple of 16; both strides equal; zero padding; scale fp32 [out] or [1] = scale of x * scale of the weight; bias fp32
    [out] or [n, out]; residual like the result, of any float dtype; out_scale fp32, one element = 1 / scale of the result.
    Returns dtype [n, out, h', w'], channels last, in ``out`` if given; no host synchronisation.
    """
    (images, c, h, w), (n, _, kh, kw) = x.shape, weight.shape
    (step, step_w), (pad_h, pad_w) = stride, padding
    size = (images, n, (h + 2 * pad_h - kh) // step + 1, (w + 2 * pad_w - kw) // step + 1)
    y = torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last) if out is None else out
    check(x.dtype in EIGHT_BIT and weight.dtype == x.dtype, f"x and weight are int8 or fp8, not {x.dtype} and {weight.dtype}")
    check(weight.shape[1] == c and c % 16 == 0, f"channels: one multiple of 16, not x {x.shape} and weight {weight.shape}")
    check(step == step_w, f"strides are equal, not {stride}")
    check((dtype in EIGHT_BIT) == (out_scale is not None), "out_scale comes with 8-bit results and only with them")
    check(y.shape == size and y.dtype == dtype, f"out is {dtype} {size}, not {y.dtype} {y.shape}")
    check(residual is None or residual.shape == size, f"residual has the result's shape {size}")
    check(scale.numel() in (1, n), f"scale has 1 or {n} elements, not {scale.numel()}")
    check(bias is None or (bias.numel() in (n, images * n) and bias.is_contiguous()), f"bias is [{n}] or [{images}, {n}]")
    for tensor in (x, weight, y) if residual is None else (x, weight, y, residual):
        check(tensor.is_contiguous(memory_format=torch.channels_last), f"tensors are channels last, not {tensor.stride()}")
    box_n, box_h, box_w = box(images, size[2], size[3], config.block_m)
    tiles = count((box_n, box_h, box_w), images, size[2], size[3]) * triton.cdiv(n, config.block_n)
    grid = min(tiles, programs(x.device) * config.per_sm)
    x_desc = None if not config.tma or h % step or w % step else TensorDescriptor(
        x, [images, h // step, step, w // step, step * c], [h * w * c, step * w * c, w * c, step * c, 1],
        [box_n, box_h, 1, box_w, config.block_k])
    _conv[(grid,)](
        x, x_desc,
        TensorDescriptor(weight, [kh * kw, n, c], [c, kh * kw * c, 1], [1, config.block_n, config.block_k]),
        y, scale, bias, residual, out_scale, images, c, h, w, n, size[2], size[3],
        0 if bias is None or bias.numel() == n else n, KH=kh, KW=kw, STRIDE=step, PAD_H=pad_h, PAD_W=pad_w,
        INT8=x.dtype == torch.int8, PER_COLUMN=scale.numel() > 1, BOX_N=box_n, BOX_H=box_h, BOX_W=box_w,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP=8, FLATTEN=config.flatten,
        SPECIALIZE=config.specialize, num_stages=config.stages, num_warps=config.warps,
    )
    return y
