"""What surrounds cuDNN's plans, with plans made here."""

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from sdtrt_backend.kernels import cudnn


def test_threads_build_and_run_plans_one_at_a_time(monkeypatch):
    inside, together = [], []

    def plan(*arguments):
        inside.append(None)
        time.sleep(0.01)
        together.append(len(inside))
        inside.pop()

    monkeypatch.setattr(cudnn, "plans", lambda fusion, device: plan() or plan)
    monkeypatch.setattr(cudnn, "attention_plan", lambda problem, device: plan() or plan)
    one, pixels, taps, heads = torch.ones(1), torch.ones(1, 16, 4, 4), torch.ones(16, 16, 1, 1), torch.ones(1, 2, 4, 16)
    calls = [lambda: cudnn.linear(torch.ones(4, 16), torch.ones(16, 16), one, None, torch.float16, "0"),
             lambda: cudnn.conv(pixels, taps, one, None, None, [1, 1], [0, 0], torch.float16, "0"),
             lambda: cudnn.attention_fp8(heads, heads, heads, torch.ones(3), 0.25, torch.float8_e4m3fn)]
    with ThreadPoolExecutor(3) as threads:
        for call in [threads.submit(call) for call in calls * 2]:
            call.result()
    assert together == [1] * 12
