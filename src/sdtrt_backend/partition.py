"""A graph -> parts that run one behind the other, each for one target, with the reason; few and large ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import fx

from . import ops
from .fx import ATTENTION
from .rules import OPS

QD = torch.ops.quantized_decomposed
CODING = {QD.quantize_per_tensor.default, QD.dequantize_per_tensor.default, ops.quantize_fp8, ops.dequantize_fp8}
ENGINE, REST = "tensorrt", "inductor"
# Layers (linears, convolutions) from which an engine pays, one more where it has a cut on either side, as between the attentions
# of a transformer block: a cut costs a launch, and two passes over every tensor that crosses it in the layout of the other side
MIN_LAYERS = 2
ATTENTION_REASON = "attention stays in 16 bits and outside of engines: TensorRT-RTX has no kernel for it on every card"
SMALL_REASON = "too few linears or convolutions between two cuts: an engine gains less than the cut costs"


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

    A node runs in the first part of its target that all its inputs allow, so independent branches share parts. Weights are
    dequantised, and inputs quantised, in every part that reads them: codes do not cross a border in 16 bits.
    """
    reads = _reads(gm)
    calls = [n for n in reads if n.op.startswith("call")]
    reasons: dict[fx.Node, str] = {}
    for node in calls:
        # what takes a result apart stays with what made it: only tensors cross a border
        made = next((a for a in reads[node] if not _is_tensor(a)), None)
        reasons[node] = (refuses(node) or "") if made is None else reasons.get(made, "")
    levels = _by_level(calls, reads, reasons)
    for place, level in levels.items():
        between = min(levels) < place < max(levels)
        if not reasons[level[0]] and sum(n.target in OPS for n in level) < MIN_LAYERS + between:
            reasons.update(dict.fromkeys(level, SMALL_REASON))
    return tuple(_part(gm, level, reads, *_why([reasons[n] for n in level if reasons[n]]))
                 for _, level in sorted(_by_level(calls, reads, reasons).items()))


def halve(part: Part) -> tuple[Part, Part] | None:
    """The part in two of MIN_LAYERS layers or more, to run one behind the other; None where it has no such cut.

    Of the cuts with a quarter of the layers or more on either side, else of all, one that the fewest tensors cross (behind a
    residual addition it is often one), and of these the one nearest to the middle.
    """
    reads = _reads(part.graph)
    calls = [n for n in reads if n.op.startswith("call")]
    place = {n: i for i, n in enumerate(calls)}
    last = dict(place)
    for reader in calls:
        last.update({a: place[reader] for a in reads[reader] if a in place})
    crossing: set[fx.Node] = set()
    before, total, cuts = 0, len(part.layers), {}
    for i, n in enumerate(calls[:-1]):
        before += n.target in OPS
        crossing = {a for a in (*crossing, n) if last[a] > i}
        if min(before, total - before) >= MIN_LAYERS and all(_is_tensor(a) for a in crossing):
            cuts[i + 1] = (4 * min(before, total - before) < total, len(crossing), abs(2 * before - total))
    if not cuts:
        return None
    cut = min(cuts, key=cuts.__getitem__)
    first, second = (_part(part.graph, half, reads, part.target, part.reason) for half in (calls[:cut], calls[cut:]))
    return first, second


def join(gm: fx.GraphModule, parts: Sequence[Part]) -> Part:
    """Parts of ``gm`` that run one behind the other as one, for REST."""
    if len(parts) == 1:
        return parts[0]
    names, reads = {n.name for p in parts for n in p.graph.graph.nodes if n.op.startswith("call")}, _reads(gm)
    return _part(gm, [n for n in reads if n.name in names], reads, REST, parts[0].reason)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) or node.op in ("placeholder", "get_attr")


def _reads(gm: fx.GraphModule) -> dict[fx.Node, dict[fx.Node, None]]:
    """Nodes in order -> what each reads, without the calls that every part makes for itself, and through these: those that
    read constants alone, and quantisation. A result of the graph is made once."""
    results = set(gm.graph.output_node().all_input_nodes)
    copied: dict[fx.Node, dict[fx.Node, None]] = {}
    reads: dict[fx.Node, dict[fx.Node, None]] = {}
    for n in gm.graph.nodes:
        found = dict.fromkeys(source for a in n.all_input_nodes for source in copied.get(a, {a: None}))
        constant = bool(found) and all(a.op == "get_attr" for a in found)
        own = n.op.startswith("call") and n not in results and (constant or n.target in CODING or "smoothing" in n.meta)
        (copied if own else reads)[n] = found
    return reads


def _by_level(calls: Sequence[fx.Node], reads: Mapping[fx.Node, Iterable[fx.Node]],
              reasons: Mapping[fx.Node, str]) -> dict[int, list[fx.Node]]:
    """Levels of even number are engines, of odd number the rest; a node is not before any of its inputs."""
    level: dict[fx.Node, int] = {}
    for node in calls:
        least = max((level[a] for a in reads[node] if a in level), default=0)
        level[node] = least + (least % 2 != bool(reasons[node]))
    found: dict[int, list[fx.Node]] = {}
    for node in calls:
        found.setdefault(level[node], []).append(node)
    return found


def _why(reasons: Sequence[str]) -> tuple[str, str]:
    """(target, reason) of a part with calls that were refused for these."""
    if reasons:
        return REST, max(dict.fromkeys(reasons), key=reasons.count)
    return ENGINE, "every operation has a converter"


def _part(gm: fx.GraphModule, calls: Sequence[fx.Node], reads: Mapping[fx.Node, Iterable[fx.Node]], target: str,
          reason: str) -> Part:
    inside = set(calls)
    for n in reversed(gm.graph.nodes):
        if n in inside:
            inside.update(a for a in n.all_input_nodes if a not in reads)
    nodes = [n for n in gm.graph.nodes if n in inside]
    before = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
    inputs = [a for a in before if a.op != "get_attr"]
    graph, env = fx.Graph(), {}
    for a in inputs:
        env[a] = graph.placeholder(a.name)
        env[a].meta.update(a.meta)
    for n in (*(a for a in before if a.op == "get_attr"), *nodes):
        env[n] = graph.node_copy(n, env.__getitem__)  # under its own name
    read_outside = {a for n in reads if n not in inside for a in reads[n]}
    outputs = [n for n in calls if n in read_outside]
    graph.output(tuple(env[n] for n in outputs))
    return Part(target, reason, fx.GraphModule(gm, graph), tuple(a.name for a in inputs), tuple(n.name for n in outputs),
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
