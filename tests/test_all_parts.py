"""The VAE and the text encoders of a pipeline in 8 bits beside its denoiser: pictures, ways of decoding, recipes, restore."""

import copy

import numpy as np
import pytest
import test_small_pipelines
import torch

import sdtrt_backend
from sdtrt_backend import unit
from sdtrt_backend.errors import OptionError
from sdtrt_backend.measure import compare
from sdtrt_backend.metrics import psnr
from sdtrt_backend.parts import all_parts, denoisers
from sdtrt_backend.recipe import Recipe

REFERENCE = {"engine": "reference", "calibration_runs": 1}
CALIBRATING = ["red apple", "soccer ball", "cat face", "sunflower"]
UNSEEN = ["green apple", "basketball", "dog face", "tulip"]
STEPS = 8
BOUND = 45  # dB of a decoder's pictures to its own


@pytest.fixture
def pipe():
    torch._dynamo.reset()
    return sdtrt_backend.demo_pipeline()


def draw(pipe, prompts, **given):
    """Each from its own noise."""
    noise = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    how = {"output_type": "np", "num_inference_steps": STEPS, "guidance_scale": 5.0, "generator": noise, **given}
    return pipe(list(prompts), **how).images


def latents(seed=0, size=32, batch=1, channels=4):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def picture_psnr(result, own):
    """Of pictures in [-1, 1], the worst of a batch."""
    assert result.shape == own.shape
    errors = (result.float() - own.float()).flatten(1).square().mean(1)
    return float(-10 * torch.log10(errors.max() / 4))


@torch.no_grad()
def decoded(vae, z, own=False):
    """own: as the decoder itself does it."""
    compiled, vae.decoder._compiled_call_impl = vae.decoder._compiled_call_impl, None if own else vae.decoder._compiled_call_impl
    try:
        return vae.decode(z).sample
    finally:
        vae.decoder._compiled_call_impl = compiled


def ready_decoder(pipe, z, **options):
    sdtrt_backend.accelerate(pipe, parts=["vae.decoder"], **{**REFERENCE, **options})
    for seed in range(2):
        decoded(pipe.vae, latents(seed, z.shape[-1], channels=z.shape[1]))
    result = decoded(pipe.vae, z)
    return result, sdtrt_backend.explain(pipe)


def test_parts_are_known_by_the_paths_of_the_pipeline(pipe):
    assert list(all_parts(pipe)) == ["unet", "vae.decoder", "vae.encoder", "text_encoder"]
    assert list(denoisers(pipe)) == ["unet"]
    sdtrt_backend.accelerate(pipe)
    assert pipe.vae.decoder._compiled_call_impl is pipe.text_encoder._compiled_call_impl is None
    sdtrt_backend.accelerate(pipe, parts="vae.decoder,text_encoder")
    assert pipe.vae.encoder._compiled_call_impl is None
    assert all(pipe_part._compiled_call_impl for pipe_part in (pipe.vae.decoder, pipe.text_encoder))
    sdtrt_backend.restore(pipe)
    assert all(module._compiled_call_impl is None for module in all_parts(pipe).values())


@pytest.mark.parametrize("parts", ["vae", ["unet", "text_encoder_2"], [], 3])
def test_a_part_that_is_not_there_is_refused_and_nothing_has_changed(pipe, parts):
    with pytest.raises(OptionError, match=r"'denoisers' or 'auto'.*vae\.decoder, vae\.encoder, text_encoder; got"):
        sdtrt_backend.accelerate(pipe, parts=parts)
    with pytest.raises(OptionError, match="text_encoder; got"):
        sdtrt_backend.calibrate(pipe, CALIBRATING, parts=parts)
    with pytest.raises(OptionError, match="of this UNet2DConditionModel, which are none but itself; got"):
        sdtrt_backend.accelerate(pipe.unet, parts=parts)
    assert all(module._compiled_call_impl is None for module in all_parts(pipe).values())


@pytest.mark.slow
def test_pictures_of_all_parts_are_as_good_as_those_of_the_denoiser_alone(pipe, tmp_path):
    exact = draw(pipe, UNSEEN)
    recipe = sdtrt_backend.calibrate(pipe, CALIBRATING, num_inference_steps=STEPS, guidance_scale=5.0, progress=False,
                                     parts="auto")
    assert list(recipe.parts) == ["vae.decoder", "text_encoder"]  # nothing was encoded
    folder = recipe.save(tmp_path)
    assert Recipe.load(folder).content_hash() == recipe.content_hash()
    of = {}
    for parts in ("denoisers", "auto", "vae.decoder"):
        sdtrt_backend.accelerate(pipe, recipe=folder, parts=parts, **REFERENCE)
        of[parts] = np.mean(psnr(draw(pipe, UNSEEN), exact))
        report = sdtrt_backend.explain(pipe)
        sdtrt_backend.restore(pipe)
        torch._dynamo.reset()
        if parts == "auto":
            whole = report
    # of few pictures: two of the denoiser's, its input changed by 1e-6, differ by 1 dB; benchmarks/pipeline.py compares many
    assert of["auto"] > of["denoisers"] - 3
    assert of["vae.decoder"] > BOUND
    assert np.array_equal(draw(pipe, UNSEEN), exact)
    states = dict(whole.pieces)
    assert states["unet"].state == states["vae.decoder"].state == "ready"
    assert states["text_encoder"].state == "refused" or states["text_encoder"].error <= 0.005
    assert {"vae.decoder.mid_block.resnets.0.conv1", "down_blocks.0.resnets.0.conv1"} <= {row.name for row in whole.layers}
    assert any(row.name == "text_encoder.encoder.layers.0.mlp.fc1" for row in whole.layers)
    assert "vae.decoder: ready" in str(whole)


@pytest.mark.slow
def test_milliseconds_of_the_report_are_those_of_a_timestep(pipe):
    sdtrt_backend.accelerate(pipe, parts=["unet", "vae.decoder"], **{**REFERENCE, "engine": "auto", "exclude": ("*",)})
    draw(pipe, CALIBRATING[:1])
    report = sdtrt_backend.explain(pipe)
    assert all(not key.endswith("_ms") or key in dict(report.pieces)["unet"].timings for key in report.timings)


@pytest.mark.slow
def test_a_decoder_calibrates_itself_and_its_first_pictures_are_its_own_to_the_bit(pipe):
    exact = [draw(pipe, [prompt]) for prompt in UNSEEN[:3]]
    sdtrt_backend.accelerate(pipe, parts=["vae.decoder"], engine="reference")
    mine = [draw(pipe, [prompt]) for prompt in UNSEEN[:3]]
    assert [np.array_equal(a, b) for a, b in zip(mine, exact, strict=True)] == [True, True, False]
    assert psnr(mine[2], exact[2])[0] > BOUND


@pytest.mark.parametrize("target", [45, 52])
def test_what_the_bound_of_a_picture_does_not_allow_stays_and_says_so(pipe, target):
    z = latents(5)
    result, report = ready_decoder(pipe, z, output_psnr=target, two_codes=())
    kept = [row for row in report.layers if row.reason.startswith(f"kept for output_psnr={target}: in 8 bits")]
    assert picture_psnr(result, decoded(pipe.vae, z, own=True)) > target - 1  # the first one was held to it, this is another
    assert bool(kept) == (target == 52)
    assert report.state == "ready"


@pytest.mark.slow
def test_tiles_have_no_seams_beyond_those_of_full_precision(pipe):
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 16
    z = latents(3, 56)
    result, report = ready_decoder(pipe, z)
    assert report.state == "ready"
    own = decoded(pipe.vae, z, own=True)
    assert picture_psnr(result, own) > BOUND
    across = [(p[..., 1:] - p[..., :-1]).abs().mean((0, 1, 2)) for p in (result, own)]  # jumps between columns, seams among them
    assert float((across[0] - across[1]).abs().max()) < 0.05 * float(across[1].mean())


def test_slices_and_batches(pipe):
    z = latents(3, batch=3)
    ready_decoder(pipe, z[:1])
    for slicing in (True, False):
        pipe.vae.use_slicing = slicing
        assert picture_psnr(decoded(pipe.vae, z), decoded(pipe.vae, z, own=True)) > BOUND
    assert sdtrt_backend.explain(pipe).state == "ready"


@pytest.mark.slow
def test_latents_go_in_and_out_and_every_type_of_output(pipe):
    given = latents(1)
    expected = draw(pipe, UNSEEN[:1], latents=given.clone())
    untouched = draw(pipe, UNSEEN[:1], latents=given.clone(), output_type="latent")
    sdtrt_backend.accelerate(pipe, parts=["vae.decoder"], **REFERENCE)
    for _ in range(3):
        assert torch.equal(draw(pipe, UNSEEN[:1], latents=given.clone(), output_type="latent"), untouched)
    with pytest.raises(sdtrt_backend.ModelError, match="not called yet"):
        sdtrt_backend.explain(pipe)  # what is not decoded calibrates no decoder
    for _ in range(2):
        as_array = draw(pipe, UNSEEN[:1], latents=given.clone())
    as_tensor = draw(pipe, UNSEEN[:1], latents=given.clone(), output_type="pt")
    as_pil = draw(pipe, UNSEEN[:1], latents=given.clone(), output_type="pil")
    assert psnr(as_array, expected)[0] > BOUND
    assert np.array_equal(as_tensor.permute(0, 2, 3, 1).numpy(), as_array)
    assert np.array_equal(np.asarray(as_pil[0]), (as_array[0] * 255).round().astype("uint8"))


def test_a_decoder_that_is_cast_to_fp32_for_each_picture_is_built_once_or_twice(monkeypatch):
    """As SDXL's pipeline casts its VAE (``force_upcast``): each time to other memory with the same values."""
    torch._dynamo.reset()
    built, build = [], unit.build
    monkeypatch.setattr(unit, "build", lambda request: built.append(1) or build(request))
    pipe = sdtrt_backend.demo_pipeline(torch.float16)
    sdtrt_backend.accelerate(pipe, parts=["vae.decoder"], **REFERENCE)
    for seed in range(12):
        pipe.vae.to(torch.float32)
        z = latents(seed)
        assert picture_psnr(decoded(pipe.vae, z), decoded(pipe.vae, z, own=True)) > BOUND
        pipe.vae.to(torch.float16)
    assert 1 <= len(built) <= 2
    assert sdtrt_backend.explain(pipe).state == "ready"


@pytest.mark.slow
def test_the_encoder_of_pictures_on_the_same_parts(pipe):
    """img2img by ``from_pipe``: what was accelerated there is accelerated here."""
    from diffusers import StableDiffusionImg2ImgPipeline

    photos = torch.from_numpy(draw(pipe, UNSEEN[:3])).permute(0, 3, 1, 2)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    exact = [draw(other, [prompt], image=photos[i:i + 1], strength=0.5) for i, prompt in enumerate(UNSEEN[:3])]
    sdtrt_backend.accelerate(pipe, parts=["vae.encoder", "vae.decoder"], **REFERENCE)
    mine = [draw(other, [prompt], image=photos[i:i + 1], strength=0.5) for i, prompt in enumerate(UNSEEN[:3])]
    report = sdtrt_backend.explain(other)
    states = {name: piece.state for name, piece in report.pieces}
    assert states["vae.decoder"] == "ready"
    assert np.array_equal(mine[0], exact[0])
    assert psnr(mine[2], exact[2])[0] > 38
    part = dict(report.pieces)["vae.encoder"]
    assert part.state == "refused" or part.error <= 0.02
    sdtrt_backend.restore(other)
    assert np.array_equal(draw(other, UNSEEN[:1], image=photos[:1], strength=0.5), exact[0])


@pytest.mark.slow
def test_a_callback_sees_every_step(pipe):
    sdtrt_backend.accelerate(pipe, parts="auto", **REFERENCE)
    seen = []

    def look(pipe, step, timestep, given):
        seen.append((step, bool(given["latents"].isfinite().all())))
        return given

    for _ in range(3):
        seen.clear()
        draw(pipe, UNSEEN[:1], callback_on_step_end=look)
    assert seen == [(i, True) for i in range(STEPS)]


def test_a_text_encoder_is_judged_on_its_first_prompts_and_calibrated_by_more_of_them_or_refused(pipe):
    """One prompt tells little of the next: each is inside the bound, or it is its own."""
    plain = sdtrt_backend.demo_pipeline().text_encoder
    sdtrt_backend.accelerate(pipe, parts=["text_encoder"], **REFERENCE)
    longest, said = pipe.tokenizer.model_max_length, []
    for prompt in [*["", "cat"] * 2, *UNSEEN, *CALIBRATING, *UNSEEN, *CALIBRATING, *UNSEEN, *CALIBRATING]:
        tokens = pipe.tokenizer([prompt], padding="max_length", max_length=longest, return_tensors="pt").input_ids
        with torch.no_grad():
            assert compare(pipe.text_encoder(tokens)[0], plain(tokens)[0]) <= 0.005
        report = sdtrt_backend.explain(pipe)
        said.append((report.state, report.notes + report.fallbacks))
    states = [state for state, _ in said]
    assert states.index("ready") < 4
    assert "calibrating" in states[4:]
    assert any("few calls calibrated it" in sentence and "max_error is 0.005" in sentence for sentence in said[-1][1])
    assert states[-1] == "ready" or "calls had calibrated it" in " ".join(said[-1][1])


def tiny_autoencoder():
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(encoder_block_out_channels=(32, 32), decoder_block_out_channels=(32, 32), num_encoder_blocks=(1, 1),
                           num_decoder_blocks=(1, 1), latent_channels=4)


def video_autoencoder():
    from diffusers import AutoencoderKLTemporalDecoder

    return AutoencoderKLTemporalDecoder(down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32),
                                        layers_per_block=1, latent_channels=4)


def causal_autoencoder():
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(base_dim=16, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
                            latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


@pytest.mark.parametrize(("make", "frames", "given"), [
    pytest.param(tiny_autoencoder, 0, {}, id="tiny"), pytest.param(video_autoencoder, 0, {"num_frames": 2}, id="temporal"),
    pytest.param(causal_autoencoder, 3, {}, id="causal", marks=pytest.mark.slow)])
def test_other_autoencoders_are_right_or_refused(make, frames, given, pipe):
    torch.manual_seed(0)
    pipe.vae = vae = make().eval().requires_grad_(False)
    exact = copy.deepcopy(vae)
    sdtrt_backend.accelerate(pipe, parts=["vae.decoder"], **REFERENCE)
    for seed in range(4):
        z = latents(seed, 16, batch=2 if given else 1)
        z = z if not frames else z[:, :, None].repeat(1, 1, frames, 1, 1)
        with torch.no_grad():
            result, own = vae.decode(z, **given).sample, exact.decode(z, **given).sample
        assert compare(result, own) < 0.02
    report = sdtrt_backend.explain(pipe)
    assert report.state in ("ready", "partly refused", "refused"), report
    volumes = [row for row in report.layers if len(row.shape) == 5]
    assert all(row.precision == "float32" and row.reason for row in volumes)
    assert report.state == "ready" or report.fallbacks
    if make is not tiny_autoencoder:
        assert volumes or report.fallbacks


@pytest.mark.slow
@pytest.mark.long
def test_a_budget_of_pictures_covers_the_decoder(pipe):
    few = ("down_blocks.*", "mid_block.*", "up_blocks.0.*", "*attentions*")  # are not quantised: so few parts are tried
    recipe = sdtrt_backend.calibrate(pipe, [*CALIBRATING, *UNSEEN], num_inference_steps=4, guidance_scale=5.0, progress=False,
                                     parts=["vae.decoder"], options={"min_psnr": 42, "exclude": few})
    facts = recipe.provenance["min_psnr"]
    assert facts["surely_db"] >= 42
    parts = {part["name"]: part for part in facts["parts"]}
    of_decoder = [part for name, part in parts.items() if name.startswith("vae.decoder.")]
    assert of_decoder
    assert all(part["error"] > 0 for part in of_decoder)  # of pictures: the latents have none of it
    assert any(layer.keep or layer.second for layer in recipe.layers.values())


@pytest.mark.slow
def test_two_pipelines_on_the_same_parts(pipe):
    """A refiner after a base, as users write it: shared VAE and text encoder."""
    from diffusers import StableDiffusionPipeline

    refiner = StableDiffusionPipeline(**{**pipe.components, "unet": copy.deepcopy(pipe.unet)}, requires_safety_checker=False)
    exact = [draw(one, UNSEEN[:1]) for one in (pipe, refiner)]
    for one in (pipe, refiner):
        sdtrt_backend.accelerate(one, parts=["unet", "vae.decoder"], max_error=0.3, **REFERENCE)
    for _ in range(3):
        mine = [draw(one, UNSEEN[:1]) for one in (pipe, refiner)]
    for one, pictures, own in zip((pipe, refiner), mine, exact, strict=True):
        report = sdtrt_backend.explain(one)
        assert {name: piece.state for name, piece in report.pieces} == {"unet": "ready", "vae.decoder": "ready"}
        assert psnr(pictures, own)[0] > 20
    sdtrt_backend.restore(refiner)
    assert sdtrt_backend.explain(pipe).state == "ready"  # its denoiser; the decoder was theirs together
    assert pipe.vae.decoder._compiled_call_impl is None
    sdtrt_backend.restore(pipe)
    assert all(np.array_equal(draw(one, UNSEEN[:1]), own) for one, own in zip((pipe, refiner), exact, strict=True))


def test_sequential_offload_of_all_parts_is_refused_with_the_way_out(pipe):
    from accelerate import cpu_offload

    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(part, torch.device("cpu"))
    with pytest.raises(sdtrt_backend.ModelError, match="enable_model_cpu_offload"):
        sdtrt_backend.accelerate(pipe, parts="auto")
    assert all(module._compiled_call_impl is None for module in all_parts(pipe).values())


@pytest.mark.slow
def test_the_report_tells_the_memory_of_each_part(pipe):
    sdtrt_backend.accelerate(pipe, parts=["unet", "vae.decoder"], **REFERENCE)
    for _ in range(2):
        draw(pipe, UNSEEN[:1])
    report = sdtrt_backend.explain(pipe)
    assert list(report.memory) == ["unet", "vae.decoder"]
    for name, module in (("unet", pipe.unet), ("vae.decoder", pipe.vae.decoder)):
        held = report.memory[name]
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        assert held["weights"] == size
        assert 0.2 * size < held["codes"] < 0.4 * size  # a byte for four, and scales
        assert "graphs" not in held
        assert f"memory of {name}: weights {size / 1e6:.1f} MB, codes {held['codes'] / 1e6:.1f} MB" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "flux", "sd3"])
def test_all_parts_of_other_families(family):
    """With two text encoders, one of them T5: each part is ready or says why not, and pictures are what they were."""
    torch._dynamo.reset()
    pipe = getattr(test_small_pipelines, family)()
    pipe.set_progress_bar_config(disable=True)
    fixed = {"height": 64, "width": 64, "num_inference_steps": 4}
    exact = [draw(pipe, [prompt], **fixed) for prompt in UNSEEN]
    sdtrt_backend.accelerate(pipe, parts="auto", **REFERENCE)
    mine = [draw(pipe, [prompt], **fixed) for prompt in UNSEEN]
    report = sdtrt_backend.explain(pipe)
    states = {name: piece.state for name, piece in report.pieces}
    assert set(states) >= {next(iter(denoisers(pipe))), "vae.decoder"}
    assert any(name.startswith("text_encoder") for name in states)
    for name, state in states.items():
        assert state == "ready" or (name.startswith("text_encoder") and any(f.startswith(name) for f in report.fallbacks)), name
    assert min(psnr(mine[-1], exact[-1])) > 25
    sdtrt_backend.restore(pipe)
    assert np.array_equal(draw(pipe, UNSEEN[:1], **fixed), exact[0])


def test_a_part_that_was_not_called_or_has_nothing_for_8_bits_is_named(pipe):
    pipe.vae.encoder = torch.nn.Sequential(torch.nn.Conv3d(4, 4, 1))
    sdtrt_backend.accelerate(pipe, parts="auto", **REFERENCE)
    for seed in range(3):
        decoded(pipe.vae, latents(seed))
    notes = sdtrt_backend.explain(pipe).notes
    nothing = "has no linear and no 2D convolution, so that it runs compiled in its own precision"
    assert f"vae.encoder, a Sequential, {nothing}" in notes
    assert {"unet, a UNet2DConditionModel, was not called yet", "text_encoder, a CLIPTextModel, was not called yet"} <= set(notes)


def test_a_text_encoder_that_torchao_has_quantised_stays_and_says_so(pipe):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.text_encoder, Int8WeightOnlyConfig())
    tokens = torch.arange(2 * 32).view(2, 32)
    with torch.no_grad():
        exact = pipe.text_encoder(tokens)[0]
        sdtrt_backend.accelerate(pipe, parts=["text_encoder"], **REFERENCE)
        for _ in range(4):
            assert compare(pipe.text_encoder(tokens)[0], exact) < 1e-5
    report = sdtrt_backend.explain(pipe)
    assert report.state == "refused"
    assert any("quantised already (Int8Tensor)" in said for said in report.fallbacks)
    sdtrt_backend.restore(pipe)
