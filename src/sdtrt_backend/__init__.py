"""8-bit inference for diffusion models as a ``torch.compile`` backend.

    pipe.unet = torch.compile(pipe.unet, backend="sd_int8")
    sdtrt_backend.accelerate(pipe)
"""

from __future__ import annotations

from .backend import sd_fp8, sd_int8
from .calibrate import calibrate
from .errors import CalibrationError, ModelError, OptionError, RecipeError, SdtrtError
from .options import Options
from .pipeline import accelerate, accelerated, demo_pipeline, explain, restore
from .recipe import Recipe
from .report import Report

__all__ = [
    "CalibrationError",
    "ModelError",
    "OptionError",
    "Options",
    "Recipe",
    "RecipeError",
    "Report",
    "SdtrtError",
    "accelerate",
    "accelerated",
    "calibrate",
    "demo_pipeline",
    "explain",
    "restore",
    "sd_fp8",
    "sd_int8",
]
