"""Recipes from and to NVIDIA Model Optimizer, with modelopt itself as the oracle."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import grab
from tolerances import TOLERANCES
from torch import fx, nn

import sdtrt_backend
from sdtrt_backend import ModelError, Recipe, RecipeError
from sdtrt_backend.calibrate import Calibration, observed
from sdtrt_backend.capture import bind, tensor_inputs
from sdtrt_backend.measure import compare
from sdtrt_backend.options import Options
from sdtrt_backend.quantize import insert, plan
from sdtrt_backend.recipe import fingerprint

mtq = pytest.importorskip("modelopt.torch.quantization", reason="the oracle of this file: pip install nvidia-modelopt")
mto = pytest.importorskip("modelopt.torch.opt")
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:modelopt"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning:modelopt")]

ALPHA = 0.5
PROMPT = "owl, fluent style"
# what sd_int8 keeps in full precision, and the inputs of layer norms, which have no place in a recipe
KEPT = ("conv_in.*", "conv_out.*", "*time_emb*", "*norm*")


def quantize(module, forward_loop, smooth=False, disable=KEPT, edit=lambda config: None):
    """``mtq.quantize`` with its int8 configuration, in place."""
    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    config["algorithm"] = {"method": "smoothquant", "alpha": ALPHA} if smooth else "max"
    edit(config)
    config["quant_cfg"] += [{"quantizer_name": pattern, "enable": False} for pattern in disable]
    with torch.no_grad():
        return mtq.quantize(module, config, forward_loop)


def run(module, inputs):
    with torch.no_grad():
        return module(*inputs)


def layers_of(module):
    return {n: m for n, m in module.named_modules() if hasattr(m, "weight_quantizer")}


def enabled(module):
    return {n: m for n, m in layers_of(module).items() if m.input_quantizer.is_enabled}


def calls(inputs):
    """Three timesteps of different width, so that a maximum over calls is one."""
    return [(inputs[0] * scale, torch.tensor(t), inputs[2] * scale) for scale, t in ((1.0, 999), (2.0, 500), (0.5, 1))]


@pytest.fixture
def loop(inputs):
    return lambda module: [run(module, call) for call in calls(inputs)]


@pytest.fixture(params=[False, True], ids=["max", "smoothquant"])
def smooth(request):
    return request.param


@pytest.fixture
def quantized(make_denoiser, loop, smooth):
    """(modelopt's module, the plain one)."""
    return quantize(make_denoiser(), loop, smooth=smooth), make_denoiser()


@pytest.fixture(scope="module", params=[False, True], ids=["max", "smoothquant"])
def unet(request):
    """(modelopt's UNet, the plain one, the calls that calibrated it): the bundled model, two steps of one picture."""
    pipe = sdtrt_backend.demo_pipeline()
    plain, seen = pipe.unet, []
    handle = plain.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((*args, kwargs["encoder_hidden_states"])), with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPT, num_inference_steps=2, guidance_scale=5.0, output_type="latent", generator=torch.Generator().manual_seed(0))
    handle.remove()
    return quantize(copy.deepcopy(plain), lambda m: [run(m, call) for call in seen], request.param), plain, seen


def check_ranges(theirs, plain, recipe):
    """What the recipe says is what modelopt's quantizers hold."""
    assert set(recipe.layers) == set(enabled(theirs))
    for name, layer in enabled(theirs).items():
        entry, quantizer = recipe.layers[name], layer.input_quantizer
        assert entry.amax == float(quantizer.amax)
        assert entry.fingerprint == fingerprint(plain.get_submodule(name).weight)
        assert entry.op == ("conv2d" if layer.weight.dim() == 4 else "linear")
        factor = recipe.smoothing.get(entry.group)
        assert (factor is None) == (quantizer.pre_quant_scale is None)
        if factor is not None:
            torch.testing.assert_close(factor * quantizer.pre_quant_scale, torch.ones_like(factor))
            torch.testing.assert_close(plain.get_submodule(name).weight * factor, layer.weight)
            assert (entry.alpha, entry.group) == (ALPHA, name)


def calibrated(plain, calls):
    """Our own calibration of the plain module: (Calibration, its recipe by the rule that modelopt has)."""
    calibration = Calibration()
    with torch.no_grad(), observed(plain, calibration):
        for call in calls:
            plain(*call)
    return calibration, calibration.recipe(Options(rule="max", alpha=ALPHA), {})


def check_calibration(calibration, ours, recipe):
    """Equal where the definitions agree: amax of unsmoothed layers; factor and amax of a layer that shares its input with
    none; of the others the factor by modelopt's formula from our statistics and the layer's own weight."""
    smoothed = 0
    for name, entry in recipe.layers.items():
        group = ours.layers[name].group
        tensor, channel = calibration.amax(group)
        if entry.group not in recipe.smoothing:
            assert entry.amax == float(tensor.maximum.max())
            continue
        smoothed += 1
        seen, weight = channel.maximum.amax(0), calibration.weights[name].amax
        expected = (seen.pow(ALPHA) / weight.pow(1 - ALPHA)).clamp(1e-4, 1e4)
        torch.testing.assert_close(recipe.smoothing[name], expected)
        assert entry.amax == pytest.approx(float((seen / expected).max()), rel=1e-6)
        if list(calibration.group_of.values()).count(group) == 1:
            torch.testing.assert_close(recipe.smoothing[name], ours.smoothing[group])
            assert entry.amax == pytest.approx(ours.layers[name].amax, rel=1e-6)
        else:  # we divide what the group reads by one factor, of its largest weights
            assert (ours.smoothing[group] <= recipe.smoothing[name] * (1 + 1e-6)).all()
    assert smoothed == (len([n for n in recipe.layers if recipe.layers[n].op == "linear"]) if recipe.smoothing else 0)


def layer_errors(theirs, plain, recipe, call):
    """Relative error of every layer of the Q/DQ reference graph against modelopt's layer, on the inputs of modelopt's run."""
    seen, errors = {}, {}
    handles = [layer.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
               for name, layer in enabled(theirs).items()]
    run(theirs, call)
    for handle in handles:
        handle.remove()
    captured, values = grab(plain, call)
    graph, nodes = bind(captured, values)
    decisions = plan(captured.layers, recipe, ())
    assert {d.layer.name for d in decisions if d.quantized} == set(seen)
    name_of = {nodes[d.layer.node].name: d.layer.name for d in decisions if d.quantized}

    class Theirs(fx.Interpreter):
        """Hands on modelopt's output of every layer, so that the next one reads what modelopt's read."""

        def run_node(self, n):
            result = super().run_node(n)
            if n.name not in name_of:
                return result
            expected = seen[name_of[n.name]]
            errors[name_of[n.name]] = compare(result, expected)
            return expected

    with torch.no_grad():
        Theirs(insert(graph, nodes, decisions)).run(*tensor_inputs(captured, values))
    return errors


def test_ranges_and_factors_are_modelopts(quantized):
    theirs, plain = quantized
    check_ranges(theirs, plain, Recipe.from_modelopt(theirs, original=plain))


@pytest.mark.slow
def test_ranges_and_factors_of_the_bundled_unet_are_modelopts(unet):
    theirs, plain, _ = unet
    recipe = Recipe.from_modelopt(theirs, original=plain)
    check_ranges(theirs, plain, recipe)
    assert len(recipe.layers) > 100


def test_our_calibration_gives_the_same_numbers(quantized, inputs):
    theirs, plain = quantized
    check_calibration(*calibrated(plain, calls(inputs)), Recipe.from_modelopt(theirs, original=plain))


def test_our_calibration_of_the_bundled_unet_gives_the_same_numbers(unet):
    theirs, plain, seen = unet
    check_calibration(*calibrated(plain, seen), Recipe.from_modelopt(theirs, original=plain))


def test_every_layer_gives_modelopts_output(quantized, inputs):
    theirs, plain = quantized
    errors = layer_errors(theirs, plain, Recipe.from_modelopt(theirs, original=plain), inputs)
    assert len(errors) == 9
    assert max(errors.values()) < TOLERANCES["modelopt_layer"], errors


@pytest.mark.slow
def test_every_layer_of_the_bundled_unet_gives_modelopts_output(unet):
    theirs, plain, seen = unet
    errors = layer_errors(theirs, plain, Recipe.from_modelopt(theirs, original=plain), seen[1])
    assert len(errors) > 100
    assert max(errors.values()) < TOLERANCES["modelopt_layer"], errors


def test_a_step_of_the_backend_is_modelopts_step(quantized, inputs, tmp_path):
    theirs, plain = quantized
    Recipe.from_modelopt(theirs, original=plain).save(tmp_path)
    step = torch.compile(plain, backend="sd_int8", options={"engine": "reference", "recipe": str(tmp_path)})
    result = run(step, inputs)
    assert sdtrt_backend.explain(step).state == "ready"
    assert compare(result, run(theirs, inputs)) < TOLERANCES["modelopt_step"] < compare(result, run(plain, inputs))


@pytest.fixture
def trained(make_denoiser, loop, inputs, smooth):
    """(modelopt's module after ten steps of quantisation-aware training, a plain one with the trained weights)."""
    theirs, plain = quantize(make_denoiser(), loop, smooth=smooth), make_denoiser()
    wanted = run(plain, inputs)
    optimizer = torch.optim.Adam(theirs.parameters(), 1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(theirs(*inputs), wanted).backward()
        optimizer.step()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            value, scale = theirs.get_parameter(name), None
            if name.endswith("weight") and name.removesuffix(".weight") in layers_of(theirs):
                scale = theirs.get_submodule(name.removesuffix(".weight")).input_quantizer.pre_quant_scale
            parameter.copy_(value if scale is None else value * scale)
    return theirs.requires_grad_(False), plain


def test_trained_ranges_are_taken_as_they_are(trained, inputs, tmp_path):
    theirs, plain = trained
    recipe = Recipe.load(Recipe.from_modelopt(theirs, original=plain).save(tmp_path))
    assert len(recipe.weight_amax) == len(recipe.layers) == 9
    for name, layer in enabled(theirs).items():
        assert recipe.layers[name].amax == float(layer.input_quantizer.amax)
        assert torch.equal(recipe.weight_amax[name], layer.weight_quantizer.amax.flatten())
        assert not torch.allclose(recipe.weight_amax[name], layer.weight.flatten(1).abs().amax(1))
    errors = layer_errors(theirs, plain, recipe, inputs)
    assert max(errors.values()) < TOLERANCES["modelopt_layer"], errors
    step = torch.compile(plain, backend="sd_int8", options={"engine": "reference", "recipe": str(tmp_path)})
    result = run(step, inputs)
    assert not [layer.name for layer in sdtrt_backend.explain(step).layers if "two 8-bit codes" in layer.reason]
    assert compare(result, run(theirs, inputs)) < TOLERANCES["modelopt_step"] < compare(result, run(plain, inputs))


def test_trained_ranges_survive_a_round_trip(trained, loop, inputs):
    theirs, plain = trained
    recipe, again = Recipe.from_modelopt(theirs, original=plain), quantize(copy.deepcopy(plain), loop)
    recipe.to_modelopt(again, original=plain)
    assert Recipe.from_modelopt(again, original=plain).weight_amax.keys() == recipe.weight_amax.keys()
    torch.testing.assert_close(run(again, inputs), run(theirs, inputs), rtol=1e-4, atol=1e-5)


def state(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def assert_same_state(module, expected, exact=True):
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if exact:
            assert torch.equal(found[name], value), name
        else:  # a reciprocal's reciprocal may be one rounding away
            torch.testing.assert_close(found[name], value, rtol=3e-7, atol=0.0)


def test_what_was_read_and_written_back_is_the_identity(quantized):
    theirs, plain = quantized
    before = state(theirs)
    Recipe.from_modelopt(theirs, original=plain).to_modelopt(theirs, original=plain)
    assert_same_state(theirs, before)


def test_a_recipe_written_into_another_module_of_the_model_gives_the_same_module(quantized, make_denoiser, loop, inputs):
    theirs, plain = quantized
    recipe = Recipe.from_modelopt(theirs, original=plain)
    other = quantize(make_denoiser(), loop)
    recipe.to_modelopt(other)
    assert_same_state(other, state(theirs), exact=False)
    assert compare(run(other, inputs), run(theirs, inputs)) < TOLERANCES["modelopt_step"]
    again = Recipe.from_modelopt(other, original=plain)
    assert again.layers.keys() == recipe.layers.keys()
    assert all(again.layers[n].amax == layer.amax for n, layer in recipe.layers.items())


def test_a_factor_is_replaced_from_the_original_weights(make_denoiser, loop, recipe):
    plain, smoothed, unsmoothed = make_denoiser(), quantize(make_denoiser(), loop, True), quantize(make_denoiser(), loop)
    recipe.to_modelopt(smoothed, original=plain)
    recipe.to_modelopt(unsmoothed)
    assert_same_state(smoothed, state(unsmoothed))


def test_our_recipe_makes_modelopts_module_ours(make_denoiser, loop, recipe, inputs):
    """Calibrated by us: q, k and v share a factor; what the rules keep is excluded; a layer without a range is disabled."""
    plain, theirs = make_denoiser(), quantize(make_denoiser(), loop, disable=("*norm*", "context_k*"))
    assert theirs.conv_in.input_quantizer.is_enabled
    recipe.to_modelopt(theirs, exclude=("conv_in", "conv_out", "time_embedding"))
    assert set(enabled(theirs)) == set(recipe.layers) - {"conv_in", "conv_out", "time_embedding"}
    assert torch.equal(theirs.to_q.input_quantizer.pre_quant_scale, theirs.to_v.input_quantizer.pre_quant_scale)
    errors = layer_errors(theirs, plain, recipe, inputs)
    assert len(errors) == 9
    assert max(errors.values()) < TOLERANCES["modelopt_layer"], errors
    del recipe.layers["ff_out"]
    recipe.to_modelopt(theirs, original=plain)
    assert "ff_out" not in enabled(theirs)
    assert theirs.ff_out.input_quantizer.pre_quant_scale is None
    assert torch.equal(theirs.ff_out.weight, plain.ff_out.weight)


def test_what_we_wrote_survives_modelopts_checkpoint(make_denoiser, loop, recipe, inputs, tmp_path):
    theirs = quantize(make_denoiser(), loop)
    recipe.to_modelopt(theirs)
    mto.save(theirs, tmp_path / "theirs.pt")
    restored = mto.restore(make_denoiser(seed=1), tmp_path / "theirs.pt")
    assert torch.equal(run(restored, inputs), run(theirs, inputs))


def test_a_restored_checkpoint_gives_the_same_recipe(quantized, make_denoiser, tmp_path):
    theirs, plain = quantized
    mto.save(theirs, tmp_path / "theirs.pt")
    restored = mto.restore(make_denoiser(seed=1), tmp_path / "theirs.pt")
    first, second = (Recipe.from_modelopt(m, original=plain).save(tmp_path / str(i)) for i, m in enumerate((theirs, restored)))
    files = [{f.name: f.read_bytes() for f in folder.iterdir()} for folder in (first, second)]
    assert files[0] == files[1]
    assert len(files[0]) == 2


def test_unsmoothed_siblings_of_one_range_are_one_group(make_denoiser, loop):
    recipe = Recipe.from_modelopt(quantize(make_denoiser(), loop))
    assert {recipe.layers[n].group for n in ("to_q", "to_k", "to_v")} == {"to_q"}
    assert recipe.layers["context_v"].group == "context_k"
    assert recipe.layers["to_out"].group == "to_out"


def test_a_compiled_module_is_read_under_its_own_names(make_denoiser, loop):
    theirs = quantize(make_denoiser(), loop)
    assert Recipe.from_modelopt(torch.compile(theirs)).layers == Recipe.from_modelopt(theirs).layers


def test_provenance_names_the_calibration(quantized):
    theirs, plain = quantized
    facts = Recipe.from_modelopt(theirs, original=plain).provenance
    assert facts["algorithm"]["method"] in ("max", "smoothquant")
    assert facts["versions"]["nvidia-modelopt"]


def test_bf16_weights_run_in_fp32_have_a_certain_fingerprint_and_fp32_weights_need_the_original(make_denoiser, loop):
    plain = make_denoiser()
    rounded = copy.deepcopy(plain).bfloat16().float()
    recipe = Recipe.from_modelopt(quantize(copy.deepcopy(rounded), loop, True))
    recipe.check_model({n: fingerprint(rounded.get_submodule(n).weight) for n in recipe.layers})
    with pytest.raises(RecipeError, match=r"rounded to torch.float32.*pass original="):
        Recipe.from_modelopt(quantize(copy.deepcopy(plain).half().float(), loop, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_needs_the_original_and_agrees_to_its_rounding(make_denoiser, inputs, dtype):
    plain = make_denoiser().to(dtype)
    half = [(a.to(dtype), t, c.to(dtype)) for a, t, c in calls(inputs)]
    theirs = quantize(copy.deepcopy(plain), lambda m: [run(m, call) for call in half], True)
    with pytest.raises(RecipeError, match="pass original="):
        Recipe.from_modelopt(theirs)
    recipe = Recipe.from_modelopt(theirs, original=plain)
    eps = torch.finfo(dtype).eps
    for name, factor in recipe.smoothing.items():
        expected = plain.get_submodule(name).weight.float() * factor
        torch.testing.assert_close(theirs.get_submodule(name).weight.float(), expected, rtol=2 * eps, atol=1e-5)
    before = state(theirs)
    recipe.to_modelopt(theirs, original=plain)
    assert_same_state(theirs, before)


def test_a_layer_disabled_after_smoothing_is_left_to_full_precision_and_named(make_denoiser, loop, inputs):
    """Its weight was divided and its input is still multiplied; the recipe is for the original, where neither happens."""
    plain, theirs = make_denoiser(), quantize(make_denoiser(), loop, True)
    mtq.disable_quantizer(theirs, "ff_out.*")
    assert theirs.ff_out.input_quantizer.pre_quant_scale is not None
    recipe = Recipe.from_modelopt(theirs, original=plain)
    assert "ff_out" not in recipe.layers
    assert recipe.provenance["unsmoothed"] == ["ff_out"]
    errors = layer_errors(theirs, plain, recipe, inputs)
    assert max(errors.values()) < TOLERANCES["modelopt_layer"], errors
    recipe.to_modelopt(theirs, original=plain)
    assert theirs.ff_out.input_quantizer.pre_quant_scale is None
    assert torch.equal(theirs.ff_out.weight, plain.ff_out.weight)


def test_quantizers_without_a_place_in_a_recipe_are_named(make_denoiser, loop, caplog):
    theirs = quantize(make_denoiser(), loop, disable=("*time_embedding*",))
    recipe = Recipe.from_modelopt(theirs)
    assert recipe.provenance["left_out"] == ["norm2.input_quantizer", "norm3.input_quantizer"]
    assert "2 quantizers (norm2.input_quantizer, norm3.input_quantizer, ...) are neither" in caplog.text
    recipe.to_modelopt(theirs)
    assert not theirs.norm2.input_quantizer.is_enabled


def weight_cfg(**attributes):
    return lambda config: config["quant_cfg"].append({"quantizer_name": "*weight_quantizer", "cfg": attributes})


def input_cfg(**attributes):
    return lambda config: config["quant_cfg"].append({"quantizer_name": "*input_quantizer", "cfg": attributes})


@pytest.mark.parametrize(("edit", "sentence"), [
    (input_cfg(num_bits=(4, 3)), r"conv1: its input is quantised in another format \(num_bits \(4, 3\)\)"),
    (weight_cfg(num_bits=4, block_sizes={-1: 32}), "conv1: its weight is quantised in blocks"),
    (lambda c: c["quant_cfg"].append({"quantizer_name": "*to_q.weight_quantizer",
                                      "cfg": [{"num_bits": 4, "block_sizes": {-1: 32}}, {"num_bits": 8, "axis": 0}]}),
     "to_q: a tensor of it is quantised to several formats"),
    (input_cfg(num_bits=8, type="dynamic"), "conv1: its input is quantised with ranges found at run time"),
    (input_cfg(num_bits=8, axis=1), r"conv1: its input is quantised with a range per channel \(axis 1\)"),
    (input_cfg(num_bits=8, narrow_range=True), "conv1: its input is quantised without the code -128"),
    (weight_cfg(num_bits=8, axis=None), r"conv1: its weight is quantised with other ranges than one per output channel"),
    (lambda c: c["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False}),
     "conv1: its weight is quantised and its input is not"),
    (lambda c: c["quant_cfg"].append({"quantizer_name": "*weight_quantizer", "enable": False}),
     "conv1: its input is quantised and its weight is not"),
    (lambda c: c["quant_cfg"].append({"quantizer_name": "conv1.output_quantizer", "cfg": {"num_bits": 8}}),
     "conv1: its output is quantised too"),
])
def test_what_a_recipe_cannot_hold_is_refused_with_the_layer_named(make_denoiser, loop, edit, sentence):
    with pytest.raises(RecipeError, match=f"a recipe cannot hold {sentence}"):
        Recipe.from_modelopt(quantize(make_denoiser(), loop, edit=edit))


def test_weights_that_are_compressed_or_never_calibrated_are_refused(make_denoiser, loop):
    uncalibrated = quantize(make_denoiser(), lambda module: None)
    with pytest.raises(RecipeError, match="conv1: its input is quantised without a calibrated range"):
        Recipe.from_modelopt(uncalibrated)
    compressed = quantize(make_denoiser(), loop)
    mtq.compress(compressed)
    with pytest.raises(RecipeError, match="its weight is compressed"):
        Recipe.from_modelopt(compressed)


def test_a_module_without_enabled_quantizers_is_refused(denoiser, make_denoiser, loop, recipe):
    for use in (Recipe.from_modelopt, recipe.to_modelopt):
        with pytest.raises(ModelError, match=r"ToyDenoiser has no nn.Linear or nn.Conv2d with an enabled modelopt quantizer"):
            use(denoiser)
    with pytest.raises(ModelError, match=r"SimpleNamespace has no nn.Linear"):
        Recipe.from_modelopt(SimpleNamespace(unet=denoiser))
    theirs = quantize(make_denoiser(), loop)
    mtq.disable_quantizer(theirs, "*")
    with pytest.raises(ModelError, match=r"no nn.Linear or nn.Conv2d with an enabled"):
        Recipe.from_modelopt(theirs)


def test_another_original_and_another_model_are_refused_and_nothing_is_changed(make_denoiser, loop, recipe):
    theirs, stranger = quantize(make_denoiser(), loop, True), make_denoiser(seed=1)
    before = state(theirs)
    with pytest.raises(RecipeError, match="the weight of conv1 in original is not the one"):
        Recipe.from_modelopt(theirs, original=stranger)
    with pytest.raises(RecipeError, match="original has no layer"):
        Recipe.from_modelopt(theirs, original=nn.Linear(2, 2))
    with pytest.raises(RecipeError, match="in original is not the one"):
        recipe.to_modelopt(theirs, original=stranger)
    assert_same_state(theirs, before)
    other = quantize(make_denoiser(seed=1), loop)
    before = state(other)
    with pytest.raises(RecipeError, match="belongs to another model"):
        recipe.to_modelopt(other)
    assert_same_state(other, before)
    assert all(layer.weight_quantizer.is_enabled for layer in enabled(other).values())
