"""What attention reads on a GPU: q and k normed and rotated by one kernel, and all three in fp8 where that was planned."""

from __future__ import annotations

import operator
from itertools import permutations
from typing import Any

import torch
from torch import fx

from .. import ops
from ..calls import arguments, dimension, heads_in_front, name_of, rearranges
from ..fx import ATTENTION, add_constant, behind_linear, drop_dead, inserting_after, plain_attention
from ..kernels import Chooser
from ..values import FP8_MAX
from .producers import ADDITIONS, PRODUCTS, concatenated, operands, viewed

FP8 = torch.float8_e4m3fn
SPLITS = ("reshape", "view", "unflatten")  # that may make pairs of neighbours
NORMS = (torch.nn.functional.rms_norm, torch.rms_norm)


def rewrite_attention(gm: fx.GraphModule, choose: Chooser) -> None:
    """Rewrite the operands of every attention, and the attentions with ``meta["fp8_attention"]``."""
    kernel = choose.producer("rms_rope8")
    for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        found = plain_attention(node, masked=True)  # none with a mask is planned in fp8
        if found is None:
            continue
        planned = node.meta.get("fp8_attention")
        with gm.graph.inserting_before(node):
            if planned is None:
                for operand in found[:2] if kernel is not None else ():
                    node.replace_input_with(operand, rms_rope(gm, operand, None, operand.meta["val"].dtype, kernel) or operand)
                continue
            codes, (fp8_kernel, scales, centred) = [], planned
            mean = gm.graph.call_function(torch.mean, (found[2], 2, True), {"dtype": torch.float32}) if centred else None
            for name, operand, s in zip("qkv", found[:3], scales, strict=True):
                inverse = add_constant(gm, f"{node.name}_{name}_inverse_scale", _scalar(operand, 1 / s))
                rotated = None if kernel is None or name == "v" else rms_rope(gm, operand, inverse, FP8, kernel)
                codes.append(rotated or _coded(gm, operand, inverse, mean if name == "v" else None))
            y = _in_fp8(gm, node, codes, scales, found[3], fp8_kernel, mean)
        node.replace_all_uses_with(y)
    drop_dead(gm.graph)


def _scalar(like: fx.Node, value: float) -> torch.Tensor:
    """fp32, a buffer of two dimensions once it is in the graph: equal layers then have equal kernel source."""
    return torch.full((1, 1), value, device=like.meta["val"].device)


def _coded(gm: fx.GraphModule, operand: fx.Node, inverse: fx.Node, mean: fx.Node | None) -> fx.Node:
    """The operand, less its mean over the tokens where that is given, as fp8 codes, in plain torch for the compiler to fuse.

    Of a linear's result they are made right behind it: ``meta["encoded"]`` of the linear is then (they, their factor), for a
    product that writes them itself."""
    missing = -operand.meta["val"].shape[-1] % ops.ATTENTION_FP8_UNIT
    found = behind_linear(operand) if mean is None and not missing else None
    if found is None:
        x = operand if mean is None else gm.graph.call_function(torch.sub, (operand, mean))
        x = gm.graph.call_function(torch.nn.functional.pad, (x, (0, missing))) if missing else x
        return _encoded(gm, x, inverse, operand)
    linear, views = found
    factor = getattr(gm, str(inverse.target))
    with inserting_after(linear):
        x = _encoded(gm, linear, add_constant(gm, str(inverse.target), factor), linear)
    linear.meta["encoded"] = (x, float(factor))
    y = viewed(gm, x, views)
    y.meta.update(operand.meta)
    return y


def _encoded(gm: fx.GraphModule, x: fx.Node, inverse: fx.Node, like: fx.Node) -> fx.Node:
    x = gm.graph.call_function(torch.mul, (x, inverse))
    x = gm.graph.call_method("to", (gm.graph.call_function(torch.clamp, (x, -FP8_MAX, FP8_MAX)), FP8))
    x.meta.update(like.meta)
    return x


def _in_fp8(gm: fx.GraphModule, node: fx.Node, codes: list[fx.Node], scales: list[float], scale: float, kernel: str,
            mean: fx.Node | None) -> fx.Node:
    """The attention over ``codes``, as the 16-bit tensor [b, h, queries, d] that ``node`` was. mean: [b, h, 1, d] that the codes
    of v are without; weights of a softmax sum to 1, so it is in every row of the result."""
    value = node.meta["val"]
    b, h, queries, d = value.shape
    both = add_constant(gm, f"{node.name}_scales", torch.tensor(scales, device=value.device))
    y = gm.graph.call_function(ops.attention_fp8, (*codes, both, scale, ops.ATTENTION_FP8_OUT[kernel], kernel))
    y = gm.graph.call_method("to", (y, torch.float32))
    y = gm.graph.call_function(torch.mul, (y, add_constant(gm, f"{node.name}_out_scale", _scalar(node, scales[2]))))
    y = gm.graph.call_method("view", (y, b, queries, h, d + -d % ops.ATTENTION_FP8_UNIT))
    if d % ops.ATTENTION_FP8_UNIT:
        y = gm.graph.call_method("narrow", (y, -1, 0, d))
    if mean is not None:
        y = gm.graph.call_function(torch.add, (y, gm.graph.call_method("transpose", (mean, 1, 2))))
    # heads last until here: whoever puts them side by side again reads it without a copy
    y = gm.graph.call_method("transpose", (gm.graph.call_method("to", (y, value.dtype)), 1, 2))
    y.meta.update(node.meta)
    return y


def complex_in_real(gm: fx.GraphModule) -> None:
    """Neighbouring pairs taken as complex numbers and multiplied by others, as x * cos + swapped(x) * sin: Inductor fuses no
    complex numbers, and ``rms_rope`` knows this form. The tables of cosines and sines are made once, where the factors are."""
    call, method = gm.graph.call_function, gm.graph.call_method
    tables: dict[fx.Node, list[fx.Node]] = {}
    for product in [n for n in gm.graph.nodes if n.target in PRODUCTS]:
        for merged in [m for real in product.users if real.target is torch.view_as_real for m in real.users]:
            for complex_x, factor in permutations(operands(product, PRODUCTS) or (), 2):
                found = _paired(complex_x, merged)
                if found is None:
                    continue
                x, pairs = found
                if factor not in tables:
                    tables[factor] = _cos_and_sin(gm, factor, tables)
                with gm.graph.inserting_before(merged):
                    cos, sin = tables[factor]
                    halves = method("unbind", (pairs, -1))
                    even, odd = (call(operator.getitem, (halves, i)) for i in (0, 1))
                    swapped = method("flatten", (call(torch.stack, ([call(torch.neg, (odd,)), even], -1)), -2))
                    y = call(torch.add, (call(torch.mul, (x, cos)), call(torch.mul, (swapped, sin))))
                swapped.meta["val"] = y.meta["val"] = merged.meta["val"]
                merged.replace_all_uses_with(y)
                break


def _cos_and_sin(gm: fx.GraphModule, factor: fx.Node, known: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    """Real and imaginary parts for each of a pair's values, made behind ``factor``, or behind what it spreads over the heads."""
    if name_of(factor) == "unsqueeze":
        given = arguments(factor)
        if given["input"] not in known:
            known[given["input"]] = _cos_and_sin(gm, given["input"], known)
        tables = known[given["input"]]
        with inserting_after(tables[-1]):
            return [_call(gm, "unsqueeze", t, given["dim"]) for t in tables]
    with inserting_after(factor):
        parts = [_call(gm, torch.select, _call(gm, torch.view_as_real, factor), -1, i) for i in (0, 1)]
        one_for_all = factor.meta["val"].shape[-1:] in ((), (1,))
        return parts if one_for_all else [_call(gm, "repeat_interleave", part, 2, -1) for part in parts]


def _call(gm: fx.GraphModule, target: Any, *args: Any) -> fx.Node:
    """The call of a function or method, with its ``meta["val"]``."""
    values = fx.map_arg(args, lambda n: n.meta["val"])
    if isinstance(target, str):
        node, made = gm.graph.call_method(target, args), getattr(values[0], target)(*values[1:])
    else:
        node, made = gm.graph.call_function(target, args), target(*values)
    node.meta["val"] = made
    return node


def _paired(complex_x: fx.Node, merged: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, its neighbours in pairs), where those are taken as complex numbers and ``merged`` has the shape of x again."""
    if complex_x.target is not torch.view_as_complex or name_of(merged) not in ("flatten", "reshape", "view"):
        return None
    pairs = arguments(complex_x)["input"]
    x = arguments(pairs)["input"] if rearranges(pairs) else pairs
    before, after = x.meta["val"], merged.meta["val"]
    return (x, pairs) if _in_pairs(pairs, x) and (before.shape, before.dtype) == (after.shape, after.dtype) else None


def rms_rope(gm: fx.GraphModule, operand: fx.Node, inverse: fx.Node | None, dtype: torch.dtype, kernel: str) -> fx.Node | None:
    """The operand [b, h, t, d] from one kernel, where it is rms_norm -> rotary embedding of neighbouring pairs -> heads in
    front: (n * cos + rotated * sin), of one stream of tokens or of two, which are put one behind the other before the embedding
    or after it. ``dtype`` fp8: codes, times ``inverse``."""
    if not heads_in_front(operand):
        return None
    whole = _uncast(arguments(operand)["input"])
    parts = concatenated(whole, 1) or [whole]
    embedded = [e for e in map(_embedded, parts) if e is not None]
    if len(embedded) != len(parts):
        return None
    streams = [part for x, _ in embedded for part in concatenated(x, 1) or [x]]
    norms = [n for n in map(_norm, streams) if n is not None]
    if len(norms) != len(streams) or len(norms) > 2 or len({eps for _, _, eps in norms}) > 1:
        return None
    x, weight, eps = norms[-1]
    first, first_weight, _ = norms[0] if len(norms) == 2 else (None, None, eps)
    width = x.meta["val"].shape[-1]
    if width & (width - 1) or len({t.meta["val"].shape[:-2] for _, both in embedded for t in both}) > 1:
        return None
    tables = [_one_behind_the_other(gm, [both[i] for _, both in embedded]) for i in (0, 1)]
    tables = [gm.graph.call_method("contiguous", (gm.graph.call_method("to", (t, torch.float32)),)) for t in tables]
    y = gm.graph.call_function(ops.rms_rope8, (x, first, weight, first_weight, *tables, eps, inverse, dtype, kernel))
    y = gm.graph.call_method("transpose", (y, 1, 2))
    y.meta.update(operand.meta)
    return y


def _embedded(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """(x, [cos, sin]) where the node is x * cos + rotated(x) * sin, all [b, t, h, d]."""
    node = _uncast(node)
    products = [operands(_uncast(term), PRODUCTS) for term in operands(node, ADDITIONS) or ()]
    if len(products) != 2 or products[0] is None or products[1] is None:
        return None
    x, rotated = (_uncast(p[0]) for p in products)
    tables = [t for p in products if (t := _table(p[1], node.meta["val"].shape)) is not None]
    return (x, tables) if len(tables) == 2 and _swaps_neighbours(rotated, x) else None


def _one_behind_the_other(gm: fx.GraphModule, tables: list[fx.Node]) -> fx.Node:
    """The tables of both streams as one, made once for all that read them."""
    if len(tables) == 1:
        return tables[0]
    for user in tables[0].users:
        if user.target is torch.cat and user.args == (tables, -2):
            return user
    with inserting_after(next(n for n in reversed(gm.graph.nodes) if n in tables)):
        return _call(gm, torch.cat, tables, -2)


def _uncast(node: Any) -> fx.Node:
    """The node that conversions between floating-point types start from."""
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in ("float", "to", "type_as"):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def _table(node: Any, shape: torch.Size) -> fx.Node | None:
    """[t, d], or [b, t, d] of one image or of each, behind a table that is the same for all heads of [b, t, h, d]."""
    node = _uncast(node)
    whole = slice(None, None, None)
    if node.target is operator.getitem and node.args[1] == (None, whole, None, whole):
        table = node.args[0]
    elif name_of(node) == "unsqueeze" and dimension(arguments(node)["dim"], node) == node.meta["val"].dim() - 2:
        table = arguments(node)["input"]
    else:
        return None
    b, t, _, d = shape
    return table if tuple(table.meta["val"].shape) in ((t, d), (1, t, d), (b, t, d)) else None


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
    return _in_pairs(pairs, x) and _uncast(arguments(pairs)["input"]) is x


def _in_pairs(pairs: fx.Node, x: fx.Node) -> bool:
    """Whether ``pairs`` [..., d / 2, 2] are the neighbours of x [..., d]."""
    shape = x.meta["val"].shape
    return rearranges(pairs) and name_of(pairs) in SPLITS and pairs.meta["val"].shape == (*shape[:-1], shape[-1] // 2, 2)


def _norm(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """(input [b, t, h, d], weight [d], eps) of an RMS norm over the last dimension."""
    found = _norm_in_parts(node) if node.target in PRODUCTS else None
    if node.target in NORMS:
        given = arguments(node)
        if given["weight"] is not None and given["eps"] is not None and len(given["normalized_shape"]) == 1:
            found = given["input"], given["weight"], given["eps"]
    return found if found is not None and found[0].meta["val"].dim() == 4 else None


def _norm_in_parts(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """x * rsqrt(mean(x ** 2) + eps) * weight, as diffusers' own RMSNorm computes it."""
    scaled, weight = operands(node, PRODUCTS) or (node, node)
    x, root = operands(_uncast(scaled), PRODUCTS) or (node, node)
    total = arguments(root)["input"] if name_of(root) == "rsqrt" else node
    mean, eps = ((given := arguments(total))["input"], given["other"]) if total.target in ADDITIONS else (node, None)
    given = arguments(mean) if name_of(mean) == "mean" else {}
    square = given.get("input", node)
    if name_of(square) != "pow" or arguments(square)["exponent"] != 2 or _uncast(arguments(square)["input"]) is not _uncast(x):
        return None
    last = given["keepdim"] is True and [dimension(d, square) for d in _listed(given["dim"])] == [square.meta["val"].dim() - 1]
    fits = weight.meta["val"].shape == square.meta["val"].shape[-1:]
    return (_uncast(x), weight, eps) if last and fits and isinstance(eps, float) else None


def _listed(dim: int | list[int]) -> list[int]:
    return [dim] if isinstance(dim, int) else dim
