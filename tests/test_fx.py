"""FX helpers: names, arguments, constants and where new nodes go."""

import pytest
import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from sdtrt_backend.fx import (
    ATTENTION,
    add_constant,
    alive,
    await_workers,
    call_arguments,
    finish,
    inserting_after,
    module_path,
    pair,
    plain_attention,
    propagate,
    read_through_copies,
    start_workers,
    written,
)


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


def test_who_holds_nodes_learns_which_were_erased_as_dead(gm):
    with gm.graph.inserting_before(node(gm, torch.conv2d)):
        dead = gm.graph.call_function(torch.conv2d, node(gm, torch.conv2d).args)
        kept = gm.graph.call_method("relu_", (node(gm, "x"),))  # nobody reads it, but it changes x
    held = {"conv": gm.graph.output_node().args[0], "dead": dead, "kept": kept}
    assert alive(held, gm) == held
    finish(gm)
    assert alive(held, gm) == {"conv": held["conv"], "kept": kept}


def test_statistics_that_a_norm_writes_keep_it_alive(gm):
    with gm.graph.inserting_before(node(gm, torch.conv2d)):
        norms = [gm.graph.call_function(torch.nn.functional.batch_norm, (node(gm, "x"), None, None, None, None, False)),
                 gm.graph.call_function(torch.nn.functional.batch_norm, (node(gm, "x"), *[node(gm, "timestep")] * 2),
                                        {"training": True})]
    finish(gm)
    assert list(alive(dict(zip(("eval", "training"), norms, strict=True)), gm)) == ["training"]


def attention(*args, **kwargs):
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in "qkvm"}
    for n in nodes.values():
        n.meta["val"] = torch.empty(2, 4, 5, 16)
    return graph.call_function(ATTENTION, tuple(nodes.get(a, a) for a in args), {k: nodes.get(v, v) for k, v in kwargs.items()})


@pytest.mark.parametrize(("args", "kwargs", "scale"), [
    (("q", "k", "v"), {}, 0.25), ((), {"query": "q", "key": "k", "value": "v"}, 0.25),
    (("q", "k"), {"value": "v", "scale": 2.0}, 2.0),
    (("q", "k", "v", None, 0.0, False), {"scale": None, "enable_gqa": False}, 0.25)])
def test_a_plain_attention_is_found_however_it_is_written(args, kwargs, scale):
    found = plain_attention(attention(*args, **kwargs))
    assert found is not None
    assert ([n.name for n in found[:3]], found[3]) == (["q", "k", "v"], scale)


@pytest.mark.parametrize(("args", "kwargs"), [
    (("q", "k", "v", "m"), {}), (("q", "k", "v"), {"attn_mask": "m"}), (("q", "k", "v", None, 0.1), {}),
    (("q", "k", "v", None, 0.0, True), {}), (("q", "k", "v"), {"enable_gqa": True}), (("q", "k", "v"), {"scale": "m"})])
def test_an_attention_with_more_to_it_is_not_plain(args, kwargs):
    assert plain_attention(attention(*args, **kwargs)) is None


def test_what_is_changed_through_any_view_is_read_through_a_copy():
    """A reader in front of the change reads what was there then, wherever it is moved to."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.mul, (x, 2))
    reader = graph.call_function(torch.nn.functional.silu, (y,))
    graph.call_method("zero_", (graph.call_method("unfold", (y, 0, 2, 2)),))
    graph.output((reader, y))
    for n in (x, y):
        n.meta["val"] = torch.empty(4)
    gm = fx.GraphModule(torch.nn.Module(), graph)
    read_through_copies(gm)
    assert reader.args[0].target == "clone"
    gm.recompile()
    silu, changed = gm(torch.ones(4))
    assert torch.equal(silu, torch.nn.functional.silu(2 * torch.ones(4)))
    assert torch.equal(changed, torch.zeros(4))


def blocks(x, w):
    for _ in range(5):
        y = torch.nn.functional.linear(x.to(torch.bfloat16), w)
        x = x + torch.nn.functional.silu(y.transpose(0, 1)).transpose(0, 1)
    return x


def described(gm):
    return [(n.name, v.shape, v.stride(), v.dtype) for n in gm.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]


def test_what_blocks_have_in_common_is_propagated_once_and_comes_out_the_same(monkeypatch):
    gm, inputs = fx.symbolic_trace(blocks), (torch.randn(4, 6), torch.randn(6, 6).bfloat16())
    FakeTensorProp(gm).propagate(*inputs)
    expected, computed, run = described(gm), [], FakeTensorProp.run_node
    for n in gm.graph.nodes:
        n.meta.clear()
    monkeypatch.setattr(FakeTensorProp, "run_node", lambda self, n: (computed.append(n.target), run(self, n))[1])
    propagate(gm, inputs)
    assert described(gm) == expected
    assert [computed.count(t) for t in ("to", torch.nn.functional.linear, torch.nn.functional.silu)] == [1, 1, 1]
    assert computed.count("transpose") == 2
    for n in gm.graph.find_nodes(op="call_method", target="transpose"):
        of, view = (v.meta["val"].untyped_storage() for v in (n.args[0], n))
        assert view._cdata == of._cdata
    computed.clear()
    propagate(gm, inputs)
    assert computed == ["x", "w", "output"]
    propagate(gm, (torch.randn(8, 6), inputs[1]))
    assert gm.graph.find_nodes(op="output")[0].args[0].meta["val"].shape == (8, 6)


def test_a_view_of_what_a_pass_has_made_anew_lies_in_its_memory():
    def changed_through_a_view(x, w):
        y = torch.nn.functional.linear(x, w)
        y.view(6, 4).view(-1).zero_()
        return y

    gm, inputs = fx.symbolic_trace(changed_through_a_view), (torch.randn(4, 6), torch.randn(6, 6))
    propagate(gm, inputs)
    old = node(gm, torch.nn.functional.linear)
    with gm.graph.inserting_before(old):
        new = gm.graph.call_function(torch.matmul, old.args)
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)
    propagate(gm, inputs)
    assert new in written(gm.graph)


def test_a_call_in_autocast_is_not_the_one_before_it():
    graph = fx.Graph()
    x = graph.placeholder("x")
    outside = graph.call_function(torch.mm, (x, x))
    entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, False))
    inside = graph.call_function(torch.mm, (x, x))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    graph.output((outside, inside))
    propagate(fx.GraphModule(torch.nn.Module(), graph), (torch.randn(4, 4),))
    assert [n.meta["val"].dtype for n in (outside, inside)] == [torch.float32, torch.bfloat16]


@pytest.mark.slow
def test_workers_are_waited_for_and_no_longer_than_is_said(monkeypatch):
    pytest.importorskip("triton", reason="Inductor starts no workers without Triton")
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads

    waited = []

    def wait(seconds):
        waited.append(seconds)
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(AsyncCompile, "wait_pool_ready", wait)
        await_workers(0.5)
    assert waited == [0.5]
    start_workers()
    await_workers()
    assert AsyncCompile.use_process_pool() is (get_compile_threads() > 1)
