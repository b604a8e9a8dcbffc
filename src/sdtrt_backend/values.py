"""The frozen dataclasses that travel between the stages, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

INT8_MAX = 127  # symmetric int8: amax maps to 127; -128 is not produced by amax itself
FP8_MAX = 448  # float8_e4m3fn: the largest finite value
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
UINT8_ZERO = 128  # oneDNN takes unsigned activations: int8 value + 128


@dataclass(frozen=True)
class Layer:
    """One quantisable call in a captured graph.

    name: module path; op: key of ``rules.OPS`` table; node: FX node name; source: FX node that produces the input.
    weight: [out, in] (linear) or [out, in, kh, kw] (convolution), as the user holds it.
    """

    name: str
    op: str
    node: str
    source: str
    weight: torch.Tensor
    groups: int = 1


@dataclass(frozen=True)
class Decision:
    """What happens to one layer: "int8" or "fp8" with these scales, or "16-bit", the user's precision, for a written reason.

    amax: clipping value of the (smoothed) input; smoothing: divisor of the input per channel [in] or None.
    """

    layer: Layer
    precision: str
    reason: str
    amax: float = 0.0
    smoothing: torch.Tensor | None = None
    group: str = ""

    @property
    def quantized(self) -> bool:
        return self.precision != "16-bit"


@dataclass(frozen=True)
class LayerReport:
    """One row of the report. sqnr_db: signal to quantisation noise of the layer's output, dB; flops: 2 * MAC of a step."""

    name: str
    op: str
    shape: tuple[int, ...]
    precision: str
    engine: str
    reason: str
    amax: float | None = None
    sqnr_db: float | None = None
    flops: int = 0
