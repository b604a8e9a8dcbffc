"""A graph in pieces gives what the whole gives, and what comes again is compiled once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from sdtrt_backend import regions
from sdtrt_backend.fx import runnable

WIDTH = 8


class Block(nn.Module):
    """Attention and feed-forward with modulation: more than 40 calls."""

    def __init__(self, hidden=16):
        super().__init__()
        self.mod, self.qkv, self.out = nn.Linear(WIDTH, 6 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x, condition, table):
        a, b, c, d, e, f = self.mod(F.silu(condition)).chunk(6, -1)
        y = F.layer_norm(x, (WIDTH,)) * (1 + a) + b
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        y = F.scaled_dot_product_attention(q * table, k * table, v).transpose(1, 2).flatten(2)
        x = x + c * self.out(y)
        value, gate = self.up(F.layer_norm(x, (WIDTH,)) * (1 + d) + e).chunk(2, -1)
        return x + f * self.down(value * F.gelu(gate))


class Deep(nn.Module):
    """``hidden``: the width inside each block; ``table``: one value for all, made in the graph; ``tails``: of the prompt, one
    share for each block, as one product makes them."""

    def __init__(self, *hidden):
        super().__init__()
        self.first, self.tails = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH * len(hidden))
        self.blocks = nn.ModuleList(map(Block, hidden))

    def forward(self, x, condition, prompt):
        x, table = self.first(x), torch.cos(condition[..., :4])[:, None]
        tails = self.tails(prompt).split(WIDTH, -1)
        for block, tail in zip(self.blocks, tails, strict=True):
            x = block(x + tail, condition, table)
        return x, condition.sum(-1)


def inputs(seed=0):
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, WIDTH, generator=noise) for n in (5, 1, 1)]


def graph(module):
    """As lowerings have it: constants are get_attr nodes, modules are gone."""
    torch._dynamo.reset()
    found = []
    torch.compile(module, backend=lambda gm, example: found.append((gm, example)) or gm.forward)(*inputs())
    ((gm, example),) = found
    root, made, env = nn.Module(), fx.Graph(), {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example, strict=True):
        if isinstance(value, nn.Parameter):
            root.register_buffer(node.name, value.detach())
            env[node] = made.get_attr(node.name)
        else:
            env[node] = made.placeholder(node.name)
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            env[node] = made.node_copy(node, env.__getitem__)
    return fx.GraphModule(root, made)


class Counting:
    """A compiler that compiles nothing, and counts the calls that it was given."""

    def __init__(self):
        self.pieces = []

    def __call__(self, gm, example):
        self.pieces.append(sum(n.op.startswith("call_") for n in gm.graph.nodes))
        assert len(example) == len(gm.graph.find_nodes(op="placeholder"))
        return runnable(gm)


def in_pieces(module):
    """(what the pieces give, what the module gives, calls of the graph, calls of each piece that was compiled)."""
    gm, compiler = graph(module), Counting()
    calls = sum(n.op.startswith("call_") for n in gm.graph.nodes)
    step = regions.compiled(gm, inputs(), compiler)
    return step(*inputs(1)), module(*inputs(1)), calls, compiler.pieces


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@torch.no_grad()
def test_equal_blocks_are_compiled_once_and_give_what_the_whole_gives():
    found, expected, calls, pieces = in_pieces(Deep(16, 16, 16, 16, 16, 16))
    assert same(found, expected)
    assert sum(pieces) < 0.4 * calls
    assert len(pieces) <= 4  # what comes before, a block, the last one or what comes behind it


@torch.no_grad()
def test_two_kinds_of_blocks_are_two_pieces():
    found, expected, calls, pieces = in_pieces(Deep(16, 16, 16, 16, 24, 24, 24, 24))
    assert same(found, expected)
    assert sum(pieces) < 0.5 * calls


@torch.no_grad()
def test_a_graph_that_repeats_nothing_stays_whole():
    found, expected, calls, pieces = in_pieces(Deep(16, 24))
    assert same(found, expected)
    assert pieces == [calls]


@pytest.mark.slow
@settings(max_examples=12)
@given(st.lists(st.sampled_from([16, 24]), min_size=2, max_size=7))
@torch.no_grad()
def test_whatever_comes_again_the_result_is_that_of_the_whole(hidden):
    found, expected, calls, pieces = in_pieces(Deep(*hidden))
    assert same(found, expected)
    assert sum(pieces) <= calls


class Cache(Deep):
    """Writes into a tensor that it made at the start, in every block."""

    def forward(self, x, condition, prompt):
        sums = torch.zeros(len(self.blocks))
        x, table = self.first(x), torch.cos(condition[..., :4])[:, None]
        for i, block in enumerate(self.blocks):
            x = block(x + prompt, condition, table)
            sums[i] += x.sum()
        return x, sums


@torch.no_grad()
def test_what_is_changed_in_place_crosses_no_cut():
    found, expected, calls, pieces = in_pieces(Cache(16, 16, 16, 16))
    assert same(found, expected)
    assert pieces == [calls]


class Literal(Deep):
    """Each block is scaled by a number of its own."""

    def forward(self, x, condition, prompt):
        x, table = self.first(x), torch.cos(condition[..., :4])[:, None]
        for i, block in enumerate(self.blocks):
            x = block(x + prompt, condition, table) * (i + 1)
        return (x,)


@torch.no_grad()
def test_blocks_that_differ_by_a_number_are_different():
    found, expected, calls, pieces = in_pieces(Literal(16, 16, 16, 16))
    assert same(found, expected)
    assert pieces == [calls]


@pytest.mark.slow
@torch.no_grad()
def test_through_inductor_the_pieces_give_what_the_whole_gives():
    module = Deep(16, 16, 16, 16)
    step = regions.compiled(graph(module), inputs())
    for found, expected in zip(step(*inputs(1)), module(*inputs(1)), strict=True):
        torch.testing.assert_close(found, expected)
