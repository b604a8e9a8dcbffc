"""8 bits where they were measured to be faster, with the quantisation of the input in the sum."""

import math

import pytest
import torch
import torch.nn.functional as F
from fragments import PIXELS, TOKENS, Fragment, conv, linear, planned
from torch import nn

from sdtrt_backend import ops
from sdtrt_backend.assign import assign, attentions_in_fp8, kernels_ms, quantization_ms
from sdtrt_backend.capture import bind, tensor_inputs
from sdtrt_backend.fx import propagate
from sdtrt_backend.kernels import Choice
from sdtrt_backend.quantize import plan


class Measured:
    """Every kernel takes the time given here."""

    def __init__(self, int8=1.0, fp8=1.0, wide=2.0, quantize=0.5, attention_fp8=None):
        self.attention_fp8 = attention_fp8
        self.times = {"int8": int8, "fp8": fp8}
        self.wide, self.quantize = wide, quantize

    def best(self, problem, precision):
        ms = self.times[precision]
        return None if ms is None else Choice("reference", ms)

    def wide_ms(self, problem):
        return self.wide

    def quantize_ms(self, numel, dtype):
        return self.quantize

    def attention_ms(self, query, tokens, dtype, out):
        return 4.0 if out.itemsize == 1 else 3.0

    def attention_fp8_ms(self, query, tokens):
        return self.attention_fp8

    def attention_times(self, *shape):
        return {"torch": 3.0, "triton": 1.0}


@pytest.fixture
def bound(graph, recipe):
    captured, args = graph
    gm, nodes = bind(captured, args)
    propagate(gm, tensor_inputs(captured, args))
    return gm, nodes, plan(captured.layers, recipe, ())


def run(bound, chooser, precision="int8", always=False):
    _, nodes, decisions = bound
    return {d.layer.name: d for d in assign(decisions, nodes, chooser, precision, always)}


def test_what_is_faster_in_8_bits_runs_so_and_the_rest_says_both_times(bound):
    layers = run(bound, Measured(int8=2.4, wide=1.0))
    # q, k and v are one product of 2.4 ms against three of 1.0
    assert {name for name, d in layers.items() if d.quantized} == {"to_q", "to_k", "to_v"}
    assert "2.4000 ms in int8" in layers["conv1"].reason
    assert "1.0000 ms in float32" in layers["conv1"].reason


def test_quantising_an_input_that_no_norm_writes_counts(bound):
    # the text is an input of the graph: its two readers pay for a pass over it
    assert run(bound, Measured(int8=1.0, wide=0.7, quantize=0.3))["context_k"].quantized
    assert not run(bound, Measured(int8=1.0, wide=0.7, quantize=0.5))["context_k"].quantized


def test_sd_fp8_takes_int8_where_that_is_faster(bound):
    assert run(bound, Measured(int8=0.9, fp8=1.0), "fp8")["conv1"].precision == "int8"
    assert run(bound, Measured(int8=1.0, fp8=0.9), "fp8")["conv1"].precision == "fp8"
    assert run(bound, Measured(int8=1.0, fp8=None), "fp8")["conv1"].precision == "int8"
    assert run(bound, Measured(int8=1.0, fp8=0.9), "int8")["conv1"].precision == "int8"


def test_where_every_layer_is_wanted_in_8_bits_time_does_not_matter(bound):
    layers = run(bound, Measured(int8=0.1, fp8=9.0), "fp8", always=True)
    assert {d.precision for d in layers.values() if d.quantized} == {"fp8"}
    assert sum(d.quantized for d in layers.values()) == 9


def test_without_a_kernel_the_reason_names_the_shape(bound):
    layers = run(bound, Measured(int8=None))
    assert "no int8 kernel takes conv2d 2x64x8x8 by 64x64x3x3" in layers["conv1"].reason


def test_the_bound_is_every_16_bit_kernel_of_the_graph(bound, attending):
    assert kernels_ms(bound[0], Measured(wide=2.0)) == pytest.approx(2.0 * len(bound[2]))
    assert kernels_ms(attending[0], Measured(wide=2.0)) == pytest.approx(2.0 * 4 + 3.0)


def test_calls_that_are_never_quantised_or_name_their_arguments_are_read_too():
    def body(m, x):
        return m.linear(torch.flatten(input=m.words(m.conv(x)), start_dim=2))

    captured, args, decisions, tensors = planned(Fragment(body, conv=conv, words=lambda: conv(padding="same"),
                                                          linear=lambda: nn.Linear(42, 64)), PIXELS)
    gm, nodes = bind(captured, args)
    propagate(gm, tensors)
    assert kernels_ms(gm, Measured(wide=2.0)) == 2.0 * 2  # padding in words has no kernel to compare with
    assert quantization_ms(nodes[decisions[-1].layer.source], Measured(quantize=0.5), torch.int8) == 0.5


def test_behind_an_attention_the_cost_is_the_difference_of_two_kernels(attending):
    (attention,) = attending[0].graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    assert quantization_ms(attention, Measured(), torch.int8) == 1.0


@pytest.fixture
def attending():
    """(graph, tensors) of one attention with four heads."""
    captured, args, _, tensors = planned(Fragment(attend, q=linear, k=linear, v=linear, o=linear), TOKENS)
    gm, _ = bind(captured, args)
    propagate(gm, tensors)
    return gm, tensors


def attend(m, x):
    q, k, v = (layer(x).view(2, -1, 4, 16).transpose(1, 2) for layer in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=False)
    return m.o(y.transpose(1, 2).reshape(2, -1, 64))


@pytest.mark.parametrize(("fp8", "off", "marked"), [(1.0, 0.0, True), (2.0, 0.0, False), (None, 0.0, False), (1.0, 0.2, False)],
                         ids=["faster", "slower with three passes", "no kernel", "wrong"])
def test_an_attention_runs_in_fp8_where_that_is_faster_and_near(attending, monkeypatch, fp8, off, marked):
    gm, tensors = attending
    reference = ops.KERNELS["attention_fp8", "reference"]

    def kernel(q, k, v, scales, scale):
        return (reference(q, k, v, scales, scale).float() * (1 + off)).to(q.dtype)

    monkeypatch.setitem(ops.KERNELS, ("attention_fp8", "cudnn"), kernel)
    errors = attentions_in_fp8(gm, tensors, Measured(attention_fp8=fp8))
    (attention,) = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    assert bool(errors) is marked
    if marked:
        name, scales = attention.meta["fp8_attention"]
        assert name == "cudnn"
        assert all(math.log2(s) % 1 == 0 for s in scales)
        assert 0 < errors[0] < 0.08
    else:
        assert "fp8_attention" not in attention.meta
