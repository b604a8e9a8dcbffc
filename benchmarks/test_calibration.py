"""What does calibration cost, in time and in memory? Both sides in one run: `pytest benchmarks/test_calibration.py`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

import sdtrt_backend
from sdtrt_backend.calibrate import Calibration, observed
from sdtrt_backend.demo import CALIBRATION_PROMPTS, machine
from sdtrt_backend.measure import step_ms
from sdtrt_backend.recipe import versions

PROMPTS, STEPS, GUIDANCE, REPEATS = 2, 25, 5.0, 5
LIMIT = 1.5  # calibration at most this often the time of the same pictures without it
RESULTS = Path(__file__).parent / "results"


@pytest.fixture(scope="module")
def pipe():
    pipe = sdtrt_backend.demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, prompts):
    """The pictures that calibrate() draws, without it: seed + i, one prompt at a time, not decoded."""
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            pipe([prompt], num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent",
                 generator=[torch.Generator("cpu").manual_seed(i)])


def statistics_bytes(pipe, prompts):
    """Bytes of all tensors that a calibration over ``prompts`` holds at its end."""
    calibration = Calibration()
    with observed(pipe.unet, calibration):
        latents(pipe, prompts)
    tensors = [t for at in calibration.inputs.values() for s in at.values() for t in vars(s).values()]
    tensors += [t for low_high in calibration.ranges.values() for t in low_high]
    tensors += [*calibration.power.values(), *(t for w in calibration.weights.values() for t in (w.amax, w.energy, w.peak))]
    return sum(t.nbytes for t in {id(t): t for t in tensors if isinstance(t, torch.Tensor)}.values())


def test_calibration_against_the_same_pictures_without_it(pipe, capsys):
    """2 prompts, 25 steps, batch 2 (guidance); medians of interleaved runs."""
    prompts = CALIBRATION_PROMPTS[:PROMPTS]

    def calibrate(resume=None):
        sdtrt_backend.calibrate(pipe, prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, progress=False, resume=resume)

    def calibrate_and_keep():
        with tempfile.TemporaryDirectory() as folder:
            calibrate(folder)

    sides = {"the pipeline alone": lambda: latents(pipe, prompts), "calibrate": calibrate,
             "calibrate, resume=": calibrate_and_keep}
    step_ms(*sides.values(), repeats=1)
    times = dict(zip(sides, step_ms(*sides.values(), repeats=REPEATS), strict=True))
    ratios = {name: times[name] / times["the pipeline alone"] for name in times}
    held = {n: statistics_bytes(pipe, CALIBRATION_PROMPTS[:n]) for n in (2, 4)}
    lines = [f"{machine()}; torch {versions()['torch']}, {torch.get_num_threads()} threads"]
    lines += [f"{name:20} {ms / 1e3:7.2f} s {ratios[name]:6.2f}x" for name, ms in times.items()]
    lines += [f"statistics after {n} prompts: {size / 1e6:.1f} MB" for n, size in held.items()]
    with capsys.disabled():
        print("", *lines, sep="\n")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "calibration_cpu.json").write_text(json.dumps(
        {"machine": machine(), "versions": versions(), "threads": torch.get_num_threads(), "prompts": PROMPTS, "steps": STEPS,
         "time_ms": times, "ratios": ratios, "statistics_bytes": held}, indent=1) + "\n")
    assert max(ratios.values()) <= LIMIT
    assert held[4] == held[2]


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
