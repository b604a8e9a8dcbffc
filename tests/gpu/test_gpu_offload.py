"""Offloading of an accelerated pipeline: what moves is the 8-bit codes, and the GPU never needs room for the 16-bit weights."""

import gc

import numpy as np
import pytest
import torch
from test_all_parts import UNSEEN, draw, psnr

import sdtrt_backend
from sdtrt_backend import unit, weights

pytest.importorskip("accelerate")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
PEAK = 0.6  # of the pipeline's own under the same offload
GPU = "cuda"


def pipeline():
    """Of the bundled model with a UNet of 1.1 GiB, random weights."""
    from diffusers import UNet2DConditionModel

    torch._dynamo.reset()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 1280), layers_per_block=1,
        cross_attention_dim=192, attention_head_dim=64, transformer_layers_per_block=(1, 3))
    pipe = sdtrt_backend.demo_pipeline(torch.float16)
    pipe.unet = unet.half().eval().requires_grad_(False)
    return pipe


def peak(pipe):
    """(a picture, bytes on the GPU at most while it was drawn), after another picture."""
    draw(pipe, UNSEEN[:1])
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    picture = draw(pipe, UNSEEN[:1])
    return picture, torch.cuda.max_memory_allocated() - before


def offloaded(pipe):
    pipe.enable_model_cpu_offload()
    return pipe


@pytest.mark.parametrize("backend", ["sd_int8", "sd_fp8"])
@pytest.mark.parametrize("order", ["offload, accelerate", "accelerate, offload", "ready, offload"])
def test_model_offload_needs_the_memory_of_the_codes(order, backend, monkeypatch):
    built, build = [], unit.build
    monkeypatch.setattr(unit, "build", lambda request: built.append(1) or build(request))
    own, whole = peak(offloaded(pipeline()))
    gc.collect()
    pipe = pipeline()
    if order.startswith("offload"):
        offloaded(pipe)
    elif order.startswith("ready"):
        pipe.to(GPU)
    sdtrt_backend.accelerate(pipe, backend=backend, calibration_runs=1, engine="inductor", max_error=1.0)
    if order.startswith("accelerate"):
        offloaded(pipe)
    for _ in range(2):
        ready = draw(pipe, UNSEEN[:1])
    if order.startswith("ready"):
        offloaded(pipe)
    for _ in range(2):
        draw(pipe, UNSEEN[:1])
    before, away = len(built), sum(map(weights.away, pipe.unet.parameters()))
    mine, least = peak(pipe)
    print(f"{order}, {backend}: {least / 2**20:.0f} of {whole / 2**20:.0f} MiB = {least / whole:.2f}")
    report = sdtrt_backend.explain(pipe)
    assert (report.state, report.fallbacks) == ("ready", ())
    assert len(built) == before
    assert psnr(mine, own)[0] > 15
    assert np.array_equal(mine, ready) or psnr(mine, ready)[0] > 30
    assert away == 0  # on the CPU they are tensors of the CPU
    assert least <= PEAK * whole


def test_a_move_takes_no_memory_and_keeps_the_weights():
    pipe = pipeline().to(GPU)
    plain = {n: p.cpu() for n, p in pipe.unet.named_parameters()}
    sdtrt_backend.accelerate(pipe, calibration_runs=1, engine="inductor", max_error=1.0)
    for _ in range(3):
        before = draw(pipe, UNSEEN[:1])
    for _ in range(2):
        released = [p for p in pipe.unet.parameters() if weights.away(p)]
        size = sum(p.nbytes for p in released)
        assert size > 2**28
        host = [p.data_ptr() for p in released]
        pipe.to("cpu")
        assert [p.data_ptr() for p in released] == host
        assert all(torch.equal(p, plain[n]) for n, p in pipe.unet.named_parameters())
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        pipe.to(GPU)
        assert torch.cuda.max_memory_allocated() - held < size / 4
        assert all(map(weights.away, released))
        assert np.array_equal(draw(pipe, UNSEEN[:1]), before)
    sdtrt_backend.restore(pipe)
    assert all(torch.equal(p.cpu(), plain[n]) for n, p in pipe.unet.named_parameters())
    assert not any(map(weights.away, pipe.unet.parameters()))
