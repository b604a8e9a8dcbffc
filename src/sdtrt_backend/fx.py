"""The few FX helpers the stages share."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from . import identity
from .calls import arguments, call_arguments, changes, inputs_changed, name_of, rearranges, shares, written
from .errors import GraphError

__all__ = ["ATTENTION", "WORK", "add_constant", "alive", "arguments", "await_workers", "behind_linear", "by_tanh",
           "call_arguments", "chain", "changes", "described", "drop_dead", "finish", "for_passes", "generated", "inductor",
           "inputs_changed", "inserting_after", "let_go", "module_path", "pair", "plain_attention", "propagate",
           "read_through_copies", "start_probing", "start_workers", "written", "written_out"]

ATTENTION = torch.nn.functional.scaled_dot_product_attention
MADE_BY = "made by"  # key of ``meta``: what "val" was computed by and from, as text, and the tensors whose memory it may share
WORK = "work"  # key of ``meta``: the share of a graph's products and attentions that those of this call's shapes are, together
# calls whose numbers do not tell the shape or dtype of what they make
SCALED = ("quantize_per_tensor", "dequantize_per_tensor", "quantize_fp8")
LEAST_SHARE = 1e-3  # of it: below that nothing is measured for an attention


def module_path(node: fx.Node) -> str:
    """Path of the module that made ``node``, relative to the compiled root: ``down_blocks.0.resnets.1.conv1``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = list(stack.values())[-1][0]
    path = re.sub(r"(?:\.__dict__)?\.?_modules\['([^']+)'\]|\.__dict__\['_modules'\]\['([^']+)'\]",
                  lambda m: "." + (m.group(1) or m.group(2)), path)
    return re.sub(r"^(?:self|[LG]\['[^']+'\])\.?", "", path).strip(".") or node.name


def plain_attention(node: fx.Node, masked: bool = False) -> tuple[fx.Node, fx.Node, fx.Node, float] | None:
    """(query, key, value, factor of the scores) of a call of ATTENTION without mask, unless ``masked``, without dropout or
    anything broadcast, keys and values of one width, of which it matters how they are computed (``LEAST_SHARE``); else None."""
    if node.target is not ATTENTION or node.meta.get(WORK, 1.0) < LEAST_SHARE:
        return None
    given = arguments(node)
    if (given["attn_mask"] is not None and not masked) or any(given[name] for name in ("dropout_p", "is_causal", "enable_gqa")):
        return None
    q, k, v, scale = (given[name] for name in ("query", "key", "value", "scale"))
    query, key, value = (t.meta["val"].shape for t in (q, k, v))
    plain = len(query) == 4 and key == value and key[:2] == query[:2] and not isinstance(scale, fx.Node)
    return (q, k, v, query[-1] ** -0.5 if scale is None else scale) if plain else None


def chain(node: fx.Node, ends: Callable[[fx.Node], bool]) -> tuple[fx.Node, list[fx.Node]] | None:
    """(the node that ``ends`` accepts, the views from it down to ``node``) where each is read by the next alone."""
    views: list[fx.Node] = []
    while not ends(node):
        if not rearranges(node):
            return None
        views.append(node)
        node = arguments(node)["input"]
        if len(node.users) != 1:
            return None
    return node, views[::-1]


def behind_linear(operand: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """(the linear, the views down to ``operand``) where an attention reads nothing else of it, and nobody else anything."""
    return chain(operand, lambda n: name_of(n) == "linear") if len(operand.users) == 1 else None


def by_tanh(node: fx.Node) -> bool:
    """Whether the call is GELU by its formula with tanh."""
    return node.target is torch.nn.functional.gelu and arguments(node)["approximate"] == "tanh"


def pair(value: int | tuple[int, ...] | list[int]) -> list[int]:
    """Stride, padding or dilation as the two-element list that kernels take."""
    return [value, value] if isinstance(value, int) else (list(value) * 2)[:2]


def propagate(gm: fx.GraphModule, example: Sequence[torch.Tensor]) -> None:
    """Write every node's shape, dtype and strides for these inputs into ``meta["val"]``. What one call makes of tensors of some
    shapes, dtypes and strides is not computed again for another like it, in another block or before a pass; where its result may
    lie in memory of what it reads, only for another of the same tensors: whose memory it is shows in ``val`` too."""
    known = {_key(*n.meta[MADE_BY]): (n.meta[MADE_BY][1], n.meta["val"]) for n in gm.graph.nodes if MADE_BY in n.meta}
    modes = (v.fake_mode for _, v in known.values() if isinstance(v, FakeTensor))
    with torch.no_grad():
        _Propagate(gm, next(modes, None) or FakeTensorMode(allow_non_fake_inputs=True), known).propagate(*example)


def _key(made_by: str, tensors: Sequence[Any]) -> tuple[Any, ...]:
    return made_by, *map(id, tensors)


class _Propagate(FakeTensorProp):
    """known: ``_key`` of a call -> (the tensors in the key, which it keeps alive, the result); within: the autocast it is in."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode, known: dict[tuple[Any, ...], tuple[Sequence[Any], Any]]) -> None:
        super().__init__(gm, mode)
        self.known, self.within = known, ""

    def run_node(self, n: fx.Node) -> Any:
        n.meta.pop(MADE_BY, None)
        if "autocast" in name_of(n):
            self.within += f"{name_of(n)}{n.args}"
        made_by = self._text(n)
        if not made_by:
            return super().run_node(n)
        read = [a.meta["val"] for a in n.all_input_nodes]
        for tensors in ([], read):
            if (key := _key(made_by, tensors)) in self.known:
                n.meta[MADE_BY] = made_by, tensors
                n.meta["val"] = result = self.known[key][1]
                return result
        result = super().run_node(n)
        made = n.meta.get("val")
        if all(isinstance(v, FakeTensor) for v in (made if isinstance(made, list | tuple) else [made])):
            tensors = read if shares(n) else []
            n.meta[MADE_BY] = made_by, tensors
            self.known[_key(made_by, tensors)] = tensors, made
        return result

    def _text(self, n: fx.Node) -> str:
        """What it does and reads; "" of what is like no other call."""
        if n.op == "get_attr":
            held = self.fetch_attr(str(n.target))
            return f"constant {described(held)}" if type(held) in (torch.Tensor, torch.nn.Parameter) else ""
        if n.op not in ("call_function", "call_method") or changes(n) is not None:
            return ""
        try:
            return self.within + identity.call(n, lambda a: described(a.meta["val"]),
                                               _without_scale if name_of(n) in SCALED else identity.own_arguments)
        except (GraphError, KeyError):
            return ""


def _without_scale(node: fx.Node) -> tuple[Any, Any]:
    return [a for a in node.args if not isinstance(a, float)], node.kwargs


def described(value: Any) -> str:
    """Shape, strides, dtype and device of a tensor, as text; of a list or a number what it holds."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}"
    return str([described(v) for v in value] if isinstance(value, list | tuple) else value)


def inductor(gm: fx.GraphModule, example: Sequence[torch.Tensor],
             settings: Mapping[str, Any] | None = None) -> Callable[..., tuple[torch.Tensor, ...]]:
    """``generated``, whose code lets its constants go with the callable."""
    compiled, modules = generated(gm, example, settings)
    weakref.finalize(compiled, let_go, modules).atexit = False
    return compiled


def generated(gm: fx.GraphModule, example: Sequence[torch.Tensor], settings: Mapping[str, Any] | None = None,
              ) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[Any]]:
    """(``gm`` compiled through Inductor for inference, the modules of code that it became): one thread at a time, and while
    Dynamo compiles nothing.

    settings: of ``torch._inductor.config``, for this compilation. Tracing a graph patches torch.nn.Module, which two threads must
    not do at a time. The flag tells compiled modules that other threads call meanwhile that the trace is not theirs: without it
    they raise. Dynamo sets it for its own compilations (PyTorch 2.13).
    """
    from torch._dynamo.convert_frame import compile_lock
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.compile_fx import compile_fx

    with compile_lock, config.patch(dict(settings or {})), torch.no_grad():
        before, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
        try:
            known = {id(module) for module in PyCodeCache.modules}
            compiled = cast(Callable[..., tuple[torch.Tensor, ...]], compile_fx(gm, list(example)))
            _without_graph(gm)  # Inductor keeps the module
            return compiled, [m for m in PyCodeCache.modules if id(m) not in known]
        finally:
            torch.compiler._is_compiling_flag = before


def start_workers() -> None:
    """Inductor compiles Triton kernels in processes that take seconds to start, and until then in this one, one after the other.
    torch.compile's own backend starts them where it begins."""
    from torch._inductor import async_compile

    warm = getattr(async_compile, "maybe_warm_pool", None)  # of no public API
    if warm is not None:
        warm()


def start_probing() -> None:
    """Which vector instructions C++ may use Inductor tries in processes that take a second, and remembers. Begun ahead of the
    first compilation, that second is nobody's."""
    from torch._inductor import cpu_vec_isa

    probe = getattr(cpu_vec_isa, "valid_vec_isa_list", None)  # of no public API
    if probe is not None:
        threading.Thread(target=probe, name="sdtrt_backend: vector instructions", daemon=True).start()


def await_workers(seconds: float = 20.0) -> None:
    """Where they are on their way, until they are there, or for ``seconds``: they compile more kernels at a time than this
    process does meanwhile."""
    from torch._inductor.async_compile import AsyncCompile

    wait = getattr(AsyncCompile, "wait_pool_ready", None)  # of no public API
    if wait is not None:
        with suppress(TimeoutError):
            wait(seconds)


def let_go(modules: Sequence[Any]) -> None:
    """Generated code that nobody calls any more: Inductor keeps it, with the constants that were frozen into it, as long as the
    process lives."""
    for module in modules:
        for name in [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]:
            delattr(module, name)


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
    """Insertion point behind ``node`` for calls in their order; behind the last placeholder when it is one, as passes expect
    those first."""
    inputs = node.graph.find_nodes(op="placeholder") if node.op == "placeholder" else [node]
    return node.graph.inserting_before(inputs[-1].next)


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
    """Clean up after a pass: check, drop dead nodes and unused constants, recompile."""
    drop_dead(gm.graph)  # which checks it
    gm.delete_all_unused_submodules()
    used = {n.target for n in gm.graph.nodes if n.op == "get_attr"}
    for name in [name for name, _ in gm.named_buffers(remove_duplicate=False) if name not in used]:
        delattr(gm, name)
    gm.recompile()
    return gm


def alive(nodes: Mapping[str, fx.Node], gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Those of ``nodes`` that are still in ``gm``'s graph: a layer whose result nobody uses is erased as dead."""
    kept = set(gm.graph.nodes)
    return {name: node for name, node in nodes.items() if node in kept}


def for_passes(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module that is written as Python code when it is first called: most are rewritten by passes and never called, and for a
    deep model that is a second for each pass."""
    return _LazyGraphModule(root, graph)


def written_out(gm: fx.GraphModule) -> fx.GraphModule:
    """The module, as Python code: for whoever asks which arguments its forward has."""
    _LazyGraphModule.force_recompile(gm)
    return gm


def runnable(gm: fx.GraphModule) -> Callable[..., Any]:
    """Its forward, for good: the graph is let go."""
    forward = written_out(gm).forward
    _without_graph(gm)
    return forward


def _without_graph(gm: fx.GraphModule) -> None:
    """A graph and its module hold each other, so that the tensors of a step that is dropped would wait for Python's collection of
    cycles."""
    gm.graph._owning_module = None
    del gm._graph
