"""Lowerings: a quantised graph -> a callable. One file per target, one row here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from ..kernels import missing
from ..options import Options
from . import inductor_cpu, inductor_cuda, reference, tensorrt

# target -> function(graph with Q/DQ, example tensors, options) -> callable on the same tensors
LOWERINGS: dict[str, Callable[[fx.GraphModule, Sequence[torch.Tensor], Options], Callable[..., tuple[torch.Tensor, ...]]]] = {
    "inductor": inductor_cpu.lower,
    "inductor-cuda": inductor_cuda.lower,
    "reference": reference.lower,
    "tensorrt": tensorrt.lower,
}


def choose(options: Options, device: torch.device) -> tuple[str, str | None]:
    """(target, None) for the engine the user named, or ("", the reason why no lowering takes this device)."""
    if options.engine == "reference":
        return "reference", None
    if options.engine == "tensorrt" and device.type != "cuda":
        return "", f"TensorRT engines run on NVIDIA GPUs, the module is on the {device.type}: use engine='auto'"
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
