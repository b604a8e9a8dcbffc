"""Are the pictures the same? 64 prompts, self-calibrated on 8 others, default settings: `pytest benchmarks/test_quality.py`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import numpy as np
import torch

import sdtrt_backend
from sdtrt_backend import metrics
from sdtrt_backend.demo import draw, machine
from sdtrt_backend.recipe import versions

STEPS = 25
RESULTS = Path(__file__).parent / "results"


def test_pictures_in_8_bits_against_full_precision(capsys):
    """Euler 25 steps, guidance 5, picture i from noise of seed i on both sides."""
    prompts = (Path(__file__).parent / "prompts.txt").read_text().splitlines()
    calibration, prompts = prompts[:8], prompts[8:72]
    pipe = sdtrt_backend.demo_pipeline()
    reference = draw(pipe, prompts, STEPS, 0)
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend="sd_int8", options={"calibration_runs": len(calibration)})
    draw(pipe, calibration, STEPS, 10_000)
    pictures = draw(pipe, prompts, STEPS, 0)
    report = sdtrt_backend.explain(pipe)
    psnr, ssim = metrics.psnr(pictures, reference), metrics.ssim(pictures, reference)
    result = {"machine": machine(), "versions": versions(), "pictures": len(prompts),
              "psnr_db": {"mean": mean(psnr), "min": min(psnr)}, "ssim": {"mean": mean(ssim), "min": min(ssim)},
              "quantized_flops_share": report.quantized_flops_share, "timings": dict(report.timings)}
    with capsys.disabled():
        print(f"\n{len(prompts)} pictures: PSNR mean {mean(psnr):.2f} dB, worst {min(psnr):.2f}; "
              f"SSIM mean {mean(ssim):.4f}, worst {min(ssim):.4f}; int8 FLOPs {report.quantized_flops_share:.1%}; "
              f"last calibrating step to first 8-bit step {report.timings['cold_start_s']:.1f} s")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality_cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    assert report.state == "ready"
    assert np.isfinite(pictures).all()
    assert pictures.reshape(len(pictures), -1).std(1).min() > 0.01  # no black or empty picture
    assert mean(psnr) >= 27
    assert mean(ssim) >= 0.93
    assert report.quantized_flops_share >= 0.9
