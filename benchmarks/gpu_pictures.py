"""Are the pictures the same on a GPU? 64 prompts of the bundled model in fp16, sd_int8 and sd_fp8 with every layer that can in
8 bits: `python benchmarks/gpu_pictures.py [--out FOLDER]`."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

import sdtrt_backend
from sdtrt_backend import metrics
from sdtrt_backend.demo import GUIDANCE
from sdtrt_backend.recipe import versions

BATCH = 32
BACKENDS = ("sd_int8", "sd_fp8")


def draw(pipe: Any, prompts: list[str], steps: int) -> metrics.Pictures:
    """Picture i from noise of seed i; float32 [N, height, width, 3] in 0..1."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        noise = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))]
        pictures.append(pipe(part, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=noise, output_type="np").images)
    return np.concatenate(pictures)


def main(out: Path, device: str, count: int, steps: int, backends: list[str]) -> None:
    prompts = (Path(__file__).parent / "prompts.txt").read_text().splitlines()
    calibration, prompts = prompts[:8], prompts[8 : 8 + count]
    pipe = sdtrt_backend.demo_pipeline(torch.float16 if device == "cuda" else torch.float32).to(device)
    recipe = sdtrt_backend.calibrate(pipe, calibration, num_inference_steps=steps, guidance_scale=GUIDANCE, batch_size=8,
                                     seed=10_000)
    folder = str(recipe.save(tempfile.mkdtemp()))
    reference = draw(pipe, prompts, steps)
    result: dict[str, Any] = {"versions": versions(), "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                              "pictures": len(prompts), "steps": steps}
    for backend in backends:
        with sdtrt_backend.accelerated(pipe, backend=backend, recipe=folder, engine="inductor"):
            pictures = draw(pipe, prompts, steps)
            report = sdtrt_backend.explain(pipe)
        psnr, ssim = metrics.psnr(pictures, reference), metrics.ssim(pictures, reference)
        result[backend] = {"psnr_db": {"mean": mean(psnr), "min": min(psnr)}, "ssim": {"mean": mean(ssim), "min": min(ssim)},
                           "quantized_flops_share": report.quantized_flops_share, "timings": dict(report.timings)}
        print(f"{backend}: {len(prompts)} pictures, PSNR mean {mean(psnr):.2f} dB, worst {min(psnr):.2f}; "
              f"SSIM mean {mean(ssim):.4f}, worst {min(ssim):.4f}; 8-bit FLOPs {report.quantized_flops_share:.1%}; "
              f"{report.state}")
        assert report.state == "ready"
        assert np.isfinite(pictures).all()
        assert pictures.reshape(len(pictures), -1).std(1).min() > 0.01  # no black or empty picture
        assert mean(psnr) >= 27
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_pictures.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--backends", help="default: both on a GPU, sd_int8 on a CPU")
    given = parser.parse_args()
    backends = given.backends.split(",") if given.backends else BACKENDS if given.device == "cuda" else BACKENDS[:1]
    main(given.out, given.device, given.prompts, given.steps, list(backends))
