"""The bundled UNet as Q/DQ ONNX in onnxruntime, and as TensorRT-RTX engines built for GPUs that are not here."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from tolerances import TOLERANCES
from typer.testing import CliRunner

import sdtrt_backend
from sdtrt_backend import cli, engine, ops
from sdtrt_backend.calibrate import Calibration, observed
from sdtrt_backend.capture import bind, trace
from sdtrt_backend.errors import CalibrationError, ExportError
from sdtrt_backend.export import OUTPUT, Size, build_engine, export_onnx
from sdtrt_backend.lower import onnx as lowering
from sdtrt_backend.options import Options
from sdtrt_backend.quantize import insert
from sdtrt_backend.rules import ENGINE_KEEP

pytestmark = pytest.mark.slow  # the fixtures export the bundled UNet
PROMPTS = ["red apple, noto style", "rocket, fluent style"]
NEEDS_ONNX = "ONNX export needs pip install 'sdtrt_backend[onnx]'"
RTX = "tensorrt_rtx"
TYPES = {"tensor(float16)": torch.float16, "tensor(float)": torch.float32, "tensor(int64)": torch.int64}


@pytest.fixture(scope="module")
def pipe():
    torch._dynamo.reset()
    return sdtrt_backend.demo_pipeline()


@pytest.fixture(scope="module")
def recipe(pipe, tmp_path_factory):
    found = sdtrt_backend.calibrate(pipe, PROMPTS, num_inference_steps=4, seed=7, progress=False)
    return found.save(tmp_path_factory.mktemp("recipe"))


def steps_of(pipe, **size):
    """The denoiser's inputs at every step of a picture, by name."""
    calls = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({"sample": args[0], "timestep": args[1],
                                              "encoder_hidden_states": kwargs["encoder_hidden_states"]}), with_kwargs=True)
    prompts = PROMPTS[:1] * size.pop("prompts", 1)
    noise = [torch.Generator().manual_seed(11 + i) for i in range(len(prompts))]
    pipe(prompts, num_inference_steps=4, generator=noise, output_type="latent", **size)
    handle.remove()
    return calls


@pytest.fixture(scope="module")
def exported(pipe, recipe, tmp_path_factory):
    """precision -> the file, its rest in float16, made once."""
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
    made = {}

    def make(precision):
        if precision not in made:
            made[precision] = export_onnx(pipe, recipe, tmp_path_factory.mktemp(precision), precision=precision,
                                          dtype="float16", flavour=RTX)
        return made[precision]

    return make


def session(model):
    ort = pytest.importorskip("onnxruntime", reason=NEEDS_ONNX)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    # its further fusions replace fp8 products by an operator that it has for int8 only
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session, inputs, outputs=(OUTPUT,)):
    types = {i.name: TYPES[i.type] for i in session.get_inputs()}
    feed = {name: inputs[name].to(dtype).numpy() for name, dtype in types.items()}
    return [torch.from_numpy(y).float() for y in session.run(list(outputs), feed)]


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def reference(pipe, recipe, exported):
    """The reference lowering of the same layers, one code each, captured by Dynamo from the user's fp32 module."""
    kept = [d.layer.name for d in exported.decisions if not d.quantized]
    return torch.compile(pipe.unet, backend=f"sd_{exported.precision}",
                         options={"recipe": str(recipe), "engine": "reference", "exclude": kept, "two_codes": []})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", pytest.param("fp8", marks=pytest.mark.long)])
def test_the_file_runs_in_onnxruntime_like_the_reference_lowering_at_every_step(pipe, recipe, exported, precision):
    onnx = pytest.importorskip("onnx", reason=NEEDS_ONNX)
    model = exported(precision).files[0]
    onnx.checker.check_model(str(model), full_check=True)
    mine, oracle = session(str(model)), reference(pipe, recipe, exported(precision))
    for inputs in steps_of(pipe):
        with torch.no_grad():
            expected, full = oracle(**inputs)[0], pipe.unet(**inputs)[0]
        got = run(mine, inputs)[0]
        assert 1 - cosine(got, full) < TOLERANCES["export_noise_ratio"] * (1 - cosine(expected, full))
        if precision == "int8":
            assert cosine(got, expected) > TOLERANCES["int8_export_cosine"]


@pytest.mark.slow
def test_every_fp8_tensor_is_the_references_when_all_before_it_are(pipe, exported):
    """Each dequantised tensor is replaced by the reference's, so that rounding ties cannot add up over the layers."""
    onnx = pytest.importorskip("onnx", reason=NEEDS_ONNX)
    file = exported("fp8")
    half = sdtrt_backend.demo_pipeline(torch.float16).unet
    model, names = forced(onnx.load(str(file.files[0])))
    inputs = {k: v.half() if k != "timestep" else v for k, v in steps_of(pipe)[-1].items()}
    captured, values = trace(half, {**inputs, "return_dict": False})
    graph, nodes = bind(captured, values)
    expected, codes = watched(insert(graph, nodes, file.decisions), inputs)
    given = {f"{name}_given": value for name, value in zip(names, codes, strict=True)}
    got = run(session(model), inputs | given, [OUTPUT, *names])
    assert min(map(cosine, got, [expected, *codes])) > TOLERANCES["layer_export_cosine"]


def forced(model):
    """The model with an input for each dequantised activation, read in its place, and the activation as an output."""
    import onnx

    codes = {n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    names = [n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in codes]
    for node in model.graph.node:
        node.input[:] = [f"{name}_given" if name in names else name for name in node.input]
    for name in names:
        model.graph.input.append(onnx.helper.make_tensor_value_info(f"{name}_given", onnx.TensorProto.FLOAT, None))
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return model.SerializeToString(), names


def watched(graph, inputs):
    """(result, dequantised activations in order, fp32) of a Q/DQ graph."""
    codes = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.target is ops.quantize_fp8:
                codes.append(result.float() * n.args[1])
            return result

    with torch.no_grad():
        return Watch(graph).run(*inputs.values())[0].float(), codes


def test_weights_are_stored_in_eight_bits_per_output_channel(exported):
    onnx = pytest.importorskip("onnx", reason=NEEDS_ONNX)
    for precision, code in (("int8", onnx.TensorProto.INT8), ("fp8", onnx.TensorProto.FLOAT8E4M3FN)):
        file = exported(precision)
        model = onnx.load(str(file.files[0]))
        assert model.opset_import[0].version >= 19
        stored = {i.name: i for i in model.graph.initializer}
        weights = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
        assert len(weights) == sum(d.quantized for d in file.decisions)
        assert {stored[n.input[0]].data_type for n in weights} == {code}
        assert [i.name for i in model.graph.input] == ["sample", "timestep", "encoder_hidden_states"]
        if precision == "int8":
            assert all(list(stored[n.input[1]].dims) == list(stored[n.input[0]].dims)[:1] for n in weights)
            assert all(a.i == 0 for n in weights for a in n.attribute if a.name == "axis")


def test_int8_convolutions_stay_in_16_bits_for_tensorrt_rtx_and_say_why(exported):
    file = exported("int8")
    reason = ENGINE_KEEP[RTX, "int8", "conv2d"]
    kept = [d for d in file.decisions if d.reason == reason]
    assert kept
    assert {d.layer.op for d in kept} == {"conv2d"}
    assert f"kept in float16: {len(kept)} x {reason}" in str(file)
    assert "conv2d" in {d.layer.op for d in exported("fp8").decisions if d.quantized}
    assert f"tensorrt_rtx --onnx={file.files[0]}" in str(file)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("sm", [89, 120])
def test_an_engine_is_built_without_its_gpu_and_its_layers_are_8_bit(exported, precision, sm):
    pytest.importorskip(RTX, reason="building engines needs pip install tensorrt_rtx")
    file = exported(precision)
    built = build_engine(file, sm)
    eight = {"int8": "Int8", "fp8": "FP8"}[precision]
    quantized = [d for d in file.decisions if d.quantized]
    counts = built.manifest["layers"]
    # linears that read one tensor may become one product
    assert counts["gemm"][eight] >= len({(d.layer.source, d.group) for d in quantized if d.layer.op == "linear"})
    assert counts["correlation"].get(eight, 0) == sum(d.layer.op == "conv2d" for d in quantized)
    assert all(layer.inputs[0] == eight for layer in built.layers if layer.kind == "correlation" and "FP8" in layer.inputs)
    manifest = json.loads(built.path.with_suffix(".json").read_text())
    assert manifest["sha256"] == hashlib.sha256(built.path.read_bytes()).hexdigest()
    assert manifest["onnx_sha256"]["model.onnx"] == hashlib.sha256(file.files[0].read_bytes()).hexdigest()
    assert (manifest["flavour"], manifest["sm"], manifest["precision"]) == (RTX, sm, precision)
    assert manifest["shapes"]["sample"]["opt"] == "2x4x32x32"


def test_the_users_pipeline_is_left_as_it_was(pipe, recipe, exported):
    unet = pipe.unet
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    exported("int8")
    assert pipe.unet is unet
    assert unet.dtype is torch.float32
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


@pytest.mark.slow
def test_the_command_line_builds_an_engine_of_dynamic_batch_and_resolution(pipe, recipe, exported, tmp_path):
    for package in ("onnxscript", RTX):
        pytest.importorskip(package, reason="building engines needs pip install 'sdtrt_backend[onnx]' tensorrt_rtx")
    result = CliRunner().invoke(cli.app, [
        "export", "--to", "engine", "--sm", "89", "--recipe", str(recipe), "--dtype", "float32", "--height", "64",
        "--width", "64", "--max-batch", "3", "--max-height", "96", "--max-width", "128", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "--minShapes=sample:2x4x32x32," in result.output
    assert "--maxShapes=sample:6x4x48x64," in result.output
    assert "for SM89" in result.output
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "int8_sm89.engine", "int8_sm89.json"}
    manifest = json.loads((tmp_path / "int8_sm89.json").read_text())
    assert manifest["shapes"]["sample"] == {"min": "2x4x32x32", "opt": "2x4x32x32", "max": "6x4x48x64"}
    between = steps_of(pipe, prompts=2, height=80, width=64)[1]
    with torch.no_grad():
        expected = reference(pipe, recipe, exported("int8"))(**between)[0]
    assert cosine(run(session(str(tmp_path / "model.onnx")), between)[0], expected) > TOLERANCES["int8_export_cosine"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--to", "tflite"], "unknown --to 'tflite'; valid: onnx, engine"),
    ([], "sdtrt calibrate"),
    (["--recipe", "nowhere"], "recipe.json is missing"),
    (["--recipe", "good", "--dtype", "int4"], "valid: None, float16"),
    (["--recipe", "good", "--flavour", "onnxruntime"], "valid: tensorrt_rtx, tensorrt"),
    (["--recipe", "nowhere", "--to", "engine", "--fp8", "--sm", "80"], "fp8 needs compute capability 89 or newer, got --sm 80"),
    (["--recipe", "nowhere", "--to", "engine", "--sm", "77"], "unknown --sm for tensorrt_rtx"),
])
def test_bad_input_is_one_sentence(arguments, words, recipe, tmp_path, monkeypatch, capsys):
    arguments = [str(recipe) if a == "good" else a for a in arguments]
    if "engine" in arguments:
        pytest.importorskip(RTX, reason="its capabilities are its own")
    monkeypatch.setattr("sys.argv", ["sdtrt", "export", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == cli.BAD_INPUT
    assert words in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out").exists()


def test_without_the_packages_the_install_line_is_said(pipe, recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"pip install 'sdtrt_backend\[onnx\]'"):
        export_onnx(pipe, recipe, tmp_path)
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ExportError, match="pip install tensorrt_rtx, or tensorrt"):
        engine.check(engine.installed(), "int8", 89)


class Nested(torch.nn.Module):
    """Conditions in a dictionary, as SDXL passes them, and a bare tensor as the result."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.condition = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, sample, timestep, added_cond_kwargs=None):
        return self.inner(sample) * (timestep / 1000).to(sample.dtype) + self.condition(added_cond_kwargs["text_embeds"])


class NestedPipeline:
    """Calls its denoiser once."""

    def __init__(self):
        self.unet = Nested()

    def __call__(self, prompts, num_inference_steps, generator, output_type, height=8):
        self.unet(torch.randn(len(prompts), height, 64), torch.tensor(987.6),
                  added_cond_kwargs={"text_embeds": torch.ones(len(prompts), 1, 64)})


def test_nested_inputs_are_named_and_a_timestep_keeps_its_precision(tmp_path):
    onnx = pytest.importorskip("onnx", reason=NEEDS_ONNX)
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
    pipe, calibration = NestedPipeline(), Calibration()
    with torch.no_grad(), observed(pipe.unet, calibration):
        pipe(["a"], 1, None, "latent")
    file = export_onnx(pipe, calibration.recipe(Options(), {}), tmp_path, dtype="bfloat16", size=Size(2), largest=Size(3, 16))
    inputs = {i.name: i.type.tensor_type for i in onnx.load(str(file.files[0])).graph.input}
    assert {name: t.elem_type for name, t in inputs.items()} == {
        "sample": onnx.TensorProto.BFLOAT16, "timestep": onnx.TensorProto.FLOAT,
        "added_cond_kwargs_text_embeds": onnx.TensorProto.BFLOAT16}
    assert [d.dim_param or d.dim_value for d in inputs["sample"].shape.dim] == ["batch", "sample_1", 64]
    assert file.ranges["added_cond_kwargs_text_embeds"] == ((2, 1, 64), (2, 1, 64), (3, 1, 64))


class FromPicture(NestedPipeline):
    """Starts from a picture, and leaves out steps."""

    def __call__(self, prompts, num_inference_steps, generator, output_type, image, strength=0.8):
        steps = int(num_inference_steps * strength)
        if steps < 1:
            raise ValueError("no step is left")
        for step in range(steps):
            self.unet(image.expand(len(prompts), -1, -1), torch.tensor(900.0 - 100 * step),
                      added_cond_kwargs={"text_embeds": torch.ones(len(prompts), 1, 64)})


@pytest.mark.parametrize("strength", [0.3, 1 / 49, 1.0])
def test_a_pipeline_that_takes_pictures_gets_them(strength, tmp_path):
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
    pipe, given = FromPicture(), {"image": torch.randn(1, 6, 64), "strength": strength}
    found = sdtrt_backend.calibrate(pipe, ["a"], num_inference_steps=50, progress=False, **given)
    file = export_onnx(pipe, found, tmp_path, size=Size(2), largest=Size(3), **given)
    assert file.ranges["sample"] == ((2, 6, 64), (2, 6, 64), (3, 6, 64))
    assert [d.layer.name for d in file.decisions if d.quantized] == ["inner"]
    with pytest.raises(CalibrationError, match=r"takes no argument 'images': .* did you mean image"):
        export_onnx(pipe, found, tmp_path, images=given["image"])


def test_tensors_of_two_precisions_are_concatenated_as_torch_does(tmp_path):
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
    gm = torch.fx.symbolic_trace(lambda text, time: (torch.cat([text, time], dim=-1) * 2,))
    inputs = {"text": torch.randn(2, 3).half(), "time": torch.randn(2, 4)}
    (file,) = lowering.write(gm, inputs, ["y"], tmp_path)
    (y,) = run(session(file), inputs, ["y"])
    torch.testing.assert_close(y, torch.cat(list(inputs.values()), -1) * 2, rtol=0, atol=0)


class Unconditioned(torch.nn.Module):
    """Must be given a text, and is given none, as Kandinsky 2.2 is."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(64, 64)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        return (self.inner(sample) * timestep,)


def test_an_argument_that_must_be_passed_is_passed_as_none(tmp_path):
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)

    def draw(prompts, num_inference_steps, generator, output_type):
        draw.unet(torch.randn(len(prompts), 8, 64), torch.tensor(0.5), None)

    draw.unet, calibration = Unconditioned(), Calibration()
    with torch.no_grad(), observed(draw.unet, calibration):
        draw(["a"], 1, None, "latent")
    file = export_onnx(draw, calibration.recipe(Options(), {}), tmp_path)
    assert set(file.ranges) == {"sample", "timestep"}


class Routed(torch.nn.Module):
    """What it computes depends on the values of its input."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(64, 64)

    def forward(self, sample, timestep):
        return self.inner(sample) if sample.sum() > timestep else self.inner(-sample)


def test_what_the_exporter_cannot_trace_is_one_sentence_with_the_way_out(tmp_path):
    def draw(prompts, num_inference_steps, generator, output_type):
        draw.unet(torch.randn(len(prompts), 32, 64), torch.tensor(0.5))

    draw.unet, calibration = Routed(), Calibration()
    with torch.no_grad(), observed(draw.unet, calibration):
        draw(["a"], 1, None, "latent")
    with pytest.raises(ExportError, match=r"no ONNX file of Routed: tracing it failed with \w+: .*torch.compile or accelerate"):
        export_onnx(draw, calibration.recipe(Options(), {}), tmp_path)
    assert not list(tmp_path.iterdir())


class Squeezed(torch.nn.Module):
    """Squeezes dimensions that are 1, and others, in every way."""

    def forward(self, x):
        return torch.squeeze(x, 1)[..., 0] + x.squeeze(-1) + x.squeeze((1, 3)) + x[0].squeeze()


@pytest.mark.parametrize("make", [torch.fx.symbolic_trace, lambda m: bind(*trace(m, {"x": torch.randn(2, 5, 4, 1)}))[0]])
def test_a_dimension_that_is_not_one_is_not_squeezed(make, tmp_path):
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
    inputs = {"x": torch.randn(2, 5, 4, 1)}
    expected = Squeezed()(**inputs)
    (file,) = lowering.write(make(Squeezed()), inputs, ["y"], tmp_path)
    assert torch.equal(run(session(file), inputs, ["y"])[0], expected)


def test_a_recipe_of_another_model_is_refused(pipe, recipe, tmp_path):
    other = sdtrt_backend.demo_pipeline()
    with torch.no_grad():
        other.unet.mid_block.resnets[0].conv1.weight.mul_(2)
    with pytest.raises(sdtrt_backend.RecipeError, match="belongs to another model"):
        export_onnx(other, recipe, tmp_path)


@pytest.mark.slow
def test_constants_beyond_the_limit_lie_beside_the_model(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason=NEEDS_ONNX)
    pytest.importorskip("onnxscript", reason=NEEDS_ONNX)
    torch.manual_seed(0)
    module, call = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.SiLU()), {"input": torch.randn(2, 32)}
    graph, _ = bind(*trace(module, call))
    monkeypatch.setattr(lowering, "EMBED_LIMIT", 0)
    files = lowering.write(graph, call, ["y"], tmp_path)
    assert [f.name for f in files] == ["model.onnx", "model.onnx.data"]
    onnx.checker.check_model(str(files[0]))
    with torch.no_grad():
        expected = module(**call)
    assert cosine(run(session(str(files[0])), call, ["y"])[0], expected) > TOLERANCES["layer_export_cosine"]
    monkeypatch.undo()
    assert [f.name for f in lowering.write(graph, call, ["y"], tmp_path)] == ["model.onnx"]
    assert {f.name for f in tmp_path.iterdir()} == {"model.onnx"}
