"""The chooser of NVIDIA GPUs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch

from .. import ops
from ..values import DTYPES
from . import providers, timing
from .measurements import Measurements, fastest, why
from .problem import NARROW, Choice, Problem
from .timing import Refusal

ATTENTION_BOUND = 2e-2  # ERROR_BOUND of attention written in 8 bits: a rounding tie is a step of 1/32 of a standard deviation
# ERROR_BOUND behind GELU, whose values are about 1 and become CODES_OF_GELU codes: rounding ties are 6e-3 of them, codes that are
# cut off instead of rounded 4e-2
GELU_BOUND, CODES_OF_GELU = 2e-2, 16.0
ATTENTION_FP8_BOUND = 6e-2  # likewise with probabilities rounded to e4m3
# Standard deviation of v's codes, about that of a real v with ``assign.ATTENTION_HEADROOM``. The mean over the tokens of a video
# is a hundredth of it, and e4m3 has nothing between 0 and 2^-9
CODES_OF_V = 8.0
# A kernel's configurations were never this far apart: where one is so much slower than torch's attention, no other is tried
ATTENTION_SPREAD = 1.25
# Inductor's pass over a tensor, from 16 bits to 8, took 0.58 of the time of torch's copy, by which a pass is timed here
PASS_OF_COPY = 0.5
# Keys from which on torch's attention (cuDNN's) was 1.37 times and more as fast as ours on GPUs of ATTENTION_FP8_CAPABILITY
LONG = 4096
# Of the best rate that a product reached on this GPU: rates nearer to it are as good
FULL_RATE = 0.95
# A configuration of a linear's kernels is not tried again for linears like those that it lost LOST times in a row: it was slower
# than the best by SPREAD. Of LARGE outputs, waves of tiles on every GPU, which one is best hardly depends on the shape: there it
# has lost where it was slower at all, and a loss by LARGE_SPREAD is enough
SPREAD, LOST = 1.25, 2
LARGE, LARGE_SPREAD = 2**23, 1.1
# A configuration of a large linear that comes so near to the highest rate is taken as it is: the best was 1 % faster at most
NEAR_ENOUGH = 0.9
ATTENTION_FP8_CAPABILITY = (9, 0)  # of the first GPUs whose attention over fp8 codes is fast


class MeasuredChooser:
    """An NVIDIA GPU's: times every candidate once per problem and device."""

    place, gain, joins = "GPU", 1.0, True
    names_kernels = True
    opaque: Collection[Any] = ()

    def __init__(self, device: torch.device) -> None:
        providers.register()
        self.device = device
        self.measurements = Measurements(device)
        self.lost: Counter[tuple[Any, ...]] = Counter()  # see _like -> times in a row
        self.rate = 0.0  # FLOPs per millisecond, the highest of the products that were asked for

    def _known(self, name: str, measure: Callable[[], Mapping[str, float | Refusal]]) -> dict[str, Any]:
        with torch.cuda.device(-1 if self.device.index is None else self.device.index):
            return self.measurements.get(name, measure)

    def _times(self, problem: Problem, precision: str) -> dict[str, Any]:
        return self._known(f"{precision} {problem}", lambda: self._time(problem, precision))

    def best(self, problem: Problem, precision: str) -> Choice | None:
        """The fastest kernel of ``precision`` inside the error bound; None when there is none."""
        best = None if problem.dilation != (1, 1) else fastest(self._times(problem, precision))
        self.rate = max(self.rate, 0.0 if best is None else problem.flops / best.ms)
        return best

    def room(self, problem: Problem, precision: str) -> float:
        """See ``Timed``."""
        before, best = self.rate, self.best(problem, precision)
        if best is None:
            return 1.0
        # what came before counts, so the answer is kept: another process gets the same kernels
        share = problem.flops / best.ms / before if before else 0.0
        share = self._known(f"share of the full rate, {precision} {problem}", lambda: {"share": share})["share"]
        return 0.0 if share >= FULL_RATE else 1.0 - share

    def gelu_kernel(self, problem: Problem, out: torch.dtype) -> str | None:
        """See ``Chooser``."""
        found = self._with_gelu(problem, out)
        return found.kernel if found is not None and self.gelu_saves(problem, out) > 0 else None

    def gelu_saves(self, problem: Problem, out: torch.dtype) -> float:
        """See ``Timed``."""
        plain, found = self.best(problem, "int8"), self._with_gelu(problem, out)
        if plain is None or found is None:
            return 0.0
        return max(0.0, plain.ms + PASS_OF_COPY * self.quantize_ms(problem.x[0] * problem.weight[0], problem.dtype) - found.ms)

    def encoding_saves(self, problem: Problem) -> float:
        """See ``Timed``."""
        best = self.best(problem, "int8")
        if best is None or not providers.provider("linear8", best.kernel, "int8").writes_codes:
            return 0.0
        return PASS_OF_COPY * self.quantize_ms(problem.x[0] * problem.weight[0], problem.dtype)

    def _with_gelu(self, problem: Problem, out: torch.dtype) -> Choice | None:
        """The configuration that is best for the product alone, with GELU behind it."""
        best = self.best(problem, "int8")
        if best is None or not best.kernel.startswith("cudnn:"):
            return None

        def measure() -> dict[str, float | Refusal]:
            x, weights, bias = self._operands(problem, "int8", torch.float32)
            n, k = problem.weight
            scale = torch.full((n,), 1 / (32 * 32 * math.sqrt(k)), device=self.device)
            tail = (scale, bias, torch.full_like(bias, CODES_OF_GELU), out)
            expected = ops.KERNELS["linear_gelu8", "reference"](x, weights[0], *tail)
            run, variant = partial(ops.KERNELS["linear_gelu8", "cudnn"], x), best.kernel.partition(":")[2]
            return {best.kernel: timing.timed(run, weights, (*tail, variant), expected, GELU_BOUND)}

        return fastest(self._known(f"gelu to {str(out)[6:]} behind int8 {problem}", measure))

    def reasons(self, problem: Problem, precision: str) -> tuple[str, ...]:
        """See ``Timed``."""
        if problem.dilation != (1, 1):
            return ("no 8-bit kernel takes a dilated convolution",)
        known = self._times(problem, precision)
        return why(known) if known else (f"no package with {precision} kernels for {problem.op} is installed",)

    def wide_ms(self, problem: Problem) -> float:
        """Milliseconds of the 16-bit kernel that torch itself uses."""
        return float(self._known(f"16-bit {problem}", lambda: {"torch": self._time_wide(problem)})["torch"])

    def producer(self, op: str) -> str | None:
        """The kernel that writes ``op``'s result in 8 bits, None where its package is missing."""
        return "triton" if providers.installed("triton") else None

    def attention_kernel(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> str | None:
        """See ``Chooser``."""
        times = self.attention_times(query, tokens, dtype, out)
        fastest = min(times, key=times.__getitem__)
        return None if fastest == "torch" else fastest

    def attention_ms(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> float:
        """See ``Timed``."""
        return min(self.attention_times(query, tokens, dtype, out).values())

    def attention_times(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> dict[str, float]:
        """See ``Timed``."""
        wide = {} if out.itemsize > 1 else self.attention_times(query, tokens, dtype, dtype)

        def measure() -> dict[str, float | Refusal]:
            noise = torch.Generator(self.device).manual_seed(0)
            shapes = (query, *[(*query[:-2], tokens, query[-1])] * 2)
            # as projections write them: heads side by side
            q, k, v = (torch.randn((s[0], s[2], s[1], s[3]), generator=noise, device=self.device, dtype=dtype).transpose(1, 2)
                       for s in shapes)
            own = timing.graph_ms([lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)])
            least = own + (self.quantize_ms(q.numel(), dtype) if out.itemsize == 1 else 0.0)
            times: dict[str, float | Refusal] = {"torch": least}
            # the mean of normally distributed v with weights exp(normal): a standard deviation of sqrt(e / tokens), here 32 codes
            scale = torch.full((1,), 32 * math.sqrt(tokens / math.e), device=self.device) if out.itemsize == 1 else None
            arguments = (q, k, v, query[-1] ** -0.5, scale, out)
            expected = ops.KERNELS["attention8", "reference"](*arguments)
            taken = providers.installed("triton") and dtype in NARROW and (
                tokens < LONG or torch.cuda.get_device_capability(self.device) < ATTENTION_FP8_CAPABILITY)
            for variant in providers.attention_variants(tokens, query[-1]) if taken else ():
                if out.itemsize == 1 and least < wide.get(f"triton:{variant}", math.inf):
                    continue  # what it writes is the least of its work: it was slower in 16 bits than both passes are together
                run = partial(ops.KERNELS["attention8", "triton"], q)
                found = timing.timed(run, [k], (*arguments[2:], variant), expected, ATTENTION_BOUND)
                times[f"triton:{variant}"] = found
                if not isinstance(found, Refusal) and found > ATTENTION_SPREAD * least:
                    break
            return times

        name = f"attention {'x'.join(map(str, query))} over {tokens} {str(dtype)[6:]} to {str(out)[6:]}"
        return {kernel: ms for kernel, ms in self._known(name, measure).items() if isinstance(ms, int | float)}

    def attention_fp8(self, query: tuple[int, ...], tokens: int) -> Choice | None:
        """See ``Timed``."""
        def measure() -> dict[str, float | Refusal]:
            capability = torch.cuda.get_device_capability(self.device)
            refusals = {kernel: providers.no_attention_fp8(kernel, capability) for kernel in providers.ATTENTION_FP8}
            times: dict[str, float | Refusal] = {k: Refusal(reason, True) for k, reason in refusals.items() if reason is not None}
            usable = [k for k in refusals if k not in times]
            if not usable:
                return times
            noise = torch.Generator(self.device).manual_seed(0)
            b, h, queries, d = (*query[:-1], query[-1] + -query[-1] % ops.ATTENTION_FP8_UNIT)
            q, k, v = (timing.codes((b, t, h, d), torch.float8_e4m3fn, noise).transpose(1, 2).contiguous().transpose(1, 2)
                       .view(b, t, h, d).transpose(1, 2) for t in (queries, tokens, tokens))
            given = ((v.float() * CODES_OF_V).to(v.dtype), torch.ones(3, device=self.device), d**-0.5)
            for kernel in usable:
                tail = (*given, ops.ATTENTION_FP8_OUT[kernel])
                expected = ops.KERNELS["attention_fp8", "reference"](q, k, *tail)
                times[kernel] = timing.timed(partial(ops.KERNELS["attention_fp8", kernel], q), [k], tail, expected,
                                             ATTENTION_FP8_BOUND)
            return times

        return fastest(self._known(f"attention fp8 {'x'.join(map(str, query))} over {tokens}", measure))

    def quantize_ms(self, numel: int, dtype: torch.dtype) -> float:
        """See ``Timed``."""
        def measure() -> dict[str, float]:
            wide, narrow = (torch.zeros(numel, dtype=d, device=self.device) for d in (dtype, torch.int8))
            return {"torch": timing.graph_ms([lambda: narrow.copy_(wide)])}

        return float(self._known(f"quantize {numel} {dtype}", measure)["torch"])

    def _time(self, problem: Problem, precision: str) -> dict[str, float | Refusal]:
        op = {"linear": "linear8", "conv2d": "conv8"}[problem.op]
        times: dict[str, float | Refusal] = {}
        for p in providers.rows(op, precision):
            x, weights, bias = self._operands(problem, precision, problem.dtype if p.narrow_bias else torch.float32)
            out = problem.weight[0]
            scale = torch.full((1 if p.one_scale else out,), 1 / math.sqrt(math.prod(problem.weight[1:])), device=self.device)
            tail: tuple[Any, ...] = (scale, bias, problem.dtype)
            if op == "conv8":
                tail = (scale, bias, None, list(problem.stride), list(problem.padding), problem.dtype)
            run = partial(ops.KERNELS[op, p.name], x)
            expected = ops.KERNELS[op, "reference"](x, weights[0], *tail)

            def tried(variant: str, run: Any = run, weights: Any = weights, tail: Any = tail,
                      expected: Any = expected) -> float | Refusal:
                return timing.timed(run, weights, (*tail, variant), expected, timing.ERROR_BOUND)

            like = partial(_like, p, problem)
            families = [tuple(v for v in family if self.lost[like(v)] < LOST) for family in p.variants(precision)]
            enough_ms = problem.flops / (NEAR_ENOUGH * self.rate) if self.rate and _large(problem) else 0.0
            found = timing.search([family for family in families if family], p.fallback, tried, enough_ms)
            if op == "linear8":  # the best configuration of a convolution depends on its place in the model
                self._remember(like, found, _large(problem))
            times |= {f"{p.name}:{variant}": ms for variant, ms in found.items()}
        return times

    def _operands(self, problem: Problem, precision: str,
                  dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """(x, copies of a weight, bias in ``dtype``)."""
        noise, copies = torch.Generator(self.device).manual_seed(0), timing.copies(problem.weight, 1)
        x, *weights = (timing.codes(shape, DTYPES[precision], noise) for shape in (problem.x, *[problem.weight] * copies))
        return x, weights, torch.randn(problem.weight[0], generator=noise, device=self.device, dtype=dtype)

    def _remember(self, like: Callable[[str], tuple[Any, ...]], found: Mapping[str, float | Refusal], large: bool) -> None:
        """Which configurations were far from the best of this provider."""
        times = {variant: t for variant, t in found.items() if not isinstance(t, Refusal)}
        for variant, t in times.items():
            behind = t / min(times.values())
            if behind <= (1.0 if large else SPREAD):
                self.lost[like(variant)] = 0
            else:
                self.lost[like(variant)] += LOST if large and behind > LARGE_SPREAD else 1

    def _time_wide(self, problem: Problem) -> float:
        noise = torch.Generator(self.device).manual_seed(0)

        def tensor(shape: tuple[int, ...]) -> torch.Tensor:
            t = torch.randn(shape, generator=noise, device=self.device, dtype=problem.dtype)
            return t.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else t

        x, bias = tensor(problem.x), tensor(problem.weight[:1])
        weights = [tensor(problem.weight) for _ in range(timing.copies(problem.weight, problem.dtype.itemsize))]
        if problem.op == "linear":
            return timing.graph_ms([partial(torch.nn.functional.linear, x, w, bias) for w in weights])
        geometry = (problem.stride, problem.padding, problem.dilation)
        return timing.graph_ms([partial(torch.nn.functional.conv2d, x, w, bias, *geometry) for w in weights])


def _large(problem: Problem) -> bool:
    return problem.op == "linear" and problem.x[0] * problem.weight[0] >= LARGE


def _like(p: providers.Provider, problem: Problem, variant: str) -> tuple[Any, ...]:
    """Equal for a configuration of ``p`` and problems where it is as good: those not large, or of about as long products."""
    return p.op, p.name, p.precision, variant, problem.x[1].bit_length() if _large(problem) else 0
