"""A graph that does the same several times over, as the blocks of a transformer do, compiled in pieces: equal pieces once.

Inductor takes as long for thirty equal blocks as for thirty different ones. Here the repetition is found in the graph itself, so
that it does not matter how the model's classes are cut: calls that come again after a fixed number of calls, on tensors that lie
as far back. What two pieces do is compared as text, with their constants as inputs, so
a wrong guess about where to cut costs time and nothing else.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from . import identity
from .calls import written
from .errors import GraphError
from .fx import described, propagate, runnable
from .programs import inductor

Compile = Callable[[fx.GraphModule, Sequence[torch.Tensor]], Callable[..., Any]]
LEAST_PERIOD = 16  # calls: what repeats sooner is no block, and each piece costs Inductor a second whatever is in it
LEAST_SAVED = 48  # calls that are not compiled again: below that a whole graph is as fast to compile, and fuses across the cut


def compiled(gm: fx.GraphModule, example: Sequence[torch.Tensor], compile_piece: Compile = inductor) -> Callable[..., Any]:
    """``gm`` compiled for the shapes of ``example``: in pieces where it repeats itself, else as a whole."""
    return in_pieces(gm, example, compile_piece) or compile_piece(gm, example)


def in_pieces(gm: fx.GraphModule, example: Sequence[torch.Tensor],
              compile_piece: Compile = inductor) -> Callable[..., Any] | None:
    """``gm`` compiled in pieces, equal ones once; None where it does not repeat itself.

    A piece reads its constants as inputs, and its intermediate results have the strides that eager execution gives them.
    """
    if not all(isinstance(_held(gm, n), torch.Tensor) for n in gm.graph.find_nodes(op="get_attr")):
        return None  # a graph in the graph: a piece could not take it as an input
    propagate(gm, example)
    graph = _Graph(gm)
    places = sorted({0, *_cuts(graph, 0, len(graph.calls)), len(graph.calls)})
    pieces = [_piece(graph, start, end) for start, end in itertools.pairwise(places)]
    if len({piece.text for piece in pieces}) == len(pieces):  # they only looked alike
        return None
    return _joined(graph, pieces, compile_piece)


class _Graph:
    """The calls of a graph in order. kinds: equal numbers for calls that do the same but for which tensors they read; reads: of
    each call, the places of what it reads, negative for inputs; live: how many tensors cross a cut before each place; closed:
    where what crosses is no tensor, or lies in memory that some call changes, so that no cut may be there."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        changed = written(gm.graph)
        self.calls = _parts_behind_the_whole([n for n in gm.graph.nodes if n.op.startswith("call_")], changed)
        self.place = {n: i for i, n in enumerate(self.calls)}
        self.place |= {n: -1 - i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
        numbers: dict[str, int] = {}
        self.kinds = np.array([numbers.setdefault(self._kind(n), len(numbers)) for n in self.calls])
        self.reads = [tuple(self.place[a] for a in n.all_input_nodes if a.op != "get_attr") for n in self.calls]
        self.live, self.closed = np.zeros(len(self.calls) + 1, int), np.zeros(len(self.calls) + 1, bool)
        for n, i in self.place.items():
            begin = max(i + 1, 0)
            crossed = slice(begin, 1 + max((self.place.get(u, len(self.calls)) for u in n.users), default=begin - 1))
            self.live[crossed] += 1
            if n in changed or not isinstance(n.meta.get("val"), torch.Tensor):
                self.closed[crossed] = True

    def _kind(self, node: fx.Node) -> str:
        def name(n: fx.Node) -> str:
            return described(_held(self.gm, n)) if n.op == "get_attr" else ""

        try:
            return identity.call(node, name)
        except GraphError:  # it is like no other
            return node.name


def _parts_behind_the_whole(calls: Sequence[fx.Node], changed: Container[fx.Node]) -> list[fx.Node]:
    """The calls with every part of a result right behind it, wherever it is taken: a block's own share of a product for all
    blocks is no part of the block then, and neither is its place in it."""
    parts: dict[fx.Node, list[fx.Node]] = {}
    ordered: list[fx.Node] = []
    for n in calls:
        read = n.all_input_nodes
        if n.target is operator.getitem and read == [n.args[0]] and read[0] not in changed:
            parts.setdefault(read[0], []).append(n)

    def place(n: fx.Node) -> None:
        ordered.append(n)
        for part in parts.get(n, ()):
            place(part)

    moved = {part for found in parts.values() for part in found}
    for whole in [n for n in parts if not n.op.startswith("call_")] + [n for n in calls if n not in moved]:
        place(whole)
    return [n for n in ordered if n.op.startswith("call_")]


def _held(gm: fx.GraphModule, node: fx.Node) -> Any:
    return getattr(gm, str(node.target))


# where to cut

def _cuts(graph: _Graph, low: int, high: int) -> Iterator[int]:
    """Places between equal stretches of the calls from ``low`` to ``high``: around the stretches that save most, then in what is
    left of the graph, and in one of them."""
    start, period, length = _repetition(graph, low, high)
    phases = [(_cost(graph, phase, period, start + period + length), phase) for phase in range(start, start + period)]
    cost, first = min(phases, default=((0, 0), 0))
    times = -cost[1]
    if (times - 1) * period < LEAST_SAVED:
        return
    places = [first + i * period for i in range(times + 1)]
    yield from (p for p in places if not graph.closed[p])
    yield from _cuts(graph, low, first)
    yield from _cuts(graph, places[-1], high)
    for inner in _cuts(graph, first, first + period):
        yield from (inner + i * period for i in range(times))


def _cost(graph: _Graph, phase: int, period: int, end: int) -> tuple[int, int]:
    """Of stretches that begin at ``phase``: how many tensors cross a cut, and how few they are. As many as there are calls where
    no cut may be, or only one stretch is left."""
    times = (end - phase) // period
    return (int(graph.live[phase]) if times > 1 and not graph.closed[phase] else len(graph.calls), -times)


def _repetition(graph: _Graph, low: int, high: int) -> tuple[int, int, int]:
    """(start, period, length): the longest stretch of calls each of which comes again ``period`` calls later."""
    best, kinds = (low, 0, 0), graph.kinds[low:high]
    for period in range(LEAST_PERIOD, len(kinds) // 2 + 1):
        same = kinds[:-period] == kinds[period:]
        if same.sum() <= best[2]:
            continue
        at = np.flatnonzero(~same)
        for a, b in itertools.pairwise([-1, *at.tolist(), len(same)]):
            if b - a - 1 <= best[2]:
                continue
            begin = a + 1
            for i in range(a + 1, b + 1):
                if i == b or not _alike(graph, low + i, period):
                    best = max(best, (low + begin, period, i - begin), key=lambda found: found[2])
                    begin = i + 1
    return best


def _alike(graph: _Graph, i: int, period: int) -> bool:
    """Whether the calls ``i`` and ``i + period`` read what is as far away, or the latter what is older than a period: each block
    may have an input of its own, as its share of one product for the prompt's keys and values is."""
    mine, other = graph.reads[i], graph.reads[i + period]
    return len(mine) == len(other) and all(b - a >= period or b <= i for a, b in zip(mine, other, strict=True))


# the pieces

@dataclass(frozen=True)
class _Piece:
    """Calls from ``start`` to ``end``. reads: nodes outside them, in the order in which they are read first; text: what it does;
    results: places in it of what others read."""

    start: int
    end: int
    reads: tuple[fx.Node, ...]
    text: str
    results: frozenset[int]


def _piece(graph: _Graph, start: int, end: int) -> _Piece:
    calls = graph.calls[start:end]
    reads = dict.fromkeys(a for n in calls for a in n.all_input_nodes if not start <= graph.place.get(a, -1) < end)
    names = {a: f"in{i}" for i, a in enumerate(reads)} | {n: f"v{i}" for i, n in enumerate(calls)}
    try:
        lines = [identity.call(n, names.__getitem__) for n in calls]
    except GraphError:
        lines = [f"like no other {start}"]
    lines += [described(_held(graph.gm, a) if a.op == "get_attr" else a.meta["val"]) for a in reads]
    results = frozenset(i for i, n in enumerate(calls) if any(not start <= graph.place.get(u, -1) < end for u in n.users))
    return _Piece(start, end, tuple(reads), "\n".join(lines), results)


def _joined(graph: _Graph, pieces: Sequence[_Piece], compile_piece: Compile) -> Callable[..., Any]:
    """One callable of all pieces, each compiled once for all that do the same."""
    results: dict[str, frozenset[int]] = {}
    for piece in pieces:  # what nobody reads of the last block others may read of theirs
        results[piece.text] = results.get(piece.text, frozenset()) | piece.results
    root, joined, made = torch.nn.Module(), fx.Graph(), dict[str, str]()
    env: dict[fx.Node, fx.Node] = {}
    for n in graph.gm.graph.nodes:
        if n.op == "placeholder":
            env[n] = joined.placeholder(n.name)
        elif n.op == "get_attr":
            root.register_buffer(str(n.target), _held(graph.gm, n))
            env[n] = joined.get_attr(str(n.target))
    for piece in pieces:
        wanted = sorted(results[piece.text])
        if piece.text not in made:
            made[piece.text] = f"piece_{len(made)}"
            root.add_module(made[piece.text], _Compiled(compile_piece(_alone(graph, piece, wanted), _examples(graph, piece))))
        outputs = joined.call_module(made[piece.text], tuple(env[a] for a in piece.reads))
        for place in piece.results:
            env[graph.calls[piece.start + place]] = joined.call_function(_item, (outputs, wanted.index(place)))
    (output,) = graph.gm.graph.find_nodes(op="output")
    joined.output(fx.map_arg(output.args[0], env.__getitem__))
    return runnable(fx.GraphModule(root, joined))


def _item(outputs: Sequence[Any], i: int) -> Any:
    return outputs[i]


class _Compiled(torch.nn.Module):
    """A compiled piece, for an FX graph to call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.call(*tensors)


def _alone(graph: _Graph, piece: _Piece, wanted: Sequence[int]) -> fx.GraphModule:
    """The piece as a graph of its own."""
    alone, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for i, a in enumerate(piece.reads):
        env[a] = alone.placeholder(f"in{i}")
    for n in graph.calls[piece.start:piece.end]:
        env[n] = alone.node_copy(n, env.__getitem__)
    alone.output(tuple(env[graph.calls[piece.start + place]] for place in wanted))
    return fx.GraphModule(torch.nn.Module(), alone)


def _examples(graph: _Graph, piece: _Piece) -> list[torch.Tensor]:
    """Tensors like those that the piece reads; a constant is itself."""
    return [_held(graph.gm, a) if a.op == "get_attr" else _like(a.meta["val"]) for a in piece.reads]


def _like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).zero_()
