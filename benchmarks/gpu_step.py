"""One denoising step of SDXL, SD1.5 and FLUX.1-dev on a GPU: torch.compile beside sd_int8 and sd_fp8, in one process.

    python benchmarks/gpu_step.py sdxl --batch 2 --out benchmarks/results
    python benchmarks/gpu_step.py table --out benchmarks/results

Real configurations, random weights: the time of a step does not depend on the weights' values, its error does, so the
errors here say that the kernels are right and not how pictures look (``gpu_pictures.py`` does). Activation ranges come from
a calibration pass over the same random inputs. Every step is timed in rounds of back-to-back calls, the columns in turn;
torch.compile is replayed as a CUDA graph, our steps are called as a user calls them. The floor is
(linear + convolution FLOP) / 1979e12 + attention FLOP / 790e12 seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import sdtrt_backend
from sdtrt_backend.calibrate import Calibration, observed
from sdtrt_backend.options import Options
from sdtrt_backend.recipe import versions
from sdtrt_backend.run import states
from sdtrt_backend.store import device_key

CALLS, ROUNDS = 10, 5
PEAK_8BIT, PEAK_ATTENTION = 1979e12, 790e12
SDXL = {
    "sample_size": 128, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
FLUX = {"guidance_embeds": True}
PARAMETERS = {"sdxl": 2567463684, "sd15": 859520964, "flux": 11901408320}
TIMESTEPS = (999.0, 500.0, 100.0)


def build(name: str) -> torch.nn.Module:
    """The denoiser with random weights, in 16 bits on the GPU."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if name == "flux" else torch.float16)
    with torch.device("cuda"):
        if name == "flux":
            module: torch.nn.Module = FluxTransformer2DModel(**FLUX)
        else:
            module = UNet2DConditionModel(**(SDXL if name == "sdxl" else SD15)).to(memory_format=torch.channels_last)
    torch.set_default_dtype(torch.float32)
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[name]
    return module.eval()


def inputs(name: str, batch: int, dtype: torch.dtype) -> Callable[[float], dict[str, Any]]:
    """timestep -> keyword arguments of a step."""
    noise = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, device="cuda").to(dtype)

    if name == "flux":
        side = torch.arange(64, device="cuda")
        ids = torch.stack([torch.zeros(64, 64, device="cuda"), side[:, None].expand(64, 64), side[None].expand(64, 64)], -1)
        fixed = {"hidden_states": normal(batch, 4096, 64), "encoder_hidden_states": normal(batch, 512, 4096),
                 "pooled_projections": normal(batch, 768), "img_ids": ids.view(4096, 3).to(dtype),
                 "txt_ids": torch.zeros(512, 3, device="cuda", dtype=dtype),
                 "guidance": torch.full((batch,), 3.5, device="cuda")}
        return lambda t: {**fixed, "timestep": torch.full((batch,), t / 1000, device="cuda", dtype=dtype), "return_dict": False}
    size, width = (128, 2048) if name == "sdxl" else (64, 768)
    fixed = {"sample": normal(batch, 4, size, size), "encoder_hidden_states": normal(batch, 77, width)}
    if name == "sdxl":
        ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], device="cuda", dtype=dtype).repeat(batch, 1)
        fixed["added_cond_kwargs"] = {"text_embeds": normal(batch, 1280), "time_ids": ids}  # type: ignore[assignment]
    return lambda t: {**fixed, "timestep": torch.tensor(t, device="cuda"), "return_dict": False}


def calibrated(module: torch.nn.Module, arguments: Callable[[float], dict[str, Any]], folder: str) -> str:
    calibration = Calibration()
    with observed(module, calibration):
        for t in TIMESTEPS:
            module(**arguments(t))
    return str(calibration.recipe(Options(), {}).save(folder))


def graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.output = step()  # type: ignore[attr-defined]
    return graph.replay


def times_ms(steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median over the rounds of the mean of CALLS back-to-back calls; the columns take turns."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            step()
            start.record()
            for _ in range(CALLS):
                step()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end) / CALLS)
    return {name: statistics.median(ms[1:]) for name, ms in taken.items()}


def first_call(step: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def fresh_caches() -> None:
    """The next compilation starts with empty caches of compiled code. Our table of kernel times is filled by the first of our
    columns and read by the second."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ[name] = tempfile.mkdtemp()


def settings_of(column: str, recipe: str, weights: str) -> dict[str, Any]:
    """Arguments of torch.compile for a column."""
    if column.startswith("sd_"):
        return {"backend": column, "options": {"recipe": recipe, "weights": weights}}
    return {"mode": "max-autotune-no-cudagraphs"} if column == "compile-max" else {}


@torch.no_grad()
def print_first_call(name: str, batch: int, column: str, recipe: str) -> None:
    module = build(name)
    kwargs = inputs(name, batch, next(module.parameters()).dtype)(500.0)
    compiled = torch.compile(module, dynamic=False, **settings_of(column, recipe, "keep"))
    print(first_call(lambda: compiled(**kwargs)))


def in_new_process(name: str, batch: int, column: str, recipe: str) -> float:
    """Seconds of the first call in a process that finds the caches filled."""
    command = [sys.executable, __file__, name, "--batch", str(batch), "--columns", column, "--first-call", recipe]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


@torch.no_grad()
def measure(name: str, batch: int, columns: list[str], out: Path, warm: bool, weights: str) -> dict[str, Any]:
    module = build(name)
    arguments = inputs(name, batch, next(module.parameters()).dtype)
    kwargs = arguments(500.0)
    recipe = calibrated(module, arguments, tempfile.mkdtemp())
    with FlopCounterMode(display=False) as counter:
        plain = module(**kwargs)[0]
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in flops.items() if "attention" in op)
    total = sum(flops.values())
    floor = 1e3 * ((total - attention) / PEAK_8BIT + attention / PEAK_ATTENTION)
    wide = copy.deepcopy(module).float()
    exact = wide(**{k: _float(v) for k, v in kwargs.items()})[0]
    del wide
    torch.cuda.empty_cache()

    def error(y: torch.Tensor) -> float:
        return float((y.float() - exact).norm() / exact.norm())

    rows: dict[str, dict[str, Any]] = {"eager": {"relative_error": error(plain)}}
    steps: dict[str, Callable[[], Any]] = {"eager": lambda: module(**kwargs)}
    modules = []
    for column in columns:
        fresh_caches()
        ours = column.startswith("sd_")
        mine = copy.deepcopy(module) if ours and weights == "release" else module
        modules.append(mine)
        settings = settings_of(column, recipe, weights)
        compiled = torch.compile(mine, dynamic=False, **settings)

        def step(compiled: Any = compiled) -> Any:
            return compiled(**kwargs)

        row = rows[column] = {"first_call_s": first_call(step)}
        print(f"{column}: first call {row['first_call_s']:.0f} s", flush=True)
        torch.cuda.reset_peak_memory_stats()
        row["relative_error"] = error(step()[0])
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if ours:
            report, state = sdtrt_backend.explain(mine), states(mine)[-1]
            held = sum(c.numel() for codes in state.memory.codes.values() for c, _ in codes)
            away = sum(w.numel() * w.element_size() for w, _ in state.memory.weights.away.values())
            size = sum(p.numel() * p.element_size() for p in mine.parameters())
            precisions: dict[str, int] = {}
            for layer in report.layers:
                precisions[layer.precision] = precisions.get(layer.precision, 0) + layer.flops
            row |= {"state": report.state, "fallbacks": list(report.fallbacks), "timings": dict(report.timings),
                    "weights_share_of_16_bit": (size - away + held) / size, "step_error": report.error,
                    "flops_share": {p: n / sum(precisions.values()) for p, n in precisions.items()}}
            steps[column] = step
            if warm and report.state == "ready":
                row["warm_first_call_s"] = in_new_process(name, batch, column, recipe)
        else:
            steps[column] = graphed(step)
        print(f"{column}: {times_ms({column: steps[column]})[column]:.2f} ms alone", flush=True)
    for column, ms in times_ms(steps).items():
        rows[column] |= {"step_ms": ms, "tflops": total / ms / 1e9, "share_of_floor": floor / ms}
    best = min(rows[c]["step_ms"] for c in columns if c.startswith("compile"))
    for row in rows.values():
        row["speedup_over_best_compile"] = best / row["step_ms"]
    result = {"model": name, "batch": batch, "gpu": device_key(torch.device("cuda", 0)), "versions": versions(),
              "tflop": total / 1e12, "attention_tflop": attention / 1e12, "floor_ms": floor, "columns": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / f"gpu_{name}_{batch}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _float(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _float(v) for k, v in value.items()}
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def show(result: dict[str, Any]) -> None:
    print(f"{result['model']}, batch {result['batch']}: {result['tflop']:.2f} TFLOP, floor {result['floor_ms']:.1f} ms; "
          f"{result['gpu']['gpu']}, torch {result['gpu']['torch']}, cuDNN {result['gpu']['cudnn']}")
    print(f"{'':14} {'ms':>8} {'T/s':>6} {'floor':>6} {'first s':>8} {'warm s':>7} {'error':>7} {'weights':>8} {'speed-up':>9}")
    for name, row in result["columns"].items():
        weights = row.get("weights_share_of_16_bit")
        print(f"{name:14} {row['step_ms']:8.2f} {row['tflops']:6.0f} {row['share_of_floor']:6.0%} "
              f"{row.get('first_call_s', 0):8.1f} {row.get('warm_first_call_s', 0):7.1f} {row['relative_error']:7.4f} "
              f"{'' if weights is None else f'{weights:.2f}x':>8} {row['speedup_over_best_compile']:8.2f}x "
              f"{'; '.join(row.get('fallbacks', []))}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("sdxl", "sd15", "flux", "table"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--columns", default="compile,sd_fp8,sd_int8")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--warm", action="store_true", help="also time a first call with the caches filled")
    parser.add_argument("--weights", choices=("keep", "release"), default="release")
    parser.add_argument("--first-call", metavar="RECIPE", help="print the seconds of the first call of one column, and no more")
    given = parser.parse_args()
    if given.first_call:
        print_first_call(given.model, given.batch, given.columns, given.first_call)
    elif given.model == "table":
        for file in sorted(given.out.glob("gpu_*_*.json")):
            show(json.loads(file.read_text()))
    else:
        show(measure(given.model, given.batch, given.columns.split(","), given.out, given.warm, given.weights))
