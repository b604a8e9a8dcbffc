"""Norms, GEGLU and attention that write the 8-bit tensor themselves, where only the quantisation reads their result.

Each function takes the node that is quantised and the factor it is multiplied by (1 / scale, times an unfolded smoothing
factor), and returns the node of the 8-bit tensor, or None where its pattern does not hold.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from .. import ops
from ..fx import ATTENTION, add_constant, plain_attention, written

# not in place: a kernel that takes the sum along does not write it where others read it under its first operand's name
ADDITIONS = (operator.add, torch.add)
PRODUCTS = (operator.mul, torch.mul)
VIEWS = ("reshape", "view", "permute", "transpose", "flatten", "contiguous")
TRANSPOSED = (("transpose", (1, 2)), ("transpose", (2, 1)), ("permute", (0, 2, 1, 3)))
TWO_ROOT = 2 * math.sqrt(2 / math.pi)
MAX_ROW = 4096  # channels that one program of the layer norm kernel holds


def simplify(gm: fx.GraphModule) -> None:
    """Drop what changes nothing: dropout outside training, division by one, conversion to the dtype it has."""
    changed = written(gm.graph)
    for node in list(gm.graph.nodes):
        value, source = node.meta.get("val"), node.args[0] if node.args else None
        if not isinstance(value, torch.Tensor) or not isinstance(source, fx.Node):
            continue
        idle = ((node.target is torch.nn.functional.dropout and _dropout_is_idle(node))
                or (node.target is operator.truediv and node.args[1] == 1.0 and changed.isdisjoint((node, source)))  # a copy
                or (node.op == "call_method" and node.target == "to" and not node.kwargs and len(node.args) == 2
                    and node.args[1] is source.meta["val"].dtype))
        if idle and source.meta["val"].dtype is value.dtype:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)


def gelu_by_sigmoid(gm: fx.GraphModule) -> None:
    """gelu(x, "tanh") as x * sigmoid(2 u), which it equals: one exponential, where the library's tanh makes the pass over a
    transformer's widest tensor compute-bound."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.nn.functional.gelu):
        if node.kwargs.get("approximate") != "tanh" or len(node.args) != 1:
            continue
        call, dtype = gm.graph.call_function, node.meta["val"].dtype
        with gm.graph.inserting_before(node):
            x = gm.graph.call_method("float", node.args)
            cubic = call(torch.mul, (call(torch.square, (x,)), TWO_ROOT * 0.044715))
            u = call(torch.mul, (x, call(torch.add, (cubic, TWO_ROOT))))
            y = gm.graph.call_method("to", (call(torch.mul, (x, call(torch.sigmoid, (u,)))), dtype))
        y.meta.update(node.meta)
        node.replace_all_uses_with(y)
        gm.graph.erase_node(node)


def _dropout_is_idle(node: fx.Node) -> bool:
    given = {**dict(zip(("input", "p", "training"), node.args, strict=False)), **node.kwargs}
    return bool(given.get("p", 0.5) == 0.0 or given.get("training", True) is False)


def _chain(node: fx.Node, ends: Callable[[fx.Node], bool]) -> tuple[fx.Node, list[fx.Node]] | None:
    """(the node that ``ends`` accepts, the views from it down to ``node``) where each is read by the next alone."""
    views: list[fx.Node] = []
    while not ends(node):
        if node.op != "call_method" or node.target not in VIEWS or not isinstance(node.args[0], fx.Node):
            return None
        views.append(node)
        node = node.args[0]
        if len(node.users) != 1:
            return None
    return node, views[::-1]


def _viewed(gm: fx.GraphModule, node: fx.Node, views: list[fx.Node]) -> fx.Node:
    """``views`` applied to another node, in front of the insertion point."""
    for view in views:
        node = gm.graph.call_method(str(view.target), (node, *view.args[1:]), view.kwargs)
    return node


def group_norm(gm: fx.GraphModule, source: fx.Node, factor: torch.Tensor, dtype: torch.dtype, kernel: str) -> fx.Node | None:
    """group_norm [-> silu] [-> views]. A factor per channel goes into the norm's weights, where no silu is between."""
    found = _chain(source, lambda n: n.target in (torch.nn.functional.silu, torch.nn.functional.group_norm))
    if found is None:
        return None
    (node, views), silu = found, False
    if node.target is torch.nn.functional.silu:
        silu = True
        inner = _chain(node.all_input_nodes[0], lambda n: n.target is torch.nn.functional.group_norm)
        if inner is None or inner[1] or len(inner[0].users) != 1:
            return None
        node = inner[0]
    if node.meta["val"].dim() != 4 or (factor.numel() > 1 and silu):
        return None
    y = group_norm_call(gm, node, silu, factor, dtype, kernel)
    return _viewed(gm, y, views) if y is not None else None


def group_norm_call(gm: fx.GraphModule, node: fx.Node, silu: bool, factor: torch.Tensor | None, dtype: torch.dtype,
                    kernel: str) -> fx.Node | None:
    """group_norm8 for the norm ``node``; a concatenation of two, or a shift per image, in front of it is taken in. None where
    its weight or bias is computed."""
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), node.args, strict=False)) | node.kwargs
    x, x2, shift = given["input"], None, None
    affine = _affine(gm, given)
    if affine is None:
        return None
    (weight, bias), out_scale = affine, None
    if factor is not None and factor.numel() > 1:
        weight = factor.view(-1) * (1.0 if weight is None else weight.float())
        bias = None if bias is None else bias.float() * factor.view(-1)
        out_scale = add_constant(gm, f"{node.name}_out_scale", torch.ones_like(factor.view(-1)[:1]))
    elif factor is not None:
        out_scale = add_constant(gm, f"{node.name}_out_scale", factor.float().view(1))
    parts: Any = x.args[0] if x.target is torch.cat and x.args else ()
    if len(parts) == 2 and (x.args[1] if len(x.args) > 1 else x.kwargs.get("dim", 0)) == 1 and (
            parts[0].meta["val"].dtype is parts[1].meta["val"].dtype):
        x, x2 = parts
    elif x.target in ADDITIONS and len(x.users) == 1 and not x.kwargs and all(isinstance(a, fx.Node) for a in x.args):
        whole = x.meta["val"].shape
        for image, added in (x.args, x.args[::-1]):  # the kernel does not broadcast
            if image.meta["val"].shape == whole and added.meta["val"].shape == (*whole[:2], 1, 1):
                x, shift = image, gm.graph.call_method("flatten", (added, 1))
                break
    x, x2 = (None if t is None else gm.graph.call_method("contiguous", (t,), {"memory_format": torch.channels_last})
             for t in (x, x2))
    constants = [None if v is None else add_constant(gm, f"{node.name}_{name}", v)
                 for name, v in (("weight", weight), ("bias", bias))]
    return gm.graph.call_function(ops.group_norm8, (x, x2, shift, given["num_groups"], *constants, given.get("eps", 1e-5), silu,
                                                    out_scale, dtype, kernel))


def layer_norm(gm: fx.GraphModule, source: fx.Node, factor: torch.Tensor, dtype: torch.dtype, kernel: str) -> fx.Node | None:
    """layer_norm over the last dimension, with the addition in front of it, whose sum is written too."""
    if source.target is not torch.nn.functional.layer_norm or source.meta["val"].shape[-1] > MAX_ROW:
        return None
    given = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), source.args, strict=False)) | source.kwargs
    affine = _affine(gm, given)
    if affine is None or len(given["normalized_shape"]) != 1:
        return None
    x, eps = given["input"], given.get("eps", 1e-5)
    added = x.target in ADDITIONS and not x.kwargs and all(
        isinstance(a, fx.Node) and a.meta["val"].shape == x.meta["val"].shape and a.meta["val"].dtype is x.meta["val"].dtype
        for a in x.args)
    with gm.graph.inserting_before(x if added else source):
        constants = [None if v is None else add_constant(gm, f"{source.name}_{name}", v)
                     for name, v in zip(("weight", "bias"), affine, strict=True)]
        out_scale = add_constant(gm, f"{source.name}_out_scale", factor.float().view(-1))
        tail = (*constants, eps, out_scale, dtype, kernel)
        if not added:
            return gm.graph.call_function(ops.layer_norm8, (x, *tail))
        both = gm.graph.call_function(ops.add_layer_norm8, (*x.args, *tail))
        total, y = (gm.graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
    total.meta.update(x.meta)
    x.replace_all_uses_with(total)
    return y


def geglu(gm: fx.GraphModule, source: fx.Node, factor: torch.Tensor, dtype: torch.dtype, kernel: str) -> fx.Node | None:
    """hidden * gelu(gate), the halves of one tensor."""
    if source.target not in PRODUCTS or len(source.args) != 2:
        return None
    hidden, gate = source.args
    if not isinstance(gate, fx.Node) or not isinstance(hidden, fx.Node) or gate.target is not torch.nn.functional.gelu:
        return None
    if gate.kwargs.get("approximate", "none") != "none" or len(gate.args) != 1:
        return None
    second = gate.args[0]
    if not all(isinstance(h, fx.Node) and h.target is operator.getitem and h.args[1] == i
               for i, h in enumerate((hidden, second))):
        return None
    halves = hidden.args[0]
    assert isinstance(halves, fx.Node)
    assert isinstance(second, fx.Node)
    given = dict(zip(("input", "chunks", "dim"), halves.args, strict=False)) | halves.kwargs
    if second.args[0] is not halves or halves.target not in ("chunk", torch.chunk) or given["chunks"] != 2:
        return None
    x, dim = given["input"], given.get("dim", 0)
    if not isinstance(x, fx.Node) or dim not in (-1, x.meta["val"].dim() - 1):
        return None
    out_scale = add_constant(gm, f"{source.name}_out_scale", factor.float().view(-1))
    return gm.graph.call_function(ops.geglu8, (x, out_scale, dtype, kernel))


def attention(gm: fx.GraphModule, source: fx.Node, factor: torch.Tensor | None, dtype: torch.dtype,
              choose: Callable[[tuple[int, ...], int, torch.dtype, torch.dtype], str | None]) -> fx.Node | None:
    """attention -> heads side by side, [batch, queries, heads * width]; ``choose`` names the kernel or declines."""
    found = _chain(source, lambda n: n.target is ATTENTION)
    plain = None if found is None else plain_attention(found[0])
    if found is None or plain is None:
        return None
    views = [(v.target, v.args[1:]) for v in found[1]]
    if len(views) != 2 or views[0] not in TRANSPOSED or views[1][0] not in ("reshape", "flatten"):
        return None
    q, k, v, scale = plain
    query, shape = q.meta["val"], source.meta["val"].shape
    if tuple(shape) != (query.shape[0], query.shape[2], query.shape[1] * query.shape[3]):
        return None
    kernel = choose(tuple(query.shape), k.meta["val"].shape[2], query.dtype, dtype)
    if kernel is None:
        return None
    out_scale = None if factor is None else add_constant(gm, f"{source.name}_out_scale", factor.float().view(-1))
    return gm.graph.call_function(ops.attention8, (q, k, v, scale, out_scale, dtype, kernel))


def _affine(gm: fx.GraphModule, given: Mapping[str, Any]) -> list[torch.Tensor | None] | None:
    """Weight and bias among a norm's arguments; None where the graph computes or is handed one of them."""
    nodes = [given.get("weight"), given.get("bias")]
    if any(n is not None and n.op != "get_attr" for n in nodes):
        return None
    return [None if n is None else getattr(gm, str(n.target)).detach() for n in nodes]
