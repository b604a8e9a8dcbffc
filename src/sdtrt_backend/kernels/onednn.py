"""The chooser of CPUs: oneDNN's int8 kernels, timed against the kernel of the same layer in the user's precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention

from .. import ops
from ..values import UINT8_ZERO
from . import timing
from .measurements import Measurements, fastest, why
from .problem import Choice, Problem
from .timing import Refusal

OUTPUTS = (torch.float32, torch.bfloat16)  # what oneDNN's int8 kernels write
# int8 must save 8 %: it costs accuracy. On one thread (EPYC) layers of the bundled model that read one code take 0.3 to 0.8 of
# the time, and the two smallest of those that read two take 0.86 and 0.99.
GAIN = 0.92
X_SCALE = 1 / 32  # of random codes: their values then have a standard deviation of 1


class CpuChooser:
    """A CPU's: oneDNN's int8 kernels against those that Inductor calls in the user's precision, one race per problem.

    The number of threads is part of a measurement's name: the same problem has another winner with another number.
    """

    place, gain, joins = "CPU", GAIN, False
    names_kernels = False
    opaque: Collection[Any] = (torch.nn.functional.group_norm,)  # stays an ATen call there

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.measurements = Measurements(device)

    def _known(self, name: str, measure: Callable[[], Mapping[str, float | Refusal]]) -> dict[str, Any]:
        return self.measurements.get(f"{name} on {torch.get_num_threads()} threads", measure)

    def _race(self, problem: Problem) -> dict[str, Any]:
        return self._known(f"int8 and own {problem}", lambda: race(problem, timing.ERROR_BOUND))

    def best(self, problem: Problem, precision: str) -> Choice | None:
        """oneDNN's kernel where it takes the problem; its time says whether it is worth it."""
        if precision != "int8":
            return None
        return fastest({"onednn": self._race(problem)["onednn"]})

    def reasons(self, problem: Problem, precision: str) -> tuple[str, ...]:
        """See ``Timed``."""
        if precision != "int8":
            return (f"{precision} kernels need an NVIDIA GPU",)
        return why({"onednn": self._race(problem)["onednn"]})

    def room(self, problem: Problem, precision: str) -> float:
        """See ``Timed``: there is one precision."""
        return 0.0

    def gelu_kernel(self, problem: Problem, out: torch.dtype) -> str | None:
        """None: Inductor's loops write the codes."""
        return None

    def gelu_saves(self, problem: Problem, out: torch.dtype) -> float:
        """See ``Timed``."""
        return 0.0

    def wide_ms(self, problem: Problem) -> float:
        """Milliseconds of the kernel in the user's precision that Inductor calls."""
        own: float = self._race(problem)["own"]
        return own

    def producer(self, op: str) -> str | None:
        """None: Inductor writes the codes in the loops it generates."""
        return None

    def attention_kernel(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> str | None:
        """None: attention is torch's own."""
        return None

    def attention_times(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> dict[str, float]:
        """See ``Timed``."""
        name = f"attention {'x'.join(map(str, query))} over {tokens} {str(dtype)[6:]}"
        ms = float(self._known(name, lambda: {"torch": attention_ms(query, tokens, dtype)})["torch"])
        return {"torch": ms + (self.quantize_ms(math.prod(query), dtype) if out.itemsize == 1 else 0.0)}

    def attention_ms(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> float:
        """See ``Timed``."""
        return self.attention_times(query, tokens, dtype, out)["torch"]

    def encoding_saves(self, problem: Problem) -> float:
        """None are saved: nothing on a CPU reads fp8."""
        return 0.0

    def attention_fp8(self, query: tuple[int, ...], tokens: int) -> Choice | None:
        """None: no CPU has it."""
        return None

    def quantize_ms(self, numel: int, dtype: torch.dtype) -> float:
        """See ``Timed``."""
        return float(self._known(f"quantize {numel} {dtype}", lambda: {"torch": quantize_ms(numel, dtype)})["torch"])


def race(problem: Problem, bound: float) -> dict[str, float | Refusal]:
    """"own" and "onednn" -> milliseconds of the layer in the user's precision and of its int8 product, or why that has none.

    bound: the largest relative error of the product to plain torch on the same codes.
    """
    def work() -> float | Refusal:
        product, expected = _product(problem)
        wrong = timing.checked(product(), expected, bound)
        if wrong is None:
            times["own"], ms = timing.race_ms(own, product)
        return ms if wrong is None else wrong

    own = _own(problem)
    times: dict[str, float | Refusal] = {}
    with torch.no_grad():
        times["onednn"] = timing.attempt(work)
        if "own" not in times:
            times["own"] = timing.race_ms(own)[0]
    return times


def _product(problem: Problem) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """(the int8 product as a step calls it, its weight packed, what it should give). Through an operator of ours it would take
    0.02 ms more, which is a third of a small layer's time."""
    noise = torch.Generator().manual_seed(0)
    x, weight = (timing.codes(shape, torch.int8, noise) for shape in (problem.x, problem.weight))
    x = (x.to(torch.int16) + UINT8_ZERO).to(torch.uint8)
    out = len(weight)
    scale = torch.full((out,), X_SCALE / weight[0].numel() ** 0.5)
    bias, zero = torch.randn(out, generator=noise), torch.zeros(out, dtype=torch.int32)
    dtype = problem.dtype if problem.dtype in OUTPUTS else torch.float32
    head: tuple[Any, ...] = (x, X_SCALE, UINT8_ZERO)
    tail: tuple[Any, ...] = (1.0, 0, dtype, "none", [], "")
    call: Callable[..., torch.Tensor]
    if problem.op == "linear":
        packed, call = torch.ops.onednn.qlinear_prepack(weight, list(problem.x)), torch.ops.onednn.qlinear_pointwise.default
        return partial(call, *head, packed, scale, zero, bias, *tail), ops.int8_linear(*head, weight, scale, bias, dtype)
    geometry = [list(problem.stride), list(problem.padding), list(problem.dilation)]
    packed = torch.ops.onednn.qconv_prepack(weight, scale, X_SCALE, UINT8_ZERO, *geometry, 1, list(problem.x))
    call = torch.ops.onednn.qconv_pointwise.default
    return (partial(call, *head, packed, scale, zero, bias, *geometry, 1, *tail),
            ops.int8_conv2d(*head, weight, scale, bias, *geometry, dtype))


def _own(problem: Problem) -> Callable[[], torch.Tensor]:
    """The layer as Inductor calls it: convolutions in channels last."""
    noise = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=noise).to(problem.dtype)
                       for shape in (problem.x, problem.weight, problem.weight[:1]))
    if problem.op == "linear":
        return partial(linear, x, weight, bias)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    padding, stride, dilation = list(problem.padding), list(problem.stride), list(problem.dilation)
    return partial(conv2d, x, weight, bias, stride, padding, dilation)


def attention_ms(query: tuple[int, ...], tokens: int, dtype: torch.dtype) -> float:
    """Milliseconds of torch's attention: query [batch, heads, queries, width] over ``tokens`` keys."""
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((*query[:-2], rows, query[-1]), generator=noise).to(dtype) for rows in (query[-2], tokens, tokens))
    return timing.race_ms(partial(scaled_dot_product_attention, q, k, v))[0]


def quantize_ms(numel: int, dtype: torch.dtype) -> float:
    """Milliseconds of one pass that reads ``numel`` values of ``dtype`` and writes uint8: what Inductor generates for it takes
    about as long as torch's two passes that round and clamp. torch's own conversion to uint8 takes twice that."""
    wide, codes = torch.zeros(numel, dtype=dtype), torch.empty(numel, dtype=dtype)
    return timing.race_ms(lambda: torch.clamp(torch.round(wide, out=codes), 0, 255, out=codes))[0]
