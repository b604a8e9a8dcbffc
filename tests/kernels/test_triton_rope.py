"""RMS norm with rotary embedding against float64: on the GPU, and on the CPU under Triton's interpreter."""

import pytest
import torch
from interpreted import DEVICE, FP8, INT8, INTERPRETED, assert_written, on_device, poisoned, run_interpreted, saturating

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def exactly(x, weight, cos, sin):
    n = torch.nn.functional.rms_norm(x.double(), x.shape[-1:], weight.double(), 1e-6)
    rotated = torch.empty_like(n)
    rotated[..., 0::2], rotated[..., 1::2] = -n[..., 1::2], n[..., 0::2]
    return n * cos.double().unsqueeze(-2) + rotated * sin.double().unsqueeze(-2)


def check(tokens, before, heads, width, dtype, out, images=2, tables=()):
    """tables: their number, where they are not the same for all images."""
    from sdtrt_backend.kernels.triton_rope import rms_rope

    # heads in the middle of a wider product, as one matrix product for q, k and v writes them
    x, first = (torch.randn(images, t, 3 * heads * width, device=DEVICE).to(dtype)[..., heads * width :]
                [..., : heads * width].unflatten(-1, (heads, width)) for t in (tokens, before))
    weight, first_weight = (torch.randn(width, device=DEVICE).to(dtype) for _ in range(2))
    cos, sin = (torch.randn(*tables, before + tokens, width, device=DEVICE) for _ in range(2))
    exact = exactly(x, weight, cos[..., before:, :], sin[..., before:, :])
    if before:
        exact = torch.cat([exactly(first, first_weight, cos[..., :before, :], sin[..., :before, :]), exact], 1)
    scale = saturating(exact, out)
    with poisoned():
        y = rms_rope(x, first if before else None, weight, first_weight if before else None, cos, sin, 1e-6, scale, out)
    assert y.is_contiguous()
    assert y.dtype == out
    assert_written(y, exact, scale, 2e-5 + exact.abs() * 2e-6)


if not INTERPRETED:
    @pytest.mark.slow
    def test_this_file_passes_under_the_interpreter():
        run_interpreted(__file__)


@on_device
@pytest.mark.parametrize("out", [None, INT8, FP8], ids=str)
@pytest.mark.parametrize("dtype", [HALF, BF16, FP32], ids=str)
def test_it_writes_any_dtype(dtype, out):
    check(5, 3, 9, 64, dtype, out or dtype)


@on_device
@pytest.mark.parametrize(("tokens", "before", "heads", "width"), [(7, 0, 24, 128), (1, 1, 1, 16), (4, 9, 8, 32), (3, 0, 17, 2)])
def test_any_size(tokens, before, heads, width):
    check(tokens, before, heads, width, BF16, FP8, images=1)


@on_device
@pytest.mark.parametrize(("images", "tables"), [(3, 3), (1, 1), (2, 1)])
def test_images_may_have_tables_of_their_own(images, tables):
    check(5, 3, 4, 32, BF16, FP8, images, (tables,))


@on_device
def test_what_does_not_fit_is_refused():
    from sdtrt_backend.kernels.triton_rope import rms_rope

    x, w, c = torch.zeros(1, 4, 2, 48, device=DEVICE), torch.ones(48, device=DEVICE), torch.ones(4, 48, device=DEVICE)
    with pytest.raises(ValueError, match="power of 2, not 48"):
        rms_rope(x, None, w, None, c, c, 1e-6, None, FP32)
    with pytest.raises(ValueError, match="cos and sin are fp32"):
        rms_rope(x[..., :32], None, w[:32], None, c[:3, :32], c[:3, :32], 1e-6, None, FP32)
