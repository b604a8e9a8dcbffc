"""FX helpers: names, arguments, constants and where new nodes go."""

import pytest
import torch
from torch import fx

from sdtrt_backend.fx import add_constant, call_arguments, finish, inserting_after, module_path, pair


@pytest.fixture
def gm():
    """y = conv2d(x, w); the timestep is an input that nobody reads."""
    root, graph = torch.nn.Module(), fx.Graph()
    root.register_buffer("w", torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    x, _ = graph.placeholder("x"), graph.placeholder("timestep")
    graph.output(graph.call_function(torch.conv2d, (x, graph.get_attr("w"), None, 2), {"padding": (1, 1)}))
    return fx.GraphModule(root, graph)


def node(gm, target):
    return next(n for n in gm.graph.nodes if n.target == target)


@pytest.mark.parametrize(("recorded", "path"), [
    ("L['self'].down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.conv1"),
    ("L['self']._modules['down_blocks']._modules['1'].conv1", "down_blocks.1.conv1"),
    ("L['self'].__dict__['_modules']['to_out']._modules['0']", "to_out.0"),
    ("self.proj_in", "proj_in"),
    ("L['self'].self_attn.to_q", "self_attn.to_q"),  # only the root is called self
])
def test_a_module_path_is_what_named_modules_gives(gm, recorded, path):
    conv = node(gm, torch.conv2d)
    conv.meta["nn_module_stack"] = {"outer": ("L['self']", None), "inner": (recorded, None)}
    assert module_path(conv) == path


@pytest.mark.parametrize("stack", [None, {}, {"root": ("L['self']", None)}])
def test_a_node_of_no_submodule_goes_by_its_own_name(gm, stack):
    conv = node(gm, torch.conv2d)
    conv.meta["nn_module_stack"] = stack
    assert module_path(conv) == conv.name


def test_arguments_are_complete_however_they_were_passed(gm):
    conv = node(gm, torch.conv2d)
    given = call_arguments(conv)
    assert given == {"input": node(gm, "x"), "weight": node(gm, "w"), "bias": None, "stride": 2, "padding": (1, 1),
                     "dilation": 1, "groups": 1}
    conv.args, conv.kwargs = (), {"input": conv.args[0], "weight": conv.args[1], "stride": 2, "padding": (1, 1)}
    assert call_arguments(conv) == given


@pytest.mark.parametrize(("value", "two"), [(3, [3, 3]), ((1, 2), [1, 2]), ([2], [2, 2])])
def test_a_pair_has_two_elements(value, two):
    assert pair(value) == two


def test_a_constant_is_a_buffer_of_the_graph_under_a_python_name(gm):
    with gm.graph.inserting_before(node(gm, torch.conv2d)):
        constant = add_constant(gm, "a.b-c", torch.arange(3))
    assert (constant.op, constant.target) == ("get_attr", "a_b_c")
    assert torch.equal(gm.a_b_c, torch.arange(3))


def test_nodes_behind_an_input_come_after_all_inputs(gm):
    with inserting_after(node(gm, "x")):
        new = gm.graph.call_function(torch.neg, (node(gm, "x"),))
    assert new.prev.target == "timestep"
    with inserting_after(node(gm, torch.conv2d)):
        assert gm.graph.call_function(torch.neg, (new,)).prev is node(gm, torch.conv2d)


def test_finishing_drops_what_nobody_reads_and_nothing_else(gm):
    x = torch.randn(1, 4, 6, 6)
    before = gm(x, None)
    with gm.graph.inserting_before(node(gm, torch.conv2d)):
        gm.graph.call_function(torch.neg, (add_constant(gm, "unused", torch.ones(1)),))
    finish(gm)
    assert set(dict(gm.named_buffers())) == {"w"}
    assert not gm.graph.find_nodes(op="call_function", target=torch.neg)
    assert len(gm.graph.find_nodes(op="placeholder")) == 2  # an unread input is still an input
    assert torch.equal(gm(x, None), before)
