"""Dividing a tensor by its factor: inside the layer norm where nobody else reads it, else one multiplication."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sdtrt_backend.fx import finish
from sdtrt_backend.smooth import LAYER_NORMS, fold_into_norm, smooth_source

CHANNELS = 64
FACTOR = torch.rand(CHANNELS, generator=torch.Generator().manual_seed(0)) + 0.5


def make(affine=True, outsider=False, dtype=torch.float32, layer_norm=F.layer_norm):
    """(graph of relu(norm(x)), its norm, its relu); an outsider reads the norm as well."""
    root, graph = torch.nn.Module(), fx.Graph()
    generator = torch.Generator().manual_seed(1)
    for name in ("w", "b"):
        root.register_buffer(name, torch.randn(CHANNELS, generator=generator).to(dtype))
    x = graph.placeholder("x")
    graph.placeholder("timestep")
    affine = (graph.get_attr("w"), graph.get_attr("b")) if affine else (None, None)
    norm = graph.call_function(layer_norm, (x, (CHANNELS,), *affine, 1e-5))
    reader = graph.call_function(F.relu, (norm,))
    graph.output((norm if outsider else x, reader))
    return fx.GraphModule(root, graph), norm, reader


def muls(gm):
    return len(gm.graph.find_nodes(op="call_function", target=torch.mul))


@pytest.fixture
def x():
    return torch.randn(2, 5, CHANNELS, generator=torch.Generator().manual_seed(2))


def smoothed(gm, source, reader, x):
    """(what reads the source outside, the smoothed tensor before relu), after smoothing for the one reader."""
    new = smooth_source(gm, source, {reader}, FACTOR)
    reader.args = (new,)
    (output,) = gm.graph.find_nodes(op="output")
    output.args = ((output.args[0][0], new),)
    return finish(gm)(x, None)


@pytest.mark.parametrize("layer_norm", LAYER_NORMS)
def test_a_norm_that_only_the_readers_read_carries_the_factor_itself(x, layer_norm):
    gm, norm, reader = make(layer_norm=layer_norm)
    expected = F.layer_norm(x, (CHANNELS,), gm.w, gm.b) / FACTOR
    _, carried = smoothed(gm, norm, reader, x)
    assert muls(gm) == 0
    torch.testing.assert_close(carried, expected)


@pytest.mark.parametrize("how", ["by name", "no bias"])
def test_the_arguments_of_a_norm_may_be_given_in_any_way(x, how):
    gm, norm, reader = make()
    weight, bias = norm.args[2:4] if how == "by name" else (norm.args[2], None)
    norm.args, norm.kwargs = norm.args[:2], {"weight": weight, "bias": bias, "eps": 1e-3}
    expected = F.layer_norm(x, (CHANNELS,), gm.w, gm.b if bias is not None else None, 1e-3) / FACTOR
    _, carried = smoothed(gm, norm, reader, x)
    assert muls(gm) == 0
    torch.testing.assert_close(carried, expected)


@pytest.mark.parametrize("pattern", [{"outsider": True}, {"affine": False}])
def test_otherwise_one_multiplication_carries_it_and_outsiders_see_the_tensor_as_it_was(x, pattern):
    gm, norm, reader = make(**pattern)
    expected = F.layer_norm(x, (CHANNELS,), *((gm.w, gm.b) if pattern.get("affine", True) else ()))
    outside, carried = smoothed(gm, norm, reader, x)
    assert muls(gm) == 1
    assert torch.equal(outside, expected if "outsider" in pattern else x)
    torch.testing.assert_close(carried, expected / FACTOR)


def test_an_input_of_the_graph_is_multiplied_behind_all_inputs(x):
    gm, norm, _ = make()
    source = gm.graph.find_nodes(op="placeholder")[0]
    assert fold_into_norm(gm, source, {norm}, FACTOR) is None
    new = smooth_source(gm, source, {norm}, FACTOR)
    norm.args = (new, *norm.args[1:])
    finish(gm)
    first = [n.op for n in gm.graph.nodes][:2]
    assert first == ["placeholder", "placeholder"]
    assert torch.equal(gm(x, None)[0], x)
    torch.testing.assert_close(gm(x, None)[1], F.layer_norm(x / FACTOR, (CHANNELS,), gm.w, gm.b).relu())


def test_a_folded_norm_keeps_its_dtype():
    gm, norm, reader = make(dtype=torch.bfloat16)
    assert fold_into_norm(gm, norm, {reader}, FACTOR) is norm
    assert {getattr(gm, a.target).dtype for a in norm.args[2:4]} == {torch.bfloat16}
    torch.testing.assert_close(getattr(gm, norm.args[2].target), (gm.w.float() / FACTOR).bfloat16())


def test_one_tensor_may_have_a_factor_for_each_reader(x):
    """Recipes of other tools have one for every layer, and q, k and v read one tensor."""
    gm, norm, reader = make(outsider=True)
    outsider = next(n for n in norm.users if n is not reader)
    for node, factor in ((reader, FACTOR), (outsider, 3 * FACTOR)):
        node.replace_input_with(norm, smooth_source(gm, norm, {node}, factor))
    finish(gm)
    normed = F.layer_norm(x, (CHANNELS,), gm.w, gm.b)
    outside, carried = gm(x, None)
    torch.testing.assert_close(carried, (normed / FACTOR).relu())
    torch.testing.assert_close(outside, normed / (3 * FACTOR))
