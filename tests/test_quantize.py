"""The plan has a line for every layer; the graph has one Q/DQ for every tensor; smoothing touches 8-bit layers only."""

from dataclasses import replace

import pytest
import torch
from conftest import grab
from tolerances import TOLERANCES

from sdtrt_backend import measure, stats
from sdtrt_backend.capture import bind, tensor_inputs
from sdtrt_backend.quantize import FP8_HEADROOM, QD, free_convs, insert, plan, smooth_convs
from sdtrt_backend.recipe import LayerRecipe, Recipe
from sdtrt_backend.values import FP8_MAX

KEPT = {"conv_in", "conv_out", "time_embedding"}


def quantised(graph, decisions):
    captured, args = graph
    return insert(*bind(captured, args), decisions), tensor_inputs(captured, args)


def count(gm, target):
    return len(gm.graph.find_nodes(op="call_function", target=target))


def test_every_layer_has_a_scale_or_a_reason(graph, recipe):
    decisions = plan(graph[0].layers, recipe, ())
    assert {d.layer.name for d in decisions if not d.quantized} == KEPT
    assert all(d.amax > 0 if d.quantized else d.reason for d in decisions)


def test_a_layer_without_statistics_stays_and_says_so(graph, recipe):
    without = replace(recipe, layers={k: v for k, v in recipe.layers.items() if k != "conv1"})
    reasons = {d.layer.name: d.reason for d in plan(graph[0].layers, without, ())}
    assert "did not run" in reasons["conv1"]


def test_layers_that_read_one_tensor_share_its_quantisation(graph, recipe):
    gm, _ = quantised(graph, plan(graph[0].layers, recipe, ()))
    # conv1 | to_q, to_k, to_v | context_k, context_v | to_out | ff_in | ff_out
    assert count(gm, QD.quantize_per_tensor.default) == 6
    assert count(gm, QD.dequantize_per_channel.default) == 9


def test_the_quantised_graph_is_close_to_the_module(denoiser, graph, recipe, inputs):
    gm, tensors = quantised(graph, plan(graph[0].layers, recipe, ()))
    with torch.no_grad():
        error = measure.compare(gm(*tensors), denoiser(*inputs))
    assert 0 < error < TOLERANCES["int8_step"]


def test_smoothing_is_folded_into_a_norm_that_only_8_bit_layers_read(graph, recipe):
    everything = quantised(graph, plan(graph[0].layers, recipe, ()))[0]
    # factors of the context, of to_out and of ff_out have no norm to go to; those of to_q and ff_in have
    assert count(everything, torch.mul) == 3
    one_kept = quantised(graph, plan(graph[0].layers, recipe, ("to_q",)))[0]
    assert count(one_kept, torch.mul) == 4


def test_an_unquantised_layer_pays_for_no_smoothing(denoiser, graph, recipe, inputs):
    gm, tensors = quantised(graph, plan(graph[0].layers, recipe, ("*",)))
    assert count(gm, torch.mul) == count(gm, QD.quantize_per_tensor.default) == 0
    with torch.no_grad():
        assert torch.equal(gm(*tensors)[0], denoiser(*inputs))


@pytest.mark.parametrize("convs", ["plain", "smoothed", "free"])
@pytest.mark.parametrize("name", ["conv1", "to_q", "ff_out"])
def test_one_layer_alone_equals_fake_quantisation_written_by_hand(denoiser, graph, recipe, inputs, name, convs):
    others = [layer.name for layer in graph[0].layers if layer.name != name]
    decisions = plan(graph[0].layers, recipe, tuple(others), free_convs=convs == "free", smooth_convs=convs == "smoothed")
    (decision,) = [d for d in decisions if d.quantized]
    assert (decision.int8_range[1] != 0) == (decision.layer.op == "conv2d" and convs == "free")
    assert (decision.smoothing is None) == (decision.layer.op == "conv2d" and convs == "plain")
    gm, tensors = quantised(graph, decisions)
    layer = denoiser.get_submodule(name)
    s = torch.ones(1) if decision.smoothing is None else stats.over_channels(decision.smoothing, layer.weight)
    weight = layer.weight.detach() * s
    scale = stats.weight_scale(weight)
    with torch.no_grad():
        layer.weight.copy_(stats.quantize_weight(weight, scale) * scale.view(-1, *[1] * (weight.dim() - 1)))
        hook = layer.register_forward_pre_hook(lambda m, a: (stats.fake_quantize(a[0] / s, *decision.int8_range),))
        expected = denoiser(*inputs)
        hook.remove()
        # a rounding tie may fall to the other side where the norm carries the factor
        assert measure.compare(gm(*tensors), expected) < 2e-3


def test_which_convolutions_may_be_smoothed_and_have_a_zero_point():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [smooth_convs(device) for device in (cpu, cuda, torch.device("mps"))] == [True, True, False]
    assert [free_convs(*of) for of in ((cpu, "int8"), (cpu, "fp8"), (cuda, "int8"))] == [True, False, False]


class Keyword(torch.nn.Module):
    """A linear whose weight is passed by keyword."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.nn.functional.linear(x, weight=self.weight)


def test_a_weight_passed_by_keyword_is_quantised_like_any_other():
    torch._dynamo.reset()
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    module = Keyword()
    captured, args = grab(module, (x,))
    (layer,) = captured.layers
    recipe = Recipe("", {layer.name: LayerRecipe("linear", "", layer.name, float(x.abs().max()))})
    gm, tensors = quantised((captured, args), plan(captured.layers, recipe, ()))
    with torch.no_grad():
        assert measure.compare(gm(*tensors), module(x)) < TOLERANCES["int8_step"]


def in_fp8(decisions):
    return [replace(d, precision="fp8") if d.quantized else d for d in decisions]


def test_fp8_is_close_to_the_module_and_one_layer_equals_fake_quantisation_written_by_hand(denoiser, graph, recipe, inputs):
    gm, tensors = quantised(graph, in_fp8(plan(graph[0].layers, recipe, ())))
    with torch.no_grad():
        assert 0 < measure.compare(gm(*tensors), denoiser(*inputs)) < TOLERANCES["fp8_step"]
    others = tuple(layer.name for layer in graph[0].layers if layer.name != "conv1")
    decisions = in_fp8(plan(graph[0].layers, recipe, others))
    (decision,) = [d for d in decisions if d.quantized]
    gm, tensors = quantised(graph, decisions)
    layer = denoiser.conv1
    scale = layer.weight.detach().abs().amax((1, 2, 3), keepdim=True) / FP8_MAX
    with torch.no_grad():
        layer.weight.copy_(stats.fake_quantize_fp8(layer.weight, scale))
        hook = layer.register_forward_pre_hook(
            lambda m, a: (stats.fake_quantize_fp8(a[0], decision.amax * FP8_HEADROOM / FP8_MAX),))
        expected = denoiser(*inputs)
        hook.remove()
        assert measure.compare(gm(*tensors), expected) < 2e-3


def test_fp8_linears_that_read_one_tensor_have_one_scale_and_lie_in_one_memory(graph, recipe):
    known = {}
    weights = {layer.name: id(layer.weight) for layer in graph[0].layers}
    insert(*bind(*graph), in_fp8(plan(graph[0].layers, recipe, ())), known)
    (codes,) = [v.tensors for (ids, *_), v in known.items() if ids == (weights["to_q"], weights["to_k"], weights["to_v"])]
    assert all(c.dtype == torch.float8_e4m3fn for c, _ in codes)
    assert len({float(scale) for _, scale in codes}) == 1
    assert len({c.untyped_storage().data_ptr() for c, _ in codes}) == 1
    assert codes[0][0].untyped_storage().nbytes() == 3 * 64 * 64


def test_a_second_graph_of_the_module_uses_the_codes_of_the_first(graph, recipe):
    known = {}
    decisions = plan(graph[0].layers, recipe, ())
    insert(*bind(*graph), decisions, known)
    before = {k: [c for c, _ in v.tensors] for k, v in known.items()}
    gm = insert(*bind(*graph), decisions, known)
    assert all(mine is theirs for k, v in known.items()
               for (mine, _), theirs in zip(v.tensors, before[k], strict=True))
    held = {id(b) for b in gm.buffers()}
    assert all(id(c) in held for v in before.values() for c in v)
