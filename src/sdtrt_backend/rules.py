"""The tables: which operations are quantised, what stays in the user's precision and why, and how ranges are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from . import stats
from .roles import CONDITIONING, FIRST, LAST
from .values import Layer


@dataclass(frozen=True)
class OpRule:
    """How an operation is quantised: weights per output channel (axis 0), the input per tensor.

    arguments: the call's parameters in order with their defaults; channel_axis: the input's channel dimension.
    """

    name: str
    channel_axis: int
    arguments: tuple[tuple[str, Any], ...]


_LINEAR = OpRule("linear", -1, (("input", None), ("weight", None), ("bias", None)))
_CONV2D = OpRule(
    "conv2d",
    1,
    (("input", None), ("weight", None), ("bias", None), ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)),
)
# torch.export's overload takes lists only
_ATEN_CONV2D = OpRule("conv2d", 1, (*_CONV2D.arguments[:3], ("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)),
                                    ("groups", 1)))
OPS: dict[Any, OpRule] = {torch._C._nn.linear: _LINEAR, torch.nn.functional.linear: _LINEAR, torch.conv2d: _CONV2D,
                          torch.nn.functional.conv2d: _CONV2D, torch.ops.aten.linear.default: _LINEAR,
                          torch.ops.aten.conv2d.default: _ATEN_CONV2D}
MODULES: dict[type[torch.nn.Module], OpRule] = {torch.nn.Linear: _LINEAR, torch.nn.Conv2d: _CONV2D}

ENGINES = ("auto", "inductor", "tensorrt", "torchao", "reference")
TENSORRT = ("tensorrt_rtx", "tensorrt")  # modules, either of which is a TensorRT
LORA_POLICIES = ("calibrate", "own")
RESTS = ("auto", "float32", "bfloat16")

# Module paths that stay in the user's precision. They hold about 1 % of the FLOPs and much of the error. Where there is a graph,
# ``roles`` finds embeddings, modulations and the first and last layer whatever their names are; the names are for where there is
# none.
KEEP: tuple[tuple[str, str], ...] = (
    ("*time_embedding*", "timestep embedding: every layer depends on it, and it is a negligible share of the work"),
    ("*time_emb_proj*", "timestep projection: every layer depends on it, and it is a negligible share of the work"),
    ("*time_text_embed*", "timestep and text embedding: a negligible share of the work"),
    *((pattern, "timestep embedding and modulation: every layer depends on it, and it is a negligible share of the work")
      for pattern in ("*time_embed*", "t_embedder*", "*.t_embedder*", "*timestep_embedder*", "*time_proj", "condition_embedder*",
                      "adaln_single*", "*.img_mod.*", "*.txt_mod.*", "*adaLN_modulation*", "*stream_modulation*",
                      "*guidance_embed*", "distilled_guidance_layer*", "*.norm1.linear", "*.norm1_context.linear",
                      "single_transformer_blocks.*.norm.linear", "*_modulation*", "*.modulation*", "p_embedder*",
                      "pooled_text_embeddings*")),
    *((pattern, "first projection: its input is the latent or the text itself, and it is a small share of the work")
      for pattern in ("img_in", "txt_in", "proj_in", "all_x_embedder*", "cap_embedder*", "caption_projection*",
                      "patch_embedding", "text_embedder*", "*.text_embedder*", "all_final_layer*")),
    ("*add_embedding*", "added embedding: a negligible share of the work"),
    ("conv_in", "first convolution: few channels, and its input is the latent itself"),
    ("conv_out", "last convolution: few channels, and its error reaches the latent undamped"),
    ("proj_out", "last projection: its error reaches the latent undamped"),
    ("x_embedder", "first projection: its input is the latent itself"),
    ("context_embedder", "first projection of the text: a negligible share of the work"),
    ("norm_out*", "final modulation: a negligible share of the work"),
    ("*.lora_[AB].*", "side branch of a LoRA: its two small products add to those of the layer beside it, which is in 8 bits"),
)
ONE_VECTOR = ("it reads one vector of each picture, made of timestep, pooled text or sizes: every layer depends on it, and it is "
              "a negligible share of the work")
BY_ROLE = {
    CONDITIONING: ONE_VECTOR,
    FIRST: "first layer: its input is the latent, the text or an image itself, and it is a small share of the work",
    LAST: "last layer: its error reaches the latent undamped, and it is a small share of the work",
}
SIDE_BRANCH = "*.lora_[AB].*"  # reads what the layer beside it reads, and is no layer of the checkpoint: not calibrated
# Linears that are one product of several, and of which: ``fuse_qkv_projections`` of diffusers. They read the same tensor, so the
# range and the smoothing of either are right for the other
FUSED: dict[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
# Where convolutions are smoothed: what writes their input on these devices multiplies by a factor per channel as well as by one
SMOOTH_CONVS = ("cpu", "cuda")
# Where their input has a zero point as well, which costs nothing in int8 on these devices. Most of them read SiLU's output, which
# is never below -0.28, so half of the codes of a symmetric range would be lost. Elsewhere kernels pad with the code 0
FREE_CONVS = ("cpu",)
# Where the values of attention are rotated (``rotate``): where that was measured
ROTATED_ON = ("cpu",)
# Layers that read what no norm has tamed: a gated product, or the sum of a transformer's residuals, whose tails are so heavy
# that outliers of prompts nobody calibrated on are clipped, or take all codes. Where a second product costs little
# (``FREE_CONVS``: 2 % of the bundled model's step), their input is held in two codes, and their kernel runs for each of them
TWO_CODES = ("*ff*.net.2", "*.proj_out")
TWO_CODES_REASON = "its input, which no norm has tamed, is held in two 8-bit codes, 16 bits together"
TWO_CODES_HEADROOM = 8.0  # of the range to what was seen: 13 bits are left
# What an engine builder refuses: (flavour, precision, operation): reason. An exported file keeps these in 16 bits.
ENGINE_KEEP: dict[tuple[str, str, str], str] = {
    ("tensorrt_rtx", "int8", "conv2d"): "TensorRT-RTX before 1.7 refuses to build an int8 convolution; 1.7 builds it, but none "
                                        "was seen to run yet",
}
# What ``engine="torchao"`` refuses: operation: reason; and the fewest rows of a matrix product, a limit of torch._int_mm on GPUs
TORCHAO_KEEP = {"conv2d": "TorchAO has no int8 convolution: engine='auto' has"}
TORCHAO_MIN_ROWS = 17
# precision: the least compute capability (89 is 8.9) whose tensor cores have it
ENGINE_MIN_SM = {"int8": 75, "fp8": 89}
MIN_CHANNELS = 32
CHANNEL_MULTIPLE = 16  # int8 dot products of every target work on 16 channels or more at a time


LEVELS = (1.0, 2.0, 2.5, 3.0, 4.0)  # of the option ``level``; 4 adds attention in fp8 (sd_fp8 on a GPU that has it)
# (operation, module path, the least level that quantises it); the first match counts
LEVEL_OF: tuple[tuple[str, str, float], ...] = (
    ("conv2d", "*", 1.0),
    ("linear", "*ff*.net.*", 2.0),
    ("linear", "*.to_[qkv]", 2.5),
    ("linear", "*.to_*kv", 2.5),
    ("linear", "*.add_[qkv]_proj", 2.5),
    ("linear", "*", 3.0),
)


def layers_of(module: torch.nn.Module) -> Iterator[Layer]:
    """The layers of a module that was not captured, by their paths."""
    for name, child in module.named_modules():
        if type(child) in MODULES:
            yield Layer(name, MODULES[type(child)].name, "", "", child.get_parameter("weight"), getattr(child, "groups", 1))


def level_of(layer: Layer) -> float:
    """The least level that quantises ``layer``."""
    return next(level for op, pattern, level in LEVEL_OF if op == layer.op and fnmatchcase(layer.name, pattern))


def reason_to_keep(layer: Layer, exclude: tuple[str, ...], level: float = LEVELS[-1]) -> str | None:
    """The sentence why ``layer`` stays in the user's precision, or None when it may be quantised."""
    for pattern in exclude:
        if fnmatchcase(layer.name, pattern):
            return f"excluded by the option exclude: {pattern}"
    for pattern, why in KEEP:
        if fnmatchcase(layer.name, pattern):
            return why
    if layer.role:
        return BY_ROLE[layer.role]
    if level_of(layer) > level:
        return f"quantised from level {level_of(layer):g} on, the option level is {level:g}"
    out_channels, in_channels = layer.weight.shape[:2]
    if layer.groups != 1:
        return f"grouped convolution ({layer.groups} groups): no 8-bit kernel"
    if min(out_channels, in_channels) < MIN_CHANNELS:
        return f"{in_channels} -> {out_channels} channels: fewer than {MIN_CHANNELS}, int8 does not pay"
    if out_channels % CHANNEL_MULTIPLE or in_channels % CHANNEL_MULTIPLE:
        return f"{in_channels} -> {out_channels} channels: not multiples of {CHANNEL_MULTIPLE}"
    if not layer.weight.isfinite().all():
        return "its weights are not finite"
    return None


@dataclass(frozen=True)
class AmaxByTimestep:
    """amax of one tensor over the calls of each timestep, noisiest timestep first: [T] or [T, channels], fp32.

    maximum, minimum, total: over calls; count: calls [T]; histogram: of |x| of the tensor, [T, stats.BINS];
    steps: T before ``prefix``, 0 where it was not called.
    """

    maximum: torch.Tensor
    minimum: torch.Tensor
    total: torch.Tensor
    count: torch.Tensor
    histogram: torch.Tensor
    steps: int = 0

    def prefix(self, percentile: float) -> AmaxByTimestep:
        """The first ``percentile`` of the timesteps, at least one."""
        n = max(1, int(len(self.count) * percentile + 1e-9))
        return AmaxByTimestep(self.maximum[:n], self.minimum[:n], self.total[:n], self.count[:n], self.histogram[:n],
                              len(self.count))

    def mean(self) -> torch.Tensor:
        return self.total / self.count.view(-1, *[1] * (self.total.dim() - 1))

    def clipped(self, clip: Callable[[torch.Tensor], float]) -> torch.Tensor:
        """The maximum over timesteps, times the share of the tensor's range up to what ``clip`` makes of its histogram."""
        return self.maximum.amax(0) * min(1.0, clip(self.histogram.sum(0)) / max(float(self.maximum.max()), stats.TINY_AMAX))


# Range rules: amax over timesteps and calls -> one clipping value (per tensor or channel).
RANGE_RULES: dict[str, Callable[[AmaxByTimestep], torch.Tensor]] = {
    "max": lambda a: a.maximum.amax(0),
    "mean_max": lambda a: a.maximum.mean(0),
    "wide": lambda a: stats.HEADROOM * a.maximum.mean(0),
    "quartile_max": lambda a: a.maximum.quantile(0.75, 0),  # the widest quarter of the timesteps is clipped
    "min_max": lambda a: a.maximum.amin(0),
    "min_mean": lambda a: a.mean().amin(0),
    "mean_mean": lambda a: a.mean().mean(0),
    "global_min": lambda a: a.minimum.amin(0),
    "value_999": lambda a: a.clipped(lambda h: stats.value_quantile(h, 0.999)),
    "value_9999": lambda a: a.clipped(lambda h: stats.value_quantile(h, 0.9999)),
    "mse": lambda a: a.clipped(stats.mse_clip),
    "modelopt_min_max": lambda a: a.maximum.amin(0),
    "modelopt_min_mean": lambda a: (a.total / (a.steps or len(a.count))).amin(0),  # divided by steps, not by calls, as there
    "modelopt_mean_max": lambda a: a.maximum.mean(0),
    "modelopt_global_min": lambda a: a.minimum.amin(0),
}
# NVIDIA's Percentile Quant, number for number, for comparisons: a "timestep" is the count of calls modulo the steps asked for,
# whatever the scheduler does, and linears take the maximum over everything
BY_CALL = frozenset(name for name in RANGE_RULES if name.startswith("modelopt_"))


def range_rule(name: str, percentile: float, op: str) -> Callable[[AmaxByTimestep], torch.Tensor]:
    """What an operation's input follows under the options ``rule`` and ``percentile``."""
    if name in BY_CALL and op == "linear":
        return RANGE_RULES["max"]
    return lambda amax: RANGE_RULES[name](amax.prefix(percentile))
