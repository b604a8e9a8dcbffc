"""A graph -> parts that run one behind the other, each for one target, with the reason; few and large ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .fx import ATTENTION
from .rules import OPS

ENGINE, REST = "tensorrt", "inductor"
# Layers (linears, convolutions) between two cuts from which an engine pays: a cut costs a launch, and two passes over every
# tensor that crosses it in the layout of the other side
MIN_LAYERS = 2
ATTENTION_REASON = "attention stays in 16 bits and outside of engines: TensorRT-RTX has no kernel for it on every card"
SMALL_REASON = f"fewer than {MIN_LAYERS} linears or convolutions between two cuts: an engine gains less than the cut costs"


@dataclass(frozen=True)
class Part:
    """A piece of a graph. graph: its nodes, with its own constants; inputs, outputs: names of the tensors that cross its
    borders, nodes or placeholders of the whole graph; layers: names of its linears and convolutions."""

    target: str
    reason: str
    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def refusal(node: fx.Node) -> str | None:
    """Why an engine does not take this call, or None."""
    return ATTENTION_REASON if node.target is ATTENTION else None


def partition(gm: fx.GraphModule, refuses: Callable[[fx.Node], str | None] = refusal) -> tuple[Part, ...]:
    """The parts of ``gm`` in the order they run; all that ``refuses`` declines, and what lies alone between such, is for REST.

    A node runs in the first part of its target that all its inputs allow, so independent branches share parts. What is made of
    constants alone, the dequantised weights, is made in every part that reads it: 8-bit codes do not cross a border in 16 bits.
    """
    fixed = _fixed(gm)
    calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method", "call_module") and n not in fixed]
    reasons: dict[fx.Node, str] = {}
    for node in calls:
        # what takes a result apart stays with what made it: only tensors cross a border
        made = next((a for a in node.all_input_nodes if not _is_tensor(a)), None)
        reasons[node] = (refuses(node) or "") if made is None else reasons.get(made, "")
    for level in _by_level(calls, reasons).values():
        if not reasons[level[0]] and sum(n.target in OPS for n in level) < MIN_LAYERS:
            reasons.update(dict.fromkeys(level, SMALL_REASON))
    return tuple(_part(gm, level, reasons, fixed) for _, level in sorted(_by_level(calls, reasons).items()))


def _fixed(gm: fx.GraphModule) -> set[fx.Node]:
    """Calls that read constants alone; without those that are a result of the graph, which some part must make."""
    results, fixed = set(gm.graph.output_node().all_input_nodes), set()
    for n in gm.graph.nodes:
        read = n.all_input_nodes
        if n.op.startswith("call") and n not in results and read and all(a.op == "get_attr" or a in fixed for a in read):
            fixed.add(n)
    return fixed


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) or node.op in ("placeholder", "get_attr")


def _by_level(calls: Sequence[fx.Node], reasons: Mapping[fx.Node, str]) -> dict[int, list[fx.Node]]:
    """Levels of even number are engines, of odd number the rest; a node is not before any of its inputs."""
    level: dict[fx.Node, int] = {}
    for node in calls:
        least = max((level[a] for a in node.all_input_nodes if a in level), default=0)
        level[node] = least + (least % 2 != bool(reasons[node]))
    found: dict[int, list[fx.Node]] = {}
    for node in calls:
        found.setdefault(level[node], []).append(node)
    return found


def _part(gm: fx.GraphModule, calls: Sequence[fx.Node], reasons: Mapping[fx.Node, str], fixed: Set[fx.Node]) -> Part:
    needed = set(calls)
    for n in reversed(gm.graph.nodes):
        needed |= {a for a in n.all_input_nodes if a in fixed} if n in needed else set()
    nodes = [n for n in gm.graph.nodes if n in needed]
    graph, env, inside = fx.Graph(), {}, set(nodes)
    before = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
    inputs = [a for a in before if a.op != "get_attr"]
    for a in inputs:
        env[a] = graph.placeholder(a.name)
        env[a].meta.update(a.meta)
    for a in before:
        if a.op == "get_attr":
            env[a] = graph.get_attr(str(a.target))
            env[a].meta.update(a.meta)
    for n in nodes:
        env[n] = graph.node_copy(n, env.__getitem__)
    outputs = [n for n in calls if any(user not in inside for user in n.users)]
    graph.output(tuple(env[n] for n in outputs))
    why = [reasons[n] for n in calls if reasons[n]]
    return Part(REST if why else ENGINE, max(dict.fromkeys(why), key=why.count) if why else "every operation has a converter",
                fx.GraphModule(gm, graph), tuple(a.name for a in inputs), tuple(n.name for n in outputs),
                tuple(n.name for n in calls if n.target in OPS))


class Parts:
    """What runs the parts: ``steps`` are (callable, names of its inputs, names of its outputs), in order.

    Every tensor that crosses a border is contiguous, whatever made it. Called with the graph's inputs, returns its outputs.
    """

    def __init__(self, gm: fx.GraphModule, steps: Sequence[tuple[Callable[..., Any], Sequence[str], Sequence[str]]]) -> None:
        self.placeholders = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        self.result = gm.graph.output_node().args[0]
        self.constants = {n: getattr(gm, str(n.target)) for n in gm.graph.output_node().all_input_nodes if n.op == "get_attr"}
        self.steps = list(steps)
        last = {name: i for i, (_, inputs, _) in enumerate(self.steps) for name in inputs}
        last |= {n.name: len(self.steps) for n in gm.graph.output_node().all_input_nodes}
        # names whose last reader is step i
        self.done = [[name for name, reader in last.items() if reader == i] for i in range(len(self.steps))]

    def __call__(self, *inputs: torch.Tensor) -> Any:
        held = {name: t.contiguous() for name, t in zip(self.placeholders, inputs, strict=True)}
        for (run, names, outputs), done in zip(self.steps, self.done, strict=True):
            results = run(*(held[name] for name in names))
            held.update((name, t.contiguous()) for name, t in zip(outputs, results, strict=True))
            for name in done:
                del held[name]
        return fx.map_arg(self.result, lambda n: self.constants.get(n, held.get(n.name)))
