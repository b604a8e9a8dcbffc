"""A pipeline with several modules that are called at every timestep: all are calibrated, accelerated, reported and restored."""

import functools
import types

import pytest
import torch
from toy import ToyDenoiser

import sdtrt_backend
from sdtrt_backend import budget, unit
from sdtrt_backend.errors import RecipeError
from sdtrt_backend.measure import compare
from sdtrt_backend.parts import denoisers
from sdtrt_backend.recipe import Recipe

REFERENCE = {"engine": "reference", "max_error": 0.3, "calibration_runs": 1}
STEPS = 4


class TextEncoder(torch.nn.Module):
    """No denoiser: it is called once."""

    def forward(self, text):
        return text


class TwoStages:
    """Draws the first half with one denoiser and the second half, whose latents are larger, with another."""

    def __init__(self):
        self.text_encoder = TextEncoder()
        self.transformer_2, self.transformer = ToyDenoiser(1).eval(), ToyDenoiser(0).eval()

    def __call__(self, prompt, num_inference_steps=STEPS, generator=None, output_type="latent"):
        torch.manual_seed(0)
        sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 64)
        with torch.no_grad():
            for t in reversed(range(num_inference_steps)):
                module = self.transformer if t >= num_inference_steps / 2 else self.transformer_2
                sample = module(sample * (1 if module is self.transformer else 3), torch.tensor(t), encoder_hidden_states=text)
        return sample


@pytest.fixture
def pipe():
    torch._dynamo.reset()
    return TwoStages()


@pytest.fixture
def recipe(pipe):
    return sdtrt_backend.calibrate(pipe, ["a"], num_inference_steps=STEPS, progress=False)


def int8(report):
    return {row.name for row in report.layers if row.precision == "int8"}


def test_the_first_denoiser_comes_first_and_a_module_with_two_names_once(pipe):
    pipe.refiner = pipe.transformer_2
    pipe.transformer_2 = torch.compile(pipe.transformer_2)
    found = denoisers(pipe)
    assert list(found) == ["transformer", "transformer_2"]
    assert found["transformer_2"] is pipe.refiner


class Scaled(ToyDenoiser):
    """As a ControlNet: the strength is a Python float."""

    def forward(self, sample, timestep, encoder_hidden_states, strength: float = 1.0):
        return super().forward(sample, timestep, encoder_hidden_states) * strength


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_strength_builds_nothing_anew(dtype, monkeypatch):
    torch._dynamo.reset()
    built, build = [], unit.build
    monkeypatch.setattr(unit, "build", lambda request: built.append(1) or build(request))
    pipe = types.SimpleNamespace(transformer=Scaled().eval().to(dtype))
    sdtrt_backend.accelerate(pipe, **REFERENCE)
    torch.manual_seed(0)
    sample, text = torch.randn(2, 4, 8, 8, dtype=dtype), torch.randn(2, 5, 64, dtype=dtype)
    for strength in (1.0, 1.0, 1.0, 0.7, 0.0, 1.3, 1):
        for t in (9.0, 5.0, 1.0):
            with torch.no_grad():
                mine = pipe.transformer(sample, torch.tensor(t), encoder_hidden_states=text, strength=strength)
                own = pipe.transformer.forward(sample, torch.tensor(t), encoder_hidden_states=text, strength=strength)
            assert mine.dtype is own.dtype
            assert compare(mine, own) < 0.3 if strength else not mine.any()
    assert (sdtrt_backend.explain(pipe).state, len(built)) == ("ready", 1)
    assert sdtrt_backend.explain(pipe).fallbacks == ()
    sdtrt_backend.restore(pipe)
    assert pipe.transformer._compiled_call_impl is None


def test_both_calibrate_themselves_and_are_right_and_restored_to_the_bit(pipe):
    own = pipe("a")
    sdtrt_backend.accelerate(pipe, **REFERENCE)
    pictures = [pipe("a") for _ in range(3)]
    assert torch.equal(pictures[0], own)
    assert 0 < compare(pictures[-1], own) < 0.3
    report = sdtrt_backend.explain(pipe)
    assert (report.state, report.fallbacks) == ("ready", ())
    assert {"to_q", "transformer_2.to_q"} <= int8(report)
    assert len(int8(report)) == 2 * sum("." not in name for name in int8(report))
    assert "transformer_2.to_q" in str(report)
    sdtrt_backend.restore(pipe)
    assert torch.equal(pipe("a"), own)
    assert all(m._compiled_call_impl is None for m in (pipe.transformer, pipe.transformer_2))


def test_one_recipe_has_the_ranges_of_each(pipe, recipe, tmp_path):
    assert list(recipe.parts) == ["transformer_2"]
    part = recipe.parts["transformer_2"]
    assert (recipe.timesteps, part.timesteps) == ((3.0, 2.0), (1.0, 0.0))
    assert part.layers["conv1"].plain_amax != recipe.layers["conv1"].plain_amax
    loaded = Recipe.load(recipe.save(tmp_path))
    assert loaded.content_hash() == recipe.content_hash()
    assert loaded.parts["transformer_2"].content_hash() == part.content_hash()
    assert all(torch.equal(a, loaded.parts["transformer_2"].smoothing[k]) for k, a in part.smoothing.items())


@pytest.mark.parametrize("saved", [True, False])
def test_with_a_recipe_both_run_in_8_bits_from_the_first_picture(pipe, recipe, tmp_path, saved):
    own = pipe("a")
    sdtrt_backend.accelerate(pipe, recipe=recipe.save(tmp_path) if saved else recipe, **REFERENCE)
    assert 0 < compare(pipe("a"), own) < 0.3
    report = sdtrt_backend.explain(pipe)
    assert report.state == "ready"
    amax = {row.name: row.amax for row in report.layers}
    assert amax["to_out"] == pytest.approx(recipe.layers["to_out"].amax)
    assert amax["transformer_2.to_out"] == pytest.approx(recipe.parts["transformer_2"].layers["to_out"].amax)


def test_a_part_that_the_recipe_does_not_have_calibrates_itself(pipe, recipe):
    alone = Recipe(recipe.model_hash, recipe.layers, recipe.smoothing, recipe.amax_by_timestep, recipe.timesteps)
    sdtrt_backend.accelerate(pipe, recipe=alone, **REFERENCE)
    pipe("a")
    assert sdtrt_backend.explain(pipe.transformer).state == "ready"
    assert sdtrt_backend.explain(pipe).state == "calibrating"
    pipe("a")
    pipe("a")
    assert sdtrt_backend.explain(pipe).state == "ready"


def test_a_recipe_of_both_serves_a_pipeline_that_has_one_of_them(pipe, recipe):
    pipe.transformer = pipe.transformer_2
    del pipe.transformer_2
    pipe.transformer_2 = pipe.transformer  # one module, which draws all
    sdtrt_backend.accelerate(pipe, recipe=recipe, **REFERENCE)
    pipe("a")
    report = sdtrt_backend.explain(pipe)
    assert report.state == "ready"
    amax = next(row.amax for row in report.layers if row.name == "to_out")
    assert amax == pytest.approx(recipe.parts["transformer_2"].layers["to_out"].amax)


def test_a_part_with_other_weights_is_refused_and_nothing_is_changed(pipe, recipe):
    with torch.no_grad():
        pipe.transformer_2.to_q.weight.mul_(1.5)
    with pytest.raises(RecipeError):
        sdtrt_backend.accelerate(pipe, recipe=recipe, **REFERENCE)
    assert all(m._compiled_call_impl is None for m in (pipe.transformer, pipe.transformer_2))


def test_the_one_line_finds_the_part_that_is_of_its_module(pipe, recipe, tmp_path):
    folder = str(recipe.save(tmp_path))
    pipe.transformer_2 = torch.compile(pipe.transformer_2, backend="sd_int8", options={**REFERENCE, "recipe": folder})
    pipe("a")
    report = sdtrt_backend.explain(pipe.transformer_2)
    assert report.state == "ready"
    amax = next(row.amax for row in report.layers if row.name == "to_out")
    assert amax == pytest.approx(recipe.parts["transformer_2"].layers["to_out"].amax)


def test_a_calibration_of_both_goes_on_to_the_same_recipe(pipe, recipe, tmp_path, monkeypatch):
    whole = sdtrt_backend.calibrate(pipe, ["a", "b"], num_inference_steps=STEPS, progress=False)
    calls = []
    forward = pipe.transformer_2.forward

    @functools.wraps(forward)
    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:  # in the second picture
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(pipe.transformer_2, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            sdtrt_backend.calibrate(pipe, ["a", "b"], num_inference_steps=STEPS, progress=False, resume=tmp_path)
    again = sdtrt_backend.calibrate(pipe, ["a", "b"], num_inference_steps=STEPS, progress=False, resume=tmp_path)
    assert again.content_hash() == whole.content_hash() != recipe.content_hash()


@pytest.mark.slow
def test_a_refused_part_says_which_one_it_is(pipe, recipe):
    sdtrt_backend.accelerate(pipe, recipe=recipe, engine="reference", max_error=0.3, exclude=("*",))
    pipe("a")
    report = sdtrt_backend.explain(pipe)
    assert report.state == "refused"
    assert sum(f.startswith("transformer_2: no layer can be quantised") for f in report.fallbacks) == 1
    assert sum(f.startswith("no layer can be quantised") for f in report.fallbacks) == 1


def test_an_adapter_that_is_called_once_a_picture_is_named(pipe, recipe):
    plain = pipe("a")
    pipe.adapter = TextEncoder()
    sdtrt_backend.accelerate(pipe, recipe=recipe, **REFERENCE)
    pipe("a")
    report = sdtrt_backend.explain(pipe)
    assert (report.state, report.fallbacks) == ("ready", ())
    (said,) = [note for note in report.notes if "adapter" in note]
    assert said.startswith("adapter, a TextEncoder, stays in your own precision: it is called once")
    assert said in str(report)
    sdtrt_backend.restore(pipe)
    assert torch.equal(pipe("a"), plain)
    del pipe.adapter
    sdtrt_backend.accelerate(pipe, recipe=recipe, **REFERENCE)
    pipe("a")
    assert not any("adapter" in note for note in sdtrt_backend.explain(pipe).notes)


class Pictures(TwoStages):
    """Gives pictures, of the latents' size."""

    def __call__(self, prompt, num_inference_steps=STEPS, generator=None, output_type="np"):
        torch.manual_seed(generator[0].initial_seed())
        latents = torch.randn(1, 4, 8, 8)
        with torch.no_grad():
            for t in reversed(range(num_inference_steps)):
                module = self.transformer if t >= num_inference_steps / 2 else self.transformer_2
                latents = 0.5 * latents + module(latents, torch.tensor(t), encoder_hidden_states=torch.ones(1, 5, 64))
        images = latents if output_type == "latent" else (latents[:, :3] / 4).sigmoid().permute(0, 2, 3, 1).numpy()
        return types.SimpleNamespace(images=images)


@pytest.mark.slow
def test_a_picture_budget_is_for_all_parts(monkeypatch):
    """Of whichever part, most of its layers are the ones to leave 8 bits where it alone brings the error."""
    monkeypatch.setattr(budget, "times_ms", lambda problem, device: (3.0, 1.0))

    def solved(target):
        return sdtrt_backend.calibrate(Pictures(), list("abcdefgh"), num_inference_steps=STEPS, progress=False,
                                       options={"min_psnr": target})

    def not_in_one_code(recipe):
        return {name for name, layer in recipe.layers.items() if layer.keep or layer.second}

    loose = solved(1.0)
    assert not not_in_one_code(loose)
    assert not not_in_one_code(loose.parts["transformer_2"])
    target = loose.provenance["min_psnr"]["mean_db"] + 6
    tight = solved(target)
    assert tight.provenance["min_psnr"]["surely_db"] >= target
    assert not_in_one_code(tight.parts["transformer_2"])
    assert {p["name"].split(".")[0] for p in tight.provenance["min_psnr"]["parts"]} > {"transformer_2"}
    pipe = Pictures()
    sdtrt_backend.accelerate(pipe, recipe=tight, engine="reference", max_error=1.0, min_psnr=target)
    pipe("a", generator=[torch.Generator().manual_seed(99)])
    said = {row.name for row in sdtrt_backend.explain(pipe).layers if row.reason and f"min_psnr={target:g}" in row.reason}
    assert said == not_in_one_code(tight) | {f"transformer_2.{name}" for name in not_in_one_code(tight.parts["transformer_2"])}


@pytest.mark.slow
def test_a_controlnet_of_diffusers_is_calibrated_and_accelerated_with_its_unet():
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
    from PIL import Image

    plain = sdtrt_backend.demo_pipeline()
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(16, 32)).eval()
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):  # new ones are zero, and have no say
        torch.nn.init.normal_(block.weight, std=0.02)
    pipe = StableDiffusionControlNetPipeline(**plain.components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    edges = Image.new("RGB", (64, 64), (200, 30, 90))

    def picture():
        return pipe("owl, noto style", image=edges, num_inference_steps=4, generator=torch.Generator().manual_seed(0),
                    output_type="latent").images

    own = picture()
    recipe = sdtrt_backend.calibrate(pipe, ["owl", "apple"], image=edges, num_inference_steps=4, progress=False)
    with sdtrt_backend.accelerated(pipe, recipe=recipe, engine="reference", max_error=0.3):
        assert 0 < compare(picture(), own) < 0.5  # after four steps with a ControlNet that nobody has trained
        report = sdtrt_backend.explain(pipe)
    assert report.state == "ready"
    assert sum(name.startswith("controlnet.") for name in int8(report)) > 40
    assert sum(not name.startswith("controlnet.") for name in int8(report)) > 100
    assert torch.equal(picture(), own)
