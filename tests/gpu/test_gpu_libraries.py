"""cuDNN's and cuBLASLt's 8-bit kernels against float64, on a GPU: odd sizes, every kind of addition, memory that held NaN."""

from itertools import chain

import pytest
import torch
from torch.nn.functional import conv2d

from sdtrt_backend import kernels, ops, stats
from sdtrt_backend.assign import ATTENTION_ERROR, fp8_attention_error
from sdtrt_backend.kernels import PROVIDERS, gpu, installed, providers
from sdtrt_backend.values import DTYPES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
              pytest.mark.skipif(not installed("cudnn"), reason="needs nvidia-cudnn-frontend")]
DEVICE = torch.device("cuda")
ROWS = [p for p in PROVIDERS if p.name in ("cudnn", "cublaslt")]
# fp16 results; sums of fp8 products have 14 bits on Hopper
BOUNDS = {"int8": 1e-3, "fp8": 4e-3}


def codes(shape, precision):
    x = torch.randn(shape, device=DEVICE) * 30
    x = x.round().clamp(-127, 127).to(torch.int8) if precision == "int8" else x.to(DTYPES[precision])
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def poison(shape):
    """The next tensor of this size gets memory full of NaN."""
    torch.full(shape, float("nan"), dtype=torch.float16, device=DEVICE)


def check(row, arguments, expected):
    """Every variant that takes the shape gives the float64 result; there is one at least."""
    kernels.register()
    taken = 0
    for variant in chain(*row.variants(row.precision), row.fallback):
        poison(expected.shape)
        try:
            y = ops.KERNELS[row.op, row.name](*arguments, variant)
        except Exception:  # not every configuration takes every shape; one must
            continue
        taken += 1
        assert (y.shape, y.dtype) == (expected.shape, torch.float16)
        assert stats.relative_error(y, expected) < BOUNDS[row.precision], variant
    assert taken


@pytest.mark.parametrize("row", [r for r in ROWS if r.op == "linear8"], ids=lambda r: f"{r.name}-{r.precision}")
@pytest.mark.parametrize("rows", [3, 154, 1031])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(row, rows, with_bias):
    torch.manual_seed(rows)
    x, weight = codes((rows, 192), row.precision), codes((320, 192), row.precision)
    scale = torch.rand(1 if row.one_scale else 320, device=DEVICE) * 1e-3
    bias = torch.randn(320, device=DEVICE, dtype=torch.float16 if row.narrow_bias else torch.float32) if with_bias else None
    expected = x.double() @ weight.double().t() * scale + (0.0 if bias is None else bias.double())
    check(row, (x, weight, scale, bias, torch.float16), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("rows", [3, 1031])
def test_linear_with_gelu(rows, dtype):
    """In 8 bits: rounded, not cut off, and saturated."""
    kernels.register()
    torch.manual_seed(rows)
    x, weight, bias = codes((rows, 192), "int8"), codes((320, 192), "int8"), torch.randn(320, device=DEVICE)
    scale = torch.rand(320, device=DEVICE) * 2e-4
    out_scale = torch.rand(320, device=DEVICE) * (100 if dtype is torch.int8 else 1000)
    y = torch.nn.functional.gelu(x.double() @ weight.double().t() * scale + bias.double(), approximate="tanh")
    expected = ops.encode(y * out_scale, None, dtype)
    assert int((expected.double().abs() >= (127 if dtype is torch.int8 else 448)).sum()) > rows
    taken = 0
    for variant in chain(*PROVIDERS[0].variants("int8")):
        try:
            mine = ops.KERNELS["linear_gelu8", "cudnn"](x, weight, scale, bias, out_scale, dtype, variant)
        except Exception:  # as above
            continue
        taken += 1
        assert stats.relative_error(mine, expected) < gpu.GELU_BOUND, variant
        if dtype is torch.int8:
            assert int((mine.int() - expected.int()).abs().max()) <= 1
    assert taken


@pytest.mark.parametrize("row", [r for r in ROWS if r.op == "linear8" and r.writes_codes], ids=lambda r: r.name)
@pytest.mark.parametrize("rows", [3, 1031])
def test_linear_that_writes_codes(row, rows):
    """Saturated where they would be beyond e4m3."""
    kernels.register()
    torch.manual_seed(rows)
    x, weight, bias = codes((rows, 192), row.precision), codes((320, 192), row.precision), torch.randn(320, device=DEVICE) * 50
    scale = torch.rand(320, device=DEVICE) * 2e-2
    expected = ops.encode(x.double() @ weight.double().t() * scale + bias.double(), None, torch.float8_e4m3fn)
    assert int((expected.double().abs() == 448).sum()) > rows
    taken = 0
    for variant in chain(*row.variants(row.precision)):
        try:
            mine = ops.KERNELS["linear8", row.name](x, weight, scale, bias, torch.float8_e4m3fn, variant)
        except Exception:  # as above
            continue
        taken += 1
        assert mine.dtype is torch.float8_e4m3fn
        assert stats.relative_error(mine, expected) < 5e-3, variant  # rounding ties
    assert taken


@pytest.mark.parametrize("row", [r for r in ROWS if r.op == "conv8"], ids=lambda r: f"{r.name}-{r.precision}")
@pytest.mark.parametrize(("size", "taps", "stride", "padding"), [
    ((2, 64, 13, 9), 3, 1, 1), ((1, 96, 16, 16), 3, 2, 1), ((3, 64, 7, 11), 1, 1, 0)])
@pytest.mark.parametrize("added", ["", "bias", "residual", "bias and residual"])
def test_convolution(row, size, taps, stride, padding, added):
    torch.manual_seed(taps)
    x, weight = codes(size, row.precision), codes((160, size[1], taps, taps), row.precision)
    scale = torch.rand(160, device=DEVICE) * 1e-3
    expected = conv2d(x.double(), weight.double(), None, stride, padding) * scale.view(-1, 1, 1)
    bias = residual = None
    if "bias" in added:
        bias = torch.randn(160, device=DEVICE)
        expected = expected + bias.double().view(-1, 1, 1)
    if "residual" in added:
        residual = torch.randn(expected.shape, device=DEVICE).half().contiguous(memory_format=torch.channels_last)
        expected = expected + residual.double()
    check(row, (x, weight, scale, bias, residual, [stride] * 2, [padding] * 2, torch.float16), expected)


@pytest.fixture(params=providers.ATTENTION_FP8)
def kernel(request):
    """Of attention over fp8 codes."""
    kernels.register()
    if (refused := providers.no_attention_fp8(request.param, torch.cuda.get_device_capability())) is not None:
        pytest.skip(refused)
    return request.param


@pytest.mark.parametrize(("queries", "tokens", "width"), [(130, 130, 64), (256, 77, 128)])
def test_attention_in_fp8(kernel, queries, tokens, width):
    torch.manual_seed(queries)
    q, k, v = (torch.randn((2, t, 3, width), device=DEVICE).mul(30).to(torch.float8_e4m3fn).transpose(1, 2)
               for t in (queries, tokens, tokens))
    scales = torch.tensor([0.03, 0.04, 0.02], device=DEVICE)
    scores = torch.softmax(q.double() @ k.double().transpose(-1, -2) * (scales[0] * scales[1] * width**-0.5).double(), -1)
    expected = (scores @ v.double()).transpose(1, 2).flatten(2)
    y = ops.attention_fp8(q, k, v, scales, width**-0.5, ops.ATTENTION_FP8_OUT[kernel], kernel)
    assert stats.relative_error(y, expected) < gpu.ATTENTION_FP8_BOUND


def test_fp8_attention_of_narrow_heads(kernel):
    torch.manual_seed(0)
    q, k, v = (torch.randn((2, 300, 8, 40), device=DEVICE, dtype=torch.float16).transpose(1, 2) for _ in range(3))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error, _ = fp8_attention_error((q, k, v), 0.0, 40**-0.5, y, kernel)
    assert error < ATTENTION_ERROR


def test_fp8_attention_over_a_video_takes_v_without_its_mean(kernel):
    torch.manual_seed(0)
    q, k, v = (torch.randn((1, 32760, 4, 128), device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    v = 0.58 * v + 0.11 * torch.randn((1, 4, 1, 128), device=DEVICE, dtype=torch.bfloat16)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    mean = v.mean(2, keepdim=True, dtype=torch.float32)
    with_it, _ = fp8_attention_error((q, k, v), 0.0, 128**-0.5, y, kernel)
    without, _ = fp8_attention_error((q, k, v - mean), mean, 128**-0.5, y, kernel)
    print(f"relative error {with_it:.4f} with the mean, {without:.4f} without")
    assert without < ATTENTION_ERROR
    assert without < 0.5 * with_it
