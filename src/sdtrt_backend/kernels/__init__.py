"""8-bit kernels of NVIDIA GPUs: one table of providers, and the measured choice between them and the 16-bit kernel."""

from __future__ import annotations

import importlib.util
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from .. import ops, stats
from ..graphs import record, side_stream
from ..store import Store, device_key
from ..values import DTYPES

log = logging.getLogger("sdtrt_backend")
# a kernel's relative error to the fp32 reference on the same codes: 16-bit rounding is 2e-4 (fp16) or 2e-3 (bf16)
ERROR_BOUND = 5e-3
COLD_BYTES = 120e6  # weights are rotated through this much memory: a step reads each of them once, from beyond the L2 cache
ATTENTION_BOUND = 2e-2  # likewise written in 8 bits: a rounding tie is a step of 1/32 of a standard deviation
ATTENTION_FP8_BOUND = 6e-2  # likewise with probabilities rounded to e4m3
ATTENTION_FP8_CAPABILITY = (9, 0)  # of cuDNN's kernel
CALLS, REPLAYS = 12, 3
HEURISTIC = ("0", "1", "2", "3", "4")  # indices of cuDNN's own list of plans
# compute capability from which a GPU has the matrix instructions of a precision
CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}
NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """One distinct (operation, shape, layout): x [rows, in] or [n, in, h, w], weight [out, in] or [out, in, kh, kw].

    dtype: of the result and of the 16-bit kernel it competes with.
    """

    op: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = ["x".join(map(str, part)) for part in (self.x, self.weight, self.stride, self.padding)]
        return f"{self.op} {sizes[0]} by {sizes[1]} stride {sizes[2]} padding {sizes[3]} {str(self.dtype)[6:]}"


@dataclass(frozen=True)
class Provider:
    """One row of the table. variants: names of what is timed for a precision, in families: the first of each, then the others
    of the fastest; fallback: names of what is timed where all of them are refused.

    instead_of: a package that, where it is installed, makes timing this provider a waste: it was always faster.
    one_scale: takes a scale of one element only; narrow_bias: takes the bias in the result's dtype, not in fp32.
    """

    name: str
    op: str
    precision: str
    module: str
    variants: Callable[[str], Sequence[tuple[str, ...]]]
    fallback: tuple[str, ...] = ()
    instead_of: str = ""
    one_scale: bool = False
    narrow_bias: bool = False


def _cudnn_variants(precision: str) -> Sequence[tuple[str, ...]]:
    from . import cudnn

    return cudnn.variants(DTYPES[precision])


def _tiles(precision: str) -> Sequence[tuple[str, ...]]:
    from . import triton_candidates

    return [(tile,) for tile in triton_candidates.TILES]


def _one(precision: str) -> Sequence[tuple[str, ...]]:
    return [("",)]


PROVIDERS = (
    Provider("cudnn", "linear8", "int8", "cudnn", _cudnn_variants, HEURISTIC),
    Provider("cudnn", "conv8", "int8", "cudnn", _cudnn_variants, HEURISTIC),
    Provider("cudnn", "conv8", "fp8", "cudnn", _cudnn_variants, HEURISTIC),
    *(Provider("triton", op, precision, "triton", _tiles, instead_of="cudnn")
      for op in ("linear8", "conv8") for precision in CAPABILITY),
    Provider("cublaslt", "linear8", "fp8", "", _one, one_scale=True, narrow_bias=True),
)


def provider(op: str, kernel: str, precision: str) -> Provider:
    """The row that a kernel's name comes from; "reference", the plain-torch oracle, has none of its own."""
    name = kernel.partition(":")[0]
    rows = (p for p in PROVIDERS if (p.name, p.op, p.precision) == (name, op, precision))
    return next(rows, Provider(name, op, precision, "", _one))


@cache
def register() -> None:
    """Make the installed providers' functions known to the operators."""
    from . import cublaslt, cudnn

    if installed("triton"):
        from . import triton_candidates, triton_norm, triton_rope

        ops.KERNELS["rms_rope8", "triton"] = triton_rope.rms_rope
        ops.KERNELS["linear8", "triton"] = triton_candidates.linear
        ops.KERNELS["conv8", "triton"] = triton_candidates.conv
        ops.KERNELS["group_norm8", "triton"] = triton_candidates.group_norm
        ops.KERNELS["layer_norm8", "triton"] = triton_candidates.layer_norm
        ops.KERNELS["geglu8", "triton"] = triton_norm.geglu
        ops.KERNELS["attention8", "triton"] = triton_candidates.attention
    ops.KERNELS["linear8", "cublaslt"] = cublaslt.linear
    ops.KERNELS["linear8", "cudnn"] = cudnn.linear
    ops.KERNELS["conv8", "cudnn"] = cudnn.conv
    ops.KERNELS["attention_fp8", "cudnn"] = cudnn.attention_fp8


def missing(precision: str, capability: tuple[int, int]) -> str | None:
    """Why no kernel of ``precision`` can run on a GPU of this compute capability, or None."""
    if capability < CAPABILITY[precision]:
        need, have = (".".join(map(str, c)) for c in (CAPABILITY[precision], capability))
        other = "sd_int8" if precision == "fp8" and capability >= CAPABILITY["int8"] else "a 16-bit torch.compile"
        return f"{precision} needs a GPU of compute capability {need} or newer, this one has {have}: use {other}"
    convolutions = [p.module for p in PROVIDERS if (p.op, p.precision) == ("conv8", precision)]
    if not any(installed(module) for module in convolutions):
        return f"no package with {precision} kernels is installed: pip install nvidia-cudnn-frontend"
    return None


@cache
def installed(module: str) -> bool:
    """Whether a provider's package can be imported; "" is PyTorch itself."""
    return not module or importlib.util.find_spec(module) is not None


@dataclass(frozen=True)
class Choice:
    """The fastest kernel of one precision for a problem, and its milliseconds."""

    kernel: str
    ms: float


class Chooser:
    """Times every candidate once per problem and device; remembers on disk."""

    def __init__(self, device: torch.device) -> None:
        register()
        self.device = device
        self.store = Store(device_key(device))

    def _known(self, name: str, measure: Callable[[], Mapping[str, float | None]]) -> dict[str, Any]:
        """What the store has under ``name``, else what ``measure`` finds on the device."""
        with torch.cuda.device(-1 if self.device.index is None else self.device.index):
            found: dict[str, Any] = self.store.get(name, measure)
        return found

    def best(self, problem: Problem, precision: str) -> Choice | None:
        """The fastest kernel of ``precision`` inside the error bound; None when there is none."""
        known = self._known(f"{precision} {problem}", lambda: self._time(problem, precision))
        return min((Choice(k, ms) for k, ms in known.items() if ms is not None), key=lambda c: c.ms, default=None)

    def wide_ms(self, problem: Problem) -> float:
        """Milliseconds of the 16-bit kernel that torch itself uses."""
        return float(self._known(f"16-bit {problem}", lambda: {"torch": self._time_wide(problem)})["torch"])

    def producer(self, op: str) -> str | None:
        """The kernel that writes ``op``'s result in 8 bits, None where its package is missing."""
        return "triton" if installed("triton") else None

    def attention_kernel(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> str | None:
        """The kernel that computes attention fastest, writing ``out``; None for torch's own and a quantisation behind it."""
        times = self.attention_times(query, tokens, dtype, out)
        fastest = min(times, key=times.__getitem__)
        return None if fastest == "torch" else fastest

    def attention_ms(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> float:
        """Milliseconds of the fastest way to attention written in ``out``."""
        return min(self.attention_times(query, tokens, dtype, out).values())

    def attention_times(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> dict[str, float]:
        """kernel -> milliseconds: query [batch, heads, queries, width] over ``tokens`` keys; "torch" quantises in a pass of its
        own."""
        def measure() -> dict[str, float]:
            noise = torch.Generator(self.device).manual_seed(0)
            shapes = (query, *[(*query[:-2], tokens, query[-1])] * 2)
            # as projections write them: heads side by side
            q, k, v = (torch.randn((s[0], s[2], s[1], s[3]), generator=noise, device=self.device, dtype=dtype).transpose(1, 2)
                       for s in shapes)
            times = {"torch": graph_ms([lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)])}
            if out.itemsize == 1:
                times["torch"] += self.quantize_ms(q.numel(), dtype)
            scale = torch.full((1,), 32.0, device=self.device) if out.itemsize == 1 else None
            arguments = (q, k, v, query[-1] ** -0.5, scale, out)
            expected = ops.KERNELS["attention8", "reference"](*arguments)
            for variant in _attention_variants(tokens, query[-1]) if installed("triton") and dtype in NARROW else ():
                run = partial(ops.KERNELS["attention8", "triton"], q)
                ms = _attempt(run, [k], (*arguments[2:], variant), expected, ATTENTION_BOUND)
                if ms is not None:
                    times[f"triton:{variant}"] = ms
            return times

        name = f"attention {'x'.join(map(str, query))} over {tokens} {str(dtype)[6:]} to {str(out)[6:]}"
        return dict(self._known(name, measure))

    def attention_fp8_ms(self, query: tuple[int, ...], tokens: int) -> float | None:
        """Milliseconds of attention over codes q, k, v of float8_e4m3fn, None where no kernel takes them."""
        def measure() -> dict[str, float | None]:
            if not installed("cudnn") or torch.cuda.get_device_capability(self.device) < ATTENTION_FP8_CAPABILITY:
                return {"cudnn": None}
            noise = torch.Generator(self.device).manual_seed(0)
            b, h, queries, d = query
            q, k, v = (_codes((b, t, h, d), torch.float8_e4m3fn, noise).transpose(1, 2).contiguous().transpose(1, 2)
                       .view(b, t, h, d).transpose(1, 2) for t in (queries, tokens, tokens))
            tail = (v, torch.ones(3, device=self.device), d**-0.5)
            expected = ops.KERNELS["attention_fp8", "reference"](q, k, *tail)
            return {"cudnn": _attempt(partial(ops.KERNELS["attention_fp8", "cudnn"], q), [k], tail, expected,
                                      ATTENTION_FP8_BOUND)}

        ms = self._known(f"attention fp8 {'x'.join(map(str, query))} over {tokens}", measure)["cudnn"]
        return None if ms is None else float(ms)

    def quantize_ms(self, numel: int, dtype: torch.dtype) -> float:
        """Milliseconds of a separate pass that reads ``numel`` values of ``dtype`` and writes them in 8 bits."""
        def measure() -> dict[str, float]:
            wide, narrow = (torch.zeros(numel, dtype=d, device=self.device) for d in (dtype, torch.int8))
            return {"torch": graph_ms([lambda: narrow.copy_(wide)])}

        return float(self._known(f"quantize {numel} {dtype}", measure)["torch"])

    def _time(self, problem: Problem, precision: str) -> dict[str, float | None]:
        op = {"linear": "linear8", "conv2d": "conv8"}[problem.op]
        noise = torch.Generator(self.device).manual_seed(0)
        dtype = DTYPES[precision]
        x, *weights = (_codes(shape, dtype, noise) for shape in (problem.x, *[problem.weight] * _copies(problem.weight, 1)))
        out = problem.weight[0]
        times: dict[str, float | None] = {}
        for p in PROVIDERS:
            if (p.op, p.precision) != (op, precision) or not installed(p.module) or (p.instead_of and installed(p.instead_of)):
                continue
            scale = torch.full((1 if p.one_scale else out,), 1 / math.sqrt(math.prod(problem.weight[1:])), device=self.device)
            bias = torch.randn(out, generator=noise, device=self.device, dtype=problem.dtype if p.narrow_bias else torch.float32)
            tail: tuple[Any, ...] = (scale, bias, problem.dtype)
            if op == "conv8":
                tail = (scale, bias, None, list(problem.stride), list(problem.padding), problem.dtype)
            run = partial(ops.KERNELS[op, p.name], x)
            expected = ops.KERNELS[op, "reference"](x, weights[0], *tail)

            def attempt(variant: str, run: Any = run, tail: Any = tail, expected: Any = expected) -> float | None:
                return _attempt(run, weights, (*tail, variant), expected, ERROR_BOUND)

            times |= {f"{p.name}:{v}": ms for v, ms in _search(p.variants(precision), p.fallback, attempt).items()}
        return times

    def _time_wide(self, problem: Problem) -> float:
        noise = torch.Generator(self.device).manual_seed(0)

        def tensor(shape: tuple[int, ...]) -> torch.Tensor:
            t = torch.randn(shape, generator=noise, device=self.device, dtype=problem.dtype)
            return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

        x, bias = tensor(problem.x), tensor(problem.weight[:1])
        weights = [tensor(problem.weight) for _ in range(_copies(problem.weight, problem.dtype.itemsize))]
        if problem.op == "linear":
            return graph_ms([partial(torch.nn.functional.linear, x, w, bias) for w in weights])
        return graph_ms([partial(torch.nn.functional.conv2d, x, w, bias, problem.stride, problem.padding) for w in weights])


def _search(families: Sequence[tuple[str, ...]], fallback: Sequence[str],
            attempt: Callable[[str], float | None]) -> dict[str, float | None]:
    """variant -> milliseconds of those that ``attempt`` was made with: see ``Provider``."""
    times = {family[0]: attempt(family[0]) for family in families}
    fastest = min((f for f in families if times[f[0]] is not None), key=lambda f: times[f[0]] or 0.0, default=None)
    times |= {v: attempt(v) for family in ([fastest] if fastest else families) for v in family[1:]}
    return times if any(times.values()) else times | {v: attempt(v) for v in fallback}


def _attempt(run: Callable[..., torch.Tensor], rotated: Sequence[torch.Tensor], tail: tuple[Any, ...], expected: torch.Tensor,
             bound: float) -> float | None:
    """Milliseconds of run(one of ``rotated``, *tail), or None where it refuses the shape or its error is beyond ``bound``."""
    try:
        if stats.relative_error(run(rotated[0], *tail), expected) < bound:
            return graph_ms([partial(run, w, *tail) for w in rotated])
        log.warning("a kernel was dropped, its result is wrong: %s %s", run, tail[-1])
    except torch.OutOfMemoryError:  # says nothing about the kernel, and a refusal is remembered
        raise
    except Exception as refusal:  # a kernel that refuses the shape is no candidate
        log.debug("no candidate: %s %s: %s", run, tail[-1], refusal)
    return None


def _copies(weight: tuple[int, ...], itemsize: int) -> int:
    return max(1, min(CALLS, math.ceil(COLD_BYTES / (math.prod(weight) * itemsize))))


def _codes(shape: tuple[int, ...], dtype: torch.dtype, noise: torch.Generator) -> torch.Tensor:
    """Random 8-bit codes, normally distributed as activations and weights are; channels last."""
    x = torch.randn(shape, generator=noise, device=noise.device)
    x = (x * 32).clamp(-127, 127).round().to(torch.int8) if dtype is torch.int8 else x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def graph_ms(calls: Sequence[Callable[[], Any]]) -> float:
    """Median milliseconds of one call, from replays of a CUDA graph of CALLS of them in turn."""
    def in_turn() -> None:
        for i in range(CALLS):
            calls[i % len(calls)]()

    with side_stream() as stream:
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph, _ = record(in_turn, stream)
    times = []
    for _ in range(REPLAYS + 1):  # the first replay warms up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return float(statistics.median(times[1:]))


@cache
def chooser(device: torch.device) -> Chooser:
    """The device's chooser, one per process."""
    return Chooser(device)


def _attention_variants(tokens: int, width: int) -> Sequence[str]:
    from . import triton_candidates

    return triton_candidates.attention_variants(tokens, width)
