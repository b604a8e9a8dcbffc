"""What a layer is for, from the data that flows to it and not from its name."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

CONDITIONING = "conditioning"


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
