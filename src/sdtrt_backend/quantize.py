"""Plan which layers become int8, then insert Q/DQ from the plan: symmetric, weights per output channel, static input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import fx

from . import ops
from .fx import add_constant, call_arguments, finish, inserting_after
from .recipe import LayerRecipe, Recipe
from .rules import (
    ENGINE_KEEP,
    FREE_CONVS,
    FUSED,
    LEVELS,
    SMOOTH_CONVS,
    TORCHAO_KEEP,
    TORCHAO_MIN_ROWS,
    TWO_CODES_HEADROOM,
    TWO_CODES_REASON,
    reason_to_keep,
)
from .smooth import smooth_source
from .stats import TINY_AMAX, int8_scale, over_channels, quantize_weight, rotate, rotated_weight, shared_scale, weight_scale
from .values import DTYPES, FP8_MAX, INT8_MAX, Decision, Layer

QD = torch.ops.quantized_decomposed
# a clipped range pays in int8, where it makes the steps finer; a floating-point code is as fine at half its range
FP8_HEADROOM = 2.0


def plan(layers: Sequence[Layer], recipe: Recipe, exclude: tuple[str, ...], level: float = LEVELS[-1],
         free_convs: bool = False, two_codes: tuple[str, ...] = (), smooth_convs: bool = False) -> tuple[Decision, ...]:
    """One decision per layer, in graph order: int8 with its range, or the user's precision with the reason.

    smooth_convs: convolutions may be smoothed, see the function of that name; free_convs: they may, and have a zero point, see
    ``free_convs``; two_codes: patterns of layers whose input then has two codes, see ``rules.TWO_CODES``.
    """
    recipe = covering(recipe, layers)
    smoothed = free_convs or smooth_convs
    decisions = (_decide(layer, recipe, exclude, level, free_convs, smoothed, two_codes) for layer in layers)
    return tuple(replace(d, weight_amax=recipe.weight_amax.get(d.layer.name)) if d.quantized else d for d in decisions)


def covering(recipe: Recipe, layers: Sequence[Layer]) -> Recipe:
    """``recipe`` with a line for projections that were fused, or parted, since it was made: see ``rules.FUSED``."""
    found = {layer.name: line for layer in layers if layer.name not in recipe.layers
             for line in (_fused(layer.name, recipe),) if line is not None}
    return replace(recipe, layers={**recipe.layers, **found}) if found else recipe


def _fused(name: str, recipe: Recipe) -> LayerRecipe | None:
    """What the recipe knows under another name of the tensor that this layer reads."""
    last = name.rpartition(".")[2]
    path = name.removesuffix(last)
    parts = tuple(p for p in (recipe.layers.get(path + n) for n in FUSED.get(last, ())) if p is not None)
    if parts:
        whole = len(parts) == len(FUSED[last]) and len({p.group for p in parts}) == 1
        return next((p for p in parts if p.keep or p.second), parts[0]) if whole else None
    return next((recipe.layers[path + n] for n, of in FUSED.items() if last in of and path + n in recipe.layers), None)


def smooth_convs(device: torch.device) -> bool:
    """Whether the kernels on ``device`` take smoothed convolutions."""
    return device.type in SMOOTH_CONVS


def free_convs(device: torch.device, precision: str) -> bool:
    """Whether convolutions of ``precision`` on ``device`` are free to be smoothed and to have a zero point."""
    return precision == "int8" and device.type in FREE_CONVS


def for_engine(decision: Decision, precision: str, flavour: str) -> Decision:
    """The plan's decision, in ``precision``, or in 16 bits where ``rules.ENGINE_KEEP`` says so."""
    if not decision.quantized:
        return decision
    reason = ENGINE_KEEP.get((flavour, precision, decision.layer.op))
    return replace(decision, precision=precision) if reason is None else Decision(decision.layer, "16-bit", reason)


def for_torchao(decision: Decision, source: torch.Tensor) -> Decision:
    """The plan's decision for a layer that reads ``source``, or in 16 bits where ``rules`` says that TorchAO cannot run it."""
    if not decision.quantized:
        return decision
    reason, rows = TORCHAO_KEEP.get(decision.layer.op), source.numel() // source.shape[-1]
    if reason is None and rows < TORCHAO_MIN_ROWS:
        reason = f"its input has {rows} rows, TorchAO's int8 product takes {TORCHAO_MIN_ROWS} or more"
    return decision if reason is None else Decision(decision.layer, "16-bit", reason)


def _decide(layer: Layer, recipe: Recipe, exclude: tuple[str, ...], level: float, free: bool, smoothed: bool,
            two_codes: tuple[str, ...]) -> Decision:
    calibrated = recipe.layers.get(layer.name)
    told = layer if layer.role is not None or calibrated is None else replace(layer, role=calibrated.role)
    reason = reason_to_keep(told, exclude, level)
    if reason is None and calibrated is None:
        reason = "the recipe has no range for it: it did not run, or saw no finite input, during calibration"
    elif reason is None and calibrated is not None and not calibrated.amax > TINY_AMAX:
        reason = "its input was zero throughout calibration"
    elif reason is None and calibrated is not None:
        reason = calibrated.keep
        if reason is None and calibrated.second is not None and not free:
            reason = f"kernels take one code here, and it {calibrated.second}"
    if reason is not None or calibrated is None:
        return Decision(layer, "16-bit", reason or "")
    twice, trained = calibrated.second, layer.name in recipe.weight_amax
    if twice is None and not trained and any(fnmatchcase(layer.name, pattern) for pattern in two_codes):
        twice = TWO_CODES_REASON
    if free and twice is not None:
        amax, smoothing = recipe.input_of(layer.name, free) if calibrated.plain_amax is None else (calibrated.plain_amax, None)
        return Decision(layer, "int8", twice, amax * TWO_CODES_HEADROOM, smoothing, calibrated.group, two_codes=True)
    decision = Decision(layer, "int8", "", *recipe.input_of(layer.name, smoothed), calibrated.group,
                        rotated_amax=calibrated.rotated_amax)
    return replace(decision, low=calibrated.low, high=calibrated.high) if layer.op == "conv2d" and free else decision


# a weight, what is made of it, its scale where that are codes, and whether it is that of the other weights beside it too
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, bool]


@dataclass(eq=False)
class Coded:
    """The 8-bit weights of layers that read one tensor with one scale.

    members: the layers' decisions; smoothing: as ``quantized_weights`` takes it; tensors: (codes, scale) of each; loras: those
    that are part of them, None where writing them failed.
    """

    members: Sequence[Decision]
    smoothing: torch.Tensor | None
    tensors: list[tuple[torch.Tensor, torch.Tensor]]
    loras: tuple[Any, ...] | None = ()

    @cached_property
    def parts(self) -> list[Part]:
        return [(d.layer.weight, *pair, d.precision == "fp8" and d.layer.op == "linear")
                for d, pair in zip(self.members, self.tensors, strict=True)]


# (ids of weights that read one tensor, precision, device, dtype, whether smoothed, two codes, whether each is rotated and turned)
# -> what they are in 8 bits
Codes = dict[tuple[tuple[int, ...], str, torch.device, torch.dtype, bool, bool, tuple[tuple[bool, bool], ...]], Coded]


def by_tensor(decisions: Sequence[Decision]) -> Iterator[tuple[Any, list[Decision], torch.Tensor | None]]:
    """(key in ``Codes``, the 8-bit layers that read one tensor with one scale, their smoothing as their weights are shaped)."""
    by_source: dict[tuple[str, str, bool], list[Decision]] = {}
    for d in decisions:
        if d.quantized:
            by_source.setdefault((d.layer.source, d.group, d.two_codes), []).append(d)
    for members in by_source.values():
        first, smoothing = members[0], members[0].smoothing
        like = first.layer.weight
        if smoothing is not None:
            smoothing = over_channels(smoothing.to(like.device), like)
        yield (tuple(id(d.layer.weight) for d in members), first.precision, like.device, like.dtype, smoothing is not None,
               first.two_codes, tuple(d.rotations for d in members)), members, smoothing


def insert(gm: fx.GraphModule, nodes: dict[str, fx.Node], decisions: Sequence[Decision],
           known: Codes | None = None) -> fx.GraphModule:
    """Write Q/DQ for every 8-bit decision into the bound graph ``gm``; ``nodes`` maps captured names to its nodes.

    Layers that read one tensor with one scale share one Q/DQ pair. Smoothing touches quantised layers only.
    known: 8-bit weights that graphs for other shapes of the module already hold; what is missing is added.
    """
    known = {} if known is None else known
    used = [d for d in decisions if d.layer.node in nodes]  # else nobody reads its result
    for key, members, smoothing in by_tensor(used):
        source = nodes[members[0].layer.source]
        readers = [nodes[d.layer.node] for d in members]
        smoothed = source if smoothing is None else smooth_source(gm, source, set(readers), smoothing)
        quantized = _quantize_activation(gm, smoothed, members[0])
        if key not in known:
            known[key] = Coded(members, smoothing, quantized_weights(members, smoothing))
        for d, node, weight in zip(members, readers, known[key].tensors, strict=True):
            with gm.graph.inserting_before(node):
                dequantized = _weight_constant(gm, d, *weight)
                bias = _turned(gm, d, call_arguments(node)["bias"])
            changed = {"input": quantized, "weight": dequantized, "bias": bias}
            node.args, node.kwargs = tuple({**call_arguments(node), **changed}.values()), {}
    return finish(gm)


def _turned(gm: fx.GraphModule, decision: Decision, bias: fx.Node | None) -> fx.Node | None:
    """The bias of a layer whose output is rotated."""
    if bias is None or not decision.turned:
        return bias
    value = getattr(gm, str(bias.target)).detach()
    return add_constant(gm, f"{decision.layer.node}_turned_bias", rotate(value).to(value.dtype))


def _quantize_activation(gm: fx.GraphModule, source: fx.Node, decision: Decision) -> fx.Node:
    dtype = decision.layer.weight.dtype
    if decision.precision == "fp8":
        scale = decision.amax * FP8_HEADROOM / FP8_MAX
        with inserting_after(source):
            q = gm.graph.call_function(ops.quantize_fp8, (source, scale))
        with gm.graph.inserting_after(q):
            constant = add_constant(gm, f"{q.name}_scale", torch.tensor([scale], device=decision.layer.weight.device))
        with gm.graph.inserting_after(constant):
            return gm.graph.call_function(ops.dequantize_fp8, (q, constant, dtype))
    largest, codes = decision.largest_code, torch.int16 if decision.two_codes else torch.int8
    arguments = (*decision.int8_range, -largest - 1, largest, codes)
    with inserting_after(source):
        q = gm.graph.call_function(QD.quantize_per_tensor.default, (source, *arguments))
    with gm.graph.inserting_after(q):
        return gm.graph.call_function(QD.dequantize_per_tensor.default, (q, *arguments), {"out_dtype": dtype})


def quantized_weights(members: Sequence[Decision], smoothing: torch.Tensor | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(codes, scale) of each weight, times ``smoothing`` (shaped by ``stats.over_channels``), rotated: int8 and convolutions per
    output channel, int8 by the range that the decision names, if any; fp8 linears that read one tensor share one scale, so that
    they can be one matrix product: a floating-point code loses nothing by it. The codes of such linears lie one behind the other
    in one tensor, those of convolutions are channels last."""
    linears = [d for d in members if d.layer.op == "linear"]
    weights = [rotated_weight(d, d.layer.weight.detach() if smoothing is None else d.layer.weight.detach().float() * smoothing)
               for d in members]
    shared = shared_scale(torch.stack([w.abs().max() for w in weights]).max().float().view(1))
    joined = torch.empty((sum(d.layer.weight.shape[0] for d in linears), *(linears or members)[0].layer.weight.shape[1:]),
                         dtype=DTYPES[members[0].precision], device=weights[0].device)
    result, row = [], 0
    for d, w in zip(members, weights, strict=True):
        if d.precision == "int8":
            scale = int8_scale(d, w)
            codes = quantize_weight(w, scale)
        else:
            scale = shared if d in linears else weight_scale(w, torch.float8_e4m3fn)
            codes = (w.float() / scale.view(-1, *[1] * (w.dim() - 1))).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        if d in linears:
            joined[row : row + len(codes)] = codes
            codes, row = joined[row : row + len(codes)], row + len(codes)
        elif codes.is_cuda:
            codes = codes.contiguous(memory_format=torch.channels_last)
        result.append((codes, scale))
    return result


def _weight_constant(gm: fx.GraphModule, decision: Decision, codes: torch.Tensor, scale: torch.Tensor) -> fx.Node:
    dtype, name = decision.layer.weight.dtype, decision.layer.node
    q = add_constant(gm, f"{name}_weight_{decision.precision}", codes)
    s = add_constant(gm, f"{name}_weight_scale", scale)
    if decision.precision == "fp8":
        return gm.graph.call_function(ops.dequantize_fp8, (q, s, dtype))
    z = add_constant(gm, f"{name}_weight_zero_point", torch.zeros_like(scale, dtype=torch.int64))
    return gm.graph.call_function(QD.dequantize_per_channel.default, (q, s, z, 0, -INT8_MAX - 1, INT8_MAX, torch.int8),
                                  {"out_dtype": dtype})
