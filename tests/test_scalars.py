"""Python floats that change between calls: the graph computes with tensors, and gives what the module gives."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import grab
from torch import fx, nn

from sdtrt_backend.capture import bind, tensor_inputs
from sdtrt_backend.fx import inductor
from sdtrt_backend.scalars import without_item

STRENGTHS = (0.9, 0.37, 1.7)


class Recorder:
    """A backend that rewrites every graph with ``.item()`` for the values of the call, and compares it with the graph itself,
    eagerly and through Inductor. found: (results of the graph, of the rewritten one, compiled, baked names, rewritten graph)."""

    def __init__(self, compiled=False):
        self.found, self.compiled = [], compiled

    def __call__(self, gm, _):
        def run(*args):
            if not gm.graph.find_nodes(op="call_method", target="item"):
                return gm(*args)
            names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
            values = {name: float(a) for name, a in zip(names, args, strict=True)
                      if isinstance(a, torch.Tensor) and a.dtype is torch.float64 and a.dim() == 0}
            new, baked = without_item(fx.GraphModule(gm, copy.deepcopy(gm.graph)), values)
            assert not new.graph.find_nodes(op="call_method", target="item")
            assert baked <= values.keys()
            theirs = gm(*args)
            compiled = inductor(copy.deepcopy(new), list(args))(*args) if self.compiled else ()
            self.found.append((theirs, new(*args), compiled, baked, new))
            return theirs

        return run


def record(module, *calls, compiled=False, dynamic=None):
    torch._dynamo.reset()
    recorder = Recorder(compiled)
    run = torch.compile(module, backend=recorder, dynamic=dynamic)
    with torch.no_grad():
        for call in calls:
            run(*call)
    assert recorder.found
    return recorder.found


def noise(*size, dtype=torch.float32):
    return (torch.randn(*size, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)


def strengths(dtype):
    return [(noise(3, 4, 8, dtype=dtype), k) for k in STRENGTHS]


def tensors_do(x, k):
    products = x * k, x / k, x * ((k**2 + 1) / 2)
    return *products, k - x, x + k, torch.where(x > 0, k, x), torch.mul(x[0, 0, 0], other=k), x.pow(k).abs()


# of the largest value: one rounding of the result, as PyTorch and Inductor round some numbers to 16 bits first
ROUNDING = {torch.float32: 1e-7, torch.float64: 1e-15, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.int64: 1e-7}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_tensor_stands_for_the_number_in_arithmetic(dtype):
    for theirs, mine, compiled, baked, _ in record(tensors_do, *strengths(dtype), compiled=True):
        assert baked == set()
        for place, (a, b, c) in enumerate(zip(theirs, mine, compiled, strict=True)):
            assert a.dtype is b.dtype is c.dtype
            if dtype in (torch.float32, torch.float64, torch.int64) or place < 3:  # products and quotients
                torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
            for other in (b, c):
                torch.testing.assert_close(other.double(), a.double(), rtol=8 * ROUNDING[dtype], equal_nan=True,
                                           atol=ROUNDING[dtype] * float(a.double().nan_to_num().abs().max()))


def test_arithmetic_of_numbers_becomes_arithmetic_of_tensors():
    def module(x, k):
        return x * (math.sqrt(k) * 2 + 1), x + min(k, 3.0), x - max(k, 0.1), x * -abs(k - 2), x * (k // 0.5), x * (k % 0.25)

    for theirs, mine, compiled, baked, new in record(module, *strengths(torch.float32), compiled=True):
        assert baked == set()
        assert new.graph.find_nodes(op="call_function", target=torch.sqrt)
        for a, b, c in zip(theirs, mine, compiled, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)


def test_a_rewritten_graph_holds_for_every_value_that_was_not_baked_in():
    found = record(tensors_do, *strengths(torch.float32))
    (_, _, _, _, new), (theirs, *_) = found[0], found[-1]
    assert [n.name for n in new.graph.find_nodes(op="placeholder")] == ["l_x_", "l_k_"]
    mine = new(noise(3, 4, 8), torch.tensor(STRENGTHS[-1], dtype=torch.float64))
    assert all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(theirs, mine, strict=True))


def test_a_float_timestep_becomes_a_tensor():
    def module(x, t):
        steps = torch.tensor([t], dtype=torch.float64, device=x.device).expand(x.shape[0])
        return steps[:, None, None] + x, torch.tensor(t) * x, torch.full((2, 3), t), torch.full((2,), t, dtype=torch.float16)

    for theirs, mine, compiled, baked, _ in record(module, *strengths(torch.float32), compiled=True):
        assert baked == set()
        for a, b, c in zip(theirs, mine, compiled, strict=True):
            assert a.dtype is b.dtype is c.dtype
            assert a.shape == b.shape == c.shape
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_a_tensor_that_was_made_of_a_number_may_be_written():
    def module(x, t):
        made = torch.full((3,), t)
        made[1] = 2.0
        return made + x[0, 0, 0], x * t

    for theirs, mine, _, baked, _ in record(module, *strengths(torch.float32)):
        assert baked == set()
        assert all(torch.equal(a, b) for a, b in zip(theirs, mine, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tensor_may_be_changed_in_place_by_it(dtype):
    def module(x, k):
        x = x.clone()
        x *= k
        x.mul_(k + 1.0).add_(k)
        return x, torch.empty_like(x).fill_(k)

    for theirs, mine, compiled, baked, _ in record(module, *strengths(dtype), compiled=True):
        assert baked == set()
        for a, b, c in zip(theirs, mine, compiled, strict=True):
            assert a.dtype is b.dtype is c.dtype
            for other in (b, c):  # each of the changes rounds
                torch.testing.assert_close(other.float(), a.float(), rtol=4 * ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("use", [
    lambda x, k: F.layer_norm(x, (8,), eps=k), lambda x, k: F.group_norm(x, 2, eps=k),
    lambda x, k: F.scaled_dot_product_attention(x, x, x, scale=k), lambda x, k: torch.clamp(x, max=k),
    lambda x, k: torch.add(x, x, alpha=k), lambda x, k: x + int(k * 10), lambda x, k: x * round(k, 1),
    lambda x, k: F.leaky_relu(x, k), lambda x, k: torch.softmax(x, -1) * (k if x.shape[0] > 99 else round(k))])
def test_where_no_tensor_can_stand_for_it_the_number_is_baked_in_and_named(use):
    for theirs, mine, _, baked, _ in record(lambda x, k, j: use(x, k) * j, *((x, k, k + 1) for x, k in strengths(torch.float32))):
        assert baked == {"l_k_"}
        assert torch.equal(theirs[0], mine[0])


def test_a_statement_about_a_number_is_dropped():
    def module(x, k):
        torch._check(k > 0)
        return x * k

    for theirs, mine, _, baked, new in record(module, *strengths(torch.float32)):
        assert baked == set()
        assert not new.graph.find_nodes(op="call_function", target=torch._check)
        assert torch.equal(theirs[0], mine[0])


def test_an_item_of_another_tensor_stays():
    graph = fx.Graph()
    x, k, other = (graph.placeholder(name) for name in ("x", "k", "other"))
    numbers = [graph.call_method("item", (t,)) for t in (k, other)]
    graph.output(tuple(graph.call_method("add", (x, n)) for n in numbers))
    gm, baked = without_item(fx.GraphModule(nn.Module(), graph), {"k": 0.5})
    assert [n.args[0].name for n in gm.graph.find_nodes(op="call_method", target="item")] == ["other"]
    assert baked == {"k"}  # what dtype x has is not known here
    assert [float(y) for y in gm(torch.ones(()), None, torch.tensor(2.0))] == [1.5, 3.0]


# --- modules of users ------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A linear whose result is scaled by an attribute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.scale = nn.Linear(8, 8), 1.0

    def forward(self, x):
        return self.a(x) * self.scale + self.scale / 2


def changing(module, change, values, x, dynamic=None):
    torch._dynamo.reset()
    recorder = Recorder(compiled=True)
    run = torch.compile(module, backend=recorder, dynamic=dynamic)
    with torch.no_grad():
        for value in values:
            change(module, value)
            torch.testing.assert_close(run(x), module(x))
    return recorder.found


def assert_equal(found):
    for theirs, mine, compiled, _, _ in found:
        for a, b, c in zip(theirs, mine, compiled, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)


def test_an_attribute_that_changes():
    found = changing(Scaled(), lambda m, value: setattr(m, "scale", value), (1.0, *STRENGTHS), noise(2, 8))
    assert len(found) == len(STRENGTHS)
    assert all(baked == set() for *_, baked, _ in found)
    assert_equal(found)


def test_the_scaling_of_a_lora_that_changes():
    peft = pytest.importorskip("peft")
    module = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["a"], init_lora_weights=False), Scaled())

    def scale(m, value):
        m.a.scaling["default"] = value

    found = changing(module, scale, (1.0, *STRENGTHS), noise(2, 8))
    assert len(found) == len(STRENGTHS)
    assert all(baked == set() for *_, baked, _ in found)
    assert_equal(found)


class Norms(nn.Module):
    """A norm of each kind that has an eps."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6), nn.GroupNorm(2, 4)])

    def forward(self, x):
        for norm in self.norms:
            x = norm(x)
        return x


def test_the_eps_of_norms_under_dynamic_shapes_is_baked_in():
    found = record(Norms(), (noise(3, 4, 8),), compiled=True, dynamic=True)
    assert_equal(found)
    ((*_, baked, new),) = found
    assert len(baked) == 3
    assert [n.args[-1] for n in new.graph.find_nodes(op="call_function", target=F.layer_norm)] == [1e-5]


def test_a_bound_graph_computes_with_the_tensor_that_it_is_given():
    module, scales = Scaled(), [1.0, *STRENGTHS]

    def forward(x, scale):
        module.scale = scale
        return module(x)

    captured, args = grab(forward, *((noise(2, 8), scale) for scale in scales))
    gm, nodes = bind(captured, args)
    assert gm.meta["baked"] == set()
    gone = [n for n in captured.graph.graph.nodes if n.name not in nodes]
    assert {n.op for n in gone} == {"call_method", "call_function"}  # item and what it fed
    tensors = tensor_inputs(captured, args)
    run = inductor(copy.deepcopy(gm), tensors)
    for value in (0.25, scales[-1]):
        given = [torch.tensor(value, dtype=torch.float64) if t.dtype is torch.float64 else t for t in tensors]
        torch.testing.assert_close(gm(*given)[0], forward(noise(2, 8), value), rtol=0, atol=0)
        torch.testing.assert_close(run(*given)[0], forward(noise(2, 8), value))
