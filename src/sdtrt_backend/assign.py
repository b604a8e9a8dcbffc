"""Which layers run in 8 bits on a GPU, and in which: decided per group of layers that read one tensor, by measured time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from .fx import call_arguments, pair
from .kernels import Chooser, Problem
from .rules import OPS
from .values import DTYPES, Decision

# calls that write their result from a kernel of their own: quantising it is a pass of its own. What is none of these is
# a norm or pointwise, and writes 8 bits itself
ATTENTION = torch.nn.functional.scaled_dot_product_attention
OPAQUE = {*OPS, ATTENTION}
VIEWS = {"reshape", "view", "permute", "transpose", "contiguous", "flatten", "unflatten", "chunk", "to"}


def assign(decisions: Sequence[Decision], nodes: Mapping[str, fx.Node], chooser: Chooser, precision: str,
           always: bool = False, tick: Callable[[float], None] = lambda share: None) -> tuple[Decision, ...]:
    """Every quantised decision with its precision: "fp8" or "int8" (``precision`` "fp8" may use both), or back to "16-bit"
    where the 8-bit kernels, with the quantisation of their input, were measured to be slower, unless ``always``.

    nodes: captured name -> node of the bound graph, with shapes in ``meta["val"]``; tick: told the share of the groups that
    each one is, when it is decided.
    """
    groups: dict[tuple[str, str], list[Decision]] = {}
    for d in decisions:
        if d.quantized:
            groups.setdefault((d.layer.source, d.group), []).append(d)
    chosen: dict[str, tuple[str, str]] = {}
    for (source, _), members in groups.items():
        candidates = ("int8",) if precision == "int8" else ("fp8",) if always else ("fp8", "int8")
        verdict = _cheapest(members, nodes, nodes[source], chooser, candidates, always)
        chosen.update({d.layer.node: verdict for d in members})
        tick(1 / len(groups))
    return tuple(replace(d, precision=chosen[d.layer.node][0], reason=chosen[d.layer.node][1]) if d.quantized else d
                 for d in decisions)


def kernels_ms(gm: fx.GraphModule, chooser: Chooser) -> float:
    """Milliseconds of all matrix products, convolutions and attentions of the graph in 16 bits: no compiler of the same
    calls can be faster than that."""
    total = 0.0
    for node in gm.graph.nodes:
        if node.target in OPS and not call_arguments(node).get("groups", 1) > 1:
            total += chooser.wide_ms(problem([node]))
        elif node.target is ATTENTION and len(node.args) == 3:
            query, key = (a.meta["val"] for a in node.args[:2])
            total += chooser.attention_times(tuple(query.shape), key.shape[-2], query.dtype, query.dtype)["torch"]
    return total


def _cheapest(members: Sequence[Decision], nodes: Mapping[str, fx.Node], source: fx.Node, chooser: Chooser,
              precisions: tuple[str, ...], always: bool) -> tuple[str, str]:
    """(precision, reason) of one group: linears count as the one matrix product they become."""
    calls = [nodes[d.layer.node] for d in members]
    if any(pair(call_arguments(c).get("dilation", 1)) != [1, 1] for c in calls):
        return "16-bit", "dilated convolution: no 8-bit kernel"
    linears = [c for c in calls if OPS[c.target].name == "linear"]
    problems = [problem([c]) for c in calls if c not in linears] + ([problem(linears)] if linears else [])
    wide = sum(chooser.wide_ms(problem([c])) for c in calls)
    times: dict[str, float] = {}
    for precision in precisions:
        best = [chooser.best(p, precision) for p in problems]
        if all(best):
            times[precision] = quantization_ms(source, chooser, DTYPES[precision]) + sum(b.ms for b in best if b)
    if not times:
        return "16-bit", f"no {' or '.join(precisions)} kernel takes {problems[0]}"
    fastest = min(times, key=times.__getitem__)
    if times[fastest] >= wide and not always:
        return "16-bit", (f"measured on this GPU: {times[fastest]:.4f} ms in {fastest} with quantising the input, "
                          f"{wide:.4f} ms in {str(problems[0].dtype)[6:]}")
    return fastest, ""


def problem(calls: Sequence[fx.Node]) -> Problem:
    """The shapes of one convolution, or of linears that read one tensor, as one matrix product."""
    arguments = [call_arguments(c) for c in calls]
    x, weights = arguments[0]["input"].meta["val"], [a["weight"].meta["val"] for a in arguments]
    dtype = calls[0].meta["val"].dtype
    if OPS[calls[0].target].name == "linear":
        rows = x.numel() // x.shape[-1]
        return Problem("linear", (rows, x.shape[-1]), (sum(w.shape[0] for w in weights), x.shape[-1]), (1, 1), (0, 0), dtype)
    (sy, sx), (py, px) = pair(arguments[0]["stride"]), pair(arguments[0]["padding"])
    return Problem("conv2d", tuple(x.shape), tuple(weights[0].shape), (sy, sx), (py, px), dtype)


def quantization_ms(source: fx.Node, chooser: Chooser, dtype: torch.dtype) -> float:
    """What it costs that ``source`` is written in 8 bits instead of 16: nothing behind a norm or pointwise call, a pass over
    the tensor behind a matrix product, the difference between two kernels behind an attention."""
    value, node = source.meta["val"], source
    while (node.op == "call_method" and node.target in VIEWS) or node.target in (torch.chunk, torch.flatten):
        parent = node.args[0]
        assert isinstance(parent, fx.Node)
        node = parent
    if node.target is ATTENTION and len(node.args) == 3:
        query, key = (a.meta["val"] for a in node.args[:2])
        wide, narrow = (chooser.attention_ms(tuple(query.shape), key.shape[-2], query.dtype, d) for d in (query.dtype, dtype))
        return narrow - wide
    if node.op == "placeholder" or node.target in OPAQUE:
        return chooser.quantize_ms(value.numel(), value.dtype)
    return 0.0
