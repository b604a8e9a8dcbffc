"""Weights with LoRAs, in 8 bits, of all layers of a model by two Triton kernels.

W + sum(strength * up @ down), times the smoothing of its input channel, in fp32: the first pass over the weights takes the
largest value of every row, from which torch makes the scales, the second one writes codes. Without LoRAs they are those that
torch itself makes, to the bit. The same code runs on CPU tensors under TRITON_INTERPRET=1, set before triton is first imported.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels.

import itertools
import math
import struct
from array import array
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import, unused-ignore]
import triton.language as tl  # type: ignore[import, unused-ignore]

from ..stats import channels_last, row_scale, shared_scale

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.int8: tl.int8,
         torch.float8_e4m3fn: tl.float8e4nv}
BLOCK_ROWS, BLOCK_K, BLOCK_RANK, WARPS = 64, 128, 32, 4
BLOCK_SCALES = 1024
ALIGNMENT = 16  # bytes, and elements of a row, with which the kernels load and store whole vectors
COLUMNS = tl.constexpr(16)  # of a weight in the table: those of ``_weight``, slot, what a row adds to it, first and last LoRA
ENTRY = tl.constexpr(4)  # of a LoRA: pointers to its factors, rank, the bits of its strength


@dataclass(frozen=True, eq=False)
class Write:
    """One weight to be written.

    weight: [out, ...] of any floating-point dtype in memory that the GPU reads; factors: (up [out, rank], down [rank, ...] in
    the order of the weight's memory, strength) of each LoRA, contiguous, of one dtype for all. codes: int8 or float8_e4m3fn with
    their scale, fp32 [out] or [1], or without one of the weight's dtype. smoothing: fp32, ``in`` elements, or None; shared: equal
    for weights of one scale, None where each row has its own. Weight and codes: see ``fits``.
    """

    weight: torch.Tensor
    factors: Sequence[tuple[torch.Tensor, torch.Tensor, float]]
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    smoothing: torch.Tensor | None = None
    shared: Hashable = None


def fits(t: torch.Tensor) -> bool:
    """Whether a weight, or codes, are laid out as the kernels take them: contiguous or channels last."""
    return t.dtype in TYPES and 0 < t.numel() < 2**31 and (t.is_contiguous() or channels_last(t))


def write_weights(writes: Sequence[Write]) -> None:
    """Write the codes and scales of all, on the current stream, without waiting for it. Codes are of one 8-bit dtype."""
    if not writes:
        return
    kinds = defaultdict[Any, list[Write]](list)
    for w in writes:
        kinds[_kind(w)].append(w)
    shared = {name: i for i, name in enumerate(dict.fromkeys(w.shared for w in writes if w.shared is not None))}
    table, entries, slots = list[int](), list[int](), len(shared)
    for w in itertools.chain.from_iterable(kinds.values()):
        slot, step = (slots, 1) if w.shared is None else (shared[w.shared], 0)
        slots += len(w.weight) if step and w.scale is not None else 0
        first = len(entries) // ENTRY.value
        table.extend((*_weight(w), slot, step, first, first + len(w.factors)))
        for up, down, strength in w.factors:
            entries.extend((up.data_ptr(), down.data_ptr(), up.shape[1], _bits(strength)))
    device = writes[0].codes.device
    numbers, first, launches = _table(table + entries, device), 0, []
    for kind, alike in kinds.items():
        grid = len(alike), triton.cdiv(max(len(w.weight) for w in alike), BLOCK_ROWS)
        launches.append((grid, numbers[first:], kind))
        first += COLUMNS.value * len(alike)
    sizes = {"ROWS": BLOCK_ROWS, "K": BLOCK_K, "RANK": BLOCK_RANK, "num_warps": WARPS}
    scales = torch.zeros(max(1, slots), device=device)
    for grid, rows, (weight, factor, code, _, aligned) in launches:
        if code.itemsize == 1:
            _amax[grid](rows, numbers[first:], scales, TYPES[weight], TYPES[factor], aligned, **sizes)
            dtype = code
    if slots:
        scales = torch.cat([shared_scale(scales[: len(shared)]), row_scale(scales[len(shared) :], dtype)])
    for grid, rows, (weight, factor, code, same, aligned) in launches:
        _codes[grid](rows, numbers[first:], scales, TYPES[weight], TYPES[factor], TYPES[code], same, aligned, **sizes)


def _kind(w: Write) -> tuple[torch.dtype, torch.dtype, torch.dtype, bool, bool]:
    """Of weights that one launch takes: dtypes of the weight, the factors and the codes; whether codes are in the order of the
    weight; whether all rows begin at multiples of ALIGNMENT."""
    factors = [t for up, down, _ in w.factors for t in (up, down)]
    aligned = w.weight[0].numel() % ALIGNMENT == 0 and not any(t.shape[1] % ALIGNMENT for t in factors) and not any(
        t.data_ptr() % ALIGNMENT for t in (w.weight, w.codes, *factors))
    return (w.weight.dtype, factors[0].dtype if factors else w.weight.dtype, w.codes.dtype,
            channels_last(w.weight) == channels_last(w.codes), aligned)


def _bits(number: float) -> int:
    """Of an fp32 number."""
    return int.from_bytes(struct.pack("<f", number), "little", signed=True)


def _table(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """On the device without waiting for it."""
    table = torch.frombuffer(array("q", numbers), dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.clone()


def _weight(w: Write) -> tuple[int, ...]:
    """Its columns in the table but the last four: four pointers; rows; elements of a row; elements from one step of the outer of
    its two indices, channel and position in the kernel, to the next; what a step of the outer and of the inner one adds to the
    place of a code, and to the channel; what a row adds to the place of its scale."""
    rows, channels, *kernel = w.weight.shape
    positions = math.prod(kernel)
    code = (1, channels) if channels_last(w.codes) else (positions, 1)  # of a channel, of a position
    inner, code_outer, code_inner, channel_outer, channel_inner = (
        (channels, code[1], code[0], 0, 1) if channels_last(w.weight) else (positions, *code, 1, 0))
    return (w.weight.data_ptr(), 0 if w.smoothing is None else w.smoothing.data_ptr(), w.codes.data_ptr(),
            0 if w.scale is None else w.scale.data_ptr(), rows, channels * positions, inner, code_outer, code_inner,
            channel_outer, channel_inner, int(w.scale is not None and len(w.scale) > 1))


@triton.jit
def _pointer(address_ptr: tl.tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    pointer = tl.load(address_ptr).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _length(length_ptr: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """An int32 that the compiler knows to be a multiple of ALIGNMENT where it is."""
    length = tl.load(length_ptr).to(tl.int32)
    if ALIGNED:
        length = length // 16 * 16
    return length


@triton.jit
def _up(up: tl.tensor, rank: tl.tensor, rows: tl.tensor, start: tl.tensor, limit: tl.tensor, RANK: tl.constexpr) -> tl.tensor:
    r = start + tl.arange(0, RANK)
    return tl.load(up + rows[:, None] * rank + r[None, :], mask=(rows < limit)[:, None] & (r < rank)[None, :], other=0.0)


@triton.jit
def _values(table: tl.tensor, entries: tl.tensor, rows: tl.tensor, k: tl.tensor, first_up: tl.tensor,
            WEIGHT: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr) -> tl.tensor:
    """A tile of a weight with its LoRAs, smoothed, fp32; zeros outside of the weight. first_up: see ``_first_up``."""
    length, limit = _length(table + 5, ALIGNED), tl.load(table + 4)
    k_inside = (k < length)[None, :]
    weight, first = _pointer(table, WEIGHT, ALIGNED), tl.load(table + 14)
    y = tl.load(weight + rows[:, None] * length + k[None, :], mask=(rows < limit)[:, None] & k_inside, other=0.0).to(tl.float32)
    for entry in range(first, tl.load(table + 15)):
        at = entries + ENTRY * entry
        up, down, rank = _pointer(at, FACTOR, ALIGNED), _pointer(at + 1, FACTOR, ALIGNED), _length(at + 2, ALIGNED)
        product = tl.zeros(y.shape, tl.float32)
        for start in range(0, rank, RANK):
            u = first_up
            if (start > 0) | (entry > first):
                u = _up(up, rank, rows, start, limit, RANK)
            r = start + tl.arange(0, RANK)
            d = tl.load(down + r[:, None] * length + k[None, :], mask=(r < rank)[:, None] & k_inside, other=0.0)
            product = tl.dot(u, d, product, input_precision="tf32x3")  # of 16-bit factors the products are exact
        y += product * tl.load(at + 3).to(tl.int32).to(tl.float32, bitcast=True)
    smoothing = tl.load(table + 1)
    if smoothing != 0:
        inner = tl.load(table + 6).to(tl.int32)
        channel = k // inner * tl.load(table + 9) + k % inner * tl.load(table + 10)
        y *= tl.load(smoothing.to(tl.pointer_type(tl.float32)) + channel, mask=k < length, other=1.0)[None, :]
    return y


@triton.jit
def _first_up(table: tl.tensor, entries: tl.tensor, rows: tl.tensor, FACTOR: tl.constexpr, ALIGNED: tl.constexpr,
              RANK: tl.constexpr) -> tl.tensor:
    """Of the first LoRA, the only one of most weights: loaded once for all tiles of the rows."""
    first = tl.load(table + 14)
    up = tl.zeros((rows.shape[0], RANK), FACTOR)
    if first < tl.load(table + 15):
        at = entries + ENTRY * first
        up = _up(_pointer(at, FACTOR, ALIGNED), _length(at + 2, ALIGNED), rows, 0, tl.load(table + 4), RANK)
    return up


@triton.jit
def _amax(table: tl.tensor, entries: tl.tensor, amax_ptr: tl.tensor, WEIGHT: tl.constexpr,
          FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr) -> None:
    """amax [slots], fp32, zeros before: the largest absolute value of what has one scale."""
    table += COLUMNS * tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    limit = tl.load(table + 4)
    if tl.program_id(1) * ROWS >= limit:
        return
    up = _first_up(table, entries, rows, FACTOR, ALIGNED, RANK)
    amax = tl.zeros((ROWS,), tl.float32)
    for start in range(0, _length(table + 5, ALIGNED), K):
        y = _values(table, entries, rows, start + tl.arange(0, K), up, WEIGHT, FACTOR, ALIGNED, RANK)
        amax = tl.maximum(amax, tl.max(tl.abs(y), 1))
    tl.atomic_max(amax_ptr + tl.load(table + 12) + rows * tl.load(table + 13), amax, mask=rows < limit)


@triton.jit
def _codes(table: tl.tensor, entries: tl.tensor, scales_ptr: tl.tensor, WEIGHT: tl.constexpr,
           FACTOR: tl.constexpr, CODE: tl.constexpr, SAME: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
           K: tl.constexpr, RANK: tl.constexpr) -> None:
    """Codes, and scales where they belong. scales: of the slots, fp32."""
    table += COLUMNS * tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside, length = rows < tl.load(table + 4), _length(table + 5, ALIGNED)
    if tl.program_id(1) * ROWS >= tl.load(table + 4):
        return
    codes, inner = _pointer(table + 2, CODE, ALIGNED), tl.load(table + 6).to(tl.int32)
    up = _first_up(table, entries, rows, FACTOR, ALIGNED, RANK)
    if CODE.primitive_bitwidth == 8:
        scale = tl.load(scales_ptr + tl.load(table + 12) + rows * tl.load(table + 13), mask=inside, other=1.0)
        tl.store(tl.load(table + 3).to(tl.pointer_type(tl.float32)) + rows * tl.load(table + 11), scale, mask=inside)
    for start in range(0, length, K):
        k = start + tl.arange(0, K)
        y = _values(table, entries, rows, k, up, WEIGHT, FACTOR, ALIGNED, RANK)
        if CODE.is_int():
            # 1.5 * 2^23: fp32 holds only integers there, so the addition rounds, to even
            y = (tl.div_rn(y, scale[:, None]) + 12582912.0) - 12582912.0
            y = tl.minimum(tl.maximum(y, -127.0), 127.0)
        elif CODE.is_fp8():
            y = tl.minimum(tl.maximum(tl.div_rn(y, scale[:, None]), -448.0), 448.0)
        at = k if SAME else k // inner * tl.load(table + 7).to(tl.int32) + k % inner * tl.load(table + 8).to(tl.int32)
        tl.store(codes + rows[:, None] * length + at[None, :], y.to(CODE), mask=inside[:, None] & (k < length)[None, :])


@dataclass(frozen=True, eq=False)
class Product:
    """target[start : start + rows] = source * factor: fp32, contiguous, the source [rows] or [1]."""

    target: torch.Tensor
    start: int
    rows: int
    source: torch.Tensor
    factor: float


def write_products(products: Sequence[Product]) -> None:
    """All of them by one launch, as torch multiplies them."""
    if not products:
        return
    table = list[int]()
    for p in products:
        table.extend((p.target.data_ptr() + 4 * p.start, p.source.data_ptr(), p.rows, int(len(p.source) > 1), _bits(p.factor)))
    grid = len(products), triton.cdiv(max(p.rows for p in products), BLOCK_SCALES)
    _products[grid](_table(table, products[0].target.device), BLOCK=BLOCK_SCALES, num_warps=WARPS)


@triton.jit
def _products(table: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = table + 5 * tl.program_id(0)
    target, source = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1).to(tl.pointer_type(tl.float32))
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, factor = i < tl.load(row + 2), tl.load(row + 4).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(target + i, tl.load(source + i * tl.load(row + 3), mask=inside) * factor, mask=inside)
