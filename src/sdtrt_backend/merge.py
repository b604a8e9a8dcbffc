"""Weights with LoRAs, W + sum(strength * scale * up @ down) in fp32, written into tensors that built steps read: 8-bit codes with
their scales, and weights that stay in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch

from . import weights
from .kernels import installed
from .lower import Derived, Scaled
from .quantize import Coded, Part, quantized_weights
from .stats import channels_last
from .values import Decision

RANKS = 16  # of LoRAs on a GPU: with any other rank its kernel loads single values
AT_ONCE = 160  # weights of one launch, which takes the GPU about as long as it takes Python to put the next one together
STAGED = 2**30  # bytes of weights in memory of the host that are on the GPU at a time


@dataclass(frozen=True)
class Factors:
    """scale * up @ down is added to a weight: down [rank, in, (kh, kw)], up [out, rank, (1, 1)], any floating-point dtype.

    last: ``down`` is [rank, (kh, kw), in], as the memory of a weight that is channels last.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    last: bool = False

    @cached_property
    def addresses(self) -> tuple[int, int, int]:
        """Of up, of down, and the rank."""
        return self.up.data_ptr(), self.down.data_ptr(), len(self.down)

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        """What is added to ``weight``, in fp32, on its device."""
        up, down = (t.to(weight.device, torch.float32).flatten(1) for t in (self.up, self.down))
        out, channels, *kernel = weight.shape
        product = (up @ down).view(out, *kernel, channels).movedim(-1, 1) if self.last else (up @ down).view(weight.shape)
        return product * self.scale

    def beside(self, weight: torch.Tensor) -> Factors:
        """On the weight's device and in the order of its memory; in its dtype, or fp32; flat, and of a rank that is a multiple of
        RANKS, by zeros."""
        dtype = weight.dtype if self.down.dtype == self.up.dtype == weight.dtype else torch.float32
        down, up, last = self.down.to(weight.device, dtype), self.up.to(weight.device, dtype).flatten(1), channels_last(weight)
        if last:
            down = down.view(len(down), *weight.shape[1:]).movedim(1, -1)
        more = -len(down) % RANKS
        down, up = (torch.nn.functional.pad(t, by) for t, by in ((down.flatten(1), (0, 0, 0, more)), (up, (0, more))))
        return Factors(down.contiguous(), up.contiguous(), self.scale, last)


FactorsOf = Callable[[torch.Tensor], Sequence[tuple[Factors, float]]]  # weight -> its LoRAs with their strengths


@dataclass(eq=False)
class Merged:
    """A second tensor for a weight that stays in 16 bits. loras, places: see ``Coded``."""

    weight: torch.Tensor
    tensor: torch.Tensor
    loras: tuple[Any, ...] | None = None
    places: list[Any] = field(default_factory=list)

    @cached_property
    def parts(self) -> list[Part]:
        return [(self.weight, self.tensor, None, False)]


def added(weight: torch.Tensor, factors: Sequence[tuple[Factors, float]]) -> torch.Tensor:
    """``weight`` with these LoRAs, in fp32."""
    whole = weight.detach().float()
    for one, strength in factors:
        whole = whole + one.delta(weight) * strength
    return whole


@torch.no_grad()
def write(targets: Sequence[Coded | Merged], factors_of: FactorsOf) -> None:
    """Write them all in place: on a GPU many with a few launches, and meanwhile what is to be launched next is put together."""
    some, staged = list[Any](), 0
    for one in targets:
        writes = _for_kernel(one, factors_of)
        if writes is None:
            _write_by_torch(one, factors_of)
            continue
        some += writes
        staged += sum(weight.nbytes for weight, *_ in one.parts if weights.away(weight))
        if len(some) >= AT_ONCE or staged >= STAGED:
            _launch(some)
            some, staged = [], 0
    _launch(some)


def _launch(writes: Sequence[Any]) -> None:
    if writes:
        _kernels().write_weights(writes)


@cache
def _kernels() -> Any:
    """None where Triton is not installed."""
    if not installed("triton"):
        return None
    from .kernels import triton_weights

    return triton_weights


def _for_kernel(one: Coded | Merged, factors_of: FactorsOf) -> list[Any] | None:
    """What the kernels take for its weights; None where one is not where, or not as, they take it."""
    kernels, writes = _kernels() if one.parts[0][1].is_cuda else None, []
    if kernels is None:
        return None
    one.places += [None] * (len(one.parts) - len(one.places))
    for i, (weight, codes, scale, shared) in enumerate(one.parts):
        here = weight.detach().clone() if weights.away(weight) else weight  # two passes read it
        known = one.places[i]
        if known is None or known.valid_for != kernels.valid_for(here, codes, scale):
            smoothing = one.smoothing if isinstance(one, Coded) else None
            known = kernels.place(here, codes, scale, smoothing, id(one) if shared else None) if here.is_cuda else None
            one.places[i] = known
        factors = [(f, f.scale * strength) for f, strength in factors_of(weight)]
        if len(factors) > 1 and len({f.up.dtype for f, _ in factors}) > 1:
            factors = [(replace(f, up=f.up.float(), down=f.down.float()), strength) for f, strength in factors]
        found = None if known is None else known.write(here, factors)
        if found is None:
            return None
        writes.append(found)
    return writes


def _write_by_torch(one: Coded | Merged, factors_of: FactorsOf) -> None:
    if isinstance(one, Merged):
        one.tensor.copy_(added(one.weight, factors_of(one.weight)))
        return

    def with_loras(d: Decision) -> Decision:
        factors = factors_of(d.layer.weight)
        return replace(d, layer=replace(d.layer, weight=added(d.layer.weight, factors))) if factors else d

    for pair, new in zip(one.tensors, quantized_weights([with_loras(d) for d in one.members], one.smoothing), strict=True):
        for mine, other in zip(pair, new, strict=True):
            with torch.inference_mode(mine.is_inference()):
                mine.copy_(other)


def renew(derived: Sequence[Derived | Scaled], written: Sequence[Coded | Merged] | None) -> None:
    """What steps read in place of codes and scales, after those of ``written`` were, or any: scales on a GPU by one launch."""
    at_once: list[Scaled] = []
    addresses = {t.data_ptr() for one in written or () for _, *pair, _ in one.parts for t in pair if t is not None}
    for one in derived:
        if isinstance(one, Scaled) and one.target.is_cuda and _kernels() is not None:
            at_once.append(one)
        elif written is None or not addresses.isdisjoint(t.data_ptr() for t in one.sources):
            one.renew()
    if at_once:
        _kernels().write_products([(one.target, one.parts, one.factor) for one in at_once])
