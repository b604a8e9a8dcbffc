"""Which layers run in 8 bits, and in which: decided per group of layers that read one tensor, by measured time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from . import ops
from .calls import call_arguments, name_of, rearranges
from .fx import ATTENTION, WORK, behind_linear, by_tanh, pair, plain_attention
from .kernels import Problem, Timed, Unsteady
from .rules import OPS
from .stats import relative_error
from .values import DTYPES, FP8_MAX, Decision

# calls that write their result from a kernel of their own: quantising it is a pass of its own. What is none of these is
# a norm or pointwise, and writes 8 bits itself
OPAQUE = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
          "conv_transpose2d", "conv_transpose3d", "scaled_dot_product_attention")
# besides views: what takes a part of a tensor, and conversions, which are fused into the pass
PARTS = ("chunk", "split", "unbind", "getitem", "to", "float", "half", "bfloat16")


# of the work of a graph's products and attentions: what another precision could win at most, for it to be worth the seconds that
# compiling its candidates takes
LEAST_GAIN = 0.01
# A GPU at its power limit slows down, and convolutions in fp8 more than in int8: by 1.06 to 1.11 of what calls at the full clock
# show, by which they are timed (H200, a second of calls in a row of 16x640x64x64, 16x320x128x128 and 16x1280x32x32)
FP8_CONVOLUTION = 1.06
ENCODING = "encoding"  # key of ``meta``: that an attention over fp8 codes is all that reads this linear
PASS_OF_PRODUCT = 0.25  # that GELU's pass takes, of the time of the product in front of it (4096x3072 by 12288x3072, H200)


def mark_work(gm: fx.GraphModule) -> None:
    """Tell every product and attention which share of the graph's work those of its shapes are, which are measured once."""
    work = {n: _flops(n) for n in gm.graph.nodes if n.target in OPS or n.target is ATTENTION}
    of_shape: Counter[Any] = Counter()
    for node, flops in work.items():
        of_shape[_shapes(node)] += flops
    for node in work:
        node.meta[WORK] = of_shape[_shapes(node)] / of_shape.total()


def _shapes(node: fx.Node) -> tuple[Any, ...]:
    return (node.target, *(tuple(operand.meta["val"].shape) for operand in node.all_input_nodes if "val" in operand.meta))


def _flops(node: fx.Node) -> int:
    if node.target is not ATTENTION:
        given = call_arguments(node)
        return int(2 * node.meta["val"].numel() * math.prod(given["weight"].meta["val"].shape[1:]))
    query, key = (operand.meta["val"] for operand in node.all_input_nodes[:2])
    return int(4 * query.numel() * key.shape[-2])


def assign(decisions: Sequence[Decision], nodes: Mapping[str, fx.Node], chooser: Timed, precision: str,
           always: bool = False, tick: Callable[[float], None] = lambda share: None) -> tuple[Decision, ...]:
    """Every quantised decision with its precision: "fp8" or "int8" (``precision`` "fp8" may use both), or back to "16-bit"
    where the 8-bit kernels, with the quantisation of their input, were not measured to be faster, unless ``always``. A layer of
    two codes counts its kernel twice.

    nodes: captured name -> node of the bound graph, with shapes in ``meta["val"]``; tick: told the share of the groups that
    each one is, when it is decided.
    """
    groups: dict[tuple[str, str, bool], list[Decision]] = {}  # each has one quantisation
    for d in decisions:
        if d.quantized:
            groups.setdefault((d.layer.source, d.group, d.two_codes), []).append(d)
    chosen: dict[str, tuple[str, str]] = {}
    for (source, *_), members in groups.items():
        candidates = ("int8",) if precision == "int8" else ("fp8",) if always else ("fp8", "int8")
        verdict = _cheapest(members, nodes, nodes[source], chooser, candidates, always)
        chosen.update({d.layer.node: verdict for d in members})
        tick(1 / len(groups))
    return tuple(_as_chosen(d, *chosen[d.layer.node]) if d.quantized else d for d in decisions)


def _as_chosen(decision: Decision, precision: str, reason: str) -> Decision:
    if precision == "16-bit":
        return Decision(decision.layer, precision, reason)
    return replace(decision, precision=precision)  # and its own reason, which says why it has two codes


def kernels_ms(gm: fx.GraphModule, chooser: Timed) -> float:
    """Milliseconds of all matrix products, convolutions and attentions of the graph in 16 bits: on a GPU no compiler of the
    same calls can be faster than that."""
    total = 0.0
    for node in gm.graph.nodes:
        if node.target in OPS:
            given = call_arguments(node)
            # a bound may leave out what is never quantised, and a Problem has neither groups nor padding in words
            if given.get("groups", 1) == 1 and not isinstance(given.get("padding"), str):
                total += chooser.wide_ms(problem([node]))
        elif (attention := plain_attention(node, masked=True)) is not None:  # a mask does not make it faster
            query, key = (a.meta["val"] for a in attention[:2])
            total += chooser.attention_times(tuple(query.shape), key.shape[-2], query.dtype, query.dtype)["torch"]
    return total


def _cheapest(members: Sequence[Decision], nodes: Mapping[str, fx.Node], source: fx.Node, chooser: Timed,
              precisions: tuple[str, ...], always: bool) -> tuple[str, str]:
    """(precision, reason) of one group: linears count as the one matrix product they become."""
    calls = [nodes[d.layer.node] for d in members]
    linears = [c for c in calls if chooser.joins and OPS[c.target].name == "linear"]
    problems = [problem([c]) for c in calls if c not in linears] + ([problem(linears)] if linears else [])
    if always and not chooser.names_kernels:
        return precisions[0], ""
    refusals = {precisions[0]: _refusal(problems, chooser, precisions[0])}
    share = max(c.meta.get(WORK, 1.0) for c in calls)
    gelu = len(linears) == 1 and all(map(by_tanh, linears[0].users)) and gelu_pays(linears[0])
    encoding = all(c.meta.get(ENCODING, False) for c in calls)
    if gelu or encoding or refusals[precisions[0]] or share * max(chooser.room(p, precisions[0]) for p in problems) > LEAST_GAIN:
        refusals |= {other: _refusal(problems, chooser, other) for other in precisions[1:]}  # takes seconds to compile
    taken = [precision for precision, refusal in refusals.items() if refusal is None]
    if not taken:
        return "16-bit", f"no {' or '.join(precisions)} kernel takes {refusals[precisions[0]]}"
    if always:
        return taken[0], ""
    wide = [chooser.wide_ms(problem([c])) for c in calls]
    narrow = {precision: [best.ms for p in problems if (best := chooser.best(p, precision)) is not None] for precision in taken}
    if any(isinstance(ms, Unsteady) for ms in (*wide, *narrow[taken[0]])):
        return taken[0], ""  # the machine was too busy to tell: what was planned stays
    products = 2 if members[0].two_codes else 1
    times = {p: products * (quantization_ms(source, chooser, DTYPES[p]) + sum(each)) for p, each in narrow.items()}
    if "fp8" in times:
        times["fp8"] += products * (FP8_CONVOLUTION - 1) * sum(
            ms for p, ms in zip(problems, narrow["fp8"], strict=True) if p.op == "conv2d")
    if gelu and "int8" in times:
        times["int8"] -= chooser.gelu_saves(problems[0], DTYPES[precisions[0]])
    if encoding and "int8" in times:
        times["int8"] -= chooser.encoding_saves(problems[0])
    fastest = min(times, key=times.__getitem__)
    if times[fastest] >= chooser.gain * sum(wide):
        least = "" if chooser.gain == 1 else f"; 8 bits must save {1 - chooser.gain:.0%}"
        return "16-bit", (f"measured on this {chooser.place}: {times[fastest]:.4f} ms in {fastest} with quantising the input, "
                          f"{sum(wide):.4f} ms in {str(problems[0].dtype)[6:]}{least}")
    return fastest, ""


def gelu_pays(product: fx.Node) -> bool:
    """Whether an int8 kernel that applies the GELU behind a product is worth the time that compiling it takes."""
    return bool(product.meta.get(WORK, 1.0) * PASS_OF_PRODUCT > LEAST_GAIN)


def _refusal(problems: Sequence[Problem], chooser: Timed, precision: str) -> str | None:
    """The first problem that no kernel of ``precision`` takes and why, or None."""
    for p in problems:
        if reasons := chooser.reasons(p, precision):
            return f"{p} ({reasons[0]})"
    return None


def problem(calls: Sequence[fx.Node]) -> Problem:
    """The shapes of one convolution, or of linears that read one tensor, as one matrix product."""
    arguments = [call_arguments(c) for c in calls]
    x, weights = arguments[0]["input"].meta["val"], [a["weight"].meta["val"] for a in arguments]
    dtype = calls[0].meta["val"].dtype
    if OPS[calls[0].target].name == "linear":
        rows = x.numel() // x.shape[-1]
        return Problem("linear", (rows, x.shape[-1]), (sum(w.shape[0] for w in weights), x.shape[-1]), (1, 1), (0, 0), dtype)
    (sy, sx), (py, px), (dy, dx) = (pair(arguments[0].get(k, default)) for k, default in (
        ("stride", 1), ("padding", 0), ("dilation", 1)))
    return Problem("conv2d", tuple(x.shape), tuple(weights[0].shape), (sy, sx), (py, px), dtype, (dy, dx))


def quantization_ms(source: fx.Node, chooser: Timed, dtype: torch.dtype) -> float:
    """What it costs that ``source`` is written in 8 bits instead of 16: nothing behind a norm or pointwise call, a pass over
    the tensor behind a matrix product or another opaque call, the difference between two kernels behind an attention."""
    value, node = source.meta["val"], source
    while (rearranges(node) or name_of(node) in PARTS) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if "fp8_attention" in node.meta:
        return 0.0  # a pass over its result there is anyway, whatever that writes
    if (attention := plain_attention(node)) is not None:
        query, key = (a.meta["val"] for a in attention[:2])
        wide, narrow = (chooser.attention_ms(tuple(query.shape), key.shape[-2], query.dtype, d) for d in (query.dtype, dtype))
        return narrow - wide
    if node.op == "placeholder" or name_of(node) in OPAQUE or node.target in chooser.opaque:
        return chooser.quantize_ms(value.numel(), value.dtype)
    return 0.0


# An attention runs in fp8 where its result on a real input is this near to the 16-bit one: about twice the noise of an fp8
# matrix product.
ATTENTION_ERROR = 0.08
# Ranges of q, k and v are measured at one timestep. e4m3 has 17 powers of 2: a range 8 times as wide costs nothing.
ATTENTION_HEADROOM = 8.0


def attentions_in_fp8(gm: fx.GraphModule, args: Sequence[Any], chooser: Timed) -> list[float]:
    """Mark the attentions of the bound graph that fp8 computes faster, quantising q, k and v included, and near enough on
    ``args``: their ``meta["fp8_attention"]`` gets the kernel, the scales of q, k and v, powers of 2, and whether v is taken
    without its mean over the tokens. Returns the relative error of each.

    Tensor cores of compute capability 9 add up fp8 products in some 14 bits and cut off the rest (DeepSeek-V3, arXiv:2412.19437,
    3.3.2): over the tens of thousands of tokens of a video the mean of v, which only ever grows, loses a tenth of itself.
    """
    faster = {}
    for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        if (found := plain_attention(node)) is None:
            continue
        shape, tokens, dtype = tuple(found[0].meta["val"].shape), found[1].meta["val"].shape[-2], found[0].meta["val"].dtype
        best = chooser.attention_fp8(shape, tokens)
        if best is not None:
            passes = sum(max(0.0, quantization_ms(operand, chooser, torch.float8_e4m3fn)) for operand in found[:3]
                         if _written_by(operand) is None)
            if best.ms + passes < chooser.attention_ms(shape, tokens, dtype, dtype):
                faster[node] = (best.kernel, *found)
    if not faster:
        return []
    errors = []

    class Try(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            y = super().run_node(n)
            if n in faster:
                kernel, *operands, scale = faster[n]
                q, k, v = (self.env[operand] for operand in operands)
                mean = v.mean(2, keepdim=True, dtype=torch.float32)
                for centred, taken, added in ((False, v, 0.0), (True, v - mean, mean)):
                    error, scales = fp8_attention_error((q, k, taken), added, scale, y, kernel)
                    if error < ATTENTION_ERROR:
                        n.meta["fp8_attention"] = (kernel, scales, centred)
                        for linear in filter(None, map(_written_by, operands[:2] if centred else operands)):
                            linear.meta[ENCODING] = True
                        errors.append(error)
                        break
            return y

    with torch.no_grad():
        Try(gm).run(*args)
    return errors


def _written_by(operand: fx.Node) -> fx.Node | None:
    """The linear whose int8 product may write the codes of an attention's operand itself."""
    found = behind_linear(operand) if operand.meta["val"].shape[-1] % ops.ATTENTION_FP8_UNIT == 0 else None
    return None if found is None else found[0]


def fp8_attention_error(operands: Sequence[torch.Tensor], mean: torch.Tensor | float, scale: float,
                        y: torch.Tensor, kernel: str) -> tuple[float, list[float]]:
    """(relative error to ``y`` of fp8 attention over q, k and v plus the mean that v is without, scales of q, k and v)."""
    scales = [_power_of_2(t) for t in operands]
    width = y.shape[-1]
    filled = (0, -width % ops.ATTENTION_FP8_UNIT)
    codes = (torch.nn.functional.pad(ops.encode(t.float() / s, None, torch.float8_e4m3fn), filled)
             for t, s in zip(operands, scales, strict=True))
    both, dtype = torch.tensor(scales, device=y.device), ops.ATTENTION_FP8_OUT[kernel]
    coded = ops.attention_fp8(*codes, both, scale, dtype, kernel).float() * scales[2]
    return relative_error(coded.unflatten(2, (y.shape[1], -1)).transpose(1, 2)[..., :width] + mean, y), scales


def _power_of_2(t: torch.Tensor) -> float:
    """The scale of e4m3 codes that reach ATTENTION_HEADROOM times the largest value of ``t``."""
    amax = float(t.abs().max())
    return 2.0 ** math.ceil(math.log2(amax * ATTENTION_HEADROOM / FP8_MAX)) if 0 < amax < math.inf else 1.0
