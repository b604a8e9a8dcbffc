"""The few FX helpers the stages share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from .rules import OPS

ATTENTION = torch.nn.functional.scaled_dot_product_attention


def module_path(node: fx.Node) -> str:
    """Path of the module that made ``node``, relative to the compiled root: ``down_blocks.0.resnets.1.conv1``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = list(stack.values())[-1][0]
    path = re.sub(r"(?:\.__dict__)?\.?_modules\['([^']+)'\]|\.__dict__\['_modules'\]\['([^']+)'\]",
                  lambda m: "." + (m.group(1) or m.group(2)), path)
    return re.sub(r"^(?:self|[LG]\['[^']+'\])\.?", "", path).strip(".") or node.name


def call_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a quantisable call by name, defaults filled in (``rules.OPS``)."""
    parameters = OPS[node.target].arguments
    values = dict(parameters)
    values.update(zip((name for name, _ in parameters), node.args, strict=False))
    values.update(node.kwargs)
    return values


def plain_attention(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, float] | None:
    """(query, key, value, factor of the scores) of a call of ATTENTION without mask, dropout or shared heads; else None."""
    if node.target is not ATTENTION:
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("attn_mask") is not None or any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        return None
    q, k, v = (given[name] for name in names[:3])
    width = q.meta["val"].shape[-1]
    return (q, k, v, given.get("scale") or width**-0.5) if q.meta["val"].dim() == 4 else None


def pair(value: int | tuple[int, ...] | list[int]) -> list[int]:
    """Stride, padding or dilation as the two-element list that kernels take."""
    return [value, value] if isinstance(value, int) else (list(value) * 2)[:2]


def propagate(gm: fx.GraphModule, example: Sequence[torch.Tensor]) -> None:
    """Write every node's shape, dtype and strides for these inputs into ``meta["val"]``."""
    with torch.no_grad():
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example)


def add_constant(gm: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    """Register ``value`` as a buffer of ``gm`` and return a get_attr node at the current insertion point. A name that is taken
    gets a number: one tensor may have several factors, and they are named after it."""
    wanted = name = re.sub(r"\W", "_", name)
    taken = 0
    while hasattr(gm, name):
        taken += 1
        name = f"{wanted}_{taken}"
    gm.register_buffer(name, value)
    return gm.graph.get_attr(name)


def inserting_after(node: fx.Node) -> AbstractContextManager[None]:
    """Insertion point behind ``node``; behind the last placeholder when it is one, as passes expect those first."""
    inputs = node.graph.find_nodes(op="placeholder") if node.op == "placeholder" else [node]
    return node.graph.inserting_after(inputs[-1])


def finish(gm: fx.GraphModule) -> fx.GraphModule:
    """Clean up after a pass: drop dead nodes and unused constants, check, recompile."""
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    used = {n.target for n in gm.graph.nodes if n.op == "get_attr"}
    for name in [name for name, _ in gm.named_buffers() if name not in used]:
        delattr(gm, name)
    gm.graph.lint()
    gm.recompile()
    return gm
