"""Weights with LoRAs, W + sum(strength * scale * up @ down) in fp32, written into tensors that built steps read: 8-bit codes with
their scales, and weights that stay in 16 bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
    """A second tensor for a weight that stays in 16 bits. loras: those that are part of it, None where none were written."""

    weight: torch.Tensor
    tensor: torch.Tensor
    loras: tuple[Any, ...] | None = None

    @property
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
    some, size = list[Any](), 0
    for one in targets:
        prepared = list(_prepared(one, factors_of))
        if None in prepared:
            _write_by_torch(one, factors_of)
            continue
        some += prepared
        size += sum(weight.nbytes for weight, *_ in one.parts if weights.away(weight))
        if len(some) >= AT_ONCE or size >= STAGED:
            _launch(some)
            some, size = [], 0
    _launch(some)


def _launch(prepared: Sequence[Any]) -> None:
    if prepared:
        from .kernels.triton_weights import write_weights

        write_weights(prepared)


def _prepared(one: Coded | Merged, factors_of: FactorsOf) -> Iterator[Any]:
    """What the kernels take for each weight, None where it is not where, or not as, they take it."""
    if not one.parts[0][1].is_cuda or not installed("triton"):
        yield None
        return
    from .kernels.triton_weights import prepare

    smoothing = one.smoothing if isinstance(one, Coded) else None
    for weight, codes, scale, shared in one.parts:
        factors = [(f.up, f.down, f.scale * strength, f.last) for f, strength in factors_of(weight)]
        if len(factors) > 1 and len({up.dtype for up, *_ in factors}) > 1:
            factors = [(up.float(), down.float(), strength, last) for up, down, strength, last in factors]
        here = weight.detach()
        if weights.away(weight):
            here = here.clone()  # two passes read it
        yield prepare(here, factors, codes, scale, smoothing, id(one) if shared else None) if here.is_cuda else None


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


def renew(derived: Sequence[Derived | Scaled]) -> None:
    """What steps read in place of codes and scales, after those were written: scales on a GPU by one launch."""
    at_once: list[Scaled] = []
    for one in derived:
        if isinstance(one, Scaled) and one.target.is_cuda and installed("triton"):
            at_once.append(one)
        else:
            one.renew()
    if at_once:
        from .kernels.triton_weights import Product, write_products

        starts = [itertools.accumulate((rows for _, rows in one.parts), initial=0) for one in at_once]
        write_products([Product(one.target, start, rows, scale, one.factor) for one, begins in zip(at_once, starts, strict=True)
                        for start, (scale, rows) in zip(begins, one.parts, strict=False)])
