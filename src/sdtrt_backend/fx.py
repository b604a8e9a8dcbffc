"""The few FX helpers the stages share."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from .rules import OPS

ATTENTION = torch.nn.functional.scaled_dot_product_attention
# calls that change their first argument; so do methods and functions whose name ends in one underscore
IN_PLACE = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow,
            operator.imod, operator.iand, operator.ior, operator.ixor}
# names of methods and functions whose result may share the memory of their first argument
VIEWS = {"getitem", "view", "view_as", "reshape", "reshape_as", "transpose", "permute", "t", "movedim", "swapaxes", "flatten",
         "unflatten", "squeeze", "unsqueeze", "expand", "expand_as", "chunk", "split", "tensor_split", "unbind", "narrow",
         "select", "contiguous", "to", "type", "type_as", "float", "half", "bfloat16", "detach", "dropout", "getattr"}


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
    """(query, key, value, factor of the scores) of a call of ATTENTION without mask, dropout or anything broadcast, keys and
    values of one width; else None."""
    if node.target is not ATTENTION:
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("attn_mask") is not None or any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        return None
    q, k, v = (given[name] for name in names[:3])
    query, key, value = (t.meta["val"].shape for t in (q, k, v))
    plain = len(query) == 4 and key == value and key[:2] == query[:2]
    return (q, k, v, given.get("scale") or query[-1] ** -0.5) if plain else None


def pair(value: int | tuple[int, ...] | list[int]) -> list[int]:
    """Stride, padding or dilation as the two-element list that kernels take."""
    return [value, value] if isinstance(value, int) else (list(value) * 2)[:2]


def propagate(gm: fx.GraphModule, example: Sequence[torch.Tensor]) -> None:
    """Write every node's shape, dtype and strides for these inputs into ``meta["val"]``."""
    with torch.no_grad():
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example)


def inductor(gm: fx.GraphModule, example: Sequence[torch.Tensor],
             settings: Mapping[str, Any] | None = None) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Compile ``gm`` through Inductor for inference, one thread at a time, and while Dynamo compiles nothing.

    settings: of ``torch._inductor.config``, for this compilation. Tracing a graph patches torch.nn.Module, which two threads must
    not do at a time. The flag tells compiled modules that other threads call meanwhile that the trace is not theirs: without it
    they raise. Dynamo sets it for its own compilations (PyTorch 2.13).
    """
    from torch._dynamo.convert_frame import compile_lock
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    with compile_lock, config.patch(dict(settings or {})), torch.no_grad():
        before, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
        try:
            return cast(Callable[..., tuple[torch.Tensor, ...]], compile_fx(gm, list(example)))
        finally:
            torch.compiler._is_compiling_flag = before


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


def _name(node: fx.Node) -> str:
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name.partition(".")[0]  # of an overload: "add_.Tensor"


def changes(node: fx.Node) -> fx.Node | None:
    """The tensor that a call changes in place, or None."""
    name = _name(node)
    if node.op not in ("call_function", "call_method"):
        return None
    if isinstance(node.kwargs.get("out"), fx.Node):
        return node.kwargs["out"]  # type: ignore[return-value]
    named = name.endswith("_") and not name.endswith("__")
    if not (named or node.target in IN_PLACE or node.kwargs.get("inplace")):
        return None
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def written(graph: fx.Graph) -> set[fx.Node]:
    """Every node whose memory some call of the graph may change: what it reads there depends on when it reads."""
    found = {base for n in graph.nodes if (base := changes(n)) is not None}
    pairs = [(n, base) for n in graph.nodes
             if isinstance(base := changes(n) or (n.args[0] if _name(n) in VIEWS and n.args else None), fx.Node)]
    before = 0
    while len(found) > before:
        before = len(found)
        for pair in pairs:
            if not found.isdisjoint(pair):
                found.update(pair)
    return found


def read_through_copies(gm: fx.GraphModule) -> None:
    """Whoever reads what the graph changes in place reads a copy, made where it reads: a kernel that takes its place may then
    read earlier or later. Views, changes and outputs stay."""
    changed = written(gm.graph)
    for base in [n for n in gm.graph.nodes if n in changed and isinstance(n.meta.get("val"), torch.Tensor)]:
        for reader in list(base.users):
            if reader in changed or reader.op == "output":
                continue
            with gm.graph.inserting_before(reader):
                copy = gm.graph.call_method("clone", (base,))
            copy.meta.update(base.meta)
            reader.replace_input_with(base, copy)


def drop_dead(graph: fx.Graph) -> None:
    """Remove what nobody reads and what changes nothing."""
    graph.eliminate_dead_code(lambda n: n.is_impure() or changes(n) is not None)


def finish(gm: fx.GraphModule) -> fx.GraphModule:
    """Clean up after a pass: drop dead nodes and unused constants, check, recompile."""
    drop_dead(gm.graph)
    gm.delete_all_unused_submodules()
    used = {n.target for n in gm.graph.nodes if n.op == "get_attr"}
    for name in [name for name, _ in gm.named_buffers() if name not in used]:
        delattr(gm, name)
    gm.graph.lint()
    gm.recompile()
    return gm
