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
# int8 must save a tenth. Below that the clock of a busy machine decides, and int8 costs accuracy. Layers of the bundled model
# are far from it on either side: those that win take 0.3 to 0.7 of the time.
GAIN = 0.9
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

    def wide_ms(self, problem: Problem) -> float:
        """Milliseconds of the kernel in the user's precision that Inductor calls with weights packed ahead."""
        return float(self._race(problem)["own"])

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

    def attention_fp8_ms(self, query: tuple[int, ...], tokens: int) -> float | None:
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
    """(the int8 product with its weight packed as a step's is, what it should give)."""
    noise = torch.Generator().manual_seed(0)
    x, weight = (timing.codes(shape, torch.int8, noise) for shape in (problem.x, problem.weight))
    x = (x.to(torch.int16) + UINT8_ZERO).to(torch.uint8)
    out = len(weight)
    scale = torch.full((out,), X_SCALE / weight[0].numel() ** 0.5)
    bias, zero = torch.randn(out, generator=noise), torch.zeros(out, dtype=torch.int32)
    dtype = problem.dtype if problem.dtype in OUTPUTS else torch.float32
    head = (x, X_SCALE, UINT8_ZERO)
    if problem.op == "linear":
        packed = torch.ops.onednn.qlinear_prepack(weight, list(problem.x))
        return (partial(ops.packed_linear, *head, packed, scale, zero, bias, dtype),
                ops.int8_linear(*head, weight, scale, bias, dtype))
    geometry = [list(problem.stride), list(problem.padding), list(problem.dilation)]
    packed = torch.ops.onednn.qconv_prepack(weight, scale, X_SCALE, UINT8_ZERO, *geometry, 1, list(problem.x))
    return (partial(ops.packed_conv2d, *head, packed, scale, zero, bias, *geometry, dtype),
            ops.int8_conv2d(*head, weight, scale, bias, *geometry, dtype))


def _own(problem: Problem) -> Callable[[], torch.Tensor]:
    """The layer as Inductor calls it: an fp32 convolution's weight is packed ahead, which makes it up to a quarter faster."""
    noise = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=noise).to(problem.dtype)
                       for shape in (problem.x, problem.weight, problem.weight[:1]))
    if problem.op == "linear":
        return partial(linear, x, weight, bias)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    padding, stride, dilation = list(problem.padding), list(problem.stride), list(problem.dilation)
    if problem.dtype is not torch.float32:
        return partial(conv2d, x, weight, bias, stride, padding, dilation)
    nn: Any = torch._C._nn
    packed = nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), padding, stride, dilation, 1, list(problem.x))
    call: Callable[..., torch.Tensor] = torch.ops.mkldnn._convolution_pointwise.default
    return partial(call, x, packed, bias, padding, stride, dilation, 1, "none", [], "")


def attention_ms(query: tuple[int, ...], tokens: int, dtype: torch.dtype) -> float:
    """Milliseconds of torch's attention: query [batch, heads, queries, width] over ``tokens`` keys."""
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((*query[:-2], rows, query[-1]), generator=noise).to(dtype) for rows in (query[-2], tokens, tokens))
    return timing.race_ms(partial(scaled_dot_product_attention, q, k, v))[0]


def quantize_ms(numel: int, dtype: torch.dtype) -> float:
    """Milliseconds of one pass that reads ``numel`` values of ``dtype`` and writes uint8."""
    wide, narrow = torch.zeros(numel, dtype=dtype), torch.empty(numel, dtype=torch.uint8)
    return timing.race_ms(lambda: narrow.copy_(wide))[0]
