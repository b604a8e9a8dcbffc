"""Quantisation-aware training and back: the bundled UNet, trained by NVIDIA Model Optimizer's fake quantisation, in this backend.

    python benchmarks/qat.py                     # on a CPU, some ten minutes
    python benchmarks/qat.py --steps 5 --prompts 2 --inputs 4

``mtq.quantize`` (INT8, one range per input, the largest value seen) calibrates the UNet on trajectories of 8 captions. "PTQ" is
that; "QAT" is the same trained for --steps steps of Adam to predict what the UNet in fp32 predicts on these inputs, the ranges
standing still. Both come into ``sd_int8`` by ``Recipe.from_modelopt``, on a UNet of the weights in question, and draw other
captions from equal noise.

PSNR      dB, peak 1, to the pictures in full precision: mean, 95 % confidence interval of the mean, worst
ranges    of inputs and weights in the recipe that are those of Model Optimizer's quantizers to the bit, of all
trained   layers whose weights' ranges are not max |W| any more
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.quantization.plugins.diffusion.diffusers import FP8SDPA, original_scaled_dot_product_attention
from tqdm import tqdm

import sdtrt_backend
from sdtrt_backend import Recipe, metrics
from sdtrt_backend.demo import GUIDANCE
from sdtrt_backend.recipe import versions
from sdtrt_backend.store import processor

BATCH, RATE = 8, 1e-5
KEEPS = ("conv_in", "conv_out", "time_emb", "norm", "bmm", "softmax")  # what sd_int8 keeps, and what a recipe has no place for


def draw(pipe: Any, prompts: list[str], steps: int = 25) -> metrics.Pictures:
    """Picture i from noise of seed i."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        noise = [torch.Generator().manual_seed(start + i) for i in range(len(prompts[start : start + BATCH]))]
        pictures.append(pipe(prompts[start : start + BATCH], num_inference_steps=steps, guidance_scale=GUIDANCE, generator=noise,
                             output_type="np").images)
    return np.concatenate(pictures)


def trajectories(pipe: Any, prompts: list[str]) -> list[tuple[Any, ...]]:
    """(latents, timestep, text) of every step."""
    seen: list[tuple[Any, ...]] = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda m, args, given: seen.append((*args, given["encoder_hidden_states"])), with_kwargs=True)
    draw(pipe, prompts)
    handle.remove()
    return seen


def train(student: torch.nn.Module, teacher: torch.nn.Module, inputs: list[tuple[Any, ...]], steps: int, images: int) -> None:
    """Adam on the squared difference of what both predict."""
    optimizer = torch.optim.Adam(student.parameters(), RATE)
    random = torch.Generator().manual_seed(0)
    for _ in (bar := tqdm(range(steps), desc="training")):
        latents, timestep, text = inputs[int(torch.randint(len(inputs), (1,), generator=random))]
        some = torch.randperm(len(latents), generator=random)[:images]
        with torch.no_grad():
            wanted = teacher(latents[some], timestep, text[some]).sample
        loss = torch.nn.functional.mse_loss(student(latents[some], timestep, text[some]).sample, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        bar.set_postfix_str(f"loss {float(loss.detach()):.2e}")


def measured(pipe: Any, plain: torch.nn.Module, student: Any, prompts: list[str], exact: metrics.Pictures) -> dict[str, Any]:
    """The row of a calibrated or trained module."""
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(student.get_parameter(name))
    recipe = Recipe.from_modelopt(student)
    layers = {name: layer for name, layer in student.named_modules() if name in recipe.layers}
    equal = sum(recipe.layers[name].amax == float(layer.input_quantizer.amax) and torch.equal(
        recipe.weight_amax.get(name, layer.weight.abs().flatten(1).amax(1)), layer.weight_quantizer.amax.flatten())
        for name, layer in layers.items())
    pipe.unet = plain
    with tempfile.TemporaryDirectory() as folder, \
            sdtrt_backend.accelerated(pipe, backend="sd_int8", recipe=recipe.save(folder), engine="inductor", two_codes=[]):
        pictures = draw(pipe, prompts)
        report = sdtrt_backend.explain(pipe)
    assert report.state == "ready", report.fallbacks
    psnr = metrics.psnr(pictures, exact)
    return {"psnr_db": {"mean": statistics.mean(psnr), "interval": metrics.mean_interval(psnr), "worst": min(psnr)},
            "ranges": [equal, len(layers)], "trained": len(recipe.weight_amax),
            "quantized_flops_share": report.quantized_flops_share}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--images", type=int, default=8, help="of a training step, each of its own caption")
    parser.add_argument("--prompts", type=int, default=64, help="captions that are judged")
    parser.add_argument("--inputs", type=int, default=8, help="captions that calibrate and train")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(argv)
    captions = (Path(__file__).parent / "prompts.txt").read_text().splitlines()
    pipe = sdtrt_backend.demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    teacher, plain = pipe.unet, copy.deepcopy(pipe.unet)
    prompts = captions[8 : 8 + given.prompts]
    exact = draw(pipe, prompts)
    inputs = trajectories(pipe, captions[: given.inputs])
    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    config["quant_cfg"] += [{"quantizer_name": f"*{part}*", "enable": False} for part in KEEPS]
    with torch.no_grad():
        student = mtq.quantize(copy.deepcopy(teacher), config, lambda module: [module(*call) for call in inputs])
    libraries = versions(("sdtrt_backend", "torch", "nvidia-modelopt", "diffusers"))
    result: dict[str, Any] = {"machine": processor(), "versions": libraries,
                              "pictures": len(prompts), "steps": given.steps, "images": given.images}
    result["ptq"] = measured(pipe, plain, student, prompts, exact)
    start = time.perf_counter()
    # Model Optimizer's attention has no gradient: meanwhile it is torch's
    with mock.patch.object(FP8SDPA, "apply", lambda *these: original_scaled_dot_product_attention(*these[:6], scale=these[6])):
        train(student, teacher, inputs, given.steps, given.images)
    result["training_s"] = time.perf_counter() - start
    result["qat"] = measured(pipe, plain, student, prompts, exact)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "qat_cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    for name in ("ptq", "qat"):
        row = result[name]
        low, high = row["psnr_db"]["interval"]
        print(f"{name}: PSNR {row['psnr_db']['mean']:.2f} dB ({low:.2f} to {high:.2f}), worst {row['psnr_db']['worst']:.2f}; "
              f"ranges {row['ranges'][0]} of {row['ranges'][1]}; trained {row['trained']}; "
              f"8-bit FLOPs {row['quantized_flops_share']:.1%}")


if __name__ == "__main__":
    main()
