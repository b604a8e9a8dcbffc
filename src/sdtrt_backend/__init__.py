"""8-bit inference for diffusion models as a ``torch.compile`` backend.

    pipe.unet = torch.compile(pipe.unet, backend="sd_int8")
    sdtrt_backend.accelerate(pipe)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .autoquant import AutoquantPlan, autoquant
from .backend import sd_fp8, sd_int8
from .calibrate import calibrate
from .errors import (
    BundleError,
    CalibrationError,
    LoraError,
    ModelError,
    OptionError,
    PlanError,
    RecipeError,
    SdtrtError,
    require_torchao,
)
from .lora import load_lora, loras, set_loras, unload_lora
from .options import Options
from .pipeline import accelerate, accelerated, demo_pipeline, explain, restore
from .recipe import Recipe
from .report import Report

if TYPE_CHECKING:
    from .torchao_config import SDFp8Config, SDInt8Config, load_quantized

__all__ = [
    "AutoquantPlan",
    "BundleError",
    "CalibrationError",
    "LoraError",
    "ModelError",
    "OptionError",
    "Options",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Report",
    "SDFp8Config",
    "SDInt8Config",
    "SdtrtError",
    "accelerate",
    "accelerated",
    "autoquant",
    "calibrate",
    "demo_pipeline",
    "explain",
    "load_lora",
    "load_quantized",
    "loras",
    "restore",
    "sd_fp8",
    "sd_int8",
    "set_loras",
    "unload_lora",
]

_WITH_TORCHAO = ("SDFp8Config", "SDInt8Config", "load_quantized")


def __getattr__(name: str) -> Any:
    """TorchAO is loaded by whoever asks for its configurations, and by nobody else."""
    if name not in _WITH_TORCHAO:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_torchao(f"sdtrt_backend.{name}")
    from . import torchao_config

    return getattr(torchao_config, name)
