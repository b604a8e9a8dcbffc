"""How fast is one UNet step of the bundled model in 8 bits? Both sides in one run: `pytest benchmarks/test_step.py`."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch

import sdtrt_backend
from sdtrt_backend.demo import CALIBRATION_PROMPTS, LastCall, draw, machine
from sdtrt_backend.measure import step_ms
from sdtrt_backend.recipe import versions

REPEATS = 40
RESULTS = Path(__file__).parent / "results"


def test_sd_int8_against_torch_compile(capsys, tmp_path):
    """Batch 2 (guidance), 32x32 latent, the timesteps of a picture in turn; medians of interleaved steps."""
    pipe = sdtrt_backend.demo_pipeline()
    last = LastCall(pipe.unet)
    draw(pipe, ["rocket, fluent style"], 5, 0)
    last.close()
    recipe = sdtrt_backend.calibrate(pipe, CALIBRATION_PROMPTS[:2], guidance_scale=5.0, progress=False).save(tmp_path)
    sample, text = last.args[0], last.kwargs["encoder_hidden_states"]
    wide, narrow = (sample, text), (sample.bfloat16(), text.bfloat16())
    half = copy.deepcopy(pipe.unet).bfloat16()

    def compiled(module, **settings):
        torch._dynamo.reset()
        return torch.compile(module, **settings)

    pipe.scheduler.set_timesteps(25)

    def stepping(module, sample, text):
        timesteps = itertools.cycle(pipe.scheduler.timesteps)
        return lambda: module(sample, next(timesteps), text)

    accelerated = {name: compiled(copy.deepcopy(pipe.unet), backend="sd_int8",
                                  options={"recipe": str(recipe), "rest": "float32", **options})
                   for name, options in (("rest float32", {}), ("rest bfloat16", {"rest": "bfloat16"}),
                                         ("two codes for all", {"two_codes": ["*"]}))}
    steps = {
        "eager fp32": stepping(pipe.unet, *wide),
        "torch.compile fp32": stepping(compiled(copy.deepcopy(pipe.unet)), *wide),
        "eager bf16": stepping(half, *narrow),
        "torch.compile bf16": stepping(compiled(copy.deepcopy(half)), *narrow),
        **{f"sd_int8, {name}": stepping(module, *wide) for name, module in accelerated.items()},
    }
    with torch.no_grad():
        for _ in range(3):
            step_ms(*steps.values(), repeats=1)
        both = {"torch.compile fp32": steps["torch.compile fp32"], "two codes": steps.pop("sd_int8, two codes for all")}
        times = dict(zip(steps, step_ms(*steps.values(), repeats=REPEATS), strict=True))
        alone = dict(zip(both, step_ms(*both.values(), repeats=REPEATS), strict=True))
    assert all(sdtrt_backend.explain(module).state == "ready" for module in accelerated.values())
    best = min(ms for name, ms in times.items() if name.startswith("sd_int8"))
    default = times["sd_int8, rest float32"]
    lines = [f"{machine()}; torch {versions()['torch']}"]
    lines += [f"{name:26} {ms:7.1f} ms {ms / default:6.2f}x" for name, ms in times.items()]
    ratios = {f"{name} / sd_int8": times[name] / default for name in ("torch.compile fp32", "torch.compile bf16")}
    ratios["torch.compile fp32 / two codes for all"] = alone["torch.compile fp32"] / alone["two codes"]
    lines += [f"two codes for all: {alone['two codes']:.1f} ms"]
    lines += [f"{name}: {ratio:.2f}" for name, ratio in ratios.items()]
    with capsys.disabled():
        print("", *lines, f"best sd_int8 variant: {best:.1f} ms", sep="\n")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_cpu.json").write_text(json.dumps(
        {"machine": machine(), "versions": versions(), "step_ms": times, "ratios": ratios}, indent=1) + "\n")
    assert ratios["torch.compile fp32 / sd_int8"] >= 2.0
    assert ratios["torch.compile bf16 / sd_int8"] >= 1.25


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
