"""``sdtrt demo``: the one line on a real pipeline, from full precision to 8 bits, measured in one run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import metrics
from .measure import step_ms
from .parts import denoiser_name
from .pictures import asked
from .pipeline import explain
from .recipe import versions
from .report import comparison_picture, summary_table, write_result
from .state import states
from .store import processor

if TYPE_CHECKING:
    from rich.console import Console

PROMPTS = ("hot pepper, noto style", "rocket, fluent style", "red apple, noto style", "owl, fluent style",
           "guitar, noto style", "cactus, fluent style", "hamburger, noto style", "penguin, fluent style")
CALIBRATION_PROMPTS = ("strawberry, fluent style", "dog face, noto style", "airplane, fluent style", "tulip, noto style",
                       "pizza, fluent style", "snowman, noto style", "umbrella, fluent style", "fish, noto style")
GUIDANCE = 5.0
STEP_REPEATS = 15
AMPLIFIED = 8  # differences of a few levels in 255 are not seen otherwise
NOISE_TIMESTEPS = 13  # of a picture's: each costs about five steps of the model


def draw(pipe: Any, prompts: Sequence[str], steps: int, seed: int, tick: Callable[[], None] = lambda: None,
         given: Mapping[str, Any] = MappingProxyType({})) -> metrics.Pictures:
    """One picture per prompt, each from noise of seed + its index; float32 [N, height, width, 3] in 0..1. given: what else the
    pipeline takes, as ``calibrate`` does."""
    def on_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tick()
        return tensors

    pictures, ask = [], asked(pipe, prompts, given)
    how = {"guidance_scale": GUIDANCE, "callback_on_step_end": on_step, "num_inference_steps": steps, "output_type": "np"}
    for i in range(ask.count):
        noise = torch.Generator("cpu").manual_seed(seed + i)
        pictures.append(ask.draw([i], **{k: v for k, v in how.items() if k not in given}, generator=noise).images[0])
    return np.stack(pictures)


class LastCall:
    """Remembers the denoiser's last arguments while open, so that a step can be timed on real inputs, and those of its
    first ``first`` calls."""

    def __init__(self, module: torch.nn.Module, first: int = 0) -> None:
        self.handle = module.register_forward_pre_hook(self.keep, with_kwargs=True)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.first = first
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        if len(self.calls) < self.first:
            self.calls.append((args, kwargs))

    def close(self) -> None:
        self.handle.remove()


def run(pipe: Any, prompts: Sequence[str], calibration_prompts: Sequence[str], steps: int, seed: int, out: Path,
        console: Console, label: str) -> dict[str, Any]:
    """Draw in full precision, self-calibrate, draw in 8 bits, time one step of each, write the report; returns its JSON."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from .heatmaps import noise_by_timestep, noise_chart, range_pages

    name = denoiser_name(pipe)
    plain = getattr(pipe, name)
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        def stage(what: str, total: int) -> Callable[[], None]:
            task = bar.add_task(what, total=total)
            return lambda: bar.advance(task)

        last = LastCall(plain, first=steps)
        tick = stage("pictures in full precision", len(prompts) * steps)
        reference = draw(pipe, prompts, steps, seed, tick)
        last.close()

        quantized = torch.compile(plain, backend="sd_int8", options={"calibration_runs": len(calibration_prompts)})
        setattr(pipe, name, quantized)
        tick = stage("self-calibration, full precision", len(calibration_prompts) * steps)
        draw(pipe, calibration_prompts, steps, seed + 10_000, tick)
        pictures = draw(pipe, prompts, steps, seed, stage("the same pictures in 8 bits, built first", len(prompts) * steps))

        tick = stage("torch.compile, to compare with", 1)
        compiled = torch.compile(plain)
        start = time.perf_counter()
        with torch.no_grad():
            compiled(*last.args, **last.kwargs)
            compile_start = time.perf_counter() - start
            tick()
            steps_of = [partial(f, *last.args, **last.kwargs) for f in (plain, compiled, quantized)]
            eager_ms, compile_ms, int8_ms = step_ms(*steps_of, repeats=STEP_REPEATS)
        report = explain(pipe)
        recipe = states(plain)[-1].recipe
        tick = stage("noise of each layer", 1)
        charts = []
        if recipe is not None and report.state == "ready":
            calls = last.calls[:: -(-len(last.calls) // NOISE_TIMESTEPS)]
            charts = [noise_chart(noise_by_timestep(plain, recipe, report.layers, calls)), *range_pages(recipe)]
        tick()
    psnr, ssim = metrics.psnr(pictures, reference), metrics.ssim(pictures, reference)
    result: dict[str, Any] = {
        "title": f"sd_int8 on {label}: {len(prompts)} pictures, {steps} steps, {str(next(plain.parameters()).dtype)[6:]} before",
        "machine": machine(),
        "versions": versions(),
        "step_ms": {"eager": eager_ms, "compile": compile_ms, "sd_int8": int8_ms},
        "speedup_vs_compile": compile_ms / int8_ms,
        "speedup_vs_eager": eager_ms / int8_ms,
        "psnr_db": {"mean": mean(psnr), "min": min(psnr), "each": psnr},
        "ssim": {"mean": mean(ssim), "min": min(ssim), "each": ssim},
        "quantized_flops_share": report.quantized_flops_share or 0.0,
        "cold_start_s": report.timings.get("cold_start_s", 0.0),
        "compile_cold_start_s": compile_start,
        "prompts": list(prompts),
        "calibration_prompts": list(calibration_prompts),
        "steps": steps,
        "seed": seed,
        "state": report.state,
    }
    sheet = comparison_picture([("full precision", reference), ("sd_int8", pictures),
                                (f"difference x{AMPLIFIED}", np.clip(np.abs(pictures - reference) * AMPLIFIED, 0, 1))], prompts)
    files = write_result(out, result, report, sheet, charts)
    console.print(summary_table(result))
    for sentence in report.fallbacks:
        console.print(f"fallback: {sentence}", style="yellow")
    console.print("written: " + ", ".join(str(f) for f in files))
    return result


def machine() -> str:
    """Processor, cores and operating system in words."""
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


