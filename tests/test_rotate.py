"""The values of an attention may be rotated by 8-bit weights alone: where, that nothing else changes, and what it brings."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fragments import Fragment, noise, planned
from torch import nn

from sdtrt_backend import measure, stats
from sdtrt_backend.capture import bind
from sdtrt_backend.fx import propagate
from sdtrt_backend.merge import Factors, added, write
from sdtrt_backend.quantize import Coded, insert, quantized_weights
from sdtrt_backend.rotate import rotate_heads
from sdtrt_backend.stats import ROTATED, rotate
from sdtrt_backend.values import Decision, Layer

X, TEXT = noise(2, 12, 64), noise(2, 7, 96)
HEADS = {"to_q": lambda: nn.Linear(64, 128), "to_k": lambda: nn.Linear(64, 128), "to_v": lambda: nn.Linear(64, 128),
         "to_out": lambda: nn.Linear(128, 64)}


def split(t, width=64):
    return t.view(*t.shape[:2], -1, width).transpose(1, 2)


def joined(t):
    return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], -1)


def attend(m, x, text=None, mask=None, width=64):
    text = x if text is None else text
    y = F.scaled_dot_product_attention(split(m.to_q(x), width), split(m.to_k(text), width), split(m.to_v(text), width),
                                       attn_mask=mask)
    return m.to_out(joined(y).to(x.dtype))


def rotated(module, *inputs, **how):
    """(graph with Q/DQ, its tensors, decisions by name)."""
    captured, args, decisions, tensors = planned(module, *inputs, **how)
    graph, nodes = bind(captured, args)
    propagate(graph, tensors)
    decisions = rotate_heads(decisions, nodes)
    return insert(graph, nodes, decisions), tensors, {d.layer.name: d for d in decisions}


def names(decisions):
    return {n for n, d in decisions.items() if d.rotated}, {n for n, d in decisions.items() if d.turned}


def test_a_rotation_is_its_own_inverse_and_keeps_every_length():
    x = noise(3, 2 * ROTATED)
    torch.testing.assert_close(rotate(rotate(x)), x)
    torch.testing.assert_close(rotate(x).unflatten(-1, (2, -1)).norm(dim=-1), x.unflatten(-1, (2, -1)).norm(dim=-1))
    torch.testing.assert_close(rotate(x.T, 0), rotate(x).T)
    torch.testing.assert_close(rotate(torch.ones(1, ROTATED)), torch.ones(1, ROTATED))  # no channel gathers a common mean
    one = torch.zeros(1, ROTATED).index_fill(1, torch.tensor([5]), 8.0)
    torch.testing.assert_close(rotate(one).abs(), torch.ones(1, ROTATED))  # an outlier is shared by all


@pytest.mark.parametrize("how", ["itself", "text", "mask"])
def test_values_and_the_layer_behind_the_attention_are_rotated(how):
    wide = {"to_k": lambda: nn.Linear(96, 128), "to_v": lambda: nn.Linear(96, 128)} if how == "text" else {}
    module = Fragment(attend, **HEADS | wide)
    inputs = {"itself": (X,), "text": (X, TEXT), "mask": (X, X, noise(2, 1, 12, 12))}[how]
    gm, tensors, decisions = rotated(module, *inputs)
    assert names(decisions) == ({"to_out"}, {"to_v"})
    with torch.no_grad():
        assert 0 < measure.compare(gm(*tensors), module(*inputs)) < 0.03  # of one side alone it would be beyond 1


@pytest.mark.parametrize("name", ["to_out", "to_v"])
def test_a_layer_alone_gives_what_its_report_says(name):
    module = Fragment(attend, **HEADS)
    decision = rotated(module, X, alpha=None)[2][name]
    layer, x = module.get_submodule(name), noise(5, 128 if name == "to_out" else 64) * decision.amax / 5
    x8, w8 = stats.fake_quantize_input(decision, x), stats.fake_quantize_weight(decision, layer.weight)
    (codes, scale), = quantized_weights([decision], None)
    by_hand = codes * scale[:, None]
    given = rotate(x8) if name == "to_out" else x8
    result = given @ by_hand.T if name == "to_out" else rotate(given @ by_hand.T)
    torch.testing.assert_close(result, x8 @ w8.T, rtol=1e-4, atol=1e-4)
    assert stats.relative_error(x8 @ w8.T, x @ layer.weight.T) < 0.03


def sum_of_two(m, x):
    y = F.scaled_dot_product_attention(split(m.to_q(x)), split(m.to_k(x)), split(m.to_v(x)))
    return m.to_out(joined(y) + joined(y * 2))


def read_twice(m, x):
    y = joined(F.scaled_dot_product_attention(split(m.to_q(x)), split(m.to_k(x)), split(m.to_v(x))))
    return m.to_out(y), y * 2


def values_read_twice(m, x):
    v = m.to_v(x)
    y = F.scaled_dot_product_attention(split(m.to_q(x)), split(m.to_k(x)), split(v))
    return m.to_out(joined(y)), v * 2


def keys_are_values(m, x):
    v = split(m.to_v(x))
    return m.to_out(joined(F.scaled_dot_product_attention(split(m.to_q(x)), v, v)))


def normed(m, x):
    y = F.scaled_dot_product_attention(split(m.to_q(x)), split(m.to_k(x)), F.layer_norm(split(m.to_v(x)), (64,)))
    return m.to_out(joined(y))


def heads_inside(m, x):
    """The width of a head lies outside of the heads."""
    q, k, v = (t(x).view(*x.shape[:2], 64, 2).permute(0, 3, 1, 2) for t in (m.to_q, m.to_k, m.to_v))
    return m.to_out(joined(F.scaled_dot_product_attention(q, k, v)))


def tokens_joined(m, x):
    y = F.scaled_dot_product_attention(split(m.to_q(x)), split(m.to_k(x)), split(m.to_v(x)))
    return m.to_out(y.reshape(x.shape[0], x.shape[1], -1))


@pytest.mark.parametrize("body", [sum_of_two, read_twice, values_read_twice, keys_are_values, normed, heads_inside, tokens_joined,
                                  lambda m, x: attend(m, x, width=32)], ids=lambda f: f.__name__)
def test_elsewhere_nothing_is(body):
    module = Fragment(body, **HEADS)
    gm, tensors, decisions = rotated(module, X)
    assert names(decisions) == (set(), set())
    with torch.no_grad():
        assert measure.compare(gm(*tensors), module(X)) < 0.03


def test_both_must_be_in_8_bits():
    captured, args, decisions, tensors = planned(Fragment(attend, **HEADS), X)
    graph, nodes = bind(captured, args)
    propagate(graph, tensors)

    def changed(name, **how):
        mine = [replace(d, **how) if d.layer.name == name else d for d in decisions]
        return {d.layer.name: d for d in rotate_heads(mine, nodes)}

    assert names(changed("to_out", precision="16-bit")) == names(changed("to_v", precision="16-bit")) == (set(), set())
    assert names(changed("to_out", precision="fp8")) == (set(), set())  # a floating-point code has no range to win
    assert names(changed("to_out", two_codes=True)) == names(changed("to_out", rotated_amax=None)) == (set(), set())
    assert names(changed("to_v", weight_amax=torch.ones(128))) == (set(), set())  # a range was trained as the weight lies
    assert names(changed("to_v", precision="fp8")) == ({"to_out"}, {"to_v"})


def test_an_outlier_costs_less():
    module = Fragment(attend, **HEADS)
    with torch.no_grad():
        module.to_v.weight[3] *= 30
        module.to_out.weight[:, 3] /= 30
    captured, args, decisions, tensors = planned(module, X, alpha=None)
    errors = []
    for how in (lambda d, nodes: d, rotate_heads):
        graph, nodes = bind(captured, args)
        propagate(graph, tensors)
        with torch.no_grad():
            errors.append(measure.compare(insert(graph, nodes, how(decisions, nodes))(*tensors), module(X)))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_loras_are_rotated_along(precision):
    weights = [torch.randn(64, 128), torch.randn(128, 128)]
    members = [Decision(Layer(f"layer{i}", "linear", f"node{i}", "x", w), precision, "", rotated=True, turned=i == 1)
               for i, w in enumerate(weights)]
    lora = Factors(torch.randn(4, 128), torch.randn(128, 4), 0.5)
    one = Coded(members, None, quantized_weights(members, None))
    before = [(c.clone(), s.clone()) for c, s in one.tensors]
    write([one], lambda w: [(lora, "lora")] if w is weights[1] else [], {"lora": 0.7}, {})
    whole = rotate(rotate(added(weights[1], [(lora, 0.7)]), 0))
    codes, scale = one.tensors[1]
    assert stats.relative_error(codes.float() * scale.view(-1, 1), whole) < (0.01 if precision == "int8" else 0.04)
    write([one], lambda w: [], {}, {})
    assert all(torch.equal(a.float(), b.float()) for pair, kept in zip(one.tensors, before, strict=True)
               for a, b in zip(pair, kept, strict=True))
