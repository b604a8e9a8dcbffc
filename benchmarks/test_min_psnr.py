"""What does a picture budget cost? ``pytest benchmarks/test_min_psnr.py``: the bundled model calibrated with ``min_psnr``, its
step against torch.compile, and pictures of captions that neither calibrated nor judged, both sides in one run."""

from __future__ import annotations

import copy
import json
import time
from functools import partial
from pathlib import Path

import pytest
import quality
import torch

import sdtrt_backend
from sdtrt_backend.demo import GUIDANCE, LastCall, machine
from sdtrt_backend.measure import step_ms
from sdtrt_backend.metrics import psnr
from sdtrt_backend.recipe import versions

REPEATS = 30
PICTURES = 16
RESULTS = Path(__file__).parent / "results"


@pytest.mark.parametrize(("scheduler", "target", "sets", "least"), [
    ("euler", 32.0, (0,), 1.6), ("dpm", 32.0, (0,), 1.6), ("euler", 50.0, (1, 2), 1.2)])
def test_the_step_inside_a_budget(capsys, tmp_path, scheduler, target, sets, least):
    """Batch 2 (guidance), 32x32 latent; medians of steps that take turns. sets: of captions that calibrate and judge; least:
    times torch.compile."""
    torch._dynamo.reset()
    pipe = sdtrt_backend.demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    _, steps, make = quality.SCHEDULERS[scheduler]
    pipe.scheduler = make(pipe.scheduler.config)
    calibration = [caption for which in sets for caption in quality.captions(which, 1)[0]]
    prompts = quality.captions(0, PICTURES)[1]
    start = time.perf_counter()
    recipe = sdtrt_backend.calibrate(pipe, calibration, num_inference_steps=steps, guidance_scale=GUIDANCE, progress=False,
                                     options={"min_psnr": target})
    seconds = time.perf_counter() - start
    folder = recipe.save(tmp_path)

    def draw():
        noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        return pipe(prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=noise, output_type="np").images

    plain = draw()
    with sdtrt_backend.accelerated(pipe, recipe=folder, min_psnr=target):
        each = psnr(draw(), plain)
    last = LastCall(pipe.unet)
    pipe(prompts[:1], num_inference_steps=2, guidance_scale=GUIDANCE)
    last.close()
    call = (*last.args, last.kwargs["encoder_hidden_states"])
    mine = copy.deepcopy(pipe.unet)
    torch._dynamo.reset()
    functions = {"torch.compile fp32": torch.compile(copy.deepcopy(pipe.unet)), f"sd_int8, min_psnr={target:g}":
                 torch.compile(mine, backend="sd_int8", options={"recipe": str(folder), "min_psnr": target})}
    with torch.no_grad():
        calls = [partial(f, *call) for f in functions.values()]
        for _ in range(3):
            step_ms(*calls, repeats=1)
        times = dict(zip(functions, step_ms(*calls, repeats=REPEATS), strict=True))
    report = sdtrt_backend.explain(mine)
    compiled, ours = times.values()
    kept = sum(layer.keep is not None for layer in recipe.layers.values())
    second = sum(layer.second is not None for layer in recipe.layers.values())
    share, name = report.quantized_flops_share, quality.SCHEDULERS[scheduler][0]
    with capsys.disabled():
        print("", f"{machine()}; torch {versions()['torch']}",
              f"{name} {steps} steps, min_psnr={target:g}, {len(calibration)} captions",
              f"calibrated and searched in {seconds:.0f} s: {second} layers have a second code for it, {kept} stay in fp32",
              f"torch.compile {compiled:.1f} ms, sd_int8 {ours:.1f} ms: {compiled / ours:.2f}x, {share:.1%} of FLOPs in 8 bits",
              f"PSNR of {len(each)} pictures: mean {sum(each) / len(each):.1f} dB, worst {min(each):.1f} dB", sep="\n")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"min_psnr_{target:g}_{scheduler}.json").write_text(json.dumps(
        {"machine": machine(), "versions": versions(), "step_ms": times, "ratio": compiled / ours, "psnr_db": each,
         "calibrate_s": seconds, "second_codes": second, "kept": kept, "share": share,
         "search": recipe.provenance["min_psnr"]}, indent=1) + "\n")
    assert report.state == "ready"
    assert sum(each) / len(each) >= target
    assert compiled / ours >= least


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
