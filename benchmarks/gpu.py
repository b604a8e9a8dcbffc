"""One denoising step of a published denoiser on a GPU: eager, torch.compile, torchao, SDNQ, sd_int8 and sd_fp8. The models are
SDXL, SD1.5, FLUX.1-dev and those of ``denoisers.py``.

    python benchmarks/gpu.py --model sdxl --batch 2                                  # eager, compile, sd_int8, sd_fp8
    python benchmarks/gpu.py --model sdxl --batch 2 --columns compile-max,torchao-fp8,torchao-int8,sdnq-int8
    python benchmarks/gpu.py --model sdxl --batch 2 --columns sd_fp8 --profile       # GPU time by kernel, nothing timed
    python benchmarks/gpu.py --table                                                 # every JSON in --out and its profiles
    python benchmarks/gpu.py --tiny --model sdxl --columns eager,compile,sd_int8     # the same code on a CPU

Published configurations, random weights, built on the GPU (UNets fp16 channels last, transformers bf16). The time of a step does
not depend on the weights' values; its error does, so an error here says that the kernels are right and not how pictures look
(``gpu_pictures.py`` does). One JSON per model, batch and column under ``--out``; a column that fails writes its first error
line there and the others go on.

Every column that does not make its own CUDA graph is replayed as one (the sd_ columns make theirs and are called as a user
calls them); eager is timed without a graph as well. ``eager`` and ``compile`` always run, unless ``--no-baselines``, in the
process of our columns and in turn with them. The other columns run before, each alone in a process of its own, which is
killed when preparing and the first call take longer than ``--limit`` seconds; nothing else uses the GPU meanwhile. With
``--side-by-side`` those columns and ``compile`` make their first calls at the same time, which then say little ("&"), and take
turns where steps are timed; the first calls of our columns come after all of them. Runs of two models share a GPU that way when
both are given the same ``--turns``.

What the columns of the table mean:
step        median over ``--rounds`` of the mean of CALLS back-to-back calls, CUDA events, after one call that fills the queue;
            of a run that was stopped over ROUNDS_SO_FAR
TFLOP       of one step, by torch.utils.flop_counter on the eager module, attention included
floor       (linear + convolution FLOP) / 1979e12 + attention FLOP / 790e12 seconds: dense 8-bit peak of an H200, and what it
            reaches in 16 bits; the table shows the share of it that a step reaches
cold, warm  seconds of the first call with empty caches (Inductor, Triton, our kernel times), in memory too; of our columns
            in a process of its own, and then in this one with the caches that the other left on disk
weights     GPU memory of the module before a step; of our columns, which make theirs in the first call, after it
peak        the larger of the memory allocated at most during called steps and of all that the allocator holds for the column
            afterwards, which counts a CUDA graph's pool
error       relative, ||y - y32|| / ||y32||, to the module in fp32 without TF32
ratio       best torch.compile step (``compile``, ``compile-max``, ``compile-blocks``: the repeated blocks) of the same run / this
            step; "*": of another run

torchao quantises the linears that see more than 16 rows and have multiples of 16 (its kernels' limits), and compiles the
repeated blocks (diffusers' ``compile_repeated_blocks``). Its row-wise fp8 takes bf16 weights only, so that column runs the
UNets in bf16. SDNQ (GPL, imported by its two columns only) quantises linears and convolutions and compiles its own
functions; ``sdnq-int8-compile`` compiles the repeated blocks on top. Both are asked for by name and found on PYTHONPATH.
``sd_fp8-unwatched`` and ``sd_int8-unwatched`` are without the drift watch: beside ``sd_fp8`` they tell what it costs.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import gc
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import denoisers
import torch
from safetensors.torch import load_file, save_file
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

import sdtrt_backend
from sdtrt_backend.calibrate import Calibration, observed
from sdtrt_backend.measure import finish_device
from sdtrt_backend.options import Options
from sdtrt_backend.recipe import versions

PEAK_8BIT, PEAK_ATTENTION = 1979e12, 790e12
CALLS = 2
ROUNDS_SO_FAR = 3
PROCESSES: list[subprocess.Popen[bytes]] = []  # of columns
TIMESTEPS = (999.0, 700.0, 400.0, 100.0)  # calibration; a step is timed at the third
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = ("sdtrt_backend", "torch", "triton", "nvidia-cudnn-frontend", "diffusers", "transformers", "torchao", "sdnq")
BASELINES = ("eager", "compile")
OURS = ("sd_int8", "sd_fp8", "sd_int8-unwatched", "sd_fp8-unwatched")
ALONE = ("compile-max", "compile-blocks", "torchao-fp8", "torchao-int8", "sdnq-int8", "sdnq-int8-compile")

UNET: dict[str, dict[str, Any]] = {"sdxl": {
    "sample_size": 128, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816},
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}}
FLUX: dict[str, Any] = {"guidance_embeds": True}
SIDE, TOKENS = 64, 512  # FLUX at 1024x1024: 64x64 image tokens
PARAMETERS = {"sdxl": 2567463684, "sd15": 859520964, "flux": 11901408320}
TINY: dict[str, dict[str, Any]] = {
    "sdxl": {"sample_size": 16, "block_out_channels": (32, 64, 128), "transformer_layers_per_block": (1, 1, 2),
             "attention_head_dim": (2, 4, 8), "cross_attention_dim": 64, "addition_time_embed_dim": 8,
             "projection_class_embeddings_input_dim": 80},
    "sd15": {"sample_size": 16, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64, "attention_head_dim": 2},
    "flux": {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
             "joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)}}

# GPU kernels by name, first match wins
GROUPS = (("attention", r"flash|fmha|sdpa|attention|attn|^_short"),
          # cuDNN's fort_native convolutions are those that its graph API fuses: ours, in 8 bits
          ("8-bit matmul/conv", r"^_gemm|^_conv$|^_conv_|i8i8|i8i32|_s8|s8s8|int8.*gemm|gemm.*int8|16832gemm|igmma|imma|"
                                r"nvjet_(sm\d+_)?qq|fort_native\w*convfwd|e4m3.*(gemm|fprop|conv)|(gemm|fprop|conv).*e4m3|"
                                r"scaled_mm|int_mm|fp8.*gemm|gemm.*fp8"),
          ("16-bit matmul/conv", r"gemm|nvjet|fprop|xmma|cutlass|convolve|winograd|wgrad|dgrad|conv2d|triton_tem|_mm_"),
          ("norms, GEGLU and rotary embedding of ours", r"^_channel_statistics|^_normalise|^_layer_norm|^_geglu|^_rms_rope"),
          ("Inductor's fused kernels", r"^triton_"))


# the models and their inputs

def build(name: str, tiny: bool) -> torch.nn.Module:
    """The denoiser with random weights from seed 0, on DEVICE."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    if name in denoisers.DENOISERS:
        return denoisers.build(name, tiny, DEVICE)
    torch.manual_seed(0)
    small = TINY[name] if tiny else {}
    torch.set_default_dtype(torch.float32 if DEVICE.type == "cpu" else torch.bfloat16 if name == "flux" else torch.float16)
    with DEVICE:
        if name == "flux":
            module: torch.nn.Module = FluxTransformer2DModel(**FLUX | small)
        else:
            module = UNet2DConditionModel(**UNET[name] | small).to(memory_format=torch.channels_last)
    torch.set_default_dtype(torch.float32)
    parameters = sum(p.numel() for p in module.parameters())
    assert tiny or parameters == PARAMETERS[name], f"{name} has {parameters} parameters, the published one {PARAMETERS[name]}"
    return module.eval().requires_grad_(False)


def inputs(module: torch.nn.Module, batch: int, tiny: bool, name: str = "") -> Callable[[float], dict[str, Any]]:
    """timestep -> keyword arguments of a step: a smooth latent with the timestep's share of noise, text states of scale 1. name:
    of the model, for those of ``denoisers.py``."""
    if name in denoisers.DENOISERS:
        return denoisers.inputs(name, module, batch, tiny, DEVICE)
    config: Any = module.config
    dtype = next(module.parameters()).dtype
    seeded = torch.Generator(DEVICE).manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=seeded, device=DEVICE)

    if "joint_attention_dim" in config:
        side, tokens = (8, 16) if tiny else (SIDE, TOKENS)
        rows = torch.arange(side, device=DEVICE, dtype=dtype)
        ids = torch.stack([torch.zeros_like(rows)[:, None].expand(side, side), rows[:, None].expand(side, side),
                           rows[None].expand(side, side)], -1).reshape(side * side, 3)
        clean, noise = normal(batch, side * side // 16, config.in_channels), normal(batch, side * side, config.in_channels)
        clean = clean.repeat_interleave(16, 1)
        fixed = {"encoder_hidden_states": normal(batch, tokens, config.joint_attention_dim).to(dtype),
                 "pooled_projections": normal(batch, config.pooled_projection_dim).to(dtype), "img_ids": ids,
                 "txt_ids": torch.zeros(tokens, 3, device=DEVICE, dtype=dtype),
                 "guidance": torch.full((batch,), 3.5, device=DEVICE), "return_dict": False}
        return lambda t: fixed | {"hidden_states": ((1 - t / 1000) * clean + t / 1000 * noise).to(dtype),
                                  "timestep": torch.full((batch,), t / 1000, device=DEVICE, dtype=dtype)}
    size = config.sample_size
    clean, noise = normal(batch, 4, size // 8, size // 8), normal(batch, 4, size, size)
    clean = clean.repeat_interleave(8, 2).repeat_interleave(8, 3)
    fixed = {"encoder_hidden_states": normal(batch, 77, config.cross_attention_dim).to(dtype), "return_dict": False}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        ids = torch.tensor([[8.0 * size, 8.0 * size, 0, 0, 8.0 * size, 8.0 * size]], device=DEVICE, dtype=dtype).repeat(batch, 1)
        fixed["added_cond_kwargs"] = {"text_embeds": normal(batch, width).to(dtype), "time_ids": ids}
    return lambda t: fixed | {"sample": (math.sqrt(1 - (t / 1000) ** 2) * clean + t / 1000 * noise).to(dtype),
                              "timestep": torch.tensor(t, device=DEVICE)}


def calibrated(module: torch.nn.Module, arguments: Callable[[float], dict[str, Any]], folder: Path) -> str:
    """Folder of the module's recipe."""
    calibration = Calibration()
    with observed(module, calibration):
        for t in TIMESTEPS:
            module(**arguments(t))
    return str(calibration.recipe(Options.parse(None), {"front_door": "benchmarks/gpu.py"}).save(folder))


def in_float32(module: torch.nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The output in fp32 without TF32."""
    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    wide = copy.deepcopy(module).float()
    y = first_output(wide(**_pytree.tree_map(widen, kwargs)))
    torch.backends.cudnn.allow_tf32 = before
    return y


def first_output(result: Any) -> torch.Tensor:
    """A model of lists gives a list."""
    return next(t for t in _pytree.tree_leaves(result) if isinstance(t, torch.Tensor))


def flops(module: torch.nn.Module, kwargs: dict[str, Any]) -> tuple[int, int]:
    """(linears, convolutions and attention; attention alone) of one eager step."""
    with FlopCounterMode(display=False) as counter:
        module(**kwargs)
    by_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    return sum(by_op.values()), sum(n for op, n in by_op.items() if "attention" in op)


# what a column does with the module

def prepare(column: str, module: torch.nn.Module, kwargs: dict[str, Any], recipe: str, weights: str) -> Any:
    """The callable of a column."""
    if column == "eager":
        return module
    if column == "compile":
        return torch.compile(module, dynamic=False)
    if column == "compile-max":
        return torch.compile(module, dynamic=False, mode="max-autotune-no-cudagraphs")
    if column in OURS:
        return torch.compile(module, backend=column.removesuffix("-unwatched"), dynamic=False, options={
            "recipe": recipe, "weights": weights, "watch": not column.endswith("-unwatched"),
            "max_error": 1.0})  # of random weights, which make more of a rounding than trained ones
    if column.startswith("torchao"):
        to_torchao(module, column, kwargs)
    elif column.startswith("sdnq"):
        from sdnq import sdnq_post_load_quant

        sdnq_post_load_quant(module, weights_dtype="int8", quant_conv=True, use_quantized_matmul=True,
                             use_quantized_matmul_conv=True)
    if column != "sdnq-int8":
        if not getattr(module, "_repeated_blocks", None):  # diffusers' own list, which is empty for SD3's class
            lists = [child for child in module.children() if isinstance(child, torch.nn.ModuleList)]
            module._repeated_blocks = sorted({type(block).__name__ for blocks in lists for block in blocks})  # type: ignore[assignment]
        module.compile_repeated_blocks(dynamic=False)  # type: ignore[operator]
    return module


def to_torchao(module: torch.nn.Module, column: str, kwargs: dict[str, Any]) -> None:
    """Dynamic 8-bit linears, row-wise, in place."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    config: Any = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    if column == "torchao-int8":
        config = Int8DynamicActivationInt8WeightConfig()
    rows: dict[str, int] = {}

    def see(name: str) -> Callable[..., None]:
        return lambda child, args, *_: rows.__setitem__(name, args[0].numel() // args[0].shape[-1])

    hooks = [m.register_forward_hook(see(n)) for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
    module(**kwargs)
    for hook in hooks:
        hook.remove()

    def chosen(child: torch.nn.Module, name: str) -> bool:
        return rows.get(name, 0) > 16 and all(n % 16 == 0 for n in child.weight.shape)  # type: ignore[union-attr]

    quantize_(module, config, filter_fn=chosen)


def use_caches(folder: Path, fresh: bool) -> None:
    """The caches on disk are in the folder. Fresh: the next compilation finds nothing there, and nothing in memory."""
    from torch._inductor.utils import clear_caches

    from sdtrt_backend.kernels import chooser

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SDTRT_CACHE"):
        os.environ[name] = str(folder / name)
        Path(os.environ[name]).mkdir(parents=True, exist_ok=True)
    chooser.cache_clear()  # the kernel times in memory are of the former folder
    if fresh:
        clear_caches()


# measuring

def first_call(step: Callable[[], Any]) -> float:
    finish_device()
    start = time.perf_counter()
    step()
    finish_device()
    return time.perf_counter() - start


def graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as one CUDA graph over the same inputs; the step itself on a CPU."""
    if DEVICE.type == "cpu":
        return step
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.output = step()  # type: ignore[attr-defined]
    graph.step = step  # type: ignore[attr-defined]  # the weights that it reads
    return graph.replay


def once_ms(step: Callable[[], Any]) -> float:
    """Mean of CALLS back-to-back calls."""
    step()
    if DEVICE.type == "cpu":
        return 1e3 * first_call(lambda: [step() for _ in range(CALLS)]) / CALLS
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CALLS):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / CALLS


def times_ms(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians; the steps take turns."""
    taken = [{name: once_ms(step) for name, step in steps.items()} for _ in range(rounds + 1)]
    return {name: statistics.median(t[name] for t in taken[1:]) for name in steps}


def memory() -> tuple[int, int]:
    """(allocated, held by the allocator) bytes on the GPU."""
    gc.collect()
    if DEVICE.type == "cpu":
        return 0, 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def called_peak(step: Callable[[], Any]) -> int:
    """Bytes allocated at most during two calls."""
    if DEVICE.type == "cpu":
        step()
        return 0
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def start_column(column: str, module: torch.nn.Module, kwargs: dict[str, Any], exact: torch.Tensor, recipe: str, weights: str,
                 before: tuple[int, int], compiled_now: Callable[[], Any] = int,
                 ) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """First call, error and memory of a column; and what is to be timed. before: ``memory()`` without the module."""
    compiled = prepare(column, module, kwargs, recipe, weights)

    def step() -> Any:
        return compiled(**kwargs)

    row: dict[str, Any] = {"weights_gb": (memory()[0] - before[0]) / 1e9, "cold_s": first_call(step)}
    compiled_now()
    print(f"{column}: first call {row['cold_s']:.1f} s", flush=True)
    y = first_output(step()).float()
    row["relative_error"] = float((y - exact).norm() / exact.norm())
    del y
    peak = called_peak(step)
    steps = {column: step}
    if column in OURS:
        row |= explained(module)
        row["weights_gb"] = (memory()[0] - before[0]) / 1e9
    else:
        try:
            steps[column] = graphed(step)
            if column == "eager":
                steps["eager, no graph"] = step
        except Exception as error:
            cause = error.__context__ or error  # ending the capture fails, too
            row["note"] = f"no CUDA graph: {first_line(cause)}"
            finish_device()
    row["peak_gb"] = max(peak - before[0], memory()[1] - before[1]) / 1e9
    return row, steps


def explained(module: torch.nn.Module) -> dict[str, Any]:
    """What ``sdtrt_backend.explain`` says, in short."""
    report = sdtrt_backend.explain(module)
    shares: dict[str, float] = {}
    total = sum(layer.flops for layer in report.layers) or 1
    for layer in report.layers:
        shares[layer.precision] = shares.get(layer.precision, 0.0) + layer.flops / total
    return {"state": report.state, "note": "; ".join(report.fallbacks), "flops_share": shares, "timings": dict(report.timings)}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


# a run

class Run:
    """The facts of one run, and its rows on disk."""

    def __init__(self, given: argparse.Namespace, stamp: str) -> None:
        self.given, self.stamp = given, stamp
        self.facts: dict[str, Any] = {"model": given.model, "tiny": given.tiny, "batch": given.batch, "run": stamp,
                                      "machine": machine(), "versions": versions(PACKAGES)}

    def path(self, column: str) -> Path:
        return Path(self.given.out / f"{'tiny-' * self.given.tiny}{self.given.model}_{self.given.batch}_{column}.json")

    def write(self, column: str, row: dict[str, Any]) -> None:
        if self.given.profile:
            return
        if row.get("step_ms") and "tflop" in self.facts:
            row["tflops"] = 1e3 * self.facts["tflop"] / row["step_ms"]
            row["share_of_floor"] = self.facts["floor_ms"] / row["step_ms"]
        self.given.out.mkdir(parents=True, exist_ok=True)
        self.path(column).write_text(json.dumps(self.facts | {"column": column} | row, indent=1) + "\n")


def machine() -> dict[str, str]:
    if DEVICE.type == "cpu":
        return {"gpu": "CPU"}
    from sdtrt_backend.store import device_key

    found: dict[str, str] = device_key(torch.device("cuda", 0))
    return found


@torch.no_grad()
def measure(run: Run, columns: list[str], work: Path) -> None:
    """Every column of a run; writes their rows."""
    given = run.given
    empty = memory()
    module = build(given.model, given.tiny)
    size = memory()[0] - empty[0]
    arguments = inputs(module, given.batch, given.tiny, given.model)
    kwargs = arguments(TIMESTEPS[2])
    recipe = calibrated(module, arguments, work / "recipe") if set(columns) & set(OURS) else ""
    total, attention = flops(module, kwargs)
    floor = 1e3 * ((total - attention) / PEAK_8BIT + attention / PEAK_ATTENTION)
    run.facts |= {"parameters": sum(p.numel() for p in module.parameters()), "tflop": total / 1e12,
                  "attention_tflop": attention / 1e12, "floor_ms": floor}
    exact = in_float32(module, kwargs)
    assert exact.isfinite().all(), "the random module's own output is not finite"
    save_file({"exact": exact.contiguous()}, work / "reference.safetensors")
    (work / "facts.json").write_text(json.dumps(run.facts))
    memory()
    others = []
    for column in columns:
        if column in ALONE:
            others.append(in_its_own_process(run, column, work))
            if not given.side_by_side:
                others[-1].join()
    together = [c for c in columns if c not in ALONE]
    first_of_ours = next((c for c in together if c in OURS), None)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    with ExitStack() as to_the_end:
        for column in together:
            if column == first_of_ours:
                to_the_end.enter_context(its_turn(run, work, others))
            start_together(run, column, module, size, kwargs, exact, recipe, work, bool(others), rows, steps)
            if column in steps and not (given.profile or any(other.is_alive() for other in others)):
                time_in_turn(run, rows, steps, ROUNDS_SO_FAR)  # a run that is stopped has its columns so far
                print(f"{column}: {rows[column]['step_ms']:.2f} ms", flush=True)
        if given.profile:
            for column in together:
                if column in steps and column in given.columns.split(","):
                    profile(run, column, steps[column])
            return
        if first_of_ours is None:
            to_the_end.enter_context(its_turn(run, work, others))
        time_in_turn(run, rows, steps, given.rounds)


def start_together(run: Run, column: str, module: torch.nn.Module, size: int, kwargs: dict[str, Any], exact: torch.Tensor,
                   recipe: str, work: Path, beside_others: bool, rows: dict[str, dict[str, Any]],
                   steps: dict[str, Callable[[], Any]]) -> None:
    """The first call of a column of this process; its row and steps, or the error as its row."""
    given, cold_row = run.given, dict[str, Any]()
    if column in OURS and column in given.warm.split(",") and not given.profile:
        cold_row = cold_start(run, column, work)
        if "error" in cold_row:
            run.write(column, cold_row)
            return
    use_caches(work / "caches" / column, fresh=not cold_row)
    try:
        before = memory()
        if column not in OURS:  # they share the module, so it counts for each
            before = before[0] - size, before[1] - size
        mine = copy.deepcopy(module) if column in OURS else module
        row, timed = start_column(column, mine, kwargs, exact, recipe, given.weights, before)
    except Exception as error:
        run.write(column, {"error": first_line(error)})
        return
    if beside_others and given.side_by_side and column not in OURS:
        row["side_by_side"] = True
    rows[column] = row | ({"cold_s": cold_row["cold_s"], "warm_s": row["cold_s"]} if cold_row else {})
    steps |= timed


def time_in_turn(run: Run, rows: dict[str, dict[str, Any]], steps: dict[str, Callable[[], Any]], rounds: int) -> None:
    """Write the rows with the times of their steps, all timed in this call."""
    times = times_ms(steps, rounds)
    for column, row in rows.items():
        row["step_ms"] = times[column]
        if f"{column}, no graph" in times:
            row["no_graph_ms"] = times[f"{column}, no graph"]
        run.write(column, row)


def cold_start(run: Run, column: str, work: Path) -> dict[str, Any]:
    """Seconds of the first call in a process of its own, which leaves its caches for this one."""
    result = work / "cold.json"
    result.unlink(missing_ok=True)
    process = subprocess.run([*again(run, column), "--cold", str(work)])
    if not result.exists():
        return {"error": f"its cold start ended with exit status {process.returncode}"}
    return dict(json.loads(result.read_text()))


@torch.no_grad()
def cold(run: Run, column: str, work: Path) -> None:
    """In that process: one first call with empty caches."""
    given = run.given
    use_caches(work / "caches" / column, fresh=True)
    module = build(given.model, given.tiny)
    kwargs = inputs(module, given.batch, given.tiny, given.model)(TIMESTEPS[2])
    try:
        compiled = prepare(column, module, kwargs, str(work / "recipe"), given.weights)
        row: dict[str, Any] = {"cold_s": first_call(lambda: compiled(**kwargs))}
        print(f"{column}: cold first call {row['cold_s']:.1f} s", flush=True)
    except Exception as error:
        row = {"error": first_line(error)}
    (work / "cold.json").write_text(json.dumps(row))


def again(run: Run, column: str) -> list[str]:
    """The command of this script for one column of the same run."""
    given = run.given
    return [sys.executable, __file__, "--model", given.model, "--batch", str(given.batch), "--columns", column, "--out",
            str(given.out), "--rounds", str(given.rounds), "--stamp", run.stamp, "--weights", given.weights,
            *(["--turns", str(given.turns)] if given.turns else []), *["--tiny"] * given.tiny,
            *["--side-by-side"] * given.side_by_side,
            *["--profile"] * given.profile, *["--cudnn-benchmark"] * given.cudnn_benchmark]


def in_its_own_process(run: Run, column: str, work: Path) -> threading.Thread:
    """Start a column in a process; the thread ends with it."""
    run.path(column).unlink(missing_ok=True)
    process = subprocess.Popen([*again(run, column), "--alone", str(work)])
    PROCESSES.append(process)
    watching = threading.Thread(target=watch, args=(run, column, work, process), daemon=True)
    watching.start()
    return watching


def watch(run: Run, column: str, work: Path, process: subprocess.Popen[bytes]) -> None:
    """Kill a column's process when it compiles for longer than the limit."""
    compiling, compiled = marks(column, work)
    given, since = run.given, 0.0
    try:
        while process.poll() is None:
            time.sleep(0.2)
            since = since or (time.monotonic() if compiling.exists() else 0.0)
            if since and not compiled.exists() and time.monotonic() - since > given.limit:
                run.write(column, {"error": f"did not compile in {given.limit / 60:g} min"})
                return
    finally:
        process.kill()
        process.wait()
    if not given.profile and not run.path(column).exists():
        run.write(column, {"error": f"its process ended with exit status {process.returncode}"})


def marks(column: str, work: Path) -> tuple[Path, Path]:
    """Files that are there once a column in its own process (compiles, has compiled)."""
    return work / f"{column} compiling", work / f"{column} compiled"


@contextmanager
def its_turn(run: Run, work: Path, others: Iterable[threading.Thread] = ()) -> Iterator[None]:
    """After these have ended. One process at a time, of this run, and of all that were given the same folder."""
    for other in others:
        other.join()
    with open((run.given.turns or work) / "turn", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@torch.no_grad()
def alone(run: Run, column: str, work: Path) -> None:
    """In the process of its own: one column."""
    given = run.given
    exact = load_file(work / "reference.safetensors")["exact"].to(DEVICE)
    run.facts |= {k: v for k, v in json.loads((work / "facts.json").read_text()).items() if k not in run.facts}
    use_caches(work / "caches" / column, fresh=True)
    try:
        before = memory()
        module = build(given.model, given.tiny)
        if column == "torchao-fp8":
            module.to(torch.bfloat16)
        kwargs = inputs(module, given.batch, given.tiny, given.model)(TIMESTEPS[2])
        compiling, compiled = marks(column, work)
        compiling.touch()
        row, steps = start_column(column, module, kwargs, exact, "", "", before, compiled.touch)
        row |= {"side_by_side": True} if given.side_by_side else {}
        if column == "torchao-fp8" and given.model in UNET:
            row["note"] = "; ".join(filter(None, ("bf16", row.get("note"))))
        with its_turn(run, work):
            if given.profile:
                profile(run, column, steps[column])
            else:
                row["step_ms"] = times_ms(steps, given.rounds)[column]
    except Exception as error:
        row = {"error": first_line(error)}
        print(f"{column}: {row['error']}", flush=True)
    run.write(column, row)


# seeing

def profile(run: Run, column: str, step: Callable[[], Any]) -> None:
    """GPU time of one step by kernel and by kind; kept in ``gpu_profile`` beside ``--out``."""
    from torch.profiler import ProfilerActivity

    step()
    finish_device()
    gpu = DEVICE.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as recorded:
        step()
        finish_device()
    kernels: dict[str, list[float]] = {}
    for event in recorded.events() or []:
        if gpu and ("CUDA" not in str(event.device_type) or getattr(event, "is_user_annotation", False)):
            continue
        if event.name.startswith(("##", "Torch", "Pregraph")):  # spans around kernels, not kernels
            continue
        entry = kernels.setdefault(event.name, [0.0, 0])
        entry[0] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3
        entry[1] += 1
    groups = kinds(kernels)
    print(f"\n{column}: {sum(ms for ms, _ in groups.values()):.3f} ms in {sum(int(n) for _, n in groups.values())} kernels")
    for name, (ms, count) in groups.items():
        print(f"  {ms:8.3f} ms {int(count):5} x  {name}")
    kernels = dict(sorted(kernels.items(), key=lambda item: -item[1][0]))
    for name, (ms, count) in list(kernels.items())[:40]:
        print(f"  {ms:8.3f} ms {int(count):5} x  [{kind(name)}]  {name[:140]}")
    path = profiles(run.given.out) / run.path(column).name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run.facts | {"column": column, "kernels": kernels}, indent=1) + "\n")


def profiles(out: Path) -> Path:
    return out.parent / "gpu_profile"


def kinds(kernels: dict[str, list[float]]) -> dict[str, list[float]]:
    """kind -> [ms, calls]."""
    groups = {name: [0.0, 0.0] for name in (*dict(GROUPS), "everything else")}
    for name, entry in kernels.items():
        groups[kind(name)] = [a + b for a, b in zip(groups[kind(name)], entry, strict=True)]
    return groups


def kind(kernel: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, kernel, re.IGNORECASE)), "everything else")


def table(folder: Path) -> None:
    """Every row in the folder, by model and batch."""
    rows = [json.loads(p.read_text()) for p in sorted(folder.glob("*_*_*.json"))]
    order = [*BASELINES, "compile-max", *(c for c in ALONE if c != "compile-max"), *OURS]
    keys = sorted({(r["tiny"], r["model"], r["batch"]) for r in rows})
    for key in keys:
        mine = sorted((r for r in rows if (r["tiny"], r["model"], r["batch"]) == key), key=lambda r: order.index(r["column"]))
        head = max(mine, key=lambda r: r["run"])
        newest = {c: r["step_ms"] for r in mine if (c := r["column"]).startswith("compile") and r.get("step_ms")}
        driver = re.search(r" (\d+\.\d+\.\d+) ", head["machine"].get("driver", ""))
        print(f"\n{'tiny ' * key[0]}{key[1]}, batch {key[2]}: {head.get('tflop', 0):.3f} TFLOP, floor "
              f"{head.get('floor_ms', 0):.2f} ms; {head['machine']['gpu']}{f', driver {driver[1]}' if driver else ''}; "
              + ", ".join(f"{p} {v}" for p, v in head["versions"].items()))
        print(f"{'':18}{'step ms':>9}{'TFLOP/s':>9}{'floor':>7}{'cold s':>8}{'warm s':>8}{'weights GB':>11}{'peak GB':>9}"
              f"{'error':>9}{'ratio':>8}")
        for r in mine:
            if "step_ms" not in r:
                print(f"{r['column']:18}{r.get('error', 'not timed: the run ended early')}")
                continue
            same = {c: q["step_ms"] for q in mine if (c := q["column"]) in newest and q["run"] == r["run"]}
            best = min((same or newest).values(), default=math.nan)
            print(f"{r['column']:18}{r['step_ms']:9.2f}{r['tflops']:9.1f}{r['share_of_floor']:7.1%}{number(r, 'cold_s', 7, 1)}"
                  + ("&" if r.get("side_by_side") else " ") + f"{number(r, 'warm_s', 8, 1)}"
                  f"{number(r, 'weights_gb', 11, 2)}{number(r, 'peak_gb', 9, 2)}"
                  f"{number(r, 'relative_error', 9, 5)}"
                  + ("" if math.isnan(best) else f"{best / r['step_ms']:7.2f}x{' ' if same else '*'} ")
                  + "; ".join(s for s in (r.get("state", ""), r.get("note", "")) if s))
            if "no_graph_ms" in r:
                print(f"{r['column'] + ', no graph':18}{r['no_graph_ms']:9.2f}")


def profile_table(folder: Path) -> None:
    """GPU milliseconds of a step by kind of kernel, of every profile in the folder."""
    found: dict[tuple[bool, str, int], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*_*_*.json")):
        row = json.loads(path.read_text())
        found.setdefault((row["tiny"], row["model"], row["batch"]), []).append(row)
    for (tiny, model, batch), rows in found.items():
        columns = [kinds(r["kernels"]) for r in rows]
        print(f"\n{'tiny ' * tiny}{model}, batch {batch}: ms in kernels of each kind (calls)")
        print(f"{'':46}" + "".join(f"{r['column']:>18}" for r in rows))
        for name in columns[0]:
            print(f"{name:46}" + "".join(f"{c[name][0]:10.2f} ({int(c[name][1]):5})" for c in columns))
        print(f"{'all':46}" + "".join(f"{sum(ms for ms, _ in c.values()):10.2f} ({int(sum(n for _, n in c.values())):5})"
                                      for c in columns))


def number(row: dict[str, Any], key: str, width: int, digits: int) -> str:
    return f"{row[key]:{width}.{digits}f}" if key in row else " " * width


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*PARAMETERS, *denoisers.DENOISERS), default="sdxl")
    parser.add_argument("--batch", type=int, help="default 2 for UNets and SD3.5, else 1: no second pass, or one of its own")
    parser.add_argument("--columns", default=",".join(OURS[:2]), help=f"of {', '.join((*BASELINES, *ALONE, *OURS))}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--limit", type=float, default=300, help="seconds that a column in its own process may compile")
    parser.add_argument("--weights", choices=("keep", "release"), default="release", help="option of the sd_ columns")
    parser.add_argument("--warm", default=",".join(OURS), metavar="COLUMNS", help="of ours, whose first call is also made warm")
    parser.add_argument("--no-baselines", action="store_true", help="only the columns named; ratios are to another run's")
    parser.add_argument("--side-by-side", action="store_true", help="first calls of the other columns at the same time")
    parser.add_argument("--turns", type=Path, help="a folder: runs on one GPU take turns to build our columns and to time steps")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="cuDNN chooses 16-bit convolutions by measuring")
    parser.add_argument("--profile", action="store_true", help="GPU time by kernel of the columns named, no times of steps")
    parser.add_argument("--table", action="store_true", help="print the table of --out, run nothing")
    parser.add_argument("--tiny", action="store_true", help="small configurations of the same structure")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cold", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stamp", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.batch = given.batch or (2 if given.model in (*UNET, "sd35-large") else 1)
    wanted = given.columns.split(",")
    if unknown := [c for c in wanted if c not in (*BASELINES, *ALONE, *OURS)]:
        parser.error(f"no column is called {', '.join(unknown)}; there are {', '.join((*BASELINES, *ALONE, *OURS))}")
    torch.backends.cudnn.benchmark = given.cudnn_benchmark
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that no column outlives the run
    if given.alone:
        alone(Run(given, given.stamp), wanted[0], given.alone)
    elif given.cold:
        cold(Run(given, given.stamp), wanted[0], given.cold)
    elif not given.table:
        if not (given.profile or given.no_baselines):
            wanted = [*BASELINES, *(c for c in wanted if c not in BASELINES)]
        with tempfile.TemporaryDirectory() as work:
            try:
                measure(Run(given, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())), wanted, Path(work))
            finally:
                for process in PROCESSES:
                    process.kill()
    if not given.alone and not given.cold and not given.profile:
        table(given.out)
        profile_table(profiles(given.out))
