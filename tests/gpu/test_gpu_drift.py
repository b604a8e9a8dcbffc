"""The drift watch on a GPU: no call waits for the device, NaN is noticed on a later call, drift after a few sampled ones."""

import copy
from dataclasses import replace

import pytest
import torch

import sdtrt_backend
from sdtrt_backend import drift
from sdtrt_backend.demo import CALIBRATION_PROMPTS, LastCall, draw

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture
def built(tmp_path, steps):
    """(compiled UNet in use, its Step, the unquantised UNet, call of either with the text scaled)."""
    torch._dynamo.reset()
    pipe = sdtrt_backend.demo_pipeline(torch.float16).to("cuda")
    recipe = sdtrt_backend.calibrate(pipe, CALIBRATION_PROMPTS[:2], guidance_scale=5.0, progress=False)
    last = LastCall(pipe.unet)
    draw(pipe, ["rocket, fluent style"], 5, 0)
    last.close()
    (sample, timestep), text = last.args[:2], last.kwargs["encoder_hidden_states"]

    def call(unet, scale=1.0, of_sample=1.0):
        with torch.no_grad():
            return unet(sample * of_sample, timestep, text * scale, return_dict=False)[0]

    unet = torch.compile(copy.deepcopy(pipe.unet), backend="sd_int8", dynamic=False,
                         options={"recipe": str(recipe.save(tmp_path)), "engine": "inductor"})
    call(unet)
    assert sdtrt_backend.explain(unet).state == "ready"
    return unet, steps[-1], pipe.unet, call


def spoilt(*outputs):
    """NaN in what a step gives and in its peak."""
    *outs, peaks = outputs
    mine = torch.arange(len(peaks), device=peaks.device) < len(outs)
    return *(o * float("nan") for o in outs), peaks.masked_fill(mine, float("nan"))


def test_watched_calls_wait_for_nothing_and_nan_is_noticed_on_a_later_one(built):
    unet, step, plain, call = built
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(max(drift.FIRST) + 2):  # sampled calls among them
            call(unet)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    watched = sdtrt_backend.explain(unet).watched
    assert watched.samples == len(drift.FIRST)
    for at_build, lately in watched.groups.values():
        assert lately < max(drift.DRIFTED_SHARE, drift.DRIFTED_FACTOR * at_build)

    call(unet, of_sample=float("nan"))  # its output is finite: 8-bit codes have no NaN
    torch.cuda.synchronize()
    report = sdtrt_backend.explain(unet)
    assert report.state == "ready"
    assert any("was given NaN or infinite inputs" in n for n in report.notes)

    (sizes, good), = step.variants.items()
    step.variants[sizes] = replace(good, step=lambda *tensors: spoilt(*good.step(*tensors)))
    first = call(unet)  # where the numbers are there when the call ends, it is the module's own result already
    late = not first.isfinite().all()
    torch.cuda.synchronize()
    for y in [call(unet)] if late else [first, call(unet)]:
        torch.testing.assert_close(y, call(plain), rtol=0.02, atol=0.02)
    (said,) = sdtrt_backend.explain(unet).fallbacks
    assert "the 8-bit step gave NaN or infinite values on call" in said
    assert ("results since that call are to be made again" in said) == late


def test_drift_is_said_once(built):
    unet, _, _, call = built
    for _ in range(max(drift.FIRST) + 2):
        call(unet, scale=20.0)
    torch.cuda.synchronize()
    notes = [n for n in sdtrt_backend.explain(unet).notes if "calibrated ranges" in n]
    assert len(notes) == 1
    assert sdtrt_backend.explain(unet).state == "ready"
