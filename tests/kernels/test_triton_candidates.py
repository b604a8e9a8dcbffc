"""The Triton kernels behind the operators: what an operator promises, its plain-torch reference and the kernel agree."""

import pytest
import torch
from interpreted import DEVICE, FP8, INT8, INTERPRETED, on_device, run_interpreted

from sdtrt_backend import ops, stats

HALF = torch.float16
# fp16 probabilities move an 8-bit result to its neighbour now and then, and those of fp8 are 6 to 12 % apart; a wrong kernel
# is beyond 0.1
TIES = 2e-2

if not INTERPRETED:
    @pytest.mark.slow
    def test_this_file_passes_under_the_interpreter():
        run_interpreted(__file__)


def normal(*shape, dtype=HALF):
    return torch.randn(shape, device=DEVICE).to(dtype)


def codes(*shape, dtype):
    x = torch.randn(shape, device=DEVICE) * 30
    return x.round().clamp(-128, 127).to(INT8) if dtype == INT8 else x.to(FP8)


def check(op, name, *arguments):
    from sdtrt_backend import kernels

    kernels.register()
    mine, reference = ops.KERNELS[op, "triton"](*arguments, *name), ops.KERNELS[op, "reference"](*arguments)
    for y, expected in zip(*((t if isinstance(t, tuple) else (t,)) for t in (mine, reference)), strict=True):
        assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
        assert stats.relative_error(y, expected) < TIES


@on_device
@pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)
def test_products_and_convolutions(dtype):
    scale, bias = torch.rand(48, device=DEVICE) * 1e-3, normal(48, dtype=torch.float32)
    check("linear8", ("3",), codes(2, 5, 32, dtype=dtype), codes(48, 32, dtype=dtype), scale, bias, HALF)
    last = {"memory_format": torch.channels_last}
    pixels, taps = codes(1, 32, 6, 5, dtype=dtype).contiguous(**last), codes(48, 32, 3, 3, dtype=dtype).contiguous(**last)
    check("conv8", ("4",), pixels, taps, scale, bias, None, [1, 1], [1, 1], HALF)
    check("conv8", ("4",), pixels, taps, scale, None, normal(1, 48, 6, 5).contiguous(**last), [1, 1], [1, 1], HALF)


@on_device
def test_what_lies_in_columns_is_read_too():
    scale = torch.rand(48, device=DEVICE) * 1e-3
    check("linear8", ("3",), codes(1, 32, 5, dtype=INT8).transpose(1, 2), codes(48, 32, dtype=INT8), scale, None, HALF)
    q, k, v = (normal(2, 6, 16, 7).transpose(2, 3) for _ in "qkv")
    check("attention8", ("s0",), q, k, v, 0.25, None, HALF)


def test_cublaslt_is_handed_rows(monkeypatch):
    from sdtrt_backend.kernels import cublaslt

    handed = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda x, weight, **_: handed.append(x.stride()) or torch.empty(x.shape[0], 48))
    x, one = torch.zeros(1, 32, 5, dtype=FP8).transpose(1, 2), torch.ones(1)
    assert cublaslt.linear(x, torch.zeros(48, 32, dtype=FP8), one, None, HALF).shape == (1, 5, 48)
    assert handed == [(32, 1)]


@on_device
@pytest.mark.parametrize("dtype", [INT8, FP8, HALF], ids=str)
def test_norms_geglu_and_attention(dtype):
    def scale(n):
        return None if dtype == HALF else 20 + 20 * torch.rand(n, device=DEVICE)

    last = {"memory_format": torch.channels_last}
    x, x2 = normal(2, 40, 5, 4).contiguous(**last), normal(2, 24, 5, 4).contiguous(**last)
    check("group_norm8", (), x, x2, None, 8, normal(64), normal(64), 1e-5, True, scale(1), dtype)
    check("group_norm8", (), x, None, normal(2, 40), 8, normal(40), None, 1e-5, False, scale(1), dtype)
    rows = normal(2, 5, 64)
    check("layer_norm8", (), rows, None, normal(64), normal(64), 1e-5, scale(64), dtype)
    check("layer_norm8", (), rows, normal(2, 5, 64), None, None, 1e-5, scale(1), dtype)
    check("geglu8", (), rows, scale(32), dtype)
    merged = normal(2, 7, 3 * 96)
    q, k, v = (t.view(2, 7, 6, 16).transpose(1, 2) for t in merged.split(96, -1))
    check("attention8", ("s0",), q, k, v, 0.25, scale(96), dtype)
    check("attention8", ("f3",), q, k, v, 0.25, scale(1), dtype)
