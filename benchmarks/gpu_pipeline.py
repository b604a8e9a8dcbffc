"""From prompt to picture: a whole pipeline, warm, part by part. Eager, torch.compile on every part, and ours.

    python benchmarks/gpu_pipeline.py --model sdxl --batch 8                 # on a GPU
    python benchmarks/gpu_pipeline.py --model flux --columns compile,ours --precision fp8
    python benchmarks/gpu_pipeline.py --model emoji --prompts 64             # the bundled model, on a CPU as well, with PSNR
    python benchmarks/gpu_pipeline.py --model sdxl --tiny                    # the same code on a CPU

sdxl: 1024x1024, 20 Euler steps; flux: FLUX.1-dev, 1024x1024, 28 steps; sd15: 512x512, 50 DDIM steps. Published configurations
with random weights in 16 bits, the VAE of SDXL in fp16 as its mended weights allow; prompts of 77 tokens (512 for T5). emoji:
64x64, 25 Euler steps, calibrated on 8 captions, pictures of others.

columns    eager; compile: torch.compile on denoiser, decoder and text encoders; denoiser: ``accelerate(pipe)``; decoder:
           ``parts=["vae.decoder"]``; ours: ``parts="auto"``
picture    ms per picture: median of --rounds calls of the pipeline after it is ready, divided by the batch
text, step, decode   ms of one call of each, in calls of their own that wait for the GPU after each part
PSNR       of pictures to those of eager, dB, mean and worst; of random weights it says nothing and is left out
ready      seconds until the pipeline is warm; the next 8 pictures, in which parts are judged, are timed in no column
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import torch

import sdtrt_backend
from sdtrt_backend import metrics
from sdtrt_backend.demo import GUIDANCE
from sdtrt_backend.measure import finish_device
from sdtrt_backend.parts import all_parts
from sdtrt_backend.recipe import versions

COLUMNS = ("eager", "compile", "denoiser", "decoder", "ours")
PARTS: dict[str, Any] = {"denoiser": "denoisers", "decoder": ["vae.decoder"], "ours": "auto"}
WARM = 4  # calls: of them two calibrate and one builds
JUDGED = 8  # calls after it, in which what has no timestep is compared with its own precision
STEPS = {"sdxl": 20, "sd15": 50, "flux": 28, "emoji": 25}
CALIBRATING = 8  # captions of the bundled model

VAE: dict[str, dict[str, Any]] = {
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": False},
    "sd15": {"latent_channels": 4, "scaling_factor": 0.18215},
    "flux": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
             "use_post_quant_conv": False, "force_upcast": False}}
VAE_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
              "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280, "hidden_act": "gelu"}
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}


# pipelines

def build(name: str, tiny: bool) -> Any:
    """The pipeline on ``gpu.DEVICE``, without a progress bar."""
    if name == "emoji":
        pipe = sdtrt_backend.demo_pipeline(torch.float32 if gpu.DEVICE.type == "cpu" else torch.float16)
    else:
        from diffusers import (
            AutoencoderKL,
            DDIMScheduler,
            EulerDiscreteScheduler,
            FlowMatchEulerDiscreteScheduler,
            FluxPipeline,
            StableDiffusionPipeline,
            StableDiffusionXLPipeline,
        )

        denoiser = gpu.build(name, tiny)
        tokenizer = sdtrt_backend.demo_pipeline().tokenizer
        tokenizer.model_max_length = 77
        with gpu.DEVICE:
            small = {"block_out_channels": (32, 32, 32, 32), "latent_channels": 4} if tiny else {}
            vae = AutoencoderKL(**VAE_BLOCKS | VAE[name] | small)
            text = text_encoders(name, tiny, tokenizer)
        modules = [m.to(next(denoiser.parameters()).dtype).eval().requires_grad_(False) for m in (vae, *text)]
        vae, *text = modules
        if name == "sdxl":
            pipe = StableDiffusionXLPipeline(vae, text[0], text[1], tokenizer, tokenizer, denoiser, EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"))
        elif name == "sd15":
            pipe = StableDiffusionPipeline(vae, text[0], tokenizer, denoiser, DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False), None, None, None, False)
        else:
            pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae, text[0], tokenizer,
                                text[1], tokenizer, denoiser)
    pipe = pipe.to(gpu.DEVICE)
    if gpu.DEVICE.type == "cuda":
        pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_encoders(name: str, tiny: bool, tokenizer: Any) -> list[torch.nn.Module]:
    """With random weights; of a small pipeline as wide as its denoiser expects."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    few = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64} if tiny else {}

    def clip(kind: Any, config: dict[str, Any], width: int) -> torch.nn.Module:
        made: torch.nn.Module = kind(CLIPTextConfig(**config | few | ({"hidden_size": width, "projection_dim": width} if tiny
                                                                     else {}) | {"eos_token_id": tokenizer.eos_token_id}))
        return made

    if name == "sd15":
        return [clip(CLIPTextModel, CLIP_L, 64)]
    if name == "sdxl":  # their states are joined, and the second one's pooled state goes to the denoiser
        return [clip(CLIPTextModel, CLIP_L, 32), clip(CLIPTextModelWithProjection, CLIP_G, 32)]
    small = {"d_model": 64, "d_ff": 64, "d_kv": 16, "num_heads": 4, "num_layers": 2} if tiny else {}
    return [clip(CLIPTextModel, CLIP_L, 32), T5EncoderModel(T5Config(**T5_XXL | small))]


def arguments(name: str, tiny: bool) -> dict[str, Any]:
    side = {"sdxl": 1024, "sd15": 512, "flux": 1024}.get(name)
    given: dict[str, Any] = {"num_inference_steps": 4 if tiny else STEPS[name]}
    if name != "flux":
        given["guidance_scale"] = GUIDANCE
    if side is not None:
        given |= {"height": 128 if tiny else side, "width": 128 if tiny else side}
    return given


# columns

def prepare(column: str, pipe: Any, precision: str, recipe: Any) -> None:
    torch._dynamo.reset()
    if column == "compile":
        for module in all_parts(pipe).values():
            module.compile(dynamic=False)
    elif column in PARTS:
        random = {} if recipe else {"max_error": 1.0, "output_psnr": None}  # of weights that make more of a rounding
        sdtrt_backend.accelerate(pipe, backend=f"sd_{precision}", parts=PARTS[column], recipe=recipe, **random)


def undo(pipe: Any) -> None:
    sdtrt_backend.restore(pipe)
    for module in all_parts(pipe).values():
        module._compiled_call_impl = None


def measured(column: str, pipe: Any, draw: Callable[..., Any], batch: int, precision: str, recipe: Any,
             rounds: int) -> dict[str, Any]:
    start = time.perf_counter()
    prepare(column, pipe, precision, recipe)
    for _ in range(WARM):
        draw()
    finish_device()
    row: dict[str, Any] = {"column": column, "ready_s": time.perf_counter() - start}
    for _ in range(JUDGED if column in PARTS else 0):
        draw()
    times = []
    for _ in range(rounds):
        finish_device()
        start = time.perf_counter()
        draw()
        finish_device()
        times.append(1e3 * (time.perf_counter() - start) / batch)
    row["picture_ms"] = statistics.median(times)
    row |= by_part(pipe, draw, rounds)
    if column in PARTS:
        report = sdtrt_backend.explain(pipe)
        row |= {"states": {name: piece.state for name, piece in report.pieces} or {"": report.state},
                "fallbacks": list(report.fallbacks), "share": report.quantized_flops_share}
    if gpu.DEVICE.type == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def by_part(pipe: Any, draw: Callable[..., Any], rounds: int) -> dict[str, float]:
    """ms of the text encoders together, of a step with its scheduler, and of decoding."""
    taken: dict[str, list[float]] = {"text_ms": [], "step_ms": [], "decode_ms": []}

    def timed(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            finish_device()
            start = time.perf_counter()
            result = call(*args, **kwargs)
            finish_device()
            taken[name].append(1e3 * (time.perf_counter() - start))
            return result
        return run

    ends: list[float] = []

    def end(_: Any, __: int, ___: Any, given: dict[str, Any]) -> dict[str, Any]:
        finish_device()
        ends.append(1e3 * time.perf_counter())
        return given

    pipe.encode_prompt, pipe.vae.decode = timed(pipe.encode_prompt, "text_ms"), timed(pipe.vae.decode, "decode_ms")
    try:
        for _ in range(rounds):
            ends.clear()
            draw(callback_on_step_end=end)
            taken["step_ms"] += list(np.diff(ends))
    finally:
        del pipe.encode_prompt, pipe.vae.decode
    return {name: statistics.median(ms) for name, ms in taken.items()}


@torch.no_grad()
def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    pipe, fixed = build(given.model, given.tiny), arguments(given.model, given.tiny)
    lines = (Path(__file__).parent / "prompts.txt").read_text().splitlines()
    captions = lines[CALIBRATING : CALIBRATING + max(given.prompts, given.batch)]

    def draw(which: int = 0, count: int = given.batch, output_type: str = "pt", **more: Any) -> Any:
        noise = [torch.Generator("cpu").manual_seed(which + i) for i in range(count)]
        return pipe(captions[which : which + count], generator=noise, output_type=output_type, **fixed, **more).images

    recipe = None
    if given.model == "emoji":
        recipe = sdtrt_backend.calibrate(pipe, lines[:CALIBRATING], seed=10_000, parts="auto", progress=False, **fixed)
    exact, rows = None, []
    for column in given.columns.split(","):
        if gpu.DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            row = measured(column, pipe, draw, given.batch, given.precision, recipe, given.rounds)
            if given.model == "emoji":
                pictures = np.concatenate([draw(i, given.batch, "np") for i in range(0, given.prompts, given.batch)])
                exact = pictures if column == "eager" else exact
                if exact is not None and column != "eager":
                    psnr = metrics.psnr(pictures, exact)
                    row |= {"psnr_db": statistics.mean(psnr), "worst_db": min(psnr)}
        except Exception as error:  # a row of the table; the others go on
            row = {"column": column, "error": gpu.first_line(error)}
        print(json.dumps(row), flush=True)
        rows.append(row)
        undo(pipe)
    return rows


def table(given: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    compiled = next((r["picture_ms"] for r in rows if r["column"] == "compile" and "picture_ms" in r), None)
    print(f"\n{'tiny ' * given.tiny}{given.model}, batch {given.batch}, sd_{given.precision}")
    print(f"{'':10}{'picture ms':>11}{'a second':>10}{'text':>8}{'step':>8}{'decode':>8}{'ratio':>8}{'ready s':>9}{'PSNR':>14}")
    for r in rows:
        if "error" in r:
            print(f"{r['column']:10}{r['error']}")
            continue
        ratio = f"{compiled / r['picture_ms']:7.2f}x" if compiled else f"{'':8}"
        psnr = f"{r['psnr_db']:7.1f},{r['worst_db']:6.1f}" if "psnr_db" in r else ""
        print(f"{r['column']:10}{r['picture_ms']:11.1f}{1e3 / r['picture_ms']:10.2f}{r['text_ms']:8.2f}{r['step_ms']:8.2f}"
              f"{r['decode_ms']:8.2f}{ratio}{r['ready_s']:9.1f}{psnr:>14}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(STEPS), default="sdxl")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--columns", default=",".join(COLUMNS), help=f"of {', '.join(COLUMNS)}")
    parser.add_argument("--precision", choices=("int8", "fp8"), default="int8")
    parser.add_argument("--prompts", type=int, default=64, help="pictures of the bundled model that are compared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="small configurations of the same structure")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    given = parser.parse_args()
    name = f"pipeline_{'tiny-' * given.tiny}{given.model}_{given.batch}_{gpu.DEVICE.type}.json"
    given.out = given.out or Path(__file__).parent / "results" / name
    given.out.parent.mkdir(parents=True, exist_ok=True)
    found = run(given)
    given.out.write_text(json.dumps({"machine": gpu.machine(), "versions": versions(), "model": given.model, "batch": given.batch,
                                     "tiny": given.tiny, "precision": given.precision, "rows": found}, indent=1) + "\n")
    table(given, found)
