"""Rotation of attention's values: their projection writes them rotated, and the projection behind the attention, whose weight is
rotated too, reads them so. Softmax mixes tokens and no channels, so that the layers' numbers stay the same, and a rotated input
has a range that is smaller beside its values: fewer codes are lost to outliers. What is rotated are 8-bit weights; a step has no
operation more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from .calls import arguments, heads_in_front, name_of, rearranges
from .fx import behind_linear
from .rules import ROTATED_ON
from .stats import ROTATED
from .values import Decision

ATTENTION = "scaled_dot_product_attention"  # torch's own and torch.export's
CONVERSIONS = ("to", "float", "half", "bfloat16")
APART, TOGETHER = ("view", "reshape", "unflatten"), ("view", "reshape", "flatten")


def rotate_heads(decisions: Sequence[Decision], nodes: Mapping[str, fx.Node]) -> tuple[Decision, ...]:
    """The decisions, int8 linears behind an attention rotated, and with each the 8-bit linear that makes its values turned.

    nodes: captured name -> node of the bound graph, with shapes in ``meta["val"]``.
    """
    layers = {nodes[d.layer.node]: d for d in decisions if d.quantized and d.layer.op == "linear" and d.weight_amax is None
              and d.layer.weight.device.type in ROTATED_ON}
    changed: dict[str, Decision] = {}
    for node, d in layers.items():
        if d.precision != "int8" or d.two_codes or not d.rotated_amax:
            continue
        values = _values_behind(arguments(node)["input"])
        if values in layers:
            changed[d.layer.node] = d.with_rotated_input()
            writer = layers[values]
            changed[writer.layer.node] = replace(changed.get(writer.layer.node, writer), turned=True)
    return tuple(changed.get(d.layer.node, d) for d in decisions)


def _values_behind(x: fx.Node) -> fx.Node | None:
    """The linear that writes the values of the attention whose result ``x`` is, heads side by side; None where anything else
    reads one of the tensors between, or the heads lie otherwise."""
    views: list[fx.Node] = []
    while name_of(x) != ATTENTION:
        if _readers(x) != 1 or not (rearranges(x) or name_of(x) in CONVERSIONS):
            return None
        if rearranges(x):
            views.append(x)
        x = x.all_input_nodes[0]
    given = arguments(x)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    if _readers(x) != 1 or value in (query, key) or value.meta["val"].dim() != 4 or given["enable_gqa"] or given["dropout_p"]:
        return None
    found = behind_linear(value)
    if found is None or len(views) != 2 or len(found[1]) != 2:
        return None
    (together, in_front), (linear, (apart, swapped)) = views, found
    heads, width = value.meta["val"].shape[1], value.meta["val"].shape[-1]
    # whatever is in front of them, the last dimensions tell how the channels lie
    as_heads = name_of(apart) in APART and apart.meta["val"].shape[-2:] == (heads, width) and heads_in_front(swapped)
    side_by_side = name_of(together) in TOGETHER and together.meta["val"].shape[-1] == heads * width and heads_in_front(in_front)
    return linear if as_heads and side_by_side and width % ROTATED == 0 else None


def _readers(node: fx.Node) -> int:
    """torch.export asserts what it knows of a tensor that is converted."""
    return sum(name_of(user) != "_assert_tensor_metadata" for user in node.users)
