"""Lowerings: a quantised graph -> a callable. One file per target, one row here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from ..kernels import CAPABILITY, missing
from ..options import Options
from . import inductor_cpu, inductor_cuda, reference, tensorrt, torchao

# target -> function(graph with Q/DQ, example tensors, options) -> callable on the same tensors
LOWERINGS: dict[str, Callable[[fx.GraphModule, Sequence[torch.Tensor], Options], Callable[..., tuple[torch.Tensor, ...]]]] = {
    "inductor": inductor_cpu.lower,
    "inductor-cuda": inductor_cuda.lower,
    "reference": reference.lower,
    "tensorrt": tensorrt.lower,
    "torchao": torchao.lower,
}


def choose(options: Options, device: torch.device) -> tuple[str, str | None]:
    """(target, None) for the engine the user named, or ("", the reason why no lowering takes this device)."""
    if options.engine == "reference":
        return "reference", None
    if options.engine == "tensorrt" and device.type != "cuda":
        return "", f"TensorRT engines run on NVIDIA GPUs, the module is on the {device.type}: use engine='auto'"
    if options.engine == "torchao":
        reason = _not_for_torchao(options, device)
        return ("", reason) if reason else ("torchao", None)
    if device.type == "cuda":
        reason = missing(options.precision, torch.cuda.get_device_capability(device))
        return ("", reason) if reason else ("tensorrt" if options.engine == "tensorrt" else "inductor-cuda", None)
    if device.type != "cpu":
        return "", f"this version has 8-bit kernels for the CPU and NVIDIA GPUs, not for {device.type}"
    if options.precision != "int8":
        return "", f"{options.precision} kernels need an NVIDIA GPU: use sd_int8 on the CPU"
    if not torch.backends.mkldnn.is_available():
        return "", "this PyTorch has no oneDNN, which runs the 8-bit kernels on the CPU"
    return "inductor", None


def _not_for_torchao(options: Options, device: torch.device) -> str | None:
    """Why ``engine="torchao"`` cannot be had, or None."""
    if options.precision != "int8":
        return f"through TorchAO this version runs int8 and not {options.precision}: use sd_int8, or engine='auto'"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY["int8"]:
        return f"int8 needs a GPU of compute capability {'.'.join(map(str, CAPABILITY['int8']))} or newer"
    if device.type not in ("cpu", "cuda"):
        return f"TorchAO's int8 product runs on CPUs and NVIDIA GPUs, not on {device.type}"
    return None
