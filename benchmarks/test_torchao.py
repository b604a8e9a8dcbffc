"""TorchAO's front door against torch.compile, both in one run: `pytest benchmarks/test_torchao.py`."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import sdtrt_backend
from sdtrt_backend.demo import CALIBRATION_PROMPTS, draw, machine
from sdtrt_backend.measure import step_ms
from sdtrt_backend.recipe import versions

pytest.importorskip("torchao", reason="the configurations are TorchAO's: pip install torchao")
from torchao.quantization import quantize_

REPEATS = 40
STEPS = 8
TWICE = {"two_codes": ["*"]}
RESULTS = Path(__file__).parent / "results"


def cosine(a, b):
    return float(nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


def test_torchao_configuration_and_autoquant_against_torch_compile(capsys, tmp_path):
    """UNet step of the bundled model in fp32, batch 2 (guidance), 32x32 latent; medians of interleaved steps."""
    pipe = sdtrt_backend.demo_pipeline()
    calls = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((*args, kwargs["encoder_hidden_states"])), with_kwargs=True)
    draw(pipe, ["rocket, fluent style"], STEPS, 0)
    handle.remove()
    recipe = sdtrt_backend.calibrate(pipe, CALIBRATION_PROMPTS[:2], guidance_scale=5.0, progress=False)
    inputs = calls[-1]
    calibrated, twice, chosen = (copy.deepcopy(pipe.unet) for _ in range(3))
    for module, settings in ((calibrated, {}), (twice, TWICE)):
        quantize_(module, sdtrt_backend.SDInt8Config(recipe, **settings),
                  filter_fn=lambda m, name: isinstance(m, nn.Linear | nn.Conv2d))
    plan = sdtrt_backend.autoquant(chosen, inputs)

    def compiled(module, **settings):
        torch._dynamo.reset()
        return partial(torch.compile(module, **settings), *inputs)

    steps = {"eager": partial(pipe.unet, *inputs), "torch.compile": compiled(pipe.unet), "autoquant": compiled(chosen),
             "SDInt8Config": compiled(calibrated, fullgraph=True),
             "SDInt8Config, two_codes=['*']": compiled(twice, fullgraph=True)}
    with torch.no_grad():
        for _ in range(3):
            step_ms(*steps.values(), repeats=1)
        times = dict(zip(steps, step_ms(*steps.values(), repeats=REPEATS), strict=True))
        torch._dynamo.reset()
        options = {"recipe": str(recipe.save(tmp_path)), "engine": "reference"}
        reference, reference_twice = (torch.compile(copy.deepcopy(pipe.unet), backend="sd_int8", options=options | settings)
                                      for settings in ({}, TWICE))
        noise = torch.Generator().manual_seed(0)
        nudged = [(x * (1 + 1e-6 * torch.randn(x.shape, generator=noise)), *rest) for x, *rest in calls]
        cosines = {"SDInt8Config": [cosine(calibrated(*c)[0], reference(*c)[0]) for c in calls],
                   "SDInt8Config, two_codes=['*']": [cosine(twice(*c)[0], reference_twice(*c)[0]) for c in calls],
                   "the reference lowering, its input changed by 1e-6": [
                       cosine(reference(*n)[0], reference(*c)[0]) for n, c in zip(nudged, calls, strict=True)],
                   "full precision": [cosine(pipe.unet(*c)[0], reference(*c)[0]) for c in calls]}
    ratios = {name: times["torch.compile"] / ms for name, ms in times.items()}
    lines = [f"{machine()}; torch {versions()['torch']}, torchao {versions()['torchao']}, {torch.get_num_threads()} threads"]
    lines += [f"{name:30} {ms:7.1f} ms {ratios[name]:6.2f}x" for name, ms in times.items()]
    lines += ["cosine to the reference lowering, step by step:",
              *(f"{' '.join(f'{c:.6f}' for c in row)}  {name}" for name, row in cosines.items())]
    with capsys.disabled():
        print("", *lines, plan.verdict, sep="\n")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "torchao_cpu.json").write_text(json.dumps(
        {"machine": machine(), "versions": versions(), "threads": torch.get_num_threads(), "step_ms": times,
         "speedup_vs_compile": ratios, "cosine_to_reference": cosines, "autoquant": plan.verdict}, indent=1) + "\n")
    assert ratios["SDInt8Config"] > ratios["SDInt8Config, two_codes=['*']"] > 1.0
    assert min(cosines["SDInt8Config, two_codes=['*']"]) >= 0.9999
    assert ratios["autoquant"] > 0.95  # an empty plan is torch.compile itself


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q"]))
