"""Lowerings: a quantised graph -> a callable. One file per target, one row here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from . import inductor_cpu, reference

# target -> function(graph with Q/DQ, example tensors, rest precision) -> callable on the same tensors
LOWERINGS: dict[str, Callable[[fx.GraphModule, Sequence[torch.Tensor], str], Callable[..., tuple[torch.Tensor, ...]]]] = {
    "inductor": inductor_cpu.lower,
    "reference": reference.lower,
}


def choose(engine: str, device: torch.device) -> tuple[str, str | None]:
    """(target, None) for the engine the user named, or ("", the reason why no lowering takes this device)."""
    if engine == "reference":
        return "reference", None
    if device.type != "cpu":
        return "", f"this version has 8-bit kernels for the CPU, not for {device.type}"
    if not torch.backends.mkldnn.is_available():
        return "", "this PyTorch has no oneDNN, which runs the 8-bit kernels on the CPU"
    return "inductor", None
