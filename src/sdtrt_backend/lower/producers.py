"""Norms, GEGLU, attention and products with GELU that write the 8-bit tensor themselves, where only the quantisation reads their
result.

Each function takes the node that is quantised and the factor it is multiplied by (1 / scale, times an unfolded smoothing
factor), and returns the node of the 8-bit tensor, or None where its pattern does not hold.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .. import ops
from ..assign import gelu_pays
from ..calls import arguments, dimension, heads_in_front, name_of, written
from ..fx import ATTENTION, add_constant, by_tanh, chain, plain_attention
from ..kernels import Problem

# not in place: a kernel that takes the sum along does not write it where others read it under its first operand's name
ADDITIONS = (operator.add, torch.add)
PRODUCTS = (operator.mul, torch.mul)
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
        if not by_tanh(node):
            continue
        given, call, dtype = arguments(node), gm.graph.call_function, node.meta["val"].dtype
        with gm.graph.inserting_before(node):
            x = gm.graph.call_method("float", (given["input"],))
            cubic = call(torch.mul, (call(torch.square, (x,)), TWO_ROOT * 0.044715))
            u = call(torch.mul, (x, call(torch.add, (cubic, TWO_ROOT))))
            y = gm.graph.call_method("to", (call(torch.mul, (x, call(torch.sigmoid, (u,)))), dtype))
        y.meta.update(node.meta)
        node.replace_all_uses_with(y)
        gm.graph.erase_node(node)


def _dropout_is_idle(node: fx.Node) -> bool:
    given = arguments(node)
    return bool(given["p"] == 0.0 or given["training"] is False)


def viewed(gm: fx.GraphModule, node: fx.Node, views: list[fx.Node]) -> fx.Node:
    """``views`` applied to another node, in front of the insertion point."""
    for view in views:
        args, kwargs = fx.map_arg((view.args, view.kwargs), {**{n: n for n in view.all_input_nodes},
                                                             arguments(view)["input"]: node}.__getitem__)
        node = gm.graph.create_node(view.op, view.target, args, kwargs)  # nothing is replaced: the old view may stay
    return node


def operands(node: fx.Node, functions: Sequence[Any]) -> tuple[fx.Node, fx.Node] | None:
    """Both tensors of a sum or product, where it is one of ``functions`` and does nothing else."""
    if node.target not in functions:
        return None
    given = arguments(node)
    both = given["input"], given["other"]
    plain = given.get("alpha", 1) == 1 and given.get("out") is None
    return both if plain and all(isinstance(n, fx.Node) for n in both) else None


def concatenated(node: fx.Node, dim: int) -> Sequence[fx.Node]:
    """What the call concatenates along ``dim``; nothing where it does not."""
    if node.target is not torch.cat:
        return ()
    given = arguments(node)
    tensors: Any = given["tensors"]
    return tensors if dimension(given["dim"], node) == dim and isinstance(tensors, list | tuple) else ()


def group_norm(gm: fx.GraphModule, source: fx.Node, factor: torch.Tensor, dtype: torch.dtype, kernel: str) -> fx.Node | None:
    """group_norm [-> silu] [-> views]."""
    found = chain(source, lambda n: n.target in (torch.nn.functional.silu, torch.nn.functional.group_norm))
    if found is None:
        return None
    (node, views), silu = found, False
    if node.target is torch.nn.functional.silu:
        silu = True
        inner = chain(node.all_input_nodes[0], lambda n: n.target is torch.nn.functional.group_norm)
        if inner is None or inner[1] or len(inner[0].users) != 1:
            return None
        node = inner[0]
    if node.meta["val"].dim() != 4:
        return None
    y = group_norm_call(gm, node, silu, factor, dtype, kernel)
    return viewed(gm, y, views) if y is not None else None


def group_norm_call(gm: fx.GraphModule, node: fx.Node, silu: bool, factor: torch.Tensor | None, dtype: torch.dtype,
                    kernel: str) -> fx.Node | None:
    """group_norm8 for the norm ``node``; a concatenation of two, or a shift per image, in front of it is taken in. None where
    its weight or bias is computed."""
    given = arguments(node)
    x, x2, shift = given["input"], None, None
    affine = _affine(gm, given)
    if affine is None:
        return None
    weight, bias = affine
    out_scale = None if factor is None else add_constant(gm, f"{node.name}_out_scale", factor.float().view(-1))
    parts, added_up = concatenated(x, 1), operands(x, ADDITIONS)
    if len(parts) == 2 and parts[0].meta["val"].dtype is parts[1].meta["val"].dtype:
        x, x2 = parts
    elif added_up is not None and len(x.users) == 1:
        whole = x.meta["val"].shape
        for image, added in (added_up, added_up[::-1]):  # the kernel does not broadcast
            if image.meta["val"].shape == whole and added.meta["val"].shape == (*whole[:2], 1, 1):
                x, shift = image, gm.graph.call_method("flatten", (added, 1))
                break
    x, x2 = (None if t is None else gm.graph.call_method("contiguous", (t,), {"memory_format": torch.channels_last})
             for t in (x, x2))
    constants = [None if v is None else add_constant(gm, f"{node.name}_{name}", v)
                 for name, v in (("weight", weight), ("bias", bias))]
    return gm.graph.call_function(ops.group_norm8, (x, x2, shift, given["num_groups"], *constants, given["eps"], silu,
                                                    out_scale, dtype, kernel))


def layer_norm(gm: fx.GraphModule, source: fx.Node, factor: torch.Tensor, dtype: torch.dtype, kernel: str) -> fx.Node | None:
    """layer_norm over the last dimension, with the addition in front of it, whose sum is written too."""
    if source.target is not torch.nn.functional.layer_norm or source.meta["val"].shape[-1] > MAX_ROW:
        return None
    given = arguments(source)
    affine = _affine(gm, given)
    if affine is None or len(given["normalized_shape"]) != 1:
        return None
    x, eps = given["input"], given["eps"]
    added = operands(x, ADDITIONS)
    if added is not None and any(a.meta["val"].shape != x.meta["val"].shape or a.meta["val"].dtype is not x.meta["val"].dtype
                                 for a in added):
        added = None
    with gm.graph.inserting_before(source if added is None else x):
        constants = [None if v is None else add_constant(gm, f"{source.name}_{name}", v)
                     for name, v in zip(("weight", "bias"), affine, strict=True)]
        out_scale = add_constant(gm, f"{source.name}_out_scale", factor.float().view(-1))
        tail = (*constants, eps, out_scale, dtype, kernel)
        if added is None:
            return gm.graph.call_function(ops.layer_norm8, (x, *tail))
        both = gm.graph.call_function(ops.add_layer_norm8, (*added, *tail))
        total, y = (gm.graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
    total.meta.update(x.meta)
    x.replace_all_uses_with(total)
    return y


def geglu(gm: fx.GraphModule, source: fx.Node, factor: torch.Tensor, dtype: torch.dtype, kernel: str) -> fx.Node | None:
    """hidden * gelu(gate), the halves of one tensor."""
    hidden, gate = operands(source, PRODUCTS) or (source, source)
    if gate.target is not torch.nn.functional.gelu or arguments(gate)["approximate"] != "none":
        return None
    second = arguments(gate)["input"]
    if any(h.target is not operator.getitem or h.args[1] != i for i, h in enumerate((hidden, second))):
        return None
    halves = second.args[0]
    if hidden.args[0] is not halves or halves.target not in ("chunk", torch.chunk):
        return None
    x, chunks, dim = (arguments(halves)[name] for name in ("input", "chunks", "dim"))
    if chunks != 2 or dimension(dim, x) != x.meta["val"].dim() - 1:
        return None
    out_scale = add_constant(gm, f"{source.name}_out_scale", factor.float().view(-1))
    return gm.graph.call_function(ops.geglu8, (x, out_scale, dtype, kernel))


def linear_gelu(gm: fx.GraphModule, source: fx.Node, factor: torch.Tensor, dtype: torch.dtype,
                choose: Callable[[Problem, torch.dtype], str | None]) -> fx.Node | None:
    """int8 linear -> gelu, by its formula with tanh; ``choose`` names the kernel or declines."""
    if not by_tanh(source):
        return None
    product = arguments(source)["input"]
    if product.target is not ops.linear8 or len(product.users) != 1 or not gelu_pays(product):
        return None
    x, weight, scale, bias, wide, _ = product.args
    codes, value = getattr(gm, str(weight.target)), product.meta["val"]
    if codes.dtype is not torch.int8:
        return None
    rows = value.numel() // len(codes)
    kernel = choose(Problem("linear", (rows, codes.shape[1]), tuple(codes.shape), (1, 1), (0, 0), wide), dtype)
    if kernel is None:
        return None
    out_scale = add_constant(gm, f"{source.name}_out_scale", factor.float().view(-1).expand(len(codes)).contiguous())
    return gm.graph.call_function(ops.linear_gelu8, (x, weight, scale, bias, out_scale, dtype, kernel))


def attention(gm: fx.GraphModule, source: fx.Node, factor: torch.Tensor | None, dtype: torch.dtype,
              choose: Callable[[tuple[int, ...], int, torch.dtype, torch.dtype], str | None]) -> fx.Node | None:
    """attention -> heads side by side, [batch, queries, heads * width]; ``choose`` names the kernel or declines."""
    found = chain(source, lambda n: n.target is ATTENTION)
    plain = None if found is None else plain_attention(found[0])
    if found is None or plain is None:
        return None
    views = found[1]
    if len(views) != 2 or not heads_in_front(views[0]) or name_of(views[1]) not in ("reshape", "flatten"):
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
    nodes = [given["weight"], given["bias"]]
    if any(n is not None and n.op != "get_attr" for n in nodes):
        return None
    return [None if n is None else getattr(gm, str(n.target)).detach() for n in nodes]
