"""What a layer is for, from the data that flows through it and not from its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Set
from typing import Any

import torch
from torch import fx

CONDITIONING, FIRST, LAST = "conditioning", "first", "last"
SMALL = 0.02  # of a graph's work. What alone reads the input of one block, or makes its result, is more than that
MOST_RESULTS = 2  # of a denoiser, as of pictures and sound; a graph with more of them computes features for another model


def conditioning(graph: fx.Graph, constants: Collection[fx.Node], timestep: fx.Node | None) -> set[fx.Node]:
    """Every node whose value is one vector of each picture, made of the timestep, pooled text, sizes or guidance, and not of
    tokens or pixels. Empty where the shapes of the inputs do not tell how many pictures there are.

    constants: placeholders of parameters and buffers. Tokens and pixels come in by inputs of three dimensions or more, or as
    numbers of words; what depends on them is theirs, until an average or a choice leaves one vector of each picture.
    """
    inputs = {n: _sizes(n) for n in graph.find_nodes(op="placeholder") if n not in constants and _sizes(n)}
    many = {n for n, sizes in inputs.items() if n is not timestep and len(sizes) > 2 and math.prod(sizes[1:-1]) > 1}
    words = {n for n, sizes in inputs.items() if n is not timestep and len(sizes) == 2 and not _value(n).is_floating_point()}
    pictures = {inputs[n][0] for n in many | ({timestep} & inputs.keys())}
    if not many:
        return set()
    unbatched = {n for n, sizes in inputs.items() if n is not timestep and len(sizes) == 2 and sizes[0] not in pictures}
    streams = many | words | unbatched
    for n in graph.nodes:
        read = [a for a in n.all_input_nodes if a in streams]
        if not read:
            continue
        sizes = _sizes(n)
        if not (_vectors(sizes) and sizes[0] in pictures) or math.prod(sizes) >= max(math.prod(_sizes(a)) for a in read):
            streams.add(n)
    return {n for n in graph.nodes if n not in streams and n not in constants and _vectors(_sizes(n))}


def ends(graph: fx.Graph, weights: Mapping[fx.Node, tuple[int, ...]], constants: Collection[fx.Node],
         vectors: Set[fx.Node]) -> dict[fx.Node, str]:
    """FIRST: an operation that alone reads an input, and nothing that another has made; LAST: one that alone makes a result.
    Those that are much of the work are neither, and nor is what reads ``vectors``.

    weights: the operations with a weight and its shape [out, in, ...].
    """
    work = {n: math.prod(_sizes(n)) * math.prod(shape[1:]) for n, shape in weights.items()}
    small = {n for n in weights if work[n] <= SMALL * sum(work.values()) and vectors.isdisjoint(n.all_input_nodes)}
    inputs = [n for n in graph.find_nodes(op="placeholder") if n not in constants]
    results = [n for n in graph.output_node().all_input_nodes if isinstance(_value(n), torch.Tensor)]
    readers = (_until([n], weights, lambda n: n.users) for n in inputs)
    makers = (_until([n], weights, _read) for n in results) if len(results) <= MOST_RESULTS else ()
    last = {n: LAST for found in makers if len(found) == 1 for n in found & small}
    first = {n: FIRST for found in readers if len(found) == 1 for n in found & small if not _until(_read(n), weights, _read)}
    return last | first


def _read(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _until(starts: Iterable[fx.Node], stops: Container[fx.Node],
           onward: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Those of ``stops`` that are reached from ``starts``, themselves among them, through no other."""
    waiting = list(starts)
    seen, met = set(waiting), set[fx.Node]()
    while waiting:
        n = waiting.pop()
        if n in stops:
            met.add(n)
            continue
        fresh = [m for m in onward(n) if m not in seen]
        seen.update(fresh)
        waiting += fresh
    return met


def _vectors(sizes: tuple[int, ...]) -> bool:
    return len(sizes) == 2 or (len(sizes) == 3 and sizes[1] == 1)


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _sizes(node: fx.Node) -> tuple[int, ...]:
    """Of a tensor, as the graph was traced; else ()."""
    value = _value(node)
    if not isinstance(value, torch.Tensor):
        return ()
    # a size that Dynamo made symbolic counts as the one it was first seen with: to compare it would tie the graph to that one
    return tuple(s if isinstance(s, int) else s.node.hint for s in value.shape)
