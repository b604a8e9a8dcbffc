"""TensorRT engines inside the step, on a GPU with TensorRT or TensorRT-RTX: the bundled model in fp16."""

import copy

import pytest
import torch

import sdtrt_backend
from sdtrt_backend import engine
from sdtrt_backend.demo import CALIBRATION_PROMPTS, draw
from sdtrt_backend.metrics import psnr

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
              pytest.mark.skipif(engine.installed() is None, reason="needs TensorRT or TensorRT-RTX")]
PROMPTS = ("rocket, fluent style", "owl, fluent style", "guitar, noto style")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(pipeline, recipe folder, arguments of each denoiser call of a picture)."""
    pipe = sdtrt_backend.demo_pipeline(torch.float16).to("cuda")
    recipe = sdtrt_backend.calibrate(pipe, CALIBRATION_PROMPTS[:2], guidance_scale=5.0, progress=False)
    calls = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((*args, kwargs["encoder_hidden_states"])), with_kwargs=True)
    draw(pipe, PROMPTS[:1], 8, 0)
    handle.remove()
    return pipe, str(recipe.save(tmp_path_factory.mktemp("recipe"))), calls


def compiled(unet, recipe, backend, **options):
    torch._dynamo.reset()
    return torch.compile(copy.deepcopy(unet), backend=backend, dynamic=False, options={"recipe": recipe, **options})


@pytest.mark.parametrize("backend", ["sd_fp8", "sd_int8"])
@torch.no_grad()
def test_engines_are_built_once_run_and_stay_near_the_reference(prepared, backend, tmp_path, capsys):
    pipe, recipe, calls = prepared
    for said in ("the engine was built in", "the engine came from the cache"):
        unet = compiled(pipe.unet, recipe, backend, engine="tensorrt", engine_dir=str(tmp_path))
        results = [unet(*c, return_dict=False)[0].float() for c in calls]
        report = sdtrt_backend.explain(unet)
        with capsys.disabled():
            print("", backend, *report.notes, dict(report.timings), sep="\n")
        assert report.state == "ready"
        assert any(said in note for note in report.notes)
        assert {layer.engine for layer in report.layers} & {"tensorrt"}
        # int8 convolutions, which TensorRT-RTX does not take, are in 16 bits on both sides
        kept = [layer.name for layer in report.layers if layer.amax is None]
        reference = compiled(pipe.unet, recipe, backend, engine="reference", exclude=kept)
        expected = [reference(*c, return_dict=False)[0].float() for c in calls]
        exact = compiled(copy.deepcopy(pipe.unet).float(), recipe, backend, engine="reference", exclude=kept)
        wide = [exact(sample.float(), timestep, text.float(), return_dict=False)[0] for sample, timestep, text in calls]
        found, rounding = cosines(results, expected), cosines(wide, expected)
        with capsys.disabled():
            print("cosine to the reference:", found, "of the reference to itself in fp32:", rounding, sep="\n")
        # late steps of fp8 are this far from themselves when 16-bit rounding moves values over the border of two codes
        assert all(c > min(0.999, 1 - 2 * (1 - r)) for c, r in zip(found, rounding, strict=True))


def cosines(results, expected):
    return [float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0))
            for a, b in zip(results, expected, strict=True)]


def test_pictures_through_engines_look_like_fp16(prepared, tmp_path):
    pipe, recipe, _ = prepared
    plain = draw(pipe, PROMPTS, 25, 0)
    with sdtrt_backend.accelerated(pipe, recipe=recipe, backend="sd_fp8", engine="tensorrt", engine_dir=str(tmp_path)):
        pictures = draw(pipe, PROMPTS, 25, 0)
        assert sdtrt_backend.explain(pipe).state == "ready"
    assert min(psnr(pictures, plain)) > 27
