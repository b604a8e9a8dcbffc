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
from .options import Options
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


def bound(options: Options, full: Any) -> float:
    """Largest relative error that an 8-bit output may have to ``full``: the options' ``max_error``, and of pictures in [-1, 1],
    whose peak is 2, what ``output_psnr`` allows."""
    if options.output_psnr is None:
        return options.max_error
    rms = max((float(t.float().square().mean().sqrt()) for t in outputs(full)), default=0.0)
    return min(options.max_error, 2 * 10 ** (-options.output_psnr / 20) / rms) if rms else options.max_error


def bounded_by(options: Options, allowed: float) -> tuple[str, float]:
    """(name, value) of the option that bounds the error so."""
    if options.output_psnr is None or allowed == options.max_error:
        return "max_error", options.max_error
    return "output_psnr", options.output_psnr


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


class Stopwatch:
    """Runs from when it is made to ``stop``: on a GPU by events in its current stream, which nobody waits for meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.began, self.ended = self._now(), self._now()

    def _now(self) -> Any:
        return time.perf_counter() if self.stream is None else self.stream.record_event(torch.cuda.Event(enable_timing=True))

    def stop(self) -> None:
        self.ended = self._now()

    @property
    def ms(self) -> float:
        """Milliseconds; waits for the GPU."""
        if self.stream is None:
            return float(1e3 * (self.ended - self.began))
        self.ended.synchronize()
        return float(self.began.elapsed_time(self.ended))


def finish_device() -> None:
    """Wait for the GPUs that are in use."""
    if torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            if i == torch.cuda.current_device() or torch.cuda.memory_reserved(i):
                torch.cuda.synchronize(i)


def layer_flops(layer: Layer, output: torch.Tensor) -> int:
    """2 * MAC of one call."""
    return 2 * output.numel() * math.prod(layer.weight.shape[1:])


def _by_weight(result: torch.Tensor, given: Mapping[str, Any]) -> int:
    """weight: [out, in / groups, ...]; oneDNN keeps this order of a packed one, and gives one of one dimension a second."""
    weight: torch.Tensor = given["qw"] if "qw" in given else given["packed" if "packed" in given else "weight"]
    return 2 * result.numel() * math.prod(weight.shape[1:])


def _by_input(result: torch.Tensor, given: Mapping[str, Any]) -> int:
    """x: [..., in]."""
    x = next(given[name] for name in ("qx", "x", "self") if name in given)
    return 2 * result.numel() * int(x.shape[-1])


def _our_own(result: torch.Tensor, given: Mapping[str, Any]) -> int:
    return 0 if given["kernel"] == "reference" else _by_weight(result, given)  # which computes in fp32


def _scaled(result: torch.Tensor, given: Mapping[str, Any]) -> int:
    return _by_input(result, given) if given["self"].dtype in EIGHT_BITS and given["mat2"].dtype in EIGHT_BITS else 0


EIGHT_BITS = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
# operator -> 2 * MAC of a call from (result, its arguments by name). Of kernels whose operands both have 8 bits
KERNELS_8: dict[str, Callable[[Any, Mapping[str, Any]], int]] = {
    **{f"onednn::qconv{n}_pointwise": _by_weight for n in ("", "1d", "2d", "3d")},
    "onednn::qlinear_pointwise": _by_input,
    "aten::_int_mm": _by_input,
    **{f"aten::{name}": _scaled for name in ("_scaled_mm", "_scaled_mm_v2", "_scaled_grouped_mm", "_scaled_grouped_mm_v2")},
    "sdtrt_backend::linear8": _our_own,
    "sdtrt_backend::linear_gelu8": _our_own,
    "sdtrt_backend::conv8": _our_own,
    "sdtrt_backend::packed_conv2d": _by_weight,  # what they call is not seen from outside
    "sdtrt_backend::packed_linear": _by_input,
}


class CountInt8(TorchDispatchMode):
    """FLOPs of the 8-bit kernels that really run while the context is open, from their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = KERNELS_8.get(func.name().partition(".")[0])
        if count is not None:
            names = (argument.name for argument in func._schema.arguments)
            self.flops += count(result, {**dict(zip(names, args, strict=False)), **(kwargs or {})})
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
    # in the call's own dtypes, which in bf16 takes half a dB at 38: in fp32 a large model's products take seconds of a GPU
    return stats.sqnr_db(call(x8.to(x.dtype), w8.to(weight.dtype), *rest), y), flops
