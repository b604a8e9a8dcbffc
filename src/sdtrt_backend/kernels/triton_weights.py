"""Weights with LoRAs, in 8 bits, of all layers of a model by two Triton kernels.

W + sum(strength * up @ down), times the smoothing of its input channel and rotated, in fp32: the first pass over the weights
takes the largest value of every row, from which torch makes the scales, the second one writes codes. Without LoRAs those of what
is not rotated are what torch itself makes, to the bit. The same code runs on CPU tensors under TRITON_INTERPRET=1, set before
triton is first imported.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels.

import itertools
import math
from array import array
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import triton  # type: ignore[import, unused-ignore]
import triton.language as tl  # type: ignore[import, unused-ignore]

from ..stats import ROTATED, channels_last, rotate, row_scale, shared_scale

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.int8: tl.int8,
         torch.float8_e4m3fn: tl.float8e4nv}
BLOCK_ROWS, BLOCK_K, BLOCK_RANK, WARPS = ROTATED, 2 * ROTATED, 32, 4
BLOCK_SCALES = 1024
ALIGNMENT = 16  # bytes, and elements of a row, with which the kernels load and store whole vectors
# Of a weight in the table: pointers to it, its smoothing, codes and scale; rows; elements of a row; elements from one step of the
# outer of its two indices, channel and position in the kernel, to the next; what a step of the outer and of the inner one adds to
# the place of a code, and to the channel; what a row adds to the place of its scale; its slot among the scales, what a row adds
# to that; its first LoRA, and the first of the next weight
COLUMNS = tl.constexpr(16)
TOGETHER = tl.constexpr(ROTATED)
ENTRY = tl.constexpr(4)  # of a LoRA: pointers to its factors, rank, place of its strength


class Factors(Protocol):
    """Of one LoRA of one weight: up [out, rank] and down [rank, in * ...], contiguous and of one dtype; down is in the order of
    the weight's memory, of channels last where ``last``."""

    @property
    def up(self) -> torch.Tensor: ...

    @property
    def down(self) -> torch.Tensor: ...

    @property
    def last(self) -> bool: ...


@dataclass(frozen=True, eq=False, slots=True)
class Write:
    """One weight to be written. kind: what all weights of one launch have in common: dtypes of the weight, its factors and its
    codes; whether codes are in the order of the weight; whether all rows begin at multiples of ALIGNMENT; whether the input and
    the output are rotated. columns: its first ones
    in the table; entries: its LoRAs; shared: name of the scale that it shares."""

    kind: tuple[torch.dtype, torch.dtype, torch.dtype, bool, bool, tuple[bool, bool]]
    columns: tuple[int, ...]
    entries: list[int]
    rows: int
    shared: Hashable


def where(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor | None) -> tuple[Any, ...]:
    """As long as it is the same, what was put together for these tensors is right."""
    return weight.data_ptr(), codes.data_ptr(), 0 if scale is None else scale.data_ptr(), weight.stride(), weight.dtype


def to_write(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor | None = None, smoothing: torch.Tensor | None = None,
             shared: Hashable = None, factors: Sequence[tuple[Factors, int]] = (),
             rotations: tuple[bool, bool] = (False, False)) -> Write | None:
    """A weight with LoRAs and its codes; None where they are not laid out as the kernels take them, which is contiguous or
    channels last.

    weight: [out, in, ...] of any floating-point dtype, in memory that the GPU reads; codes: int8 or float8_e4m3fn with their
    scale, fp32 [out] or [1], or without one of the weight's dtype; smoothing: fp32, ``in`` elements; shared: equal for weights
    of one scale, None where each row has its own; factors: of one dtype, each with the place of its strength; rotations: of the
    weight's input and of its output, see ``stats.rotate``. All of them must live until they were written.
    """
    layout = _layout(weight.shape, weight.stride(), weight.dtype)
    code_layout = _layout(codes.shape, codes.stride(), codes.dtype)
    if layout is None or code_layout is None or any(one.last != layout[3] for one, _ in factors):
        return None
    rows, channels, positions, last = layout
    address, code_address, scale_address, *_ = where(weight, codes, scale)
    of_channel, of_position = (1, channels) if code_layout[3] else (positions, 1)
    order = (channels, of_position, of_channel, 0, 1) if last else (positions, of_channel, of_position, 1, 0)
    columns = (address, 0 if smoothing is None else smoothing.data_ptr(), code_address, scale_address, rows, channels * positions,
               *order, 0 if scale is None or scale.numel() == 1 else 1)
    entries, bits, dtype = list[int](), address | code_address | channels * positions, weight.dtype
    for one, place in factors:
        up, down, rank, dtype = one.up.data_ptr(), one.down.data_ptr(), len(one.down), one.up.dtype
        entries += up, down, rank, place
        bits |= up | down | rank
    kind = weight.dtype, dtype, codes.dtype, last == code_layout[3], bits % ALIGNMENT == 0, rotations
    return Write(kind, columns, entries, rows, shared)


@cache
def _layout(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int, int, bool] | None:
    """Rows, channels, positions in the kernel, and whether they are channels last; None of any other layout."""
    t = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    fits = dtype in TYPES and len(shape) > 1 and 0 < t.numel() < 2**31 and (t.is_contiguous() or channels_last(t))
    return (shape[0], shape[1], math.prod(shape[2:]), channels_last(t)) if fits else None


class Writes:
    """What is to be written at once, by a launch of each kernel for each kind; codes are of one 8-bit dtype."""

    def __init__(self, writes: Sequence[Write], device: torch.device) -> None:
        kinds = defaultdict[Any, list[Write]](list)
        for w in writes:
            kinds[w.kind].append(w)
        shared = {name: i for i, name in enumerate(dict.fromkeys(w.shared for w in writes if w.shared is not None))}
        table, entries, slots = list[int](), list[int](), len(shared)
        for w in itertools.chain.from_iterable(kinds.values()):
            slot, step = (slots, 1) if w.shared is None else (shared[w.shared], 0)
            slots += w.rows * step
            first = len(entries) // ENTRY.value
            entries += w.entries
            table += *w.columns, slot, step, first, len(entries) // ENTRY.value
        numbers, self.launches, first = _table(table + entries, device), list[Any](), 0
        for kind, alike in kinds.items():
            grid = len(alike), triton.cdiv(max(w.rows for w in alike), BLOCK_ROWS)
            self.launches.append((grid, numbers[first:], kind))
            first += COLUMNS.value * len(alike)
        self.entries, self.shared, self.slots, self.device = numbers[first:], len(shared), slots, device
        self.hadamard = rotate(torch.eye(ROTATED, device=device))

    def __call__(self, strengths: Sequence[float]) -> None:
        """Write the codes and scales of all, on the current stream, without waiting for it."""
        sizes = {"ROWS": BLOCK_ROWS, "K": BLOCK_K, "RANK": BLOCK_RANK, "num_warps": WARPS}
        scales = torch.zeros(self.slots, device=self.device)
        given = self.entries, _table(strengths, self.device, "f"), self.hadamard
        codes = torch.int8
        for grid, rows, (weight, factor, code, _, aligned, rotations) in self.launches:
            if code.itemsize == 1:
                _amax[grid](rows, *given, scales, TYPES[weight], TYPES[factor], aligned, *rotations, **sizes)
                codes = code
        scales = torch.cat([shared_scale(scales[: self.shared]), row_scale(scales[self.shared :], codes)])
        for grid, rows, (weight, factor, code, same, aligned, rotations) in self.launches:
            _codes[grid](rows, *given, scales, TYPES[weight], TYPES[factor], TYPES[code], same, aligned, *rotations, **sizes)


def _table(numbers: Sequence[float], device: torch.device, kind: str = "q") -> torch.Tensor:
    """int64 (q) or fp32 (f), on the device without waiting for it."""
    if not numbers:
        return torch.zeros(1, device=device)
    table = torch.frombuffer(array(kind, numbers), dtype=torch.int64 if kind == "q" else torch.float32)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.clone()


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
def _values(table: tl.tensor, entries: tl.tensor, strengths: tl.tensor, hadamard_ptr: tl.tensor, rows: tl.tensor, k: tl.tensor,
            first_up: tl.tensor, WEIGHT: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ROTATED: tl.constexpr,
            TURNED: tl.constexpr, RANK: tl.constexpr) -> tl.tensor:
    """A tile of a weight with its LoRAs, smoothed and rotated, fp32; zeros outside of the weight. first_up: see ``_first_up``."""
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
        y += product * tl.load(strengths + tl.load(at + 3))
    smoothing = tl.load(table + 1)
    if smoothing != 0:
        inner = tl.load(table + 6).to(tl.int32)
        channel = k // inner * tl.load(table + 9) + k % inner * tl.load(table + 10)
        y *= tl.load(smoothing.to(tl.pointer_type(tl.float32)) + channel, mask=k < length, other=1.0)[None, :]
    if ROTATED or TURNED:  # as many rows as are rotated together, and a multiple of as many columns
        i = tl.arange(0, TOGETHER)
        hadamard = tl.load(hadamard_ptr + i[:, None] * TOGETHER + i[None, :])
        if TURNED:
            y = tl.dot(hadamard, y, input_precision="tf32x3")
        if ROTATED:
            parts = tl.reshape(y, (y.shape[0] * y.shape[1] // TOGETHER, TOGETHER))
            y = tl.reshape(tl.dot(parts, hadamard, input_precision="tf32x3"), y.shape)
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
def _amax(table: tl.tensor, entries: tl.tensor, strengths: tl.tensor, hadamard_ptr: tl.tensor, amax_ptr: tl.tensor,
          WEIGHT: tl.constexpr, FACTOR: tl.constexpr, ALIGNED: tl.constexpr, ROTATED: tl.constexpr, TURNED: tl.constexpr,
          ROWS: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr) -> None:
    """amax [slots], fp32, zeros before: the largest absolute value of what has one scale."""
    table += COLUMNS * tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    limit = tl.load(table + 4)
    if tl.program_id(1) * ROWS >= limit:
        return
    up = _first_up(table, entries, rows, FACTOR, ALIGNED, RANK)
    amax = tl.zeros((ROWS,), tl.float32)
    for start in range(0, _length(table + 5, ALIGNED), K):
        y = _values(table, entries, strengths, hadamard_ptr, rows, start + tl.arange(0, K), up, WEIGHT, FACTOR, ALIGNED, ROTATED,
                    TURNED, RANK)
        amax = tl.maximum(amax, tl.max(tl.abs(y), 1))
    tl.atomic_max(amax_ptr + tl.load(table + 12) + rows * tl.load(table + 13), amax, mask=rows < limit)


@triton.jit
def _codes(table: tl.tensor, entries: tl.tensor, strengths: tl.tensor, hadamard_ptr: tl.tensor, scales_ptr: tl.tensor,
           WEIGHT: tl.constexpr, FACTOR: tl.constexpr, CODE: tl.constexpr, SAME: tl.constexpr, ALIGNED: tl.constexpr,
           ROTATED: tl.constexpr, TURNED: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr) -> None:
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
        y = _values(table, entries, strengths, hadamard_ptr, rows, k, up, WEIGHT, FACTOR, ALIGNED, ROTATED, TURNED, RANK)
        if CODE.is_int():
            # 1.5 * 2^23: fp32 holds only integers there, so the addition rounds, to even
            y = (tl.div_rn(y, scale[:, None]) + 12582912.0) - 12582912.0
            y = tl.minimum(tl.maximum(y, -127.0), 127.0)
        elif CODE.is_fp8():
            y = tl.minimum(tl.maximum(tl.div_rn(y, scale[:, None]), -448.0), 448.0)
        at = k if SAME else k // inner * tl.load(table + 7).to(tl.int32) + k % inner * tl.load(table + 8).to(tl.int32)
        tl.store(codes + rows[:, None] * length + at[None, :], y.to(CODE), mask=inside[:, None] & (k < length)[None, :])


class Products:
    """(target, parts): the sources of the parts, each [rows] or [1], for so many rows and times a factor, one behind the other;
    fp32, contiguous. All of them by one launch, as torch multiplies them. They must live until then."""

    def __init__(self, products: Sequence[tuple[torch.Tensor, Sequence[tuple[torch.Tensor, int, float]]]]) -> None:
        table, factors, most = list[int](), list[float](), 0
        for target, parts in products:
            address = target.data_ptr()
            for source, rows, factor in parts:
                table += address, source.data_ptr(), rows, 0 if source.numel() == 1 else 1
                factors.append(factor)
                address, most = address + 4 * rows, max(most, rows)
        device = products[0][0].device
        self.given = _table(table, device), _table(factors, device, "f")
        self.grid = len(factors), triton.cdiv(most, BLOCK_SCALES)

    def __call__(self) -> None:
        _products[self.grid](*self.given, BLOCK=BLOCK_SCALES, num_warps=WARPS)


@triton.jit
def _products(table: tl.tensor, factors: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = table + 4 * tl.program_id(0)
    target, source = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1).to(tl.pointer_type(tl.float32))
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.load(row + 2)
    tl.store(target + i, tl.load(source + i * tl.load(row + 3), mask=inside) * tl.load(factors + tl.program_id(0)), mask=inside)
