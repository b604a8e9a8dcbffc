"""8 bits where they were measured to be faster, with the quantisation of the input in the sum."""

import math

import pytest
import torch
import torch.nn.functional as F
from fragments import PIXELS, TOKENS, Fragment, conv, linear, planned
from torch import nn

from sdtrt_backend import ops
from sdtrt_backend.assign import assign, attentions_in_fp8, kernels_ms, mark_work, quantization_ms
from sdtrt_backend.capture import bind, tensor_inputs
from sdtrt_backend.fx import behind_linear, plain_attention, propagate
from sdtrt_backend.kernels import Choice, Unsteady
from sdtrt_backend.quantize import plan
from sdtrt_backend.rules import TWO_CODES_REASON


class Measured:
    """A GPU on which every kernel takes the time given here."""

    place, gain, joins, names_kernels, opaque = "GPU", 1.0, True, True, ()

    def __init__(self, int8=1.0, fp8=1.0, wide=2.0, quantize=0.5, attention_fp8=None, room=1.0, saves=0.0):
        self.fp8_attention, self.left, self.saves = attention_fp8, room, saves
        self.asked = set()
        self.times = {"int8": int8, "fp8": fp8}
        self.wide, self.quantize = wide, quantize

    def best(self, problem, precision):
        self.asked.add(precision)
        ms = self.times[precision]
        return None if ms is None else Choice("reference", ms)

    def reasons(self, problem, precision):
        return ("made here: it is refused", "another one too") if self.times[precision] is None else ()

    def room(self, problem, precision):
        return self.left

    def wide_ms(self, problem):
        return self.wide

    def quantize_ms(self, numel, dtype):
        return self.quantize

    def gelu_saves(self, problem, out):
        return self.saves

    def attention_ms(self, query, tokens, dtype, out):
        return 4.0 if out.itemsize == 1 else 3.0

    def attention_fp8(self, query, tokens):
        return None if self.fp8_attention is None else Choice("cudnn", self.fp8_attention)

    def encoding_saves(self, problem):
        return self.saves

    def attention_times(self, *shape):
        return {"torch": 3.0, "triton": 1.0}


class Cpu(Measured):
    """Likewise a CPU; ``times`` has no fp8."""

    place, gain, joins, names_kernels, opaque = "CPU", 0.9, False, False, (F.group_norm,)


@pytest.fixture
def bound(graph, recipe):
    captured, args = graph
    gm, nodes = bind(captured, args)
    propagate(gm, tensor_inputs(captured, args))
    return gm, nodes, plan(captured.layers, recipe, ())


def untimed():
    """A CPU that fails where it is asked for a time."""
    def fail(*arguments):
        raise AssertionError(f"{arguments} was timed")

    chooser = Cpu()
    chooser.best = chooser.wide_ms = chooser.quantize_ms = chooser.reasons = chooser.attention_ms = fail
    return chooser


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


def test_a_near_tie_of_a_convolution_is_won_by_int8_and_of_a_linear_by_what_was_faster(bound):
    """A GPU at its power limit slows down more in fp8 convolutions."""
    near = run(bound, Measured(int8=1.0, fp8=0.97), "fp8")
    assert (near["conv1"].precision, near["to_q"].precision) == ("int8", "fp8")


def test_a_product_that_applies_gelu_saves_a_pass():
    def body(m, x):
        return m.b(F.gelu(m.a(x), approximate="tanh")) + m.c(F.gelu(x))

    captured, args, decisions, tensors = planned(Fragment(body, a=linear, b=linear, c=linear), TOKENS)
    gm, nodes = bind(captured, args)
    propagate(gm, tensors)

    def precisions(**times):
        chosen = assign(decisions, nodes, Measured(fp8=1.0, wide=3.0, quantize=0.0, **times), "fp8")
        return "".join({"int8": "i", "fp8": "f"}[d.precision] for d in chosen)

    assert precisions(int8=1.2, saves=0.3) == "iff"
    assert precisions(int8=1.2, saves=0.1) == "fff"
    assert precisions(int8=1.2, saves=0.3, room=0.0) == "iff"  # asked for where fp8 is at the highest rate, too
    assert precisions(int8=None, saves=0.3) == "fff"


def test_where_fp8_has_nothing_to_lose_no_int8_kernel_is_asked_for(bound):
    chooser = Measured(int8=0.1, fp8=1.0, room=0.0)
    assert run(bound, chooser, "fp8")["conv1"].precision == "fp8"
    assert chooser.asked == {"fp8"}
    assert run(bound, Measured(int8=0.1, fp8=None, room=0.0), "fp8")["conv1"].precision == "int8"


def test_a_layer_of_next_to_no_work_is_in_fp8_unless_only_int8_takes_it(bound, monkeypatch):
    gm, _, _ = bound
    monkeypatch.setattr("sdtrt_backend.assign.LEAST_GAIN", 0.05)
    mark_work(gm)
    layers = run(bound, Measured(int8=0.1, fp8=1.0), "fp8")
    # 2x64x8x8 by 64x64x3x3 is most of the work; the text of 2x3 tokens is next to none
    assert (layers["conv1"].precision, layers["context_k"].precision) == ("int8", "fp8")
    assert run(bound, Measured(int8=0.1, fp8=None), "fp8")["context_k"].precision == "int8"


def test_nothing_is_measured_for_an_attention_of_next_to_no_work(attending, monkeypatch):
    gm, _ = attending
    (attention,) = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    mark_work(gm)
    assert plain_attention(attention) is not None
    products = kernels_ms(gm, Measured()) - 3.0
    monkeypatch.setattr("sdtrt_backend.fx.LEAST_SHARE", 1.0)
    mark_work(gm)
    assert plain_attention(attention) is None
    assert kernels_ms(gm, Measured()) == products


def test_calls_of_one_shape_are_measured_once_and_count_together(attending):
    gm, _ = attending  # four linears of one shape, each with 24 % of the work, and an attention
    mark_work(gm)
    shares = [node.meta["work"] for node in gm.graph.nodes if "work" in node.meta]
    assert len(shares) == 5
    assert sorted(set(shares)) == pytest.approx([0.0376, 0.9624], abs=1e-4)


def test_where_every_layer_is_wanted_in_8_bits_time_does_not_matter(bound):
    layers = run(bound, Measured(int8=0.1, fp8=9.0), "fp8", always=True)
    assert {d.precision for d in layers.values() if d.quantized} == {"fp8"}
    assert sum(d.quantized for d in layers.values()) == 9


def test_without_a_kernel_the_reason_names_the_shape(bound):
    layers = run(bound, Measured(int8=None))
    assert layers["conv1"].reason.startswith("no int8 kernel takes conv2d 2x64x8x8 by 64x64x3x3")
    assert layers["conv1"].reason.endswith("(made here: it is refused)")
    assert run(bound, Measured(int8=None), always=True)["conv1"].reason == layers["conv1"].reason


def test_on_the_cpu_linears_that_read_one_tensor_stay_separate_products(bound):
    # three products of 0.8 ms against three of 1.0, where one of 2.4 would have won as well; behind their norm no pass is needed
    assert run(bound, Cpu(int8=0.8, wide=1.0))["to_q"].quantized
    assert not run(bound, Cpu(int8=2.4, wide=1.0))["to_q"].quantized


def test_the_cpu_asks_for_a_clear_gain_and_says_so(bound):
    layers = run(bound, Cpu(int8=0.91, wide=1.0, quantize=0.0))
    assert not any(d.quantized for d in layers.values())
    assert layers["to_q"].reason == ("measured on this CPU: 2.7300 ms in int8 with quantising the input, 3.0000 ms in float32; "
                                     "8 bits must save 10%")
    assert sum(d.quantized for d in run(bound, Cpu(int8=0.89, wide=1.0, quantize=0.0)).values()) == 9


def test_on_the_cpu_a_group_norm_is_a_call_behind_which_quantising_is_a_pass(bound):
    (norm,) = bound[0].graph.find_nodes(op="call_function", target=F.group_norm)
    for chooser, ms in ((Cpu(quantize=0.5), 0.5), (Measured(quantize=0.5), 0.0)):
        assert quantization_ms(norm, chooser, torch.int8) == ms


def test_with_always_the_cpu_times_nothing(bound):
    assert sum(d.quantized for d in run(bound, untimed(), always=True).values()) == 9


def test_times_of_a_busy_machine_move_no_layer(bound):
    slow = Cpu(int8=9.0, wide=Unsteady(1.0))
    assert sum(d.quantized for d in run(bound, slow).values()) == 9
    slow = Cpu(int8=Unsteady(9.0), wide=1.0)
    assert sum(d.quantized for d in run(bound, slow).values()) == 9


def test_two_codes_count_their_kernel_and_their_pass_twice_and_keep_their_reason(graph, recipe):
    captured, args = graph
    gm, nodes = bind(captured, args)
    propagate(gm, tensor_inputs(captured, args))
    bound = gm, nodes, plan(captured.layers, recipe, (), free_convs=True, two_codes=("context_k", "conv1"))
    layers = run(bound, Cpu(int8=0.4, wide=1.0, quantize=0.0))
    assert layers["context_k"].quantized
    assert layers["context_k"].two_codes
    assert layers["context_k"].reason == TWO_CODES_REASON
    layers = run(bound, Cpu(int8=0.4, wide=1.0, quantize=0.1))  # 2 * (0.4 + 0.1) of the text, whose other reader has one code
    assert "1.0000 ms in int8" in layers["context_k"].reason
    assert not layers["context_k"].two_codes
    assert layers["context_v"].quantized
    layers = run(bound, Cpu(int8=0.5, wide=1.0, quantize=0.0))
    assert "1.0000 ms in int8" in layers["conv1"].reason
    assert layers["to_q"].quantized


def test_the_bound_is_every_16_bit_kernel_of_the_graph(bound, attending):
    assert kernels_ms(bound[0], Measured(wide=2.0)) == pytest.approx(2.0 * len(bound[2]))
    assert kernels_ms(attending[0], Measured(wide=2.0)) == pytest.approx(2.0 * 4 + 3.0)


def test_the_bound_counts_a_masked_attention_as_one_without_its_mask(attending):
    gm, _ = attending
    (attention,) = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    attention.kwargs = {**attention.kwargs, "attn_mask": attention.all_input_nodes[0]}
    assert plain_attention(attention) is None
    assert kernels_ms(gm, Measured(wide=2.0)) == pytest.approx(2.0 * 4 + 3.0)
    attention.kwargs = {**attention.kwargs, "is_causal": True}  # half of its products are left out
    assert kernels_ms(gm, Measured(wide=2.0)) == pytest.approx(2.0 * 4)


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
    attention.meta["fp8_attention"] = ("cudnn", [1.0, 1.0, 1.0], False)
    assert quantization_ms(attention, Measured(), torch.int8) == 0.0  # there is a pass over its codes anyway


@pytest.fixture
def attending():
    """(graph, tensors) of one attention with four heads."""
    return one_attention(attend)


def one_attention(body):
    captured, args, _, tensors = planned(Fragment(body, q=linear, k=linear, v=linear, o=linear), TOKENS)
    gm, _ = bind(captured, args)
    propagate(gm, tensors)
    return gm, tensors


def attend(m, x, also_read=False, heads=4):
    products = [layer(x) for layer in (m.q, m.k, m.v)]
    q, k, v = (y.view(2, -1, heads, 64 // heads).transpose(1, 2) for y in products)
    y = F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=False)
    y = m.o(y.transpose(1, 2).reshape(2, -1, 64))
    return y + sum(products) if also_read else y


@pytest.mark.parametrize(("fp8", "off", "lost", "marked"), [
    (2.0, 0.0, 0.0, True), (1.0, 0.0, 0.2, True), (3.0, 0.0, 0.0, False), (None, 0.0, 0.0, False), (1.0, 0.5, 0.0, False),
], ids=["faster", "the mean is lost", "slower", "no kernel", "wrong"])
def test_an_attention_runs_in_fp8_where_that_is_faster_and_near(attending, monkeypatch, fp8, off, lost, marked):
    """lost: of the mean of v, as by tensor cores that add up many tokens."""
    gm, tensors = attending
    reference = ops.KERNELS["attention_fp8", "reference"]

    def kernel(q, k, v, scales, scale, dtype):
        y = reference(q, k, v, scales, scale, torch.float32) * (1 + off)
        return (y - lost * v.float().mean(2).flatten(1).unsqueeze(1)).to(dtype)

    monkeypatch.setitem(ops.KERNELS, ("attention_fp8", "cudnn"), kernel)
    errors = attentions_in_fp8(gm, tensors, Measured(attention_fp8=fp8))
    (attention,) = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    assert bool(errors) is marked
    if marked:
        name, scales, centred = attention.meta["fp8_attention"]
        assert name == "cudnn"
        assert all(math.log2(s) % 1 == 0 for s in scales)
        assert centred is (lost > 0)
        assert 0 < errors[0] < 0.08
    else:
        assert "fp8_attention" not in attention.meta
    written = [n.meta.get("encoding", False) for n in gm.graph.find_nodes(op="call_function", target=F.linear)]
    assert written == [marked, marked, marked and not lost, False]


def test_three_passes_count_where_the_products_are_read_by_others_too():
    gm, tensors = one_attention(lambda m, x: attend(m, x, also_read=True))
    assert attentions_in_fp8(gm, tensors, Measured(attention_fp8=2.0)) == []  # 2.0 and three of 0.5, 3.0 in 16 bits
    assert not any("encoding" in n.meta for n in gm.graph.nodes)


def test_narrow_heads_are_compared_as_kernels_take_them(monkeypatch):
    widths = []
    reference = ops.KERNELS["attention_fp8", "reference"]
    monkeypatch.setitem(ops.KERNELS, ("attention_fp8", "cudnn"),
                        lambda *given: widths.extend(t.shape[-1] for t in given[:3]) or reference(*given))
    gm, tensors = one_attention(lambda m, x: attend(m, x, heads=8))
    (error,) = attentions_in_fp8(gm, tensors, Measured(attention_fp8=1.0))  # 1.0 and three passes of 0.5, 3.0 in 16 bits
    assert 0 < error < 0.08
    assert widths == [16] * 3
    assert not any("encoding" in n.meta for n in gm.graph.nodes)


@pytest.mark.parametrize(("saves", "precision"), [(0.05, "fp8"), (0.2, "int8")])
def test_linears_whose_codes_an_attention_reads_are_int8_where_that_saves_more(saves, precision):
    captured, args, decisions, tensors = planned(Fragment(attend, q=linear, k=linear, v=linear, o=linear), TOKENS)
    gm, nodes = bind(captured, args)
    propagate(gm, tensors)
    chooser = Measured(int8=1.0, fp8=0.9, room=0.0, saves=saves)
    (attention,) = gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
    for linear_, _ in map(behind_linear, plain_attention(attention)[:3]):
        linear_.meta["encoding"] = True
    chosen = {d.layer.name: d.precision for d in assign(decisions, nodes, chooser, "fp8")}
    assert chosen == {"q": precision, "k": precision, "v": precision, "o": "fp8"}
