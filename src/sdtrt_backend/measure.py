"""What a built step is worth: its error, its time, its executed 8-bit FLOPs, and the noise of each layer."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import stats
from .values import Decision, Layer

REPEATS = 3


def outputs(result: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a graph's result."""
    parts = result if isinstance(result, tuple | list) else (result,)
    return [p for p in parts if isinstance(p, torch.Tensor) and p.is_floating_point()]


def compare(result: Any, reference: Any) -> float:
    """Largest relative error over the outputs; NaN or infinity anywhere gives infinity."""
    pairs = list(zip(outputs(result), outputs(reference), strict=True))
    if not all(bool(t.isfinite().all()) for p in pairs for t in p):
        return math.inf
    return max((stats.relative_error(y, r) for y, r in pairs), default=0.0)


def step_ms(*steps: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Median milliseconds of each step; the steps take turns, so that a busy machine slows all of them alike."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, taken in zip(steps, times, strict=True):
            finish_device()
            start = time.perf_counter()
            step()
            finish_device()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def finish_device() -> None:
    """Wait for the GPUs that are in use."""
    if torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            if i == torch.cuda.current_device() or torch.cuda.memory_reserved(i):
                torch.cuda.synchronize(i)


def layer_flops(layer: Layer, output: torch.Tensor) -> int:
    """2 * MAC of one call."""
    return 2 * output.numel() * math.prod(layer.weight.shape[1:])


class CountInt8(TorchDispatchMode):
    """FLOPs of the 8-bit kernels that really run while the context is open, from their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if namespace == "onednn" and name.startswith(("qconv", "qlinear")):
            x, weight = args[0], args[3]
            kernel = math.prod(weight.shape[2:]) if name.startswith("qconv") else 1
            self.flops += 2 * result.numel() * x.shape[1 if name.startswith("qconv") else -1] * kernel
        elif namespace == "aten" and name.startswith("_int_mm"):
            self.flops += 2 * result.numel() * args[0].shape[1]
        elif namespace == "sdtrt_backend" and name in ("linear8", "conv8"):
            self.flops += 2 * result.numel() * math.prod(args[1].shape[1:])
        return result


def layer_noise(decision: Decision, arguments: tuple[Any, ...], call: Callable[..., torch.Tensor]) -> tuple[float | None, int]:
    """(SQNR in dB of the layer alone under its decision, FLOPs of the call) for one real input.

    ``arguments``: of the call as captured; ``call``: the operation itself.
    """
    x, weight, *rest = arguments
    y = call(x, weight, *rest)
    flops = layer_flops(decision.layer, y)
    if not decision.quantized:
        return None, flops
    x8, w8 = stats.fake_quantize_input(decision, x), stats.fake_quantize_weight(decision, weight)
    bias, *geometry = rest
    return stats.sqnr_db(call(x8, w8, None if bias is None else bias.float(), *geometry), y), flops
