"""Which part runs where and why, with engines and Inductor stood in for by plain torch; no TensorRT is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fragments import TOKENS, Fragment, count, linear, planned
from test_inductor_cuda import Reference
from test_partition import ATTEND
from tolerances import TOLERANCES

from sdtrt_backend import engine, measure, ops
from sdtrt_backend.capture import bind
from sdtrt_backend.enginecache import EngineCache
from sdtrt_backend.errors import ExportError, OptionError
from sdtrt_backend.fx import propagate
from sdtrt_backend.lower import choose, inductor_cuda, producers, tensorrt
from sdtrt_backend.lower.lowered import Lowered
from sdtrt_backend.options import Options
from sdtrt_backend.partition import partition
from sdtrt_backend.quantize import insert

OPTIONS = Options(engine="tensorrt")


class Stand:
    """What ``engine.Runner`` is: runs the part that the "engine" names, times ``factor``."""

    parts: dict[bytes, torch.fx.GraphModule]
    factor = 1.0

    @staticmethod
    def refuses(part):
        """Raises what a builder raises, where it does not build the part."""

    def __init__(self, flavour, blob, inputs, outputs):
        self.graph = self.parts[blob]

    def __call__(self, *inputs):
        return [t * self.factor for t in self.graph(*inputs)]


@pytest.fixture
def stand(monkeypatch, tmp_path):
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path))
    Stand.parts, Stand.factor, Stand.built = {}, 1.0, 0
    monkeypatch.setattr(Stand, "refuses", Stand.refuses)

    def build(part, inputs, flavour, precision):
        Stand.built += 1
        Stand.refuses(part)
        blob = " ".join((*part.inputs, *part.outputs)).encode()
        Stand.parts[blob] = part.graph
        return blob

    here = {"torch": "2", "cuda": "13", "driver": "580", "gpu": "made here", "capability": "9.0"}
    monkeypatch.setattr(engine, "installed", lambda: "tensorrt_rtx")
    monkeypatch.setattr(engine, "version", lambda flavour: "1.4.0")
    monkeypatch.setattr(engine, "Runner", Stand)
    monkeypatch.setattr(tensorrt, "_build", build)
    monkeypatch.setattr(tensorrt, "device_key", lambda device: here)
    monkeypatch.setattr(inductor_cuda, "lower", lambda gm, inputs, options: Lowered(gm.forward))
    return Stand


def quantised(module=ATTEND):
    captured, args, decisions, tensors = planned(*module)
    return insert(*bind(captured, args), decisions), tensors


def test_engines_run_what_they_take_and_inductor_the_rest(stand):
    gm, tensors = quantised()
    lowered = tensorrt.lower(gm, tensors, OPTIONS)
    with torch.no_grad():
        assert measure.compare(lowered.step(*tensors), gm(*tensors)) == 0
    assert sorted(lowered.engines.values()) == ["tensorrt"] * 6
    assert stand.built == 2
    assert "3 layers, runs through tensorrt: the engine was built in" in lowered.notes[0]
    assert "runs through inductor: attention stays in 16 bits" in lowered.notes[1]


def test_the_second_time_engines_come_from_the_cache(stand):
    tensorrt.lower(*quantised(), OPTIONS)
    again = tensorrt.lower(*quantised(), OPTIONS)
    assert stand.built == 2
    assert "the engine came from the cache" in again.notes[0]
    assert len(EngineCache().entries()) == 2


def test_an_engine_that_is_wrong_is_not_used_and_the_sentence_says_by_how_much(stand):
    stand.factor = 1.1
    gm, tensors = quantised()
    lowered = tensorrt.lower(gm, tensors, OPTIONS)
    with torch.no_grad():
        assert measure.compare(lowered.step(*tensors), gm(*tensors)) == 0
    assert set(lowered.engines.values()) == {"inductor"}
    assert "runs through inductor: the engine's output differs from the reference by 0.100, 0.045 is allowed" in lowered.notes[0]


def test_an_engine_without_a_context_falls_back(stand, monkeypatch):
    def fail(*arguments):
        raise ExportError("no execution context for the engine on this GPU")

    monkeypatch.setattr(engine, "Runner", fail)
    gm, tensors = quantised()
    lowered = tensorrt.lower(gm, tensors, OPTIONS)
    assert "runs through inductor: no engine: ExportError: no execution context" in lowered.notes[0]
    with torch.no_grad():
        assert measure.compare(lowered.step(*tensors), gm(*tensors)) == 0


def test_a_gpu_that_tensorrt_does_not_support_is_asked_once(stand, monkeypatch):
    def fail(*arguments):
        raise engine.UnsupportedGPU("cannot read the engine: this GPU has compute capability 9.0")

    monkeypatch.setattr(engine, "Runner", fail)
    gm, tensors = quantised()
    lowered = tensorrt.lower(gm, tensors, OPTIONS)
    assert stand.built == 1
    assert set(lowered.engines.values()) == {"inductor"}
    assert sum("no engine: UnsupportedGPU: cannot read the engine: this GPU" in note for note in lowered.notes) == 2
    with torch.no_grad():
        assert measure.compare(lowered.step(*tensors), gm(*tensors)) == 0


def test_every_part_can_be_taken_by_inductor_with_its_8_bit_operators(stand, monkeypatch):
    """Engines may refuse any part: each must hold the codes of its own weights, not read them from another one."""
    linears = []

    def refuse_the_second(part):
        assert "linear" in part.layers, "no kernel"

    def on_the_cpu(gm, inputs, options):
        propagate(gm, inputs)
        producers.simplify(gm)
        inductor_cuda.to_8_bit_operators(gm, Reference())
        linears.append(count(gm, ops.linear8))
        return Lowered(gm.forward)

    monkeypatch.setattr(stand, "refuses", refuse_the_second)
    monkeypatch.setattr(inductor_cuda, "lower", on_the_cpu)
    gm, tensors = quantised()
    lowered = tensorrt.lower(gm, tensors, OPTIONS)
    with torch.no_grad():
        assert measure.compare(lowered.step(*tensors), gm(*tensors)) < TOLERANCES["rounding_ties"]
    assert sorted(lowered.engines.values()) == ["inductor"] * 3 + ["tensorrt"] * 3
    assert linears == [3]  # the attention and the part behind it are one step of Inductor


LAYERS = 24


def deep(m, x):
    """Residual blocks of one linear each; the first and the last read the same tensor as well."""
    first = x
    for i in range(LAYERS - 1):
        x = x + getattr(m, f"l{i}")(F.silu(x))
    return x + getattr(m, f"l{LAYERS - 1}")(first)


DEEP = Fragment(deep, **{f"l{i}": linear for i in range(LAYERS)}), TOKENS


def memory_error(layer):
    return torch.cuda.OutOfMemoryError("CUDA out of memory")


def no_cubin(layer):
    return ExportError(f"no execution context for the engine on this GPU: no cubin for {layer}")


@pytest.mark.parametrize("error", [memory_error, no_cubin])
@pytest.mark.parametrize("bad", [0, 7, LAYERS - 1])
def test_what_an_engine_refuses_is_halved_until_little_is_left_to_inductor(stand, monkeypatch, error, bad):
    name = f"linear_{bad}" if bad else "linear"

    def refuse(part):
        if name in part.layers:
            raise error(name)

    monkeypatch.setattr(stand, "refuses", refuse)
    gm, tensors = quantised(DEEP)
    lowered = tensorrt.lower(gm, tensors, OPTIONS)
    with torch.no_grad():
        assert measure.compare(lowered.step(*tensors), gm(*tensors)) == 0
    left = [n for n, target in lowered.engines.items() if target == "inductor"]
    assert name in left
    assert len(left) <= LAYERS / 2**tensorrt.HALVINGS + 1
    assert stand.built == 1 + 2 * tensorrt.HALVINGS
    assert f"part 1 of 1, {LAYERS} layers, is tried in halves of 12 and 12: no engine: " in lowered.notes[0]
    assert str(error(name)) in lowered.notes[0]
    assert sum("runs through tensorrt" in note for note in lowered.notes) == tensorrt.HALVINGS
    assert len(lowered.step.steps) <= 2 + tensorrt.HALVINGS


@pytest.mark.parametrize("largest", [0, 3, 6])
def test_engines_that_are_too_large_are_halved_and_the_number_of_builds_is_bounded(stand, monkeypatch, largest):
    def refuse(part):
        if len(part.layers) > largest:
            raise RuntimeError("Error Code 2: OutOfMemory")

    monkeypatch.setattr(stand, "refuses", refuse)
    gm, tensors = quantised(DEEP)
    lowered = tensorrt.lower(gm, tensors, OPTIONS)
    with torch.no_grad():
        assert measure.compare(lowered.step(*tensors), gm(*tensors)) == 0
    assert set(lowered.engines.values()) == {"tensorrt" if largest else "inductor"}
    assert stand.built <= 2 ** (tensorrt.HALVINGS + 1) - 1
    assert len(lowered.step.steps) == {0: 1, 3: 8, 6: 4}[largest]


def test_halves_end_where_the_step_has_tried_enough(stand, monkeypatch):
    monkeypatch.setattr(tensorrt, "RETRIES", 4)
    stand.factor = 1.1
    gm, tensors = quantised(DEEP)
    lowered = tensorrt.lower(gm, tensors, OPTIONS)
    with torch.no_grad():
        assert measure.compare(lowered.step(*tensors), gm(*tensors)) == 0
    assert stand.built == 5
    assert set(lowered.engines.values()) == {"inductor"}


def test_another_weight_scale_or_shape_is_another_engine(stand):
    def keys(change=lambda gm: None, repeat=1):
        gm, tensors = quantised()
        change(gm)
        propagate(gm, tensors)
        part = partition(gm)[0]
        return tensorrt.key(part, [t.repeat(repeat, 1, 1) for t in tensors], "tensorrt_rtx")

    def weight(gm):
        next(b for n, b in gm.named_buffers() if n.endswith("weight_int8"))[0, 0] += 1

    def scale(gm):
        for n in gm.graph.nodes:
            n.args = tuple(a * 2 if isinstance(a, float) else a for a in n.args)

    def differ(a, b):
        return {name for name in a if a[name] != b[name]}

    assert differ(keys(), keys()) == set()
    assert differ(keys(), keys(weight)) == {"weights"}
    assert differ(keys(), keys(scale)) == {"scales"}
    assert differ(keys(), keys(repeat=2)) == {"shapes"}


def built(body, tensors, **children):
    """Key of the one part that a small module is."""
    captured, args, decisions, inputs = planned(Fragment(body, **children), *tensors)
    gm = insert(*bind(captured, args), decisions)
    propagate(gm, inputs)
    (part,) = partition(gm, lambda node: None)
    return tensorrt.key(part, inputs, "tensorrt_rtx")


@pytest.mark.parametrize(("one", "other"), [
    (lambda m, x: m.b(F.gelu(m.a(x), approximate="tanh")), lambda m, x: m.b(F.gelu(m.a(x), approximate="none"))),
    (lambda m, x: m.b(F.gelu(m.a(x))), lambda m, x: m.b(F.silu(m.a(x)))),
    (lambda m, x: m.b(F.layer_norm(m.a(x), (64,), eps=1e-5)), lambda m, x: m.b(F.layer_norm(m.a(x), (64,), eps=1e-6))),
    (lambda m, x: m.b(F.leaky_relu(m.a(x), 0.1)), lambda m, x: m.b(F.leaky_relu(m.a(x), 0.2))),
    (lambda m, x: m.b(m.a(x).roll((1, 0), (1, 2))), lambda m, x: m.b(m.a(x).roll((0, 1), (1, 2)))),
], ids=["text", "function", "keyword", "number", "tuple"])
def test_graphs_that_differ_in_one_argument_are_two_engines_of_two_parts(stand, one, other):
    first, again, second = (built(body, [TOKENS], a=linear, b=linear) for body in (one, one, other))
    assert first == again
    assert "part" in {name for name in first if first[name] != second[name]}


def test_constants_that_change_places_are_another_engine(stand):
    gm, tensors = quantised()
    propagate(gm, tensors)
    part = partition(gm)[0]
    before = tensorrt.key(part, tensors, "tensorrt_rtx")
    one, other = [n for n in part.graph.graph.find_nodes(op="get_attr") if str(n.target).endswith("weight_int8")][:2]
    one.target, other.target = other.target, one.target
    after = tensorrt.key(part, tensors, "tensorrt_rtx")
    assert {name for name in before if before[name] != after[name]} == {"weights"}


ANOTHER_PROCESS = """
import sys
from pathlib import Path
import torch
import torch.nn.functional as F
from fragments import PIXELS, Fragment, conv, planned
from sdtrt_backend import engine
from sdtrt_backend.capture import bind
from sdtrt_backend.enginecache import EngineCache
from sdtrt_backend.fx import propagate
from sdtrt_backend.lower import tensorrt
from sdtrt_backend.partition import partition
from sdtrt_backend.quantize import insert

here = {"torch": torch.__version__, "cuda": "13", "driver": "580", "gpu": "made here", "capability": "9.0"}
engine.version = lambda flavour: "1.4.0"
tensorrt.device_key = lambda device: here

def body(m, x):
    return F.gelu(m.b(F.group_norm(F.silu(m.a(x)), 8, eps=1e-6)), approximate="tanh")

captured, args, decisions, tensors = planned(Fragment(body, a=lambda: conv(stride=(2, 1)), b=conv), PIXELS)
gm = insert(*bind(captured, args), decisions)
propagate(gm, tensors)
(part,) = partition(gm)
key = tensorrt.key(part, tensors, "tensorrt_rtx")
blob, said = EngineCache(Path(sys.argv[1])).get(key, lambda: b"built by " + sys.argv[2].encode())
print(blob.decode(), "|", said)
"""


def test_another_process_finds_the_engine(tmp_path):
    tests = Path(__file__).parents[1]
    said = []
    for who, seed in (("the first", "1"), ("the second", "2")):
        path = os.pathsep.join([str(tests), str(tests / "lower"), *sys.path])
        done = subprocess.run([sys.executable, "-c", ANOTHER_PROCESS, str(tmp_path / "engines"), who], text=True, check=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed})
        said.append(done.stdout)
    assert said[0].startswith("built by the first | the engine was built in")
    assert said[1].startswith("built by the first | the engine came from the cache in")


def test_the_same_calls_with_another_output_are_another_engine(stand):
    gm, tensors = quantised()
    propagate(gm, tensors)
    part = partition(gm)[0]
    before, output = tensorrt.key(part, tensors, "tensorrt_rtx"), part.graph.graph.output_node()
    output.args = (output.args[0][::-1],)
    after = tensorrt.key(part, tensors, "tensorrt_rtx")
    assert {name for name in before if before[name] != after[name]} == {"part"}


def test_a_part_builds_into_a_real_engine_ahead_of_time(tmp_path):
    """The part's ONNX file, as ``_build`` writes it, is one that TensorRT takes; for a named card, as none is here."""
    pytest.importorskip("tensorrt_rtx", reason="builds engines without a GPU: pip install tensorrt_rtx")
    pytest.importorskip("onnxscript", reason="writes ONNX: pip install onnxscript")
    gm, tensors = quantised()
    propagate(gm, tensors)
    part = partition(gm)[0]
    names, outputs = tensorrt._names(part)
    named = dict(zip(names, tensors, strict=True))
    files = tensorrt.onnx.write(tensorrt._renamed(part.graph, names), named, outputs, tmp_path)
    blob, layers, _ = engine.build("tensorrt_rtx", "int8", files[0], {n: (tuple(t.shape),) * 3 for n, t in named.items()}, 89)
    assert len(blob) > 0
    assert engine.count_types(layers)["gemm"].get("Int8", 0) >= 1


def test_without_tensorrt_the_option_raises_with_the_install_line(monkeypatch):
    monkeypatch.setattr("sdtrt_backend.options.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="no TensorRT is installed: pip install 'sdtrt_backend"):
        Options.parse({"engine": "tensorrt"})
    assert Options.parse({"engine": "auto"}).engine == "auto"


def test_engines_are_for_gpus():
    target, reason = choose(OPTIONS, torch.device("cpu"))
    assert target is None
    assert "TensorRT engines run on NVIDIA GPUs, the module is on the cpu" in reason
