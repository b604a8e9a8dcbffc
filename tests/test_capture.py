"""Dynamo's graph in, layers and a fresh graph out."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import grab
from fragments import TOKENS, Fragment, linear

from sdtrt_backend.capture import bind, concrete, tensor_inputs, trace


def test_every_linear_and_convolution_is_found_under_its_module_path(denoiser, graph):
    captured, _ = graph
    modules = {n: m for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert {layer.name for layer in captured.layers} == set(modules)
    assert all(torch.equal(layer.weight, modules[layer.name].weight) for layer in captured.layers)
    assert captured.unquantizable == {}


def test_layers_that_read_one_tensor_have_one_source(graph):
    source = {layer.name: layer.source for layer in graph[0].layers}
    assert source["to_q"] == source["to_k"] == source["to_v"] != source["to_out"]
    assert source["context_k"] == source["context_v"]


def test_the_bound_graph_takes_tensors_alone_and_gives_the_modules_own_numbers(denoiser, graph, inputs):
    captured, args = graph
    bound, _ = bind(captured, args)
    assert len(bound.graph.find_nodes(op="placeholder")) == 3
    with torch.no_grad():
        assert torch.equal(bound(*tensor_inputs(captured, args))[0], denoiser(*inputs))


def test_the_timestep_is_the_second_input(graph, inputs):
    captured, args = graph
    assert args[captured.timestep] is inputs[1]


def test_tensors_on_the_cpu_go_to_the_device_of_the_weights(graph):
    captured, args = graph
    away = replace(captured, constants={i: p.to("meta") for i, p in captured.constants.items()})
    assert {t.device.type for t in tensor_inputs(away, args)} == {"meta"}
    assert any(t is args[captured.timestep] for t in tensor_inputs(captured, args))


def test_sizes_that_dynamo_makes_symbolic_become_literals(denoiser, inputs):
    sample, timestep, context = inputs
    more = (torch.cat([sample] * 2), timestep, torch.cat([context] * 2))
    captured, args = grab(denoiser, inputs, more)
    assert any(isinstance(a, int) for a in args)
    bound, _ = bind(captured, args)
    with torch.no_grad():
        torch.testing.assert_close(bound(*tensor_inputs(captured, args))[0], denoiser(*more))


def test_torch_export_gives_the_layers_that_dynamo_gives_and_the_names_of_the_forward(denoiser, graph, inputs):
    call = dict(zip(("sample", "timestep", "encoder_hidden_states"), inputs, strict=True))
    captured, values = trace(denoiser, call)
    assert captured.fingerprints() == graph[0].fingerprints()
    bound, _ = bind(captured, values)
    assert [n.name for n in bound.graph.find_nodes(op="placeholder")] == list(call)
    with torch.no_grad():
        assert torch.equal(bound(*inputs)[0], denoiser(*inputs))


def test_a_dimension_that_torch_export_keeps_symbolic_fits_every_size(denoiser, inputs):
    sample, timestep, context = inputs
    batch = {0: torch.export.Dim.DYNAMIC}
    captured, values = trace(denoiser, {"sample": sample, "timestep": timestep, "encoder_hidden_states": context},
                             {"sample": batch, "timestep": None, "encoder_hidden_states": batch})
    bound, _ = bind(captured, values)
    more = (torch.cat([sample] * 3), timestep, torch.cat([context] * 3))
    with torch.no_grad():
        torch.testing.assert_close(bound(*more)[0], denoiser(*more))


def test_dynamos_own_graph_is_left_alone(graph):
    captured, args = graph
    before = captured.graph.code
    bind(captured, args)
    assert captured.graph.code == before


class Functional(torch.nn.Module):
    """One linear called as a function; the bias is computed or a buffer."""

    def __init__(self, bias):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(torch.randn(64, 64)), bias
        self.register_buffer("shift", torch.ones(64))

    def forward(self, x):
        return F.linear(x, self.weight, self.shift if self.bias == "buffer" else 2 * self.shift)


@pytest.mark.parametrize("bias", ["buffer", "computed"])
def test_a_layer_whose_bias_is_no_parameter_is_a_layer_or_has_a_reason(bias):
    torch._dynamo.reset()
    captured, _ = grab(Functional(bias), (torch.randn(2, 64),))
    assert len(captured.layers) + len(captured.unquantizable) == 1


class TwoCalls(torch.nn.Module):
    """Two linears that are no submodules, so one module path holds both."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return F.linear(F.linear(x, self.a), self.b)


def test_two_weights_never_share_a_name():
    torch._dynamo.reset()
    captured, _ = grab(torch.nn.Sequential(TwoCalls()), (torch.randn(2, 64),))
    assert len({layer.name for layer in captured.layers}) == len(captured.layers) == 2


def test_padding_in_words_is_a_reason():
    torch._dynamo.reset()
    captured, _ = grab(torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding="same")), (torch.randn(1, 64, 8, 8),))
    assert captured.layers == ()
    assert "'same'" in captured.unquantizable["0"]


def add(h, x):
    h.add_(torch.tanh(x))
    return h


def scale_a_view(h, x):
    part = h[:, :2]
    part.mul_(3.0)
    return h


def assign(h, x):
    h[:, :2] = 0.5
    return h


def augment_a_view(h, x):
    h[:, 2:] += 1.0
    return h


def fill_where(h, x):
    h.masked_fill_(x > 0, 0.0)
    return h


def augment_under_another_name(h, x):
    same = h
    h += torch.tanh(x)
    return same


def out_of_add(h, x):
    torch.add(h, torch.tanh(x), out=h)
    return h


def into_an_earlier_view(h, x):
    early = h.view(2, -1)
    F.relu(h, inplace=True)
    return early.view_as(x)


@pytest.mark.parametrize("change", [add, scale_a_view, assign, augment_a_view, fill_where, augment_under_another_name, out_of_add,
                                    into_an_earlier_view])
def test_what_a_module_changes_in_place_is_changed_and_not_quantised(change):
    module = Fragment(lambda m, x: m.late(change(torch.sin(m.early(x)), x)), early=linear, late=linear).eval()
    captured, args = grab(module, (TOKENS,))
    assert [layer.name for layer in captured.layers] == ["early"]
    assert "in place" in captured.unquantizable["late"]
    bound, _ = bind(captured, args)
    with torch.no_grad():
        assert torch.equal(bound(TOKENS)[0], module(TOKENS))


def test_graphs_that_do_the_same_at_these_sizes_have_the_same_calls(denoiser):
    """Dynamo's second graph has symbolic sizes."""
    small, large = ((torch.randn(n, 4, size, size), torch.tensor(500), torch.randn(n, 5, 64)) for n, size in ((2, 8), (3, 12)))
    found = []
    for calls in ((small,), (large, small), (large,)):
        torch._dynamo.reset()
        captured, args = grab(denoiser, *calls)
        found.append((sum(isinstance(a, int) for a in args), concrete(captured, args)))
    (no_sizes, fixed), (some, symbolic), (_, other) = found
    assert no_sizes == 0 < some
    assert fixed == symbolic != other
