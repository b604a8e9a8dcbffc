"""Every operation with a weight is found, and its FLOPs are those that torch's own counter counts."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from sdtrt_backend import work
from sdtrt_backend.work import weighted

aten = torch.ops.aten
ATTENTION = {aten.bmm, aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention}


class Lambda(nn.Module):
    """A function of x and parameters, which are given by name and shape."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, *x):
        return self.function(self, *x)


class LoRA(nn.Module):
    """A linear with an adapter of rank 4, as PEFT makes it."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(32, 64), nn.Linear(32, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


def captured(module, *inputs, dynamic=False):
    """[(graph, its arguments)] as Dynamo passes them to a backend."""
    torch._dynamo.reset()
    graphs = []

    def record(gm, example):
        def call(*args):
            graphs.append((gm, args))
            return gm(*args)

        return call

    with torch.no_grad():
        torch.compile(module, backend=record, dynamic=dynamic)(*inputs)
    return graphs


def is_parameter_of(args, gm):
    places = gm.graph.find_nodes(op="placeholder")
    return {n for n, value in zip(places, args, strict=True) if isinstance(value, nn.Parameter)}.__contains__


def found(module, *inputs, dynamic=False):
    ((gm, args),) = captured(module, *inputs, dynamic=dynamic)
    return gm, args, weighted(gm.graph, is_parameter_of(args, gm))


def measured(gm, args, works):
    """node name -> FLOPs of a real run."""
    nodes, counts = {w.node for w in works}, {}

    class Count(fx.Interpreter):
        def run_node(self, n):
            arguments, keywords = self.fetch_args_kwargs_from_env(n)
            result = super().run_node(n)
            if n in nodes:
                counts[n.name] = work.flops(n, result, arguments, keywords)
            return result

    with torch.no_grad():
        Count(gm).run(*args)
    return counts


def torch_counts(module, *inputs, without=frozenset()):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return sum(n for op, n in counter.get_flop_counts().get("Global", {}).items() if op not in without)


X = torch.randn(2, 8, 9)
CASES = {
    "conv1d": (nn.Conv1d(8, 16, 3, stride=2, padding=1), X),
    "conv2d": (nn.Conv2d(8, 16, 3, padding="same"), X[..., None].repeat(1, 1, 1, 5)),
    "conv2d ": (nn.Conv2d(8, 16, (3, 1), groups=4, dilation=2), X[..., None].repeat(1, 1, 1, 5)),
    "conv3d": (nn.Conv3d(8, 16, (3, 1, 2)), torch.randn(2, 8, 4, 5, 6)),
    "conv3d ": (nn.Conv3d(8, 16, 3, groups=8, bias=False), torch.randn(1, 8, 4, 5, 6)),
    "conv_transpose1d": (nn.ConvTranspose1d(8, 6, 3, stride=2), X),
    "conv_transpose2d": (nn.ConvTranspose2d(8, 16, 3, stride=2, groups=4, output_padding=1), X[..., None].repeat(1, 1, 1, 5)),
    "conv_transpose3d": (nn.ConvTranspose3d(8, 6, 2), torch.randn(2, 8, 3, 4, 5)),
    "linear": (nn.Linear(9, 5), X),
    "linear ": (nn.Linear(9, 5, bias=False), X[0, 0]),
    "matmul": (Lambda(lambda m, x: x @ m.w, w=(9, 7)), X),
    "matmul ": (Lambda(lambda m, x: m.w @ x, w=(7, 8)), X),
    "matmul  ": (Lambda(lambda m, x: x.mm(mat2=m.w), w=(9, 7)), X[0]),
    "matmul   ": (Lambda(lambda m, x: torch.bmm(x, m.w), w=(2, 9, 7)), X),
    "matmul    ": (Lambda(lambda m, x: torch.addmm(m.b, x, m.w), b=(7,), w=(9, 7)), X[0]),
    "matmul     ": (Lambda(lambda m, x: torch.baddbmm(m.b, x, m.w), b=(2, 8, 7), w=(2, 9, 7)), X),
    "matmul      ": (Lambda(lambda m, x: x @ m.w.t().float().contiguous().chunk(2, 1)[1], w=(8, 9)), X),
    "matmul       ": (Lambda(lambda m, x: torch.matmul(x, (m.codes * m.scale).view(9, 7)), codes=(63, 1), scale=(1,)), X),
    "einsum": (Lambda(lambda m, x: torch.einsum("bci,ij->bcj", x, m.w), w=(9, 7)), X),
    "einsum ": (Lambda(lambda m, x: torch.einsum("...i,hio->h...o", x, m.w), w=(3, 9, 7)), X),
    "einsum  ": (Lambda(lambda m, x: torch.einsum(x, [0, 1, 2], m.w, [2, 3], [0, 3]), w=(9, 7)), X),
    "tensordot": (Lambda(lambda m, x: torch.tensordot(x, m.w, dims=([1, 2], [1, 0])), w=(9, 8, 7)), X),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operation_has_the_flops_that_torch_counts(name):
    module, x = CASES[name]
    gm, args, works = found(module, x)
    assert [w.op for w in works] == [name.strip()]
    expected = torch_counts(module, x)
    assert expected > 0
    assert works[0].flops() == expected  # from the noted sizes
    assert list(measured(gm, args, works).values()) == [expected]  # of a run


@pytest.mark.parametrize("name", CASES)
def test_an_exported_graph_has_them_too(name):
    module, x = CASES[name]
    with torch.no_grad():
        program = torch.export.export(module, (x,))
    for one in (program, program.run_decompositions()):
        parameters = {n for n in one.graph.nodes if n.name in one.graph_signature.inputs_to_parameters}
        works = weighted(one.graph, parameters.__contains__)
        assert sum(w.flops() for w in works) == torch_counts(module, x)


@pytest.mark.parametrize("separate", [False, True])
def test_attention_counts_its_projections_and_not_its_scores(separate):
    module = nn.MultiheadAttention(32, 4, **({"kdim": 24, "vdim": 16} if separate else {}))
    q, k, v = torch.randn(5, 2, 32), torch.randn(7, 2, 24 if separate else 32), torch.randn(7, 2, 16 if separate else 32)
    gm, args, works = found(module, q, k, v)
    assert [(w.op, w.candidate) for w in works] == [("multi-head attention", False)]
    expected = torch_counts(module, q, k, v, without=ATTENTION)
    assert works[0].flops() == sum(measured(gm, args, works).values()) == expected
    assert expected < torch_counts(module, q, k, v)


def test_an_encoder_layer_that_runs_as_one_operation():
    module = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 6, 32)
    gm, args, works = found(module, x)
    assert [w.op for w in works] == ["transformer encoder layer"]
    tokens, matrices = 12, 4 * 32 * 32 + 2 * 32 * 64
    assert works[0].flops() == sum(measured(gm, args, works).values()) == 2 * tokens * matrices


def test_a_bilinear_layer_counts_the_products_with_its_weight():
    module = nn.Bilinear(9, 7, 5)
    _, _, works = found(module, X, torch.randn(2, 8, 7))
    assert [(w.op, w.flops()) for w in works] == [("bilinear", 2 * 16 * 9 * 7 * 5)]


def test_a_recurrent_layer_counts_its_matrices():
    with torch.no_grad():
        program = torch.export.export(nn.LSTM(8, 16, num_layers=2), (torch.randn(5, 2, 8),))
    parameters = {n for n in program.graph.nodes if n.name in program.graph_signature.inputs_to_parameters}
    works = weighted(program.graph, parameters.__contains__)
    assert [w.op for w in works] == ["recurrent layer"]
    assert works[0].flops() == 2 * 10 * 4 * 16 * (8 + 16 + 16 + 16)


def test_the_linears_of_a_lora_are_found_by_their_paths():
    module, x = LoRA(), torch.randn(3, 32)
    _, _, works = found(module, x)
    assert [(w.name, w.op, w.weight, w.candidate) for w in works] == [
        ("base", "linear", (64, 32), True), ("down", "linear", (4, 32), True), ("up", "linear", (64, 4), True)]
    assert sum(w.flops() for w in works) == torch_counts(module, x)


def test_a_merged_weight_is_a_weight_and_merging_it_is_work():
    module = Lambda(lambda m, x, s: F.linear(x, m.w + s * (m.up @ m.down)), w=(7, 9), up=(7, 2), down=(2, 9))
    gm, args, works = found(module, X, 0.5)
    assert [w.op for w in works] == ["matmul", "linear"]
    assert sum(measured(gm, args, works).values()) == torch_counts(module, X, 0.5)


def test_learned_queries_make_activations():
    def attend(m, x):
        scores = F.linear(m.queries, m.w) @ x.transpose(1, 2)
        return scores.softmax(-1) @ x

    _, _, works = found(Lambda(attend, queries=(3, 9), w=(9, 9)), X)
    assert [w.op for w in works] == ["linear"]  # the products of the scores are attention's


def test_what_multiplies_no_weight_matrix_is_no_work():
    def forward(m, x, i):
        x = F.embedding(i, m.table) * m.scale + F.layer_norm(x, (9,), m.norm) + m.table[:8]
        return x @ x.transpose(1, 2), F.scaled_dot_product_attention(x, x, x), torch.einsum("bci,i->bci", x, m.norm)

    gm, args, works = found(Lambda(forward, table=(11, 9), scale=(8, 9), norm=(9,)), X, torch.zeros(2, 8, dtype=torch.long))
    assert sum(measured(gm, args, works).values()) == 0
    assert [w.op for w in works] == ["einsum"]


def test_symbolic_sizes_are_counted_from_a_run():
    module, x = nn.Conv3d(8, 16, 3), torch.randn(2, 8, 4, 5, 6)
    gm, args, works = found(module, x, dynamic=True)
    assert [w.flops() for w in works] == [None]
    assert sum(measured(gm, args, works).values()) == torch_counts(module, x)


@torch.library.custom_op("sdtrt_test::mystery", mutates_args=())
def mystery(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Some product that nobody here knows."""
    return x @ weight


@mystery.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def test_an_operator_that_is_not_known_is_named_with_its_reason():
    module = Lambda(lambda m, x: mystery(x, m.w) + mystery(m.norm, m.w) + mystery(x, m.w * m.norm[:, None]), w=(9, 9), norm=(9,))
    _, _, works = found(module, X)
    assert [(w.opaque, w.weight, w.flops()) for w in works] == [(True, (9, 9), 0)] * 2
    assert works[0].reason == f"sdtrt_test.mystery.default: {work.OPAQUE}"


def test_what_has_no_kernel_has_a_row_with_its_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.out = nn.Conv3d(8, 16, 1), nn.Linear(6, 6)

        def forward(self, x):
            return self.out(self.patch(x))

    _, _, works = found(Net(), torch.randn(1, 8, 2, 3, 6))
    patch, out = works
    row = patch.kept(patch.flops(), "float32")
    assert (row.name, row.op, row.shape, row.amax) == ("patch", "conv3d", (16, 8, 1, 1, 1), None)
    assert row.reason == "conv3d: no 8-bit kernel"
    assert row.flops == 2 * 16 * 8 * 36
    assert (out.candidate, out.reason) == (True, "")
    assert work.share(out.flops(), patch.flops()) == pytest.approx(out.flops() / (out.flops() + patch.flops()))


def test_operands_are_where_the_operators_have_them():
    """Each row against the schemas of aten's operators: a position that is wrong reads another tensor, or none."""
    seen, lists = 0, ("einsum", "lstm", "gru", "rnn_tanh", "rnn_relu")
    for target, row in work.ROWS.items():
        if not isinstance(target, torch._ops.OpOverloadPacket) or target.__name__ in lists:
            continue
        for overload in target.overloads():
            schema = getattr(target, overload)._schema.arguments
            if all(argument.type.kind() in ("TensorType", "OptionalType", "IntType") for argument in schema[:2]):
                for at, names in row.operands:
                    if at < len(schema):
                        assert schema[at].name in names, (target, overload, at, schema[at].name)
                        seen += 1
    assert seen > 60


def test_operands_of_attention_are_where_its_function_has_them():
    parameters = list(inspect.signature(F.multi_head_attention_forward).parameters)
    for at, (name,) in work.ROWS[F.multi_head_attention_forward].operands:
        assert parameters[at] == name


LETTERS = "abcdef"
terms = st.lists(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=4, unique=True), min_size=2, max_size=2)


@settings(max_examples=60)
@given(terms, st.data())
def test_any_einsum_of_two_has_the_flops_that_torch_counts(operands, data):
    both = sorted(set(operands[0]) | set(operands[1]))
    result = data.draw(st.lists(st.sampled_from(both), unique=True))
    sizes = dict(zip(LETTERS, (2, 3, 4, 5, 6, 7), strict=True))
    equation = ",".join(map("".join, operands)) + "->" + "".join(result)
    tensors = [torch.randn([sizes[axis] for axis in term]) for term in operands]
    expected = torch_counts(lambda: torch.einsum(equation, *tensors))
    contracted = (set(operands[0]) & set(operands[1])) - set(result)
    mine = work.ROWS[torch.ops.aten.einsum].flops(torch.einsum(equation, *tensors), equation, tensors)
    assert mine == expected
    assert (mine > 0) == bool(contracted)


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_any_convolution_has_the_flops_that_torch_counts(dims, kernel, groups, stride, dilation, transposed):
    kind = getattr(F, f"conv{'_transpose' if transposed else ''}{dims}d")
    weight = torch.randn(8, 8 // groups, *[kernel] * dims)
    x = torch.randn(2, 8, *[7] * dims)
    geometry = {"stride": stride, "groups": groups, "dilation": dilation}
    output = kind(x, weight, **geometry)
    row = work.ROWS[kind]
    assert row.flops(output, x, weight) == torch_counts(lambda: kind(x, weight, **geometry))
    assert math.prod(output.shape) > 0
