"""8-bit matrix products in Triton for Hopper and later: TMA loads, a persistent grid, everything after the sum fused.

The same code runs on CPU tensors under TRITON_INTERPRET=1, set before triton is first imported.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels.

from dataclasses import dataclass
from functools import cache

import torch
import triton  # type: ignore[import, unused-ignore]
import triton.language as tl  # type: ignore[import, unused-ignore]
from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import, unused-ignore]

ACTS = (None, "geglu", "gelu_tanh", "gelu")
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)
INTERPRETER_SMS = 3  # programs under the interpreter: fewer than the tiles of most tests, so that a program takes several


@dataclass(frozen=True)
class GemmConfig:
    """A tile: block_m rows of x by block_n rows of the weight, block_k deep, all powers of 2.

    Of a geglu's block_n weight rows one half is hidden and one half gate, so it writes block_n / 2 columns.
    flatten: one loop over all tiles of a program, which loads the next tile's operands while it writes a tile; it needs
    shared memory for both. per_sm: programs on a multiprocessor at once, the other way to hide the writing.
    specialize: one warp group loads and others multiply (Hopper only; ``warps`` is then 4 and flatten off).
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    flatten: bool = True
    per_sm: int = 1
    specialize: bool = False


GEMM_CONFIGS = (
    GemmConfig(128, 256, 128, 3, 8),
    GemmConfig(256, 128, 128, 3, 8),
    GemmConfig(128, 128, 128, 4, 8),
    GemmConfig(128, 128, 128, 3, 4, flatten=False, per_sm=2),
    GemmConfig(64, 128, 128, 4, 4, flatten=False, per_sm=2),
)


@triton.jit
def affine(acc: tl.tensor, scale_ptr: tl.tensor, bias_ptr: tl.tensor, columns: tl.tensor, limit: tl.tensor,
           PER_COLUMN: tl.constexpr) -> tl.tensor:
    """acc int32 or fp32 [rows, columns] -> fp32 acc * scale + bias."""
    y = acc.to(tl.float32)
    if PER_COLUMN:
        y *= tl.load(scale_ptr + columns, mask=columns < limit, other=0.0)[None, :]
    else:
        y *= tl.load(scale_ptr)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < limit, other=0.0)[None, :]
    return y


@triton.jit
def gelu(x: tl.tensor) -> tl.tensor:
    """x * Phi(x), fp32. Phi by Abramowitz and Stegun 7.1.26, absolute error below 1e-7: the exact erf takes so many
    instructions that a GEGLU is bound by them and not by memory."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * poly * tl.exp2(-1.4426950408889634 * z * z)  # 1 - Phi(|x|)
    return x * tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def gelu_tanh(x: tl.tensor) -> tl.tensor:
    """The tanh approximation, fp32; (1 + tanh(u)) / 2 = sigmoid(2u), which needs no tanh."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def cast(y: tl.tensor, y_ptr: tl.tensor, out_scale_ptr: tl.tensor) -> tl.tensor:
    """fp32 -> the element type of y_ptr; 8-bit ones after a multiplication by out_scale, saturated, nearest even."""
    if y_ptr.dtype.element_ty == tl.int8:
        y = tl.minimum(tl.maximum(y * tl.load(out_scale_ptr), -128.0), 127.0)
        y = (y + 12582912.0) - 12582912.0  # 1.5 * 2^23: fp32 holds only integers there, so the addition rounds
    elif y_ptr.dtype.element_ty == tl.float8e4nv:
        y = tl.minimum(tl.maximum(y * tl.load(out_scale_ptr), -448.0), 448.0)
    return y.to(y_ptr.dtype.element_ty)


@triton.jit
def _gemm(x_desc: tl.tensor_descriptor, w_desc: tl.tensor_descriptor, y_ptr: tl.tensor, scale_ptr: tl.tensor,
          bias_ptr: tl.tensor, residual_ptr: tl.tensor, out_scale_ptr: tl.tensor, M: tl.tensor, N: tl.tensor, K: tl.tensor,
          y_stride: tl.tensor, residual_stride: tl.tensor, ACT: tl.constexpr, INT8: tl.constexpr, PER_COLUMN: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
          SPECIALIZE: tl.constexpr) -> None:
    """N, BLOCK_N: of the result; a geglu's weight has 2 N rows. A pointer that is None is not there."""
    ACC: tl.constexpr = tl.int32 if INT8 else tl.float32
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    in_group = GROUP * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE):
        # GROUP rows of tiles at a time, column by column: neighbours in time share weights and rows in the L2 cache
        first_m = tile // in_group * GROUP
        rows_in_group = tl.minimum(tiles_m - first_m, GROUP)
        m = (first_m + tile % in_group % rows_in_group) * BLOCK_M
        n = tile % in_group // rows_in_group * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        if ACT == "geglu":
            gate_acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            x = x_desc.load([m, k * BLOCK_K])
            w = w_desc.load([n, k * BLOCK_K])
            acc = tl.dot(x, w.T, acc, out_dtype=ACC)
            if ACT == "geglu":
                w_gate = w_desc.load([N + n, k * BLOCK_K])
                gate_acc = tl.dot(x, w_gate.T, gate_acc, out_dtype=ACC)
        columns = n + tl.arange(0, BLOCK_N)
        y = affine(acc, scale_ptr, bias_ptr, columns, N, PER_COLUMN)
        if ACT == "geglu":
            y *= gelu(affine(gate_acc, scale_ptr, bias_ptr, N + columns, 2 * N, PER_COLUMN))
        elif ACT == "gelu":
            y = gelu(y)
        elif ACT == "gelu_tanh":
            y = gelu_tanh(y)
        rows = m + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        if residual_ptr is not None:
            at = rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
            y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at = rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
        tl.store(y_ptr + at, cast(y, y_ptr, out_scale_ptr), mask=inside)


@cache
def programs(device: torch.device) -> int:
    """Multiprocessors of the GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETER_SMS


def gemm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None,
         residual: torch.Tensor | None = None, act: str | None = None, out_scale: torch.Tensor | None = None,
         dtype: torch.dtype = torch.float16, config: GemmConfig = GEMM_CONFIGS[0],
         out: torch.Tensor | None = None) -> torch.Tensor:
    """act((x W^T) * scale + bias) + residual; 8-bit results are multiplied by out_scale, rounded and saturated.

    x int8 or float8_e4m3fn [M, K], weight likewise [N, K], both 16-byte aligned with K, x.stride(0) multiples of 16;
    scale fp32 [N] or [1] = scale of x * scale of the weight; bias fp32 [N]; residual [M, N_out] of any float dtype;
    out_scale fp32, one element = 1 / scale of the result. act: None, "gelu", "gelu_tanh", or "geglu" = hidden *
    gelu(gate) of weight rows [hidden; gate], N_out = N / 2. Returns dtype [M, N_out], in ``out`` if given; no host
    synchronisation.
    """
    (m, k), n = x.shape, weight.shape[0] // (2 if act == "geglu" else 1)
    y = x.new_empty((m, n), dtype=dtype) if out is None else out
    check(act in ACTS, f"act is one of {ACTS}, not {act!r}")
    check(x.dtype in EIGHT_BIT and weight.dtype == x.dtype, f"x and weight are int8 or fp8, not {x.dtype} and {weight.dtype}")
    check(weight.shape[1] == k and k % 16 == 0, f"x [M, K], weight [N, K], K a multiple of 16; not {x.shape} and {weight.shape}")
    check(x.stride(1) == 1 and x.stride(0) % 16 == 0 and weight.is_contiguous(), "rows of x, and weight, are contiguous")
    check((dtype in EIGHT_BIT) == (out_scale is not None), "out_scale comes with 8-bit results and only with them")
    check(y.shape == (m, n) and y.dtype == dtype and y.stride(1) == 1, f"out is {dtype} [{m}, {n}], not {y.dtype} {y.shape}")
    check(residual is None or (residual.shape == y.shape and residual.stride(1) == 1), f"residual is [{m}, {n}], in rows")
    rows = weight.shape[0]
    check(scale.numel() in (1, rows) and (bias is None or bias.numel() == rows), f"scale has 1 or {rows}, bias {rows} elements")
    block_n = config.block_n // (2 if act == "geglu" else 1)
    grid = min(triton.cdiv(m, config.block_m) * triton.cdiv(n, block_n), programs(x.device) * config.per_sm)
    _gemm[(grid,)](
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [config.block_m, config.block_k]),
        TensorDescriptor(weight, list(weight.shape), [k, 1], [block_n, config.block_k]),
        y, scale, bias, residual, out_scale, m, n, k, y.stride(0), 0 if residual is None else residual.stride(0),
        ACT=act, INT8=x.dtype == torch.int8, PER_COLUMN=scale.numel() > 1, BLOCK_M=config.block_m, BLOCK_N=block_n,
        BLOCK_K=config.block_k, GROUP=8, FLATTEN=config.flatten, SPECIALIZE=config.specialize,
        num_stages=config.stages, num_warps=config.warps,
    )
    return y


def check(ok: bool, expected: str) -> None:
    """ValueError with what was expected."""
    if not ok:
        raise ValueError(expected)
