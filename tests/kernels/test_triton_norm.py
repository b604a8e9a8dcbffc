"""Group norm, layer norm and GEGLU against float64: on the GPU, and on the CPU under Triton's interpreter."""

import pytest
import torch
from interpreted import DEVICE, FP8, INT8, INTERPRETED, assert_written, on_device, on_gpu, poisoned, run_interpreted, saturating

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
LAST = {"memory_format": torch.channels_last}
NOISE = 2e-5  # fp32 arithmetic: the mean is rounded, and the weights, up to about 12, multiply that


def tensor(*shape, dtype=FP32, mean=0.0, std=1.0):
    return (torch.randn(shape, device=DEVICE) * std + mean).to(dtype)


def check_group_norm(c, c2, hw, groups, dtype, out, images=2, silu=True, affine=True, shifted=False, mean=0.0, noise=NOISE,
                     per_channel=False, **config):
    from sdtrt_backend.kernels.triton_norm import NormConfig, group_norm

    x = tensor(images, c, *hw, dtype=dtype, mean=mean).contiguous(**LAST)
    x2 = tensor(images, c2, *hw, dtype=dtype, mean=2 - mean, std=2.0).contiguous(**LAST) if c2 else None
    weight, bias = (tensor(c + c2, dtype=dtype, std=3), tensor(c + c2, dtype=dtype)) if affine else (None, None)
    shift = tensor(images, c, dtype=dtype) if shifted else None
    exact = x.double() if shift is None else x.double() + shift.double()[:, :, None, None]
    exact = exact if x2 is None else torch.cat([exact, x2.double()], 1)
    exact = torch.nn.functional.group_norm(exact, groups, *(None if p is None else p.double() for p in (weight, bias)), 1e-5)
    exact = torch.nn.functional.silu(exact) if silu else exact
    scale = saturating(exact, out, (c + c2,) if per_channel else (1,))
    config = NormConfig(**{"block_c": 32, "rows": 8, "warps": 4, "per_sm": 4, "per_sm_read": 2, **config})
    with poisoned():
        y = group_norm(x, x2, groups, weight, bias, 1e-5, silu, scale, out, shift, config)
    assert y.is_contiguous(**LAST)
    assert y.dtype == out
    assert_written(y, exact, scale.view(1, -1, 1, 1), noise + exact.abs() * 2e-6)


if not INTERPRETED:
    @pytest.mark.slow
    def test_this_file_passes_under_the_interpreter():
        run_interpreted(__file__)


@on_device
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize("out", [None, INT8, FP8], ids=str)
@pytest.mark.parametrize("dtype", [HALF, BF16, FP32], ids=str)
def test_group_norm_writes_any_dtype(dtype, out, silu):
    check_group_norm(64, 0, (6, 11), 8, dtype, out or dtype, silu=silu)


@on_device
@pytest.mark.parametrize(("c", "c2", "hw", "groups"), [
    (40, 24, (5, 7), 8),    # groups straddle the parts and the blocks of channels
    (48, 48, (9, 3), 6),
    (33, 31, (4, 4), 4),    # no 16-byte alignment
    (128, 0, (3, 3), 32), (80, 0, (1, 1), 2), (72, 0, (2, 3), 1), (40, 0, (4, 5), 40), (8, 152, (3, 2), 2),
    (160, 96, (3, 5), 32),
])
def test_group_norm_of_any_size(c, c2, hw, groups):
    check_group_norm(c, c2, hw, groups, HALF, INT8, images=3 if c == 40 else 1)


@on_device
@pytest.mark.parametrize(("affine", "shifted", "c2"), [(False, False, 0), (True, True, 0), (False, True, 24)])
def test_group_norm_with_and_without_its_parts(affine, shifted, c2):
    check_group_norm(40, c2, (7, 5), 8, HALF, INT8, affine=affine, shifted=shifted)


@on_device
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize("out", [INT8, FP8], ids=str)
@pytest.mark.parametrize("c2", [0, 24])
def test_group_norm_with_a_factor_for_each_channel(c2, out, silu):
    check_group_norm(40, c2, (7, 5), 8, HALF, out, silu=silu, per_channel=True)


@on_device
@pytest.mark.parametrize("config", [{"block_c": 64}, {"block_c": 128, "rows": 16}, {"rows": 1}, {"rows": 64, "per_sm": 1},
                                    {"per_sm_read": 40, "per_sm": 40}], ids=str)
def test_group_norm_with_any_tile(config):
    check_group_norm(72, 24, (5, 9), 16, HALF, INT8, **config)


@on_device
@pytest.mark.parametrize("std", [1.0, 1e-2])
def test_group_norm_survives_a_large_mean(std):
    from sdtrt_backend.kernels.triton_norm import group_norm

    x = tensor(2, 64, 17, 19, mean=100.0, std=std).contiguous(**LAST)
    exact = torch.nn.functional.group_norm(x.double(), 8, None, None, 1e-6)
    error = (group_norm(x, None, 8, None, None, 1e-6, False, None, FP32) - exact).abs().max()
    # seven roundings of the size of the mean: a chunk's mean, a channel's, three in the sum of 8 channels, and the two
    # products whose difference is the result; sums of squares that cancel, as torch's own do here, are off by 60,000
    assert error <= 7 * (torch.finfo(FP32).eps / 2) * 100.0 / std + 1e-6


@on_device
def test_group_norm_refuses_what_it_cannot_write():
    from sdtrt_backend.kernels.triton_norm import group_norm

    x = tensor(1, 24, 2, 2).contiguous(**LAST)
    with pytest.raises(ValueError, match="multiple of groups"):
        group_norm(x, None, 7, None, None, 1e-5, False, None, FP32)
    for scale in (None, torch.ones(2, device=DEVICE)):
        with pytest.raises(ValueError, match="out_scale of 1 or 24 elements"):
            group_norm(x, None, 8, None, None, 1e-5, False, scale, INT8)
    with pytest.raises(ValueError, match="channels only"):
        group_norm(x, x.half(), 8, None, None, 1e-5, False, None, FP32)
    with pytest.raises(ValueError, match=r"shift is \[2, 24\]"):
        group_norm(torch.cat([x, x]), None, 8, None, None, 1e-5, False, None, FP32, tensor(1, 24))


@on_device
@pytest.mark.parametrize("residual", [True, False], ids=["sum", "alone"])
@pytest.mark.parametrize("out", [None, INT8, FP8], ids=str)
@pytest.mark.parametrize("dtype", [HALF, BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 1, 1280), (7, 65), (1, 4096)], ids=str)
def test_layer_norm_is_the_norm_of_the_sum(shape, dtype, out, residual):
    from sdtrt_backend.kernels.triton_norm import layer_norm

    out = out or dtype
    x, width = tensor(*shape, dtype=dtype, mean=5.0), shape[-1]
    other = tensor(*shape, dtype=dtype) if residual else None
    weight, bias = tensor(width, dtype=dtype, std=3), tensor(width, dtype=dtype)
    for affine, channels in (((weight, bias), 1), ((weight, None), width)):
        total = x if other is None else x + other
        wide = (None if p is None else p.double() for p in affine)
        exact = torch.nn.functional.layer_norm(total.double(), (width,), *wide, 1e-5)
        scale = saturating(exact, out, channels)
        with poisoned():
            s, y = layer_norm(x, other, *affine, 1e-5, scale, out)
        assert torch.equal(s, total) if residual else s is None
        assert_written(y, exact, scale, NOISE + exact.abs() * 2e-6)


@on_device
@pytest.mark.parametrize("out", [HALF, INT8, FP8], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 80), (33, 640), (1, 2, 66), (2, 1000)], ids=str)
def test_geglu_is_the_product(shape, out):
    from sdtrt_backend.kernels.triton_norm import geglu

    for dtype, channels in ((HALF, 1), (BF16, shape[-1] // 2)):
        x = tensor(*shape, dtype=dtype, std=3)
        hidden, gate = x.double().chunk(2, -1)
        exact = hidden * torch.nn.functional.gelu(gate)
        scale = saturating(exact, out, channels)
        with poisoned():
            y = geglu(x, scale, out)
        assert_written(y, exact, scale, NOISE + (hidden * gate).abs() * 1e-6)


def test_geglu_of_many_rows_fits_the_grid_of_a_gpu(monkeypatch):
    from sdtrt_backend.kernels import triton_norm

    class Kernel:
        def __getitem__(self, grid):
            assert grid[0] > 65535 >= grid[1]
            return lambda *arguments, **options: None

    monkeypatch.setattr(triton_norm, "_geglu", Kernel())
    assert triton_norm.geglu(torch.empty(64 * 65536, 2, dtype=HALF), None, HALF).shape == (64 * 65536, 1)


@on_device
def test_gelu_is_close_everywhere():
    from sdtrt_backend.kernels.triton_norm import geglu

    gate = torch.linspace(-12, 12, 4096, device=DEVICE)
    y = geglu(torch.cat([torch.ones_like(gate), gate])[None], None, FP32)[0]
    exact = torch.nn.functional.gelu(gate.double())
    assert ((y - exact).abs() <= 2.5e-7 * gate.abs() + 1e-7).all()


@on_gpu
@on_device
@pytest.mark.parametrize("shape", [(320, 0, 128), (640, 320, 128), (1280, 640, 64), (1280, 1280, 32), (128, 0, 32)], ids=str)
@pytest.mark.parametrize("index", range(7))
def test_group_norm_with_every_shipped_config(index, shape):
    from dataclasses import asdict

    from sdtrt_backend.kernels.triton_norm import NORM_CONFIGS

    c, c2, size = shape
    config = asdict(NORM_CONFIGS[index])
    for out in (HALF, INT8, FP8):
        # tanh.approx: 2^-11 of half the value, which is at most about 25
        check_group_norm(c, c2, (size, size), 32, HALF, out, mean=3.0, noise=8e-3 if config["fast_silu"] else NOISE, **config)


@on_gpu
@on_device
def test_a_graph_replays_every_norm_bit_for_bit():
    from sdtrt_backend.kernels.triton_norm import NORM_CONFIGS, geglu, group_norm, layer_norm

    x, scale = tensor(2, 640, 32, 32, dtype=HALF).contiguous(**LAST), torch.tensor([40.0], device=DEVICE)
    rows = tensor(2048, 1280, dtype=HALF)

    def call():
        norms = [group_norm(x, x, 32, None, None, 1e-5, True, scale, INT8, config=config) for config in NORM_CONFIGS[:5]]
        return [*norms, layer_norm(rows, rows, None, None, 1e-5, scale, INT8)[1], geglu(rows, scale, INT8)]

    first = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = call()
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
