"""Steps of further sizes that are built on a GPU while it draws."""

import time

import numpy as np
import pytest
import torch
from test_all_parts import UNSEEN, draw, psnr
from test_sizes import finish

import sdtrt_backend
from sdtrt_backend import state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("backend", ["sd_int8", "sd_fp8"])
def test_no_picture_waits_for_a_build_in_the_background(backend):
    torch._dynamo.reset()
    pipe = sdtrt_backend.demo_pipeline(torch.float16).to("cuda")
    sizes = (64, 96, 64)
    own = [draw(pipe, UNSEEN, height=size, width=size) for size in sizes]
    sdtrt_backend.accelerate(pipe, backend=backend, engine="inductor", calibration_runs=1, background=True)
    draw(pipe, UNSEEN)
    for size, expected in zip(sizes[:2], own, strict=False):
        waited, pictures = 0.0, 0
        while not pictures or any(s.behind.thread.is_alive() for s in state.states(pipe.unet) if s.behind.thread):
            start = time.monotonic()
            assert min(psnr(draw(pipe, UNSEEN, height=size, width=size), expected)) > 20
            waited, pictures = max(waited, time.monotonic() - start), pictures + 1
        finish(pipe.unet)
        print(f"{backend}, {size}: {pictures} pictures while it was built, the slowest {waited:.1f} s")
    for size, expected in zip(sizes, own, strict=True):
        mine = draw(pipe, UNSEEN, height=size, width=size)
        assert not np.array_equal(mine, expected)
        assert min(psnr(mine, expected)) > 20
    report = sdtrt_backend.explain(pipe)
    assert (report.state, report.fallbacks) == ("ready", ())
