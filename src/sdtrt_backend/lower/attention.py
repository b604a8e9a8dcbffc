"""What attention reads on a GPU: q and k normed and rotated by one kernel, and all three in fp8 where that was planned."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .. import ops
from ..calls import arguments, name_of, rearranges
from ..fx import ATTENTION, add_constant, drop_dead, plain_attention
from ..kernels import Chooser
from ..values import FP8_MAX
from .producers import ADDITIONS, PRODUCTS, concatenated, heads_in_front, operands

FP8 = torch.float8_e4m3fn
SPLITS = ("reshape", "view", "unflatten")  # that may make pairs of neighbours
NORMS = (torch.nn.functional.rms_norm, torch.rms_norm)


def rewrite_attention(gm: fx.GraphModule, choose: Chooser) -> None:
    """Rewrite the operands of every attention, and the attentions with ``meta["fp8_attention"]``."""
    kernel = choose.producer("rms_rope8")
    for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        found = plain_attention(node)
        if found is None:
            continue
        planned = node.meta.get("fp8_attention")
        with gm.graph.inserting_before(node):
            if planned is None:
                for operand in found[:2] if kernel is not None else ():
                    node.replace_input_with(operand, rms_rope(gm, operand, None, operand.meta["val"].dtype, kernel) or operand)
                continue
            codes, (fp8_kernel, scales) = [], planned
            for name, operand, s in zip("qkv", found[:3], scales, strict=True):
                inverse = add_constant(gm, f"{node.name}_{name}_inverse_scale", _scalar(operand, 1 / s))
                rotated = None if kernel is None or name == "v" else rms_rope(gm, operand, inverse, FP8, kernel)
                codes.append(rotated or _coded(gm, operand, inverse))
            y = _in_fp8(gm, node, codes, scales, found[3], fp8_kernel)
        node.replace_all_uses_with(y)
    drop_dead(gm.graph)


def _scalar(like: fx.Node, value: float) -> torch.Tensor:
    """fp32, a buffer of two dimensions once it is in the graph: equal layers then have equal kernel source."""
    return torch.full((1, 1), value, device=like.meta["val"].device)


def _coded(gm: fx.GraphModule, operand: fx.Node, inverse: fx.Node) -> fx.Node:
    """The operand as fp8 codes, in plain torch for the compiler to fuse."""
    x = gm.graph.call_function(torch.mul, (operand, inverse))
    x = gm.graph.call_method("to", (gm.graph.call_function(torch.clamp, (x, -FP8_MAX, FP8_MAX)), FP8))
    x.meta.update(operand.meta)
    return x


def _in_fp8(gm: fx.GraphModule, node: fx.Node, codes: list[fx.Node], scales: list[float], scale: float,
            kernel: str) -> fx.Node:
    """The attention over ``codes``, as the 16-bit tensor [b, h, queries, d] that ``node`` was."""
    value = node.meta["val"]
    b, h, queries, d = value.shape
    both = add_constant(gm, f"{node.name}_scales", torch.tensor(scales, device=value.device))
    y = gm.graph.call_function(ops.attention_fp8, (*codes, both, scale, kernel))
    y = gm.graph.call_method("to", (y, torch.float32))
    y = gm.graph.call_function(torch.mul, (y, add_constant(gm, f"{node.name}_out_scale", _scalar(node, scales[2]))))
    y = gm.graph.call_method("to", (y, value.dtype))
    y = gm.graph.call_method("transpose", (gm.graph.call_method("view", (y, b, queries, h, d)), 1, 2))
    y.meta.update(node.meta)
    return y


def rms_rope(gm: fx.GraphModule, operand: fx.Node, inverse: fx.Node | None, dtype: torch.dtype, kernel: str) -> fx.Node | None:
    """The operand [b, h, t, d] from one kernel, where it is rms_norm -> rotary embedding of neighbouring pairs -> heads in
    front: (n * cos + rotated * sin), of one stream of tokens or of two one behind the other. ``dtype`` fp8: codes, times
    ``inverse``."""
    if not heads_in_front(operand):
        return None
    terms = operands(_uncast(arguments(operand)["input"]), ADDITIONS)
    products = [operands(_uncast(term), PRODUCTS) for term in terms or ()]
    if len(products) != 2 or products[0] is None or products[1] is None:
        return None
    normed, rotated = (_uncast(p[0]) for p in products)
    cos, sin = (_table(p[1], operand.meta["val"].shape[2:]) for p in products)
    if cos is None or sin is None or not _swaps_neighbours(rotated, normed):
        return None
    streams = concatenated(normed, 1) or [normed]
    norms = [n for n in map(_norm, streams) if n is not None]
    if len(norms) != len(streams) or len(norms) > 2 or len({eps for _, _, eps in norms}) > 1:
        return None
    x, weight, eps = norms[-1]
    first, first_weight, _ = norms[0] if len(norms) == 2 else (None, None, eps)
    width = x.meta["val"].shape[-1]
    if width & (width - 1):
        return None
    tables = [gm.graph.call_method("contiguous", (gm.graph.call_method("to", (t, torch.float32)),)) for t in (cos, sin)]
    y = gm.graph.call_function(ops.rms_rope8, (x, first, weight, first_weight, *tables, eps, inverse, dtype, kernel))
    y = gm.graph.call_method("transpose", (y, 1, 2))
    y.meta.update(operand.meta)
    return y


def _uncast(node: Any) -> fx.Node:
    """The node that conversions between floating-point types start from."""
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in ("float", "to"):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def _table(node: Any, shape: torch.Size) -> fx.Node | None:
    """[t, d] of that shape behind table[None, :, None, :]."""
    node = _uncast(node)
    whole = slice(None, None, None)
    if node.target is not operator.getitem or node.args[1] != (None, whole, None, whole):
        return None
    table = node.args[0]
    return table if table.meta["val"].shape == shape else None


def _swaps_neighbours(node: fx.Node, x: fx.Node) -> bool:
    """Whether ``node`` is x with neighbours (a, b) as (-b, a): reshape to pairs, unbind, stack, flatten."""
    value = x.meta["val"]
    stack = arguments(node)["input"] if name_of(node) == "flatten" and node.meta["val"].shape == value.shape else None
    joined = arguments(stack) if isinstance(stack, fx.Node) and stack.target is torch.stack else {"tensors": (), "dim": None}
    if len(pair := tuple(joined["tensors"])) != 2 or joined["dim"] not in (-1, value.dim()) or name_of(pair[0]) != "neg":
        return False
    halves = [arguments(pair[0])["input"], pair[1]]
    if any(h.target is not operator.getitem or h.args[1] != i for h, i in zip(halves, (1, 0), strict=True)):
        return False
    unbind, other = (h.args[0] for h in halves)
    if unbind is not other or name_of(unbind) != "unbind" or arguments(unbind)["dim"] not in (-1, value.dim()):
        return False
    pairs = arguments(unbind)["input"]
    return rearranges(pairs) and arguments(pairs)["input"] is x and (
        pairs.meta["val"].shape == (*value.shape[:-1], value.shape[-1] // 2, 2) and name_of(pairs) in SPLITS)


def _norm(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """(input [b, t, h, d], weight [d], eps) of an RMS norm over the last dimension."""
    if node.target not in NORMS:
        return None
    given = arguments(node)
    if given["weight"] is None or given["eps"] is None or len(given["normalized_shape"]) != 1:
        return None
    return (given["input"], given["weight"], given["eps"]) if given["input"].meta["val"].dim() == 4 else None
