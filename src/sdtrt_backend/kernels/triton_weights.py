"""Weights with LoRAs, in 8 bits, of all layers of a model by two Triton kernels.

W + sum(strength * up @ down), times the smoothing of its input channel, in fp32: the first pass over the weights takes the
largest value of every row, from which torch makes the scales, the second one writes codes. Without LoRAs they are those that
torch itself makes, to the bit. The same code runs on CPU tensors under TRITON_INTERPRET=1, set before triton is first imported.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its kernels.

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import triton  # type: ignore[import, unused-ignore]
import triton.language as tl  # type: ignore[import, unused-ignore]

from ..stats import channels_last, row_scale, shared_scale

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.int8: tl.int8,
         torch.float8_e4m3fn: tl.float8e4nv}
BLOCK_ROWS, BLOCK_K, BLOCK_RANK, WARPS = 64, 128, 32, 4
BLOCK_SCALES = 1024
COLUMNS = tl.constexpr(16)  # of a weight in the table: those of ``_weight``, slot, what a row adds to it, first and last LoRA


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

    @property
    def kind(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Dtypes of the weight, the factors and the codes, which are those of one launch."""
        return self.weight.dtype, self.factors[0][0].dtype if self.factors else self.weight.dtype, self.codes.dtype


def fits(t: torch.Tensor) -> bool:
    """Whether a weight, or codes, are laid out as the kernels take them: contiguous or channels last."""
    return t.dtype in TYPES and 0 < t.numel() < 2**31 and (t.is_contiguous() or channels_last(t))


def write_weights(writes: Sequence[Write]) -> None:
    """Write the codes and scales of all, on the current stream, without waiting for it."""
    for kind in dict.fromkeys(w.kind for w in writes):
        _write_alike([w for w in writes if w.kind == kind], kind)


def _write_alike(writes: Sequence[Write], kind: Sequence[torch.dtype]) -> None:
    device, types = writes[0].codes.device, [TYPES[dtype] for dtype in kind]
    shared = {name: i for i, name in enumerate(dict.fromkeys(w.shared for w in writes if w.shared is not None))}
    table, entries = list[tuple[int, ...]](), list[tuple[int, ...]]()
    strengths, slots = list[float](), len(shared)
    for w in writes:
        rows, slot, step = w.weight.shape[0], slots, 1
        if w.shared is not None:
            slot, step = shared[w.shared], 0
        elif w.scale is not None:
            slots += rows
        table.append((*_weight(w), slot, step, len(entries), len(entries) + len(w.factors)))
        entries += [(up.data_ptr(), down.data_ptr(), up.shape[1]) for up, down, _ in w.factors]
        strengths += [strength for *_, strength in w.factors]
    blocks = torch.tensor([triton.cdiv(w.weight.shape[0], BLOCK_ROWS) for w in writes])
    layer = torch.arange(len(writes)).repeat_interleave(blocks)
    first = torch.arange(len(layer)) - (blocks.cumsum(0) - blocks)[layer]
    programs = torch.stack([layer, first * BLOCK_ROWS], 1).to(device)
    given = (programs, _table(table, device), _table(entries, device), torch.tensor(strengths, device=device))
    sizes = {"ROWS": BLOCK_ROWS, "K": BLOCK_K, "RANK": BLOCK_RANK, "num_warps": WARPS}
    scales = torch.zeros(max(1, slots), device=device)
    if slots:
        _amax[(len(layer),)](*given, scales, *types[:2], **sizes)
        scales = torch.cat([shared_scale(scales[: len(shared)]), row_scale(scales[len(shared) :], kind[2])])
    _codes[(len(layer),)](*given, scales, *types, **sizes)


def _table(rows: Sequence[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(device)


def _weight(w: Write) -> tuple[int, ...]:
    """Its columns in the table but the last four: four pointers; rows; elements of a row; elements from one step of the outer of
    its two indices, channel and position in the kernel, to the next; what a step of the outer and of the inner one adds to the
    place of a code, and to the channel; what a row adds to the place of its scale."""
    rows = w.weight.shape[0]
    length = w.weight.numel() // rows
    channels = w.weight.shape[1] if w.weight.dim() > 1 else 1
    positions = length // channels
    code = (1, channels) if channels_last(w.codes) else (positions, 1)  # of a channel, of a position
    inner, code_outer, code_inner, channel_outer, channel_inner = (
        (channels, code[1], code[0], 0, 1) if channels_last(w.weight) else (positions, *code, 1, 0))
    return (w.weight.data_ptr(), 0 if w.smoothing is None else w.smoothing.data_ptr(), w.codes.data_ptr(),
            0 if w.scale is None else w.scale.data_ptr(), rows, length, inner, code_outer, code_inner, channel_outer,
            channel_inner, int(w.scale is not None and w.scale.numel() > 1))


@triton.jit
def _values(table: tl.tensor, entries: tl.tensor, strengths: tl.tensor, rows: tl.tensor, k: tl.tensor, WEIGHT: tl.constexpr,
            FACTOR: tl.constexpr, RANK: tl.constexpr) -> tl.tensor:
    """A tile of a weight with its LoRAs, smoothed, fp32; zeros outside of the weight."""
    length = tl.load(table + 5)
    row_inside, k_inside = (rows < tl.load(table + 4))[:, None], (k < length)[None, :]
    weight = tl.load(table).to(tl.pointer_type(WEIGHT))
    y = tl.load(weight + rows[:, None] * length + k[None, :], mask=row_inside & k_inside, other=0.0).to(tl.float32)
    for entry in range(tl.load(table + 14), tl.load(table + 15)):
        up = tl.load(entries + 3 * entry).to(tl.pointer_type(FACTOR))
        down = tl.load(entries + 3 * entry + 1).to(tl.pointer_type(FACTOR))
        rank = tl.load(entries + 3 * entry + 2)
        product = tl.zeros(y.shape, tl.float32)
        for start in range(0, rank, RANK):
            r = start + tl.arange(0, RANK)
            u = tl.load(up + rows[:, None] * rank + r[None, :], mask=row_inside & (r < rank)[None, :], other=0.0)
            d = tl.load(down + r[:, None] * length + k[None, :], mask=(r < rank)[:, None] & k_inside, other=0.0)
            product = tl.dot(u, d, product, input_precision="tf32x3")  # of 16-bit factors the products are exact
        y += product * tl.load(strengths + entry)
    smoothing, inner = tl.load(table + 1), tl.load(table + 6)
    channel = k // inner * tl.load(table + 9) + k % inner * tl.load(table + 10)
    smoothed = (k < length) & (smoothing != 0)
    return y * tl.load(smoothing.to(tl.pointer_type(tl.float32)) + channel, mask=smoothed, other=1.0)[None, :]


@triton.jit
def _amax(programs: tl.tensor, table: tl.tensor, entries: tl.tensor, strengths: tl.tensor, amax_ptr: tl.tensor,
          WEIGHT: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr) -> None:
    """amax [slots], fp32, zeros before: the largest absolute value of what has one scale."""
    program = programs + 2 * tl.program_id(0)
    table += COLUMNS * tl.load(program)
    rows = tl.load(program + 1) + tl.arange(0, ROWS)
    amax = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tl.load(table + 5), K):
        y = _values(table, entries, strengths, rows, start + tl.arange(0, K), WEIGHT, FACTOR, RANK)
        amax = tl.maximum(amax, tl.max(tl.abs(y), 1))
    tl.atomic_max(amax_ptr + tl.load(table + 12) + rows * tl.load(table + 13), amax, mask=rows < tl.load(table + 4))


@triton.jit
def _codes(programs: tl.tensor, table: tl.tensor, entries: tl.tensor, strengths: tl.tensor, scales_ptr: tl.tensor,
           WEIGHT: tl.constexpr, FACTOR: tl.constexpr, CODE: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
           RANK: tl.constexpr) -> None:
    """Codes, and scales where they belong. scales: of the slots, fp32."""
    program = programs + 2 * tl.program_id(0)
    table += COLUMNS * tl.load(program)
    rows = tl.load(program + 1) + tl.arange(0, ROWS)
    inside, length = rows < tl.load(table + 4), tl.load(table + 5)
    codes, inner = tl.load(table + 2).to(tl.pointer_type(CODE)), tl.load(table + 6)
    if tl.int8 == CODE or tl.float8e4nv == CODE:
        scale = tl.load(scales_ptr + tl.load(table + 12) + rows * tl.load(table + 13), mask=inside, other=1.0)
        tl.store(tl.load(table + 3).to(tl.pointer_type(tl.float32)) + rows * tl.load(table + 11), scale, mask=inside)
    for start in range(0, length, K):
        k = start + tl.arange(0, K)
        y = _values(table, entries, strengths, rows, k, WEIGHT, FACTOR, RANK)
        if tl.int8 == CODE:
            # 1.5 * 2^23: fp32 holds only integers there, so the addition rounds, to even
            y = (tl.div_rn(y, scale[:, None]) + 12582912.0) - 12582912.0
            y = tl.minimum(tl.maximum(y, -127.0), 127.0)
        elif tl.float8e4nv == CODE:
            y = tl.minimum(tl.maximum(tl.div_rn(y, scale[:, None]), -448.0), 448.0)
        at = rows[:, None] * length + (k // inner * tl.load(table + 7) + k % inner * tl.load(table + 8))[None, :]
        tl.store(codes + at, y.to(CODE), mask=inside[:, None] & (k < length)[None, :])


@dataclass(frozen=True, eq=False)
class Product:
    """target = source * factor: fp32 [n] of [n] or [1], contiguous."""

    target: torch.Tensor
    source: torch.Tensor
    factor: float


def write_products(products: Sequence[Product]) -> None:
    """All of them by one launch, as torch multiplies them."""
    if not products:
        return
    device = products[0].target.device
    table = [(p.target.data_ptr(), p.source.data_ptr(), p.target.numel(), int(p.source.numel() > 1)) for p in products]
    blocks = triton.cdiv(max(p.target.numel() for p in products), BLOCK_SCALES)
    _products[(len(products), blocks)](_table(table, device), torch.tensor([p.factor for p in products], device=device),
                                       BLOCK=BLOCK_SCALES, num_warps=WARPS)


@triton.jit
def _products(table: tl.tensor, factors: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = table + 4 * tl.program_id(0)
    target, source = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1).to(tl.pointer_type(tl.float32))
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.load(row + 2)
    tl.store(target + i, tl.load(source + i * tl.load(row + 3), mask=inside) * tl.load(factors + tl.program_id(0)), mask=inside)
