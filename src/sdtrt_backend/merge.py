"""Weights with LoRAs, W + sum(strength * scale * up @ down) in fp32, written into tensors that built steps read: 8-bit codes with
their scales, and weights that stay in 16 bits."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch

from . import weights
from .kernels import installed
from .lower import Derived, Held, Scaled
from .quantize import Coded, Part, quantized_weights
from .stats import channels_last
from .values import Decision

RANKS = 16  # of LoRAs on a GPU: with any other rank its kernel loads single values
AT_ONCE = 160  # weights of one launch, which takes the GPU about as long as it takes Python to put the next one together
STAGED = 2**30  # bytes of weights in memory of the host that are on the GPU at a time
SETS = 16  # of LoRAs for which a GPU's tables are kept
SCALES = "scales"  # theirs among them


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


FactorsOf = Callable[[torch.Tensor], Sequence[tuple[Factors, Hashable]]]  # weight -> its LoRAs, each with its name


@dataclass
class Prepared:
    """A GPU's tables, right as long as everything is ``where`` it was. writes: what is written at once; strengths: (name, scale)
    of the LoRA of each that they take; factors: must live as long; left: places of what kernels do not take."""

    where: Sequence[Any]
    writes: list[Any] = field(default_factory=list)
    strengths: dict[tuple[Hashable, float], int] = field(default_factory=dict)
    factors: list[Factors] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    def strengths_of(self, strengths: Mapping[Hashable, float]) -> list[float]:
        return [scale * strengths[name] for name, scale in self.strengths]


@dataclass(eq=False)
class Merged:
    """A second tensor for a weight that stays in 16 bits. loras: see ``Coded``."""

    weight: torch.Tensor
    tensor: torch.Tensor
    loras: tuple[Any, ...] | None = None

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
def write(targets: Sequence[Coded | Merged], factors_of: FactorsOf, strengths: Mapping[Hashable, float],
          prepared: dict[Any, Prepared]) -> None:
    """Write them all in place. strengths: of each LoRA; prepared: kept from one call to the next, for the GPU."""
    on_gpu = [one for one in targets if one.parts[0][1].is_cuda and _kernels() is not None]
    left = [one for one in targets if not one.parts[0][1].is_cuda or _kernels() is None]
    if on_gpu:
        left += _write_by_kernels(on_gpu, factors_of, strengths, prepared)
    for one in left:
        _write_by_torch(one, lambda weight: [(f, strengths[name]) for f, name in factors_of(weight)])


def _write_by_kernels(targets: Sequence[Coded | Merged], factors_of: FactorsOf, strengths: Mapping[Hashable, float],
                      prepared: dict[Any, Prepared]) -> list[Coded | Merged]:
    """Many with a few launches, and meanwhile what is to be launched next is put together; returns what they do not take."""
    kernels, name, device = _kernels(), tuple(strengths), targets[0].parts[0][1].device
    where = [*map(weakref.ref, targets), *(kernels.where(*part[:3]) for one in targets for part in one.parts)]
    known = prepared.get(name)
    if known is not None and known.where == where:
        values = known.strengths_of(strengths)
        for writes in known.writes:
            writes(values)
        return [targets[i] for i in known.left]
    some, here, staged, new = list[Any](), list[torch.Tensor](), 0, Prepared(where)
    for i, one in enumerate(targets):
        mine = [weight.detach().clone() if weights.away(weight) else weight for weight, *_ in one.parts]  # two passes read it
        found = _for_kernel(one, mine, factors_of, new)
        if found is None:
            new.left.append(i)
        else:
            some, here = some + found, here + mine
        staged += sum(t.nbytes for t, (weight, *_) in zip(mine, one.parts, strict=True) if t is not weight)
        if some and (len(some) >= AT_ONCE or staged >= STAGED or i == len(targets) - 1):
            new.writes.append(kernels.Writes(some, device))
            new.writes[-1](new.strengths_of(strengths))
            some, here, staged = [], [], 0
    if not any(weights.away(weight) for one in targets for weight, *_ in one.parts):
        prepared.pop(name, None)
        while len(prepared) >= SETS:
            prepared.pop(next(iter(prepared)))
        prepared[name] = new
    return [targets[i] for i in new.left]


@cache
def _kernels() -> Any:
    """None where Triton is not installed."""
    if not installed("triton"):
        return None
    from .kernels import triton_weights

    return triton_weights


def _for_kernel(one: Coded | Merged, here: Sequence[torch.Tensor], factors_of: FactorsOf, new: Prepared) -> list[Any] | None:
    """What the kernels take for its weights; None where one is not where, or not as, they take it."""
    if isinstance(one, Coded) and any(d.weight_amax is not None for d in one.members):
        return None
    found, smoothing, rotated = [], one.smoothing if isinstance(one, Coded) else None, [(False, False)]
    if isinstance(one, Coded):
        rotated = [d.rotations for d in one.members]
        if any(map(any, rotated)) and not any(factors_of(weight) for weight, *_ in one.parts):
            return None  # without LoRAs codes are what they were, to the bit, and torch sums in another order
    for (weight, codes, scale, shared), mine, rotations in zip(one.parts, here, rotated, strict=True):
        factors = factors_of(weight)
        if len({f.up.dtype for f, _ in factors}) > 1:
            factors = [(replace(f, up=f.up.float(), down=f.down.float()), name) for f, name in factors]
        new.factors += [f for f, _ in factors]
        places = [(f, new.strengths.setdefault((name, f.scale), len(new.strengths))) for f, name in factors]
        found.append(_kernels().to_write(mine, codes, scale, smoothing, id(one) if shared else None, places, rotations)
                     if mine.device == codes.device else None)
    return None if None in found else found


def _write_by_torch(one: Coded | Merged, factors_of: Callable[[torch.Tensor], Sequence[tuple[Factors, float]]]) -> None:
    if isinstance(one, Merged):
        one.tensor.copy_(added(one.weight, factors_of(one.weight)))
        return

    def with_loras(d: Decision) -> Decision:
        factors = factors_of(d.layer.weight)
        # the ranges that a weight was trained to are not those of another
        return replace(d, layer=replace(d.layer, weight=added(d.layer.weight, factors)), weight_amax=None) if factors else d

    for pair, new in zip(one.tensors, quantized_weights([with_loras(d) for d in one.members], one.smoothing), strict=True):
        for mine, other in zip(pair, new, strict=True):
            with torch.inference_mode(mine.is_inference()):
                mine.copy_(other)


def renew(derived: Sequence[Derived | Scaled | Held], written: Sequence[Coded | Merged] | None, prepared: dict[Any, Any]) -> None:
    """What steps read in place of codes and scales, after those of ``written`` were, or any: scales on a GPU by one launch.
    prepared: see ``write``."""
    at_once = [one for one in derived if isinstance(one, Scaled) and one.target.is_cuda and _kernels() is not None]
    others = derived if not at_once else [one for one in derived if not isinstance(one, Scaled) or not one.target.is_cuda]
    look = written if written is not None and others else ()
    addresses = {t.data_ptr() for one in look for _, *pair, _ in one.parts for t in pair if t is not None}
    for other in others:
        if written is None or not addresses.isdisjoint(t.data_ptr() for t in other.sources):
            other.renew()
    if at_once:
        where = [(one.target.data_ptr(), *((t.data_ptr(), factor) for t, _, factor in one.parts)) for one in at_once]
        if SCALES not in prepared or prepared[SCALES][0] != where:
            prepared[SCALES] = where, _kernels().Products([(one.target, one.parts) for one in at_once])
        prepared[SCALES][1]()
