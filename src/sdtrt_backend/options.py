"""The options of the backend: one frozen dataclass, checked once at the front door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import OptionError
from .metrics import BEST_PSNR
from .rules import ENGINES, LEVELS, LORA_POLICIES, RANGE_RULES, RESTS, TENSORRT, TWO_CODES

FITTED = "fitted"


@dataclass(frozen=True)
class Options:
    """Options of ``torch.compile(module, backend="sd_int8", options={...})``, checked once, here.

    recipe: folder of a saved recipe, or None to self-calibrate.
    calibration_runs: complete denoising trajectories to observe before building.
    rule: name of a range rule (``rules.RANGE_RULES``).
    percentile: share of the timesteps, from the noisy end, that the range rule looks at; 0 < p <= 1.
    alpha: SmoothQuant migration strength of linears, 0..1; None switches their smoothing off.
    alpha_conv: the same of convolutions, on the CPU and on NVIDIA GPUs; "fitted" takes the factors that leave the least noise
        (``stats.fitted_smoothing``).
    min_psnr: dB that pictures of prompts that calibrated nothing are to have at least on average, against the user's precision:
        ``calibrate`` measures what each layer brings of the error and of the speed, and names those that get a second
        code or stay unquantised.
    max_error: largest relative error ||y8 - y|| / ||y|| of the first 8-bit step, and of each call of a picture after weights were
        changed.
    output_psnr: of a module that gives pictures in [-1, 1], as the decoder of a VAE does: least PSNR of those outputs to its own,
        dB, beside ``max_error``.
    rest: precision of what is not 8-bit: "auto", "float32" (the module's own precision) or "bfloat16".
    engine: "auto" runs in 8 bits what was measured to be faster so; "inductor" everything that has an 8-bit kernel, for a
        comparison of pictures say; "tensorrt" builds TensorRT engines of the parts that it takes, without measuring what is
        faster; "torchao" runs linears through TorchAO's int8 product (sd_int8 only); "reference" the Q/DQ graph in plain torch,
        slow.
    exclude: glob patterns of module paths that stay unquantised.
    two_codes: glob patterns of module paths whose input is held in two 8-bit codes, 16 bits together, in int8 on the CPU.
    engine_dir: folder of the TensorRT engines, or None for the one in the user's cache directory.
    level: what is quantised (``rules.LEVEL_OF``): 1 convolutions, 2 and feed-forward linears, 2.5 and projections to q, k and v,
        3 and every other linear, 4 and attention (sd_fp8 only, where it is faster).
    weights: "keep", or "release": the 16-bit weights of quantised layers leave the GPU once the 8-bit step is in use; until
        ``restore`` the module can then be called in its compiled form only.
    lora_policy: what becomes of a set of LoRAs (``set_loras``) whose first output differs by more than ``max_error`` from the
        module's own precision with the same set: "calibrate" the ranges anew by the coming pictures, with it, or run pictures
        with this set in the module's "own" precision.
    build_after: pictures of one size with which its step is built: 1 builds with the first, 2 lets the first run in the module's
        own precision, and so on. The calibrating pictures count.
    background: build in a thread of its own, while calls run in the module's own precision: no call waits for a build.
    max_sizes: steps of one graph that are held; the one used longest ago is let go, and built again when it is needed.
    watch: notice a step that left its calibrated ranges, or gives NaN or black, while it is in use (``drift.py``).
    precision: "int8" or "fp8"; not an option but the backend's name, ``sd_int8`` or ``sd_fp8``.
    """

    recipe: str | None = None
    calibration_runs: int = 2
    rule: str = "wide"
    percentile: float = 1.0
    alpha: float | None = 0.35
    alpha_conv: float | str | None = FITTED
    min_psnr: float | None = None
    max_error: float = 0.2
    output_psnr: float | None = None
    rest: str = "auto"
    engine: str = "auto"
    exclude: tuple[str, ...] = ()
    two_codes: tuple[str, ...] = TWO_CODES
    engine_dir: str | None = None
    level: float = LEVELS[-1]
    weights: str = "keep"
    lora_policy: str = "calibrate"
    build_after: int = 1
    background: bool = False
    max_sizes: int = 32
    watch: bool = True
    precision: str = "int8"

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None, precision: str = "int8") -> Options:
        """``given`` as the user wrote it -> Options. Raises OptionError naming what is valid."""
        if not isinstance(given, Mapping | None):
            raise OptionError.no_mapping(given)
        values = dict(given or {})
        valid = [f.name for f in fields(cls) if f.name != "precision"]
        for name in values:
            if name not in valid:
                raise OptionError.unknown(name, valid)

        def check(name: str, ok: bool, expected: str) -> None:
            if name in values and not ok:
                raise OptionError.ill_typed(name, expected, values[name])

        def number(name: str) -> bool:
            return isinstance(values.get(name), int | float) and not isinstance(values.get(name), bool)

        for name in ("recipe", "engine_dir"):
            if isinstance(values.get(name), Path):
                values[name] = str(values[name])
        for name in ("exclude", "two_codes"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        check("recipe", values.get("recipe") is None or isinstance(values["recipe"], str), "the path of a recipe folder")
        check("engine_dir", values.get("engine_dir") is None or isinstance(values["engine_dir"], str), "the path of a folder")
        for name in ("calibration_runs", "build_after", "max_sizes"):
            count = values.get(name)
            check(name, isinstance(count, int) and not isinstance(count, bool) and count >= 1, "an integer >= 1")
        check("rule", isinstance(values.get("rule"), str) and values["rule"] in RANGE_RULES, f"one of {', '.join(RANGE_RULES)}")
        check("percentile", number("percentile") and 0 < values["percentile"] <= 1, "a number in (0, 1]")
        for name, fitted in (("alpha", ""), ("alpha_conv", FITTED)):
            strength = values.get(name) in (None, fitted or None) or (number(name) and 0 <= values[name] <= 1)
            check(name, strength, f"a number in [0, 1]{fitted and f', {fitted!r}'} or None")
        for name in ("min_psnr", "output_psnr"):
            check(name, values.get(name) is None or (number(name) and 0 < values[name] < BEST_PSNR),
                  f"a number in (0, {BEST_PSNR:g}) or None")
        check("max_error", number("max_error") and values["max_error"] > 0, "a number > 0")
        check("rest", values.get("rest") in RESTS, f"one of {', '.join(RESTS)}")
        check("engine", values.get("engine") in ENGINES, f"one of {', '.join(ENGINES)}")
        if values.get("engine") == "tensorrt" and not any(find_spec(name) for name in TENSORRT):
            raise OptionError.no_tensorrt()
        if values.get("engine") == "torchao" and find_spec("torchao") is None:
            raise OptionError.no_torchao()
        check("level", number("level") and values["level"] in LEVELS, f"one of {', '.join(f'{n:g}' for n in LEVELS)}")
        check("weights", values.get("weights") in ("keep", "release"), "'keep' or 'release'")
        check("lora_policy", values.get("lora_policy") in LORA_POLICIES, f"one of {', '.join(LORA_POLICIES)}")
        for name in ("background", "watch"):
            check(name, isinstance(values.get(name), bool), "True or False")
        for name in ("exclude", "two_codes"):
            patterns = values.get(name)
            check(name, isinstance(patterns, tuple) and all(isinstance(p, str) for p in patterns), "a list of glob patterns")
        return cls(**values, precision=precision)
