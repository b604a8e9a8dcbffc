"""A graph in parts: run one behind the other they are the graph; what goes where, and why."""

import pytest
import torch
import torch.nn.functional as F
from fragments import PIXELS, TOKENS, Fragment, conv, linear, planned

from sdtrt_backend.capture import bind
from sdtrt_backend.fx import call_arguments, propagate
from sdtrt_backend.partition import ATTENTION_REASON, ENGINE, REST, SMALL_REASON, Parts, halve, join, partition
from sdtrt_backend.quantize import QD, insert
from sdtrt_backend.rules import OPS


def cut(module, *inputs, **settings):
    """(Q/DQ graph, its parts, tensors)."""
    captured, args, decisions, tensors = planned(module, *inputs)
    gm = insert(*bind(captured, args), decisions)
    propagate(gm, tensors)
    return gm, partition(gm, **settings), tensors


def heads(x):
    return x.view(2, -1, 4, 16).transpose(1, 2)


def attend(m, x):
    y = F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))
    y = m.o(y.transpose(1, 2).reshape(2, -1, 64))
    a, b = m.up(F.silu(y) + x).chunk(2, dim=-1)
    return m.down(a * b), y


ATTEND = Fragment(attend, q=linear, k=linear, v=linear, o=linear, up=lambda: linear(128), down=linear), TOKENS


def run(gm, parts, tensors):
    with torch.no_grad():
        return Parts(gm, [(p.graph, p.inputs, p.outputs) for p in parts])(*tensors), gm(*tensors)


def test_attention_is_cut_out_and_the_parts_give_what_the_graph_gives():
    gm, parts, tensors = cut(*ATTEND)
    assert [p.target for p in parts] == [ENGINE, REST, ENGINE]
    assert [len(p.layers) for p in parts] == [3, 0, 3]
    assert parts[1].reason == ATTENTION_REASON
    mine, theirs = run(gm, parts, tensors)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(not isinstance(t, tuple) for t in run(gm, parts, tensors)[0])


def test_every_call_is_in_one_part_and_only_tensors_cross_a_border():
    gm, parts, _ = cut(*ATTEND)
    calls = [n for p in parts for n in p.graph.graph.nodes if n.op.startswith("call")]
    names = [n.name for n in calls]
    assert len(names) == len(set(names)) == sum(n.op.startswith("call") for n in gm.graph.nodes)
    # a layer has its own weight's codes, whichever part it is in
    assert all(call_arguments(n)["weight"].target is QD.dequantize_per_channel.default for n in calls if n.target in OPS)
    values = {n.name: n.meta["val"] for n in gm.graph.nodes if "val" in n.meta}
    assert all(isinstance(values[name], torch.Tensor) for p in parts for name in (*p.inputs, *p.outputs))
    # constants stay inside: what a part holds is not handed to it
    assert all(not name.endswith("_scale") for p in parts for name in p.inputs)


def test_a_graph_without_a_refusal_is_one_part():
    gm, parts, tensors = cut(Fragment(lambda m, x: m.b(F.silu(m.a(x))), a=conv, b=conv), PIXELS)
    assert [(p.target, len(p.layers)) for p in parts] == [(ENGINE, 2)]
    assert torch.equal(*(t[0] for t in run(gm, parts, tensors)))


def test_independent_branches_share_a_part():
    def two(m, x):
        first = F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x))).transpose(1, 2).reshape(2, -1, 64)
        second = F.scaled_dot_product_attention(heads(m.o(first)), heads(m.up(x)), heads(m.down(x)))
        return m.last(m.before(second.transpose(1, 2).reshape(2, -1, 64)))

    names = ("q", "k", "v", "o", "up", "down", "last", "before")
    _, parts, _ = cut(Fragment(two, **dict.fromkeys(names, linear)), TOKENS)
    # the second attention's keys and values depend on the input alone: they are made with the first part
    assert [p.target for p in parts] == [ENGINE, REST, ENGINE]
    assert [len(p.layers) for p in parts] == [5, 1, 2]


def test_what_lies_alone_between_two_cuts_is_no_engine():
    gm, parts, tensors = cut(Fragment(lambda m, x: m.a(x) * 2.0, a=linear), TOKENS)
    assert [(p.target, p.reason) for p in parts] == [(REST, SMALL_REASON)]
    assert torch.equal(*(t[0] for t in run(gm, parts, tensors)))


def test_an_engine_between_two_cuts_needs_one_layer_more():
    def block(m, x):
        first = F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x))).transpose(1, 2).reshape(2, -1, 64)
        between = heads(m.up(m.o(first)))
        return m.last(m.down(F.scaled_dot_product_attention(between, between, between).transpose(1, 2).reshape(2, -1, 64)))

    gm, parts, tensors = cut(Fragment(block, **dict.fromkeys(("q", "k", "v", "o", "up", "down", "last"), linear)), TOKENS)
    assert [(p.target, len(p.layers)) for p in parts] == [(ENGINE, 3), (REST, 2), (ENGINE, 2)]
    mine, theirs = run(gm, parts, tensors)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_what_is_made_of_constants_is_made_where_it_is_read_and_a_result_of_it_once():
    def body(m, x):
        w = m.a.weight * 2.0
        return F.linear(m.b(attend(m, x)[0]), w) + F.linear(x, w), w.T + 0.0, w

    layers = dict.fromkeys((*"abqkvo", "down"), linear)
    gm, parts, tensors = cut(Fragment(body, **layers, up=lambda: linear(128)), TOKENS)
    assert [p.target for p in parts] == [ENGINE, REST, ENGINE]
    mine, theirs = run(gm, parts, tensors)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("everything", [True, False])
def test_a_refusal_of_everything_or_nothing(everything):
    gm, parts, tensors = cut(*ATTEND, refuses=lambda node: "never" if everything else None)
    assert [p.target for p in parts] == [REST if everything else ENGINE]
    assert parts[0].reason == ("never" if everything else "every operation has a converter")
    mine, theirs = run(gm, parts, tensors)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def nodes(part):
    return [n for n in part.graph.graph.nodes if n.op.startswith("call")]


def test_a_part_is_halved_where_one_tensor_crosses_and_no_code_does():
    def body(m, x, y):
        kept = m.a(x) + m.b(y)
        kept = kept + m.d(F.silu(m.c(F.gelu(kept))))
        return kept + m.f(F.silu(m.e(y))), m.q(y)

    gm, (part,), tensors = cut(Fragment(body, **dict.fromkeys("abcdefq", linear)), TOKENS, TOKENS.flip(0))
    first, second = halve(part)
    assert [len(p.layers) for p in (first, second)] == [4, 3]
    # y's codes are made in both
    assert len(second.inputs) == 2
    assert [sum(n.target is QD.quantize_per_tensor.default for n in nodes(p)) for p in (first, second)] == [4, 2]
    assert set(first.layers + second.layers) == set(part.layers)
    mine, theirs = run(gm, (first, second), tensors)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    joined = join(gm, (first, second))
    assert (joined.inputs, joined.layers) == (part.inputs, part.layers)
    assert len(nodes(joined)) == len(nodes(part))
    assert all(torch.equal(a, b) for a, b in zip(run(gm, [joined], tensors)[0], theirs, strict=True))


def test_what_is_small_or_takes_a_tensor_apart_is_not_halved():
    _, (part,), _ = cut(Fragment(lambda m, x: m.c(m.b(F.silu(m.a(x)))), a=linear, b=linear, c=linear), TOKENS)
    assert halve(part) is None

    def between(m, x):
        a, b = (m.a(x) + m.b(x)).chunk(2, dim=-1)
        return m.c(torch.cat([b, a], -1)) + m.d(torch.cat([a, b], -1))

    gm, (part,), tensors = cut(Fragment(between, **dict.fromkeys("abcd", linear)), TOKENS)
    halves = halve(part)
    assert [len(p.layers) for p in halves] == [2, 2]
    assert torch.equal(*(t[0] for t in run(gm, halves, tensors)))
