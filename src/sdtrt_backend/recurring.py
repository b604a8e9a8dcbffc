"""What a step makes of its prompt or of its timestep alone, kept for the calls in which those come again.

In a picture the prompt is the same at every step, and one picture goes through the timesteps of the one before. Whether an input
came again is decided by its values.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import fx

from . import ops
from .calls import ATEN_NAMES, IDENTITIES, arguments, name_of, tensors_of, written
from .fx import drop_dead, propagate
from .rules import OPS

WEIGHTED = {*OPS, ops.int8_conv2d, ops.int8_linear}  # what is worth keeping: the rest is as soon made as compared
LEAST = 8  # of them in a part: below that it saves less than the second that Inductor takes for any graph is worth
COMPARED_BYTES = 16 * 2**20  # of the inputs of one part, at most
KEPT_BYTES, KEPT = 64 * 2**20, 64  # results of one part: those of one call at least, those of more calls within these
# tensors' methods that ATen has under no name of its own
CASTS = ("float", "half", "bfloat16", "double", "int", "long", "bool")

Part = tuple[tuple[int, ...], fx.GraphModule]  # which of the step's inputs it reads, what it makes of them


class Held:
    """A part of a step: its results are those of an earlier call, where its inputs have the same values.

    places: of its inputs among those of the step; sources: what it reads besides, after whose change it is to ``renew``.
    """

    def __init__(self, call: Callable[..., Sequence[torch.Tensor]], places: Sequence[int],
                 sources: Sequence[torch.Tensor]) -> None:
        self.call, self.places, self.sources = call, places, sources
        # inputs and results, those of the last call first; replaced and never written, as several threads may read it
        self.known: tuple[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]], ...] = ()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        given, known = [inputs[i] for i in self.places], self.known
        for one in known:
            if all(map(torch.equal, one[0], given)):
                if one is not known[0]:
                    self.known = (one, *(other for other in known if other is not one))
                return one[1]
        results = self.call(*given)
        room = max(1, min(KEPT, KEPT_BYTES // max(1, sum(t.nbytes for t in results))))
        self.known = (([t.detach().clone() for t in given], results), *known[:room - 1])
        return results

    def renew(self) -> None:
        """After one of the sources was written."""
        self.known = ()


def apart(gm: fx.GraphModule, example: Sequence[torch.Tensor]) -> tuple[list[Part], fx.GraphModule]:
    """(the parts that do not depend on the latent, the rest of ``gm``, whose last inputs are the results of the parts in order).

    No parts where nothing tells which input is the latent, where the graph writes in memory, or a result would be a part's.
    """
    graph = gm.graph
    placeholders = graph.find_nodes(op="placeholder")
    latent = set() if written(graph) else _latents(gm, example)
    if not latent:
        return [], gm
    changing = {n for n, t in zip(placeholders, example, strict=True)
                if n in latent or isinstance(t, torch.nn.Parameter) or t.nbytes > COMPARED_BYTES}
    read: dict[fx.Node, frozenset[int]] = {n: frozenset({i}) for i, n in enumerate(placeholders) if n not in changing}
    kept = set[fx.Node]()
    for n in graph.nodes:
        if n in read or n.op == "placeholder":
            continue
        if n.op == "output" or not changing.isdisjoint(n.all_input_nodes) or not _repeats(n):
            changing.add(n)
            continue
        read[n] = frozenset().union(*map(read.__getitem__, n.all_input_nodes))
        if read[n] and (n.target in WEIGHTED or not kept.isdisjoint(n.all_input_nodes)):
            kept.add(n)
    if not kept.isdisjoint(graph.output_node().all_input_nodes):
        return [], gm
    work = Counter(read[n] for n in kept if n.target in WEIGHTED)
    wanted = {places for places, products in work.items() if products >= LEAST and _comes_again([example[i] for i in places])}
    kept = {n for n in kept if read[n] in wanted}
    groups: dict[frozenset[int], list[fx.Node]] = {}
    for n in graph.nodes:
        if n in kept and not kept.issuperset(n.users):
            groups.setdefault(read[n], []).append(n)
    parts = []
    for places, results in groups.items():
        order = tuple(sorted(places, key=lambda i: (example[i].numel(), i)))  # small ones are soon seen to differ
        parts.append((order, _part(gm, [placeholders[i] for i in order], results, read)))
    return parts, _rest(gm, kept, [n for results in groups.values() for n in results]) if parts else gm


def _latents(gm: fx.GraphModule, example: Sequence[torch.Tensor]) -> set[fx.Node]:
    """The inputs that lie as the first result does, but for their channels."""
    result = next(iter(gm.graph.output_node().all_input_nodes), None)
    if result is not None and not tensors_of(result):
        propagate(gm, example)
    like = None if result is None else next(iter(tensors_of(result)), None)
    if not isinstance(like, torch.Tensor) or like.dim() < 3:
        return set()
    channels = 1 if like.dim() > 3 else 2
    return {n for n, t in zip(gm.graph.find_nodes(op="placeholder"), example, strict=True)
            if t.dim() == like.dim() and all(t.shape[i] == size for i, size in enumerate(like.shape) if i != channels)}


def _repeats(node: fx.Node) -> bool:
    """Whether a call gives the same tensors whenever it is given the same."""
    value = node.meta.get("val", node.meta.get("example_value"))
    values = value if isinstance(value, tuple | list) else () if value is None else (value,)
    if not all(isinstance(v, torch.Tensor) for v in values):
        return False
    name = name_of(node)
    if node.op == "get_attr" or node.target in WEIGHTED or node.target is operator.getitem or name in CASTS:
        return True
    packet = getattr(torch.ops.aten, ATEN_NAMES.get(name, name), None) if name else None
    if packet is None:
        return False
    if name in IDENTITIES:
        return not arguments(node).get("training", True)
    if name == "scaled_dot_product_attention":
        return not arguments(node)["dropout_p"]
    return all(torch.Tag.nondeterministic_seeded not in getattr(packet, overload).tags for overload in packet.overloads())


def _comes_again(inputs: Sequence[torch.Tensor]) -> bool:
    """A timestep comes again in every picture and the prompt at every step, but not the two together."""
    return not (any(t.dim() < 2 for t in inputs) and any(t.dim() > 2 for t in inputs))


def _part(gm: fx.GraphModule, mine: Sequence[fx.Node], results: Sequence[fx.Node],
          read: Mapping[fx.Node, frozenset[int]]) -> fx.GraphModule:
    """The graph that makes ``results`` of the inputs ``mine``."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for n in mine:
        copies[n] = graph.node_copy(n)
    places = frozenset().union(*map(read.__getitem__, mine))
    for n in gm.graph.nodes:
        if n.op != "placeholder" and n in read and read[n] <= places:
            copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output(tuple(copies[n] for n in results))
    drop_dead(graph)
    return fx.GraphModule(gm, graph)


def _rest(gm: fx.GraphModule, kept: Container[fx.Node], results: Sequence[fx.Node]) -> fx.GraphModule:
    """The graph without what is ``kept``, of which it takes ``results`` as inputs."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for n in gm.graph.find_nodes(op="placeholder"):
        copies[n] = graph.node_copy(n)
    for i, n in enumerate(results):
        copies[n] = graph.placeholder(f"held_{i}")
    for n in gm.graph.nodes:
        if n.op != "placeholder" and n not in kept:
            copies[n] = graph.node_copy(n, copies.__getitem__)
    drop_dead(graph)
    return fx.GraphModule(gm, graph)
