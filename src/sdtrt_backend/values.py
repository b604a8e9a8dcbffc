"""The frozen dataclasses that travel between the stages, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from .errors import OptionError

INT8_MAX = 127  # symmetric int8: amax maps to 127; -128 is not produced by amax itself
UINT8_ZERO = 128  # oneDNN takes unsigned activations: int8 value + 128


@dataclass(frozen=True)
class Options:
    """Options of ``torch.compile(module, backend="sd_int8", options={...})``, checked once, here.

    recipe: folder of a saved recipe, or None to self-calibrate.
    calibration_runs: complete denoising trajectories to observe before building.
    rule: name of a range rule (``rules.RANGE_RULES``).
    percentile: share of the timesteps, from the noisy end, that the range rule looks at; 0 < p <= 1.
    alpha: SmoothQuant migration strength, 0..1; None switches smoothing off.
    max_error: largest relative error ||y8 - y|| / ||y|| of the first 8-bit step.
    rest: precision of what is not 8-bit: "auto", "float32" (the module's own precision) or "bfloat16".
    engine: "auto", "inductor" or "reference".
    exclude: glob patterns of module paths that stay unquantised.
    """

    recipe: str | None = None
    calibration_runs: int = 2
    rule: str = "max"
    percentile: float = 1.0
    alpha: float | None = 0.5
    max_error: float = 0.2
    rest: str = "auto"
    engine: str = "auto"
    exclude: tuple[str, ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """``given`` as the user wrote it -> Options. Raises OptionError naming what is valid."""
        from .rules import ENGINES, RANGE_RULES, RESTS

        values = dict(given or {})
        valid = [f.name for f in fields(cls)]
        for name in values:
            if name not in valid:
                raise OptionError.unknown(name, valid)

        def check(name: str, ok: bool, expected: str) -> None:
            if name in values and not ok:
                raise OptionError.ill_typed(name, expected, values[name])

        def number(name: str) -> bool:
            return isinstance(values.get(name), int | float) and not isinstance(values.get(name), bool)

        if isinstance(values.get("recipe"), Path):
            values["recipe"] = str(values["recipe"])
        if isinstance(values.get("exclude"), list):
            values["exclude"] = tuple(values["exclude"])
        check("recipe", values.get("recipe") is None or isinstance(values["recipe"], str), "the path of a recipe folder")
        runs = values.get("calibration_runs")
        check("calibration_runs", isinstance(runs, int) and not isinstance(runs, bool) and runs >= 1, "an integer >= 1")
        check("rule", values.get("rule") in RANGE_RULES, f"one of {', '.join(RANGE_RULES)}")
        check("percentile", number("percentile") and 0 < values["percentile"] <= 1, "a number in (0, 1]")
        check("alpha", values.get("alpha") is None or number("alpha") and 0 <= values["alpha"] <= 1, "a number in [0, 1] or None")
        check("max_error", number("max_error") and values["max_error"] > 0, "a number > 0")
        check("rest", values.get("rest") in RESTS, f"one of {', '.join(RESTS)}")
        check("engine", values.get("engine") in ENGINES, f"one of {', '.join(ENGINES)}")
        patterns = values.get("exclude")
        check("exclude", isinstance(patterns, tuple) and all(isinstance(p, str) for p in patterns), "a list of glob patterns")
        return cls(**values)


@dataclass(frozen=True)
class Layer:
    """One quantisable call in a captured graph.

    name: module path; op: key of ``rules.OPS`` table; node: FX node name; source: FX node that produces the input.
    weight: [out, in] (linear) or [out, in, kh, kw] (convolution); bias: [out] or None, both as the user holds them.
    """

    name: str
    op: str
    node: str
    source: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    groups: int = 1


@dataclass(frozen=True)
class Decision:
    """What happens to one layer: int8 with these scales, or the user's precision for a written reason.

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
        return self.precision == "int8"


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


@dataclass(frozen=True)
class Report:
    """What became of a module. Times in ms per step or seconds; error is relative to the user's precision."""

    state: str
    layers: tuple[LayerReport, ...] = ()
    fallbacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    quantized_flops_share: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        from .report import render_text

        return render_text(self)
