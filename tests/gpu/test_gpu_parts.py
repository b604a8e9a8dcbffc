"""The VAE and text encoders of the bundled model in 8 bits on a GPU."""

import copy

import pytest
import torch
from test_all_parts import UNSEEN, decoded, draw, latents, picture_psnr, psnr

import sdtrt_backend
from sdtrt_backend import unit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
BOUND = 44  # dB: the first picture is held to 45


@pytest.fixture
def pipe():
    torch._dynamo.reset()
    return sdtrt_backend.demo_pipeline(torch.float16).to("cuda")


@pytest.mark.parametrize("backend", ["sd_int8", "sd_fp8"])
@pytest.mark.parametrize("engine", ["auto", "inductor"])
def test_all_parts_and_back_to_the_bit(pipe, backend, engine):
    exact = draw(pipe, UNSEEN)
    sdtrt_backend.accelerate(pipe, parts="auto", backend=backend, engine=engine, calibration_runs=1)
    pictures = [draw(pipe, UNSEEN) for _ in range(3)][-1]
    report = sdtrt_backend.explain(pipe)
    states = {name: piece.state for name, piece in report.pieces}
    assert states["unet"] == "ready", report
    assert states["vae.decoder"] == "ready" or (engine == "auto" and report.fallbacks), report
    assert min(psnr(pictures, exact)) > 20
    assert report.memory["unet"]["graphs"] > 0
    assert report.peak > sum(report.memory["unet"][kind] for kind in ("codes", "steps"))
    pipe.to("cpu")
    pipe.to("cuda")
    assert min(psnr(draw(pipe, UNSEEN), pictures)) > 60
    sdtrt_backend.restore(pipe)
    assert (draw(pipe, UNSEEN) == exact).all()


@pytest.mark.parametrize("backend", ["sd_int8", "sd_fp8"])
def test_a_decoder_alone_has_its_decibels(pipe, backend):
    sdtrt_backend.accelerate(pipe, parts=["vae.decoder"], backend=backend, engine="inductor", calibration_runs=1)
    draw(pipe, UNSEEN)
    real = draw(pipe, UNSEEN, output_type="latent") / pipe.vae.config.scaling_factor
    for z in (real, real[:1]):
        own = decoded(pipe.vae, z, own=True)
        assert picture_psnr(decoded(pipe.vae, z), own) > BOUND
    assert sdtrt_backend.explain(pipe).state == "ready"


def test_a_decoder_that_is_cast_to_fp32_for_each_picture(pipe, monkeypatch):
    built, build = [], unit.build
    monkeypatch.setattr(unit, "build", lambda request: built.append(1) or build(request))
    plain = copy.deepcopy(pipe.vae).float()
    sdtrt_backend.accelerate(pipe, parts=["vae.decoder"], engine="inductor", calibration_runs=1)
    for seed in range(12):
        pipe.vae.to(torch.float32)
        z = latents(seed).cuda()
        assert picture_psnr(decoded(pipe.vae, z), decoded(plain, z, own=True)) > BOUND
        pipe.vae.to(torch.float16)
    assert 1 <= len(built) <= 2
