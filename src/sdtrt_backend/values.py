"""The frozen dataclasses that travel between the stages, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .text import render_text

INT16_MAX = 32767  # of two 8-bit codes: 256 * high + low, high in -128..127, low in 0..255
INT8_MAX = 127  # symmetric int8: amax maps to 127; -128 is not produced by amax itself
FP8_MAX = 448  # float8_e4m3fn: the largest finite value
# A range is one-sided when its other side ends below this share of amax; that side is widened by a margin, because what was
# seen there while calibrating may be exceeded, and it is cheap
ONE_SIDED, MARGIN = 0.5, 1.25
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
UINT8_ZERO = 128  # oneDNN takes unsigned activations: int8 value + 128


@dataclass(frozen=True)
class Layer:
    """One quantisable call in a captured graph.

    name: see ``names.layer_name``; op: key of ``rules.OPS`` table; node: FX node name; source: FX node that produces the input.
    weight: the user's parameter, [out, in] (linear) or [out, in, kh, kw] (convolution); role: one of ``roles``, "" for none of
    them, None where no graph has told.
    """

    name: str
    op: str
    node: str
    source: str
    weight: torch.Tensor
    groups: int = 1
    role: str | None = None


@dataclass(frozen=True)
class LayerRecipe:
    """Calibrated input of one layer.

    fingerprint: identifies the weight; group: layers of one group read one tensor and share amax and smoothing;
    amax: clipping value after smoothing; alpha: migration strength, "fitted" or None; plain_amax: clipping value without
    smoothing or None, see ``rules.SMOOTH_CONVS``; low, high: smallest and largest value after smoothing, or None; rotated_amax:
    clipping value of the rotated input (``stats.rotate``), without smoothing, or None; keep: the sentence why the layer is to
    stay in the user's precision, or None; second: the sentence why its input is to have two codes, or to stay in the user's
    precision where kernels take one, or None; role: one of ``roles`` where a graph told it, else "".
    """

    op: str
    fingerprint: str
    group: str
    amax: float
    alpha: float | str | None = None
    plain_amax: float | None = None
    low: float | None = None
    high: float | None = None
    keep: str | None = None
    second: str | None = None
    role: str = ""
    rotated_amax: float | None = None


@dataclass(frozen=True)
class Decision:
    """What happens to one layer: "int8" or "fp8" with these scales, or "16-bit", the user's precision, for a written reason.

    amax: clipping value of the (smoothed) input; smoothing: divisor of the input per channel [in] or None; low, high: smallest
    and largest value seen, where int8 may have a zero point, else None; two_codes: the input has two 8-bit codes, which together
    are 16 bits, see ``rules.TWO_CODES``; weight_amax: of int8 codes, see ``Recipe``, or None for the weight's own; rotated_amax:
    amax, were the input rotated, or None; rotated: it is, by whoever writes it, and the weight with it; turned: the output is,
    by the weight and the bias, for those who read it.
    """

    layer: Layer
    precision: str
    reason: str
    amax: float = 0.0
    smoothing: torch.Tensor | None = None
    group: str = ""
    low: float | None = None
    high: float | None = None
    two_codes: bool = False
    weight_amax: torch.Tensor | None = None
    rotated_amax: float | None = None
    rotated: bool = False
    turned: bool = False

    @property
    def quantized(self) -> bool:
        return self.precision != "16-bit"

    def with_rotated_input(self) -> Decision:
        """The same, its input and its weight rotated, of a decision that has ``rotated_amax``."""
        assert self.rotated_amax is not None
        return replace(self, rotated=True, amax=self.rotated_amax, smoothing=None)

    @property
    def rotations(self) -> tuple[bool, bool]:
        """(whether its input is rotated, whether its output is)."""
        return self.rotated, self.turned

    @property
    def largest_code(self) -> int:
        return INT16_MAX if self.two_codes else INT8_MAX

    @property
    def int8_range(self) -> tuple[float, int]:
        """(scale, zero point in -128..127) of the input: symmetric, amax at the largest code, unless low and high narrow it."""
        if self.two_codes:
            return self.amax / INT16_MAX, 0
        low, high = (self.amax if end is None or abs(end) > ONE_SIDED * self.amax else abs(end) * MARGIN
                     for end in (self.low, self.high))
        if low == high == self.amax:
            return self.amax / INT8_MAX, 0
        scale = (low + high) / (2 * INT8_MAX + 1)
        return scale, round(low / scale) - INT8_MAX - 1


@dataclass(frozen=True)
class Plan:
    """What happens to each layer of a graph. log: (layer, stage, what that stage decided), in order, where it changed something;
    measured: fields of ``build.Timings`` that a stage found on its way."""

    decisions: tuple[Decision, ...]
    log: tuple[tuple[str, str, str], ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether a layer is in 8 bits."""
        return any(d.quantized for d in self.decisions)

    def then(self, stage: str, decisions: Sequence[Decision], **measured: Any) -> Plan:
        """The plan after ``stage``."""
        before = {d.layer.node: (d.precision, d.reason) for d in self.decisions}
        changed = [(d.layer.name, stage, f"{d.precision}{': ' if d.reason else ''}{d.reason}") for d in decisions
                   if before.get(d.layer.node) != (d.precision, d.reason)]
        return replace(self, decisions=tuple(decisions), log=(*self.log, *changed), measured={**self.measured, **measured})


@dataclass(frozen=True)
class LayerReport:
    """One row of the report: a layer, or another operation with a weight.

    shape: of its weight; sqnr_db: signal to quantisation noise of its output, dB; flops: 2 * MAC of a call; amax: None where it
    stays in the user's precision, for ``reason``. where: the graphs that the row is about, in a report of several of them.
    rotations: of its input and of its output, as in ``Decision``.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    precision: str
    engine: str
    reason: str
    amax: float | None = None
    sqnr_db: float | None = None
    flops: int = 0
    where: tuple[str, ...] = ()
    rotations: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Watched:
    """What the drift watch counted. groups: layers that read one tensor -> shares (0..1) of its values beyond everything that
    calibration saw, on the build's input and on the last sampled calls."""

    calls: int
    samples: int
    groups: Mapping[tuple[str, ...], tuple[float, float]]

    def __str__(self) -> str:
        counts = f"{self.calls} calls in 8 bits watched, {self.samples} sampled"
        if not self.groups:
            return counts
        layers, (built, lately) = max(self.groups.items(), key=lambda group: group[1][1])
        return (f"{counts}: at most {lately:.2%} of what a layer reads lay "
                f"beyond its calibrated range ({layers[0]}, {built:.2%} when it was built)")


@dataclass(frozen=True)
class Report:
    """What became of a module, or of one of its graphs.

    timings: by name; what ends in ``_ms`` is of one call, what ends in ``_s`` was spent once, the rest are counts. error: of the
    first 8-bit output, relative to the user's precision. quantized_flops_share: of ``work``, 0..1, what runs in 8 bits. flops:
    2 * MAC of every operation with a weight in one call, 0 where it is not known. sizes: of the inputs it was built for.
    memory: part of the pipeline, "" of a module alone -> what holds it -> bytes: its "weights" on their device, those "in host
    memory", their 8-bit "codes" with scales, what "steps" hold besides, and the "graphs", the pool of their CUDA graphs. peak:
    bytes of the module's GPU that the process had in tensors at most, since torch.cuda.reset_peak_memory_stats().
    pieces: (name, report) of each graph that ``report.merged`` made this one of.
    """

    state: str
    layers: tuple[LayerReport, ...] = ()
    fallbacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    quantized_flops_share: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    watched: Watched | None = None
    flops: int = 0
    sizes: str = ""
    pieces: tuple[tuple[str, Report], ...] = ()
    memory: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    peak: int = 0

    @property
    def work(self) -> int:
        """2 * MAC of every operation with a weight in one call, or of the reported layers where no more is known."""
        return self.flops or sum(layer.flops for layer in self.layers)

    @property
    def quantized_flops(self) -> int:
        """The part of ``work`` that runs in 8 bits."""
        return round((self.quantized_flops_share or 0.0) * self.work)

    def __str__(self) -> str:
        return render_text(self)
