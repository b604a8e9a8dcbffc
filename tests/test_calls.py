"""What a call means, from its schema: arguments by name, what it writes, and whose memory its result may share."""

import operator
import time

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from sdtrt_backend.calls import arguments, changes, dimension, inputs_changed, rearranges, shares, writes, written


def call(make):
    """(node that ``make`` writes behind two placeholders, x, y)."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    return make(graph, x, y), x, y


def function(target, *args, **kwargs):
    """``args``: "x" and "y" stand for the placeholders."""
    return lambda graph, x, y: graph.call_function(target, *_given(x, y, args, kwargs))


def method(name, *args, **kwargs):
    return lambda graph, x, y: graph.call_method(name, *_given(x, y, args, kwargs))


def _given(x, y, args, kwargs):
    def put(a):
        return [put(i) for i in a] if isinstance(a, list) else {"x": x, "y": y}.get(a, a) if isinstance(a, str) else a

    return tuple(put(a) for a in args), {name: put(a) for name, a in kwargs.items()}


SAME = {
    "layer norm": [function(F.layer_norm, "x", (4,)), function(F.layer_norm, "x", normalized_shape=(4,)),
                   function(F.layer_norm, input="x", normalized_shape=(4,), weight=None, bias=None, eps=1e-5)],
    "group norm": [function(F.group_norm, "x", 8, "y"), function(F.group_norm, "x", num_groups=8, weight="y")],
    "rms norm": [function(torch.rms_norm, "x", (4,), "y", 1e-6), function(torch.rms_norm, "x", (4,), eps=1e-6, weight="y"),
                 function(F.rms_norm, "x", (4,), "y", 1e-6)],
    "attention": [function(F.scaled_dot_product_attention, "x", "y", "x"),
                  function(F.scaled_dot_product_attention, "x", "y", value="x", attn_mask=None),
                  function(F.scaled_dot_product_attention, query="x", key="y", value="x", is_causal=False, dropout_p=0.0)],
    "cat": [function(torch.cat, ["x", "y"], 1), function(torch.cat, tensors=["x", "y"], dim=1)],
    "stack": [function(torch.stack, ["x", "y"]), function(torch.stack, tensors=["x", "y"], dim=0)],
    "chunk": [function(torch.chunk, "x", 2, -1), function(torch.chunk, input="x", chunks=2, dim=-1),
              method("chunk", "x", 2, dim=-1), method("chunk", "x", chunks=2, dim=-1)],
    "gelu": [function(F.gelu, "x"), function(F.gelu, input="x", approximate="none")],
    "permute": [method("permute", "x", 0, 2, 1), method("permute", "x", (0, 2, 1)), function(torch.permute, "x", (0, 2, 1)),
                method("permute", "x", dims=(0, 2, 1))],
    "sum": [function(operator.add, "x", "y"), function(torch.add, "x", "y", alpha=1), method("add", "x", other="y")],
    "linear": [function(F.linear, "x", "y"), function(F.linear, "x", weight="y", bias=None)],
}


@pytest.mark.parametrize("name", SAME)
def test_one_call_has_one_set_of_arguments_however_it_is_written(name):
    found = [{k: getattr(v, "name", v) if not isinstance(v, list) else [n.name for n in v]
              for k, v in arguments(call(make)[0]).items() if k != "alpha"} for make in SAME[name]]
    found = [{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in f.items()} for f in found]
    assert all(f == found[0] for f in found)
    assert "0" not in found[0]


@pytest.mark.parametrize(("make", "name", "value"), [
    (function(F.gelu, "x", approximate="tanh"), "approximate", "tanh"),
    (function(F.layer_norm, "x", (4,)), "eps", 1e-5),
    (function(F.scaled_dot_product_attention, "x", "y", "y"), "scale", None),
    (function(torch.chunk, "x", 2), "dim", 0),
    (function(torch.add, "x", "y", alpha=2), "alpha", 2),
    (function(F.dropout, "x", 0.1, False), "training", False),
    (function(F.dropout, "x"), "p", 0.5),
    (method("view", "x", 2, -1), "size", (2, -1)),
    (function(torch.full, (2, 3), 0.5), "fill_value", 0.5),
    (method("view", "x", torch.int8), "dtype", torch.int8),
    (method("to", "x", torch.float16), "dtype", torch.float16),
    (function(torch.conv2d, "x", "y", None, 1, "same"), "padding", "same"),
    (function(operator.getitem, "x", 1), "index", 1),
])
def test_defaults_are_filled_in_and_overloads_told_apart(make, name, value):
    assert arguments(call(make)[0])[name] == value


def test_what_has_no_schema_or_fits_none_keeps_its_arguments_by_position():
    def of_a_user(a, *more):
        return a

    node, x, y = call(function(of_a_user, "x", "y", 3, key="y"))
    assert arguments(node) == {"0": x, "1": y, "2": 3, "key": y}
    assert arguments(call(method("chunk", "x", 2, 1, 5, 7))[0])["4"] == 7
    assert arguments(x) == {}


WRITES = {
    "method": (method("add_", "x", "y"), "x"),
    "function": (function(torch.relu_, "x"), "x"),
    "overload": (function(torch.ops.aten.add_.Tensor, "x", "y"), "x"),
    "by name": (function(torch.ops.aten.copy_.default, "x", src="y"), "x"),
    "operator": (function(operator.iadd, "x", "y"), "x"),
    "item": (function(operator.setitem, "x", 0, "y"), "x"),
    "special method": (method("__ior__", "x", "y"), "x"),
    "out": (function(torch.add, "x", "x", out="y"), "y"),
    "two outs": (function(torch.max, "x", 1, out=["y", "x"]), "yx"),
    "inplace": (function(F.relu, "x", inplace=True), "x"),
    "inplace by position": (function(F.dropout, "x", 0.5, False, True), "x"),
    "all by name": (function(F.silu, input="x", inplace=True), "x"),
    "list": (function(torch._foreach_add_, ["x", "y"], 1), "xy"),
    "unknown to ATen": (method("scale_by_", "x", "y"), "x"),
    "statistics": (function(F.batch_norm, None, "x", "y", None, None, True), "xy"),
    "statistics by name": (function(torch.batch_norm, None, None, None, running_mean="x", running_var="y", training=True,
                                    momentum=0.1, eps=1e-5, cudnn_enabled=True), "xy"),
    "statistics of instances": (function(F.instance_norm, None, "x", "y"), "xy"),
    "renormed embedding": (function(F.embedding, "x", "y", max_norm=1.0), "y"),
    "by annotation": (function(torch.ops.aten._native_batch_norm_legit.default, None, None, None, "x", "y", True, 0.1, 1e-5),
                      "xy"),
}
WRITES_NOTHING = {
    "sum": function(torch.add, "x", "y"),
    "statistics in eval": function(F.batch_norm, "x", "x", "y", None, None, False),
    "inplace false": function(F.relu, "x", inplace=False),
    "embedding": function(F.embedding, "x", "y"),
    "special method": method("__add__", "x", "y"),
    "sort": function(torch.sort, "x"),
    "flag": method("requires_grad_", "x"),
    "conversion": method("to", "x", "y"),
    "unknown": method("scale_by", "x", "y"),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_a_call_writes(name):
    make, expected = WRITES[name]
    node, x, y = call(make)
    assert writes(node) == tuple({"x": x, "y": y}[e] for e in expected)
    assert changes(node) is writes(node)[0]


@pytest.mark.parametrize("name", WRITES_NOTHING)
def test_what_writes_nothing(name):
    node, _, _ = call(WRITES_NOTHING[name])
    assert writes(node) == ()
    assert changes(node) is None


VIEWS = [
    function(torch.view_as_real, "x"), function(torch.view_as_complex, "x"), method("unfold", "x", 0, 2, 1),
    method("diagonal", "x"), method("as_strided", "x", (2,), (1,)), method("swapdims", "x", 0, 1), method("moveaxis", "x", 0, 1),
    method("broadcast_to", "x", (3, 4)), function(getattr, "x", "mT"), function(getattr, "x", "T"), function(torch.real, "x"),
    function(torch.imag, "x"), method("adjoint", "x"), method("hsplit", "x", 2), function(torch.tensor_split, "x", 2),
    method("narrow", "x", 0, 0, 1), method("select", "x", 0, 1), method("expand", "x", 3, -1), method("chunk", "x", 2),
    function(torch.split, "x", 2), method("unbind", "x"), function(operator.getitem, "x", 0), method("reshape", "x", -1),
    method("contiguous", "x"), method("to", "x", torch.float32), method("float", "x"), method("type_as", "x", "y"),
    function(F.dropout, "x", 0.5, False), function(torch.ops.aten.view.default, "x", [1]), function(torch.atleast_3d, "x"),
    function(torch.einsum, "ij->ji", "x"), function(torch.broadcast_tensors, "x"), method("detach", "x"),
    function(torch.flatten, input="x", start_dim=1), method("view_of_a_library", "x"), method("add_", "x", "y"),
]


@pytest.mark.parametrize("make", VIEWS)
def test_what_may_share_memory_with_its_input(make):
    node, x, _ = call(make)
    assert x in shares(node)


@pytest.mark.parametrize("make", [
    function(torch.add, "x", "y"), function(operator.mul, "x", "y"), function(F.linear, "x", "y"), function(F.silu, "x"),
    function(F.layer_norm, "x", (4,)), function(torch.cat, ["x", "y"]), method("clone", "x"), method("softmax", "x", -1),
    function(torch.ops.aten.mul.Tensor, "x", "y"), function(F.scaled_dot_product_attention, "x", "x", "y"),
    method("repeat", "x", 2, 1), function(torch.where, "x", "x", "y"), method("index_select", "x", 0, "y")])
def test_what_has_memory_of_its_own(make):
    assert shares(call(make)[0]) == ()


@pytest.mark.parametrize(("make", "expected"), [
    (method("view", "x", 2, -1), True), (function(torch.permute, "x", (1, 0)), True), (function(torch.flatten, "x"), True),
    (method("contiguous", "x"), True), (method("view", "x", torch.int8), False), (method("chunk", "x", 2), False),
    (method("expand", "x", 2, 2), False), (function(operator.getitem, "x", 0), False), (function(torch.neg, "x"), False)])
def test_what_only_rearranges(make, expected):
    assert rearranges(call(make)[0]) is expected


def test_a_dimension_is_counted_from_the_front_where_the_tensor_is_known():
    _, x, _ = call(method("neg", "x"))
    assert dimension(-1, x) == -1
    x.meta["val"] = torch.empty(2, 3, 4)
    assert (dimension(-1, x), dimension(1, x), dimension(None, x)) == (2, 1, None)


# --- graphs as Dynamo makes them -----------------------------------------------------------------------------------------


def dynamo(module, *inputs):
    """The graph that Dynamo hands to a backend."""
    torch._dynamo.reset()
    found = []

    def backend(gm, _):
        found.append(gm)
        return gm

    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    (gm,) = found
    return gm.graph


def changed(module, *inputs):
    return [str(n.target) for n in inputs_changed(dynamo(module, *inputs))]


class Cache(nn.Module):
    """Keys of the calls so far, and their number."""

    def __init__(self, write):
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 6, 4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.write = write

    def forward(self, x):
        self.write(self, x)
        return self.keys.sum(1) + x


def put_second(m, x):
    m.keys[:, 1] = x


def pixels(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("write", [
    lambda m, x: m.keys[:, 1:2].copy_(x[:, None]),
    put_second,
    lambda m, x: m.keys.index_copy_(1, torch.tensor([1]), x[:, None]),
    lambda m, x: m.keys.unbind(1)[2].add_(x),
    lambda m, x: m.keys.view(2, 3, 2, 4).diagonal(dim1=1, dim2=2).zero_(),
    lambda m, x: torch.view_as_complex(m.keys.view(2, 6, 2, 2)).mul_(2),
    lambda m, x: m.keys.mT.mul_(2),
    lambda m, x: m.keys.to(torch.float32).contiguous().reshape(12, 4).add_(1),
    lambda m, x: torch.add(m.keys, 1, out=m.keys),
    lambda m, x: F.relu(m.keys.swapdims(0, 1), inplace=True),
    lambda m, x: F.dropout(m.keys, 0.5, training=False).add_(1),
], ids=["slice", "item", "index", "unbind", "diagonal", "complex", "mT", "copies that are none", "out", "inplace", "dropout"])
def test_a_cache_that_the_module_writes_is_a_changed_input(write):
    assert changed(Cache(write), pixels(2, 4)) == ["L_self_buffers_keys_"]


def test_a_counter_and_an_input_may_be_changed_too():
    def count(m, x):
        m.calls += 1
        x.clamp_(-1, 1)

    assert set(changed(Cache(count), pixels(2, 4))) == {"L_self_buffers_calls_", "L_x_"}


@pytest.mark.parametrize("read", [
    lambda m, x: m.keys.clone().add_(1),
    lambda m, x: m.keys.half().add_(1),
    lambda m, x: m.keys.transpose(1, 2).contiguous().add_(1),
    lambda m, x: m.keys.transpose(1, 2).reshape(-1).add_(1),
    lambda m, x: F.layer_norm(m.keys, (4,)).add_(1),
    lambda m, x: F.normalize(m.keys).add_(1),
    lambda m, x: F.interpolate(m.keys, scale_factor=2.0).add_(1),
    lambda m, x: m.keys[torch.tensor([1, 0])].add_(1),
    lambda m, x: torch.relu(x).add_(m.keys[:, 0]),
    lambda m, x: m.keys.view(-1)[3:].sum(),
], ids=["clone", "half", "contiguous", "reshape", "layer norm", "normalize", "interpolate", "gather", "operand", "read"])
def test_a_change_of_a_copy_is_no_change_of_an_input(read):
    assert changed(Cache(read), pixels(2, 4)) == []


@pytest.mark.parametrize(("norm", "statistics"), [
    (nn.BatchNorm2d(4), ("num_batches_tracked", "running_mean", "running_var")),
    (nn.InstanceNorm2d(4, track_running_stats=True), ("running_mean", "running_var"))])
def test_a_norm_that_keeps_statistics_changes_them_in_training_alone(norm, statistics):
    found = sorted(changed(nn.Sequential(norm.train()), pixels(2, 4, 3, 3)))
    assert len(found) == len(statistics)
    assert all(name in f for name, f in zip(statistics, found, strict=True))
    assert changed(nn.Sequential(norm.eval()), pixels(2, 4, 3, 3)) == []


def test_a_symbolic_number_is_no_memory():
    def count(x, n):
        n += 1
        return x * n

    torch._dynamo.reset()
    found = []
    compiled = torch.compile(count, backend=lambda gm, _: found.append(gm) or gm, dynamic=True)
    for n in (2, 3):
        compiled(pixels(2, 4), n)
    assert [inputs_changed(gm.graph) for gm in found] == [[]]


def test_what_reads_a_changed_tensor_is_written_and_a_second_parent_is_not():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    view, either = graph.call_method("view", (x, -1)), graph.call_method("either_of_a_library", (x, y))
    other, copy = graph.call_method("unbind", (view,)), graph.call_method("clone", (x,))
    graph.call_method("neg_", (view,))
    found = written(graph)
    assert {x, view, either, other} <= found
    assert found.isdisjoint({y, copy})


@pytest.mark.slow
def test_a_graph_of_five_thousand_nodes_takes_less_than_a_third_of_a_second():
    class Deep(nn.Module):
        def forward(self, x, w):
            for _ in range(1250):
                x = (F.layer_norm(x, (4,)).view(2, 4) + x).transpose(0, 1).contiguous().t()
            return x

    graph = dynamo(Deep(), pixels(2, 4), pixels(4))
    assert len(graph.nodes) > 5000
    last = graph.output_node().all_input_nodes[0]
    with graph.inserting_before(graph.output_node()):
        graph.call_method("neg_", (last,))
    start = time.process_time()
    found = written(graph)
    assert time.process_time() - start < 0.3
    assert last in found
