"""How long from import to the first 8-bit step, with a saved recipe, in a new process: `pytest benchmarks/test_start.py`."""

from __future__ import annotations

import os
import subprocess
import sys

import sdtrt_backend
from sdtrt_backend.demo import CALIBRATION_PROMPTS

START = """
import time
start = time.perf_counter()
import sdtrt_backend
pipe = sdtrt_backend.accelerate(sdtrt_backend.demo_pipeline(), recipe={recipe!r})
pipe("owl, fluent style", num_inference_steps=25, callback_on_step_end=lambda p, i, t, k: setattr(p, "_interrupt", True) or k)
assert sdtrt_backend.explain(pipe).state == "ready", sdtrt_backend.explain(pipe)
print(time.perf_counter() - start)
"""


def test_first_8_bit_step_of_a_new_process(capsys, tmp_path):
    """First with empty compiler caches, then with what the first process left in them."""
    pipe = sdtrt_backend.demo_pipeline()
    recipe = sdtrt_backend.calibrate(pipe, CALIBRATION_PROMPTS[:2], guidance_scale=5.0, progress=False).save(tmp_path / "recipe")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    seconds = []
    for _ in ("cold", "warm"):
        done = subprocess.run([sys.executable, "-c", START.format(recipe=str(recipe))], env=environment, capture_output=True,
                              text=True, check=True)
        seconds.append(float(done.stdout.split()[-1]))
    with capsys.disabled():
        print(f"\nimport to first 8-bit step: {seconds[0]:.1f} s with cold caches, {seconds[1]:.1f} s with warm ones")
    assert max(seconds) <= 60
