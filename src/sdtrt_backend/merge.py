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
STAGED = 2**30  # bytes of weights in memory of the host that are on the GPU at a time, where two passes read them


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
    """Write them all in place: on a GPU by two launches, of torch's operations for what these do not take."""
    by_kernel, others = list[Coded | Merged](), list[Coded | Merged]()
    for one in targets:
        (by_kernel if _for_kernel(one, factors_of) else others).append(one)
    for some in _staged(by_kernel):
        from .kernels.triton_weights import write_weights

        write_weights([w for one in some for w in _for_weights(one, factors_of)])
    for one in others:
        if isinstance(one, Merged):
            one.tensor.copy_(added(one.weight, factors_of(one.weight)))
        else:
            _write_codes(one, factors_of)


def _write_codes(one: Coded, factors_of: FactorsOf) -> None:
    def with_loras(d: Decision) -> Decision:
        factors = factors_of(d.layer.weight)
        return replace(d, layer=replace(d.layer, weight=added(d.layer.weight, factors))) if factors else d

    for pair, new in zip(one.tensors, quantized_weights([with_loras(d) for d in one.members], one.smoothing), strict=True):
        for mine, other in zip(pair, new, strict=True):
            with torch.inference_mode(mine.is_inference()):
                mine.copy_(other)


def _for_kernel(one: Coded | Merged, factors_of: FactorsOf) -> bool:
    """Whether all that it is made of is where, and as, the kernel takes it."""
    if not all(weight.is_cuda and codes.is_cuda for weight, codes, *_ in one.parts) or not installed("triton"):
        return False
    from .kernels.triton_weights import fits

    return all(fits(weight) and fits(codes) and all(f.last == channels_last(weight) for f, _ in factors_of(weight))
               for weight, codes, *_ in one.parts)


def _for_weights(one: Coded | Merged, factors_of: FactorsOf) -> Iterator[Any]:
    """As the kernel takes them."""
    from .kernels.triton_weights import Write

    smoothing = one.smoothing if isinstance(one, Coded) else None
    for weight, codes, scale, shared in one.parts:
        factors = [(f.up, f.down, f.scale * strength) for f, strength in factors_of(weight)]
        if len({up.dtype for up, *_ in factors}) > 1:
            factors = [(up.float(), down.float(), strength) for up, down, strength in factors]
        here = weight.detach().clone() if weights.away(weight) else weight.detach()
        yield Write(here, factors, codes, scale, smoothing, id(one) if shared else None)


def _staged(targets: Sequence[Coded | Merged]) -> Iterator[Sequence[Coded | Merged]]:
    """All at once, or as many as ``STAGED`` holds of weights that are in memory of the host."""
    some: list[Coded | Merged] = []
    size = 0
    for one in targets:
        here = sum(weight.nbytes for weight, *_ in one.parts if weights.away(weight))
        if some and size + here > STAGED:
            yield some
            some, size = [], 0
        some.append(one)
        size += here
    if some:
        yield some


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
