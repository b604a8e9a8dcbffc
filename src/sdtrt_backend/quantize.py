"""Plan which layers become int8, then insert Q/DQ from the plan: symmetric, weights per output channel, static input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.ao.quantization.fx._decomposed
from torch import fx

from .fx import add_constant, call_arguments, finish, inserting_after
from .recipe import Recipe
from .rules import reason_to_keep
from .smooth import smooth_source
from .stats import TINY_AMAX, quantize_weight, weight_scale
from .values import INT8_MAX, Decision, Layer

QD = torch.ops.quantized_decomposed


def plan(layers: Sequence[Layer], recipe: Recipe, exclude: tuple[str, ...]) -> tuple[Decision, ...]:
    """One decision per layer, in graph order: int8 with its scale, or the user's precision with the reason."""
    return tuple(_decide(layer, recipe, exclude) for layer in layers)


def _decide(layer: Layer, recipe: Recipe, exclude: tuple[str, ...]) -> Decision:
    reason = reason_to_keep(layer, exclude)
    calibrated = recipe.layers.get(layer.name)
    if reason is None and calibrated is None:
        reason = "the recipe has no range for it: it did not run, or saw no finite input, during calibration"
    elif reason is None and calibrated is not None and not calibrated.amax > TINY_AMAX:
        reason = "its input was zero throughout calibration"
    if reason is not None or calibrated is None:
        return Decision(layer, "16-bit", reason or "")
    return Decision(layer, "int8", "", calibrated.amax, recipe.smoothing.get(calibrated.group), calibrated.group)


def insert(gm: fx.GraphModule, nodes: dict[str, fx.Node], decisions: Sequence[Decision]) -> fx.GraphModule:
    """Write Q/DQ for every int8 decision into the bound graph ``gm``; ``nodes`` maps captured names to its nodes.

    Layers that read one tensor with one scale share one Q/DQ pair. Smoothing touches quantised layers only.
    """
    by_source: dict[tuple[str, str], list[Decision]] = {}
    for d in decisions:
        if d.quantized:
            by_source.setdefault((d.layer.source, d.group), []).append(d)
    for (source_name, _), members in by_source.items():
        source = nodes[source_name]
        readers = [nodes[d.layer.node] for d in members]
        smoothing = members[0].smoothing
        smoothed = source if smoothing is None else smooth_source(gm, source, set(readers), smoothing)
        dtype = members[0].layer.weight.dtype
        quantized = _quantize_activation(gm, smoothed, members[0].amax, dtype)
        for d, node in zip(members, readers, strict=True):
            with gm.graph.inserting_before(node):
                weight = _quantize_constant(gm, d.layer, smoothing, dtype)
            node.args, node.kwargs = tuple({**call_arguments(node), "input": quantized, "weight": weight}.values()), {}
    return finish(gm)


def _quantize_activation(gm: fx.GraphModule, source: fx.Node, amax: float, dtype: torch.dtype) -> fx.Node:
    scale = (amax / INT8_MAX, 0, -INT8_MAX - 1, INT8_MAX, torch.int8)
    with inserting_after(source):
        q = gm.graph.call_function(QD.quantize_per_tensor.default, (source, *scale))
    with gm.graph.inserting_after(q):
        return gm.graph.call_function(QD.dequantize_per_tensor.default, (q, *scale), {"out_dtype": dtype})


def _quantize_constant(gm: fx.GraphModule, layer: Layer, smoothing: torch.Tensor | None, dtype: torch.dtype) -> fx.Node:
    weight = layer.weight.float()
    if smoothing is not None:
        weight = weight * smoothing.to(weight.device)  # [out, in] * [in]: only linears are smoothed
    scale = weight_scale(weight)
    q = add_constant(gm, f"{layer.node}_weight_int8", quantize_weight(weight, scale))
    s = add_constant(gm, f"{layer.node}_weight_scale", scale)
    z = add_constant(gm, f"{layer.node}_weight_zero_point", torch.zeros_like(scale, dtype=torch.int64))
    return gm.graph.call_function(QD.dequantize_per_channel.default, (q, s, z, 0, -INT8_MAX, INT8_MAX, torch.int8),
                                  {"out_dtype": dtype})
