"""The Triton kernels against float64 on the same codes: on the GPU, and on the CPU under Triton's interpreter.

The interpreter must be chosen before triton is first imported, so this file runs itself once more in a process that does.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INT8, FP8 = torch.int8, torch.float8_e4m3fn
POISON = {torch.int8: 0x55, FP8: 0x7F}  # 0x7f is fp8's NaN
DEVICE = "cpu" if INTERPRETED else "cuda"
OUT_SCALE = {INT8: 40.0, FP8: 100.0}


def on_device(test):
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    return test if INTERPRETED else pytest.mark.gpu(without(test))


if INTERPRETED:
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        # Triton 3.6 calls int() on arrays of one element, which numpy 2.4 refuses
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index
    convert = interpreter._convert_float

    def convert_rounding(data, source, target, mode):
        # Triton 3.6's own halves what rounds up to a power of 2
        if (source.name, target.name) != ("fp32", "fp8e4nv"):
            return convert(data, source, target, mode)
        return torch.tensor(data).to(FP8).view(torch.uint8).numpy()

    interpreter._convert_float = convert_rounding


def codes(shape, dtype):
    if dtype == INT8:
        return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)
    return torch.randn(shape, device=DEVICE).mul(2).to(dtype)


def scales(out, operand):
    """Of a size that makes results about 1, for sums of some hundred products."""
    return (0.5 + torch.rand(out, device=DEVICE)) * (1e-5 if operand == INT8 else 1e-2)


def poisoned(shape, dtype):
    if dtype.itemsize == 1:
        return torch.full(shape, POISON[dtype], dtype=torch.uint8, device=DEVICE).view(dtype)
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def is_poison(tensor):
    tensor = tensor.flatten()
    return torch.equal(tensor.view(torch.uint8), poisoned(tensor.shape, tensor.dtype).view(torch.uint8))


def out_scale(dtype):
    return torch.tensor([OUT_SCALE[dtype]], device=DEVICE) if dtype in OUT_SCALE else None


def sum_noise(operand, products, sums):
    """Largest error of sums of ``products`` products each. Hopper adds 32 fp8 products at a time and cuts the result to 14
    bits or so; int8 sums are exact."""
    return products / 32 * 2**-13 * float(sums.abs().max()) if operand == FP8 and not INTERPRETED else 1e-5


def assert_rounded(y, exact, noise):
    """``y`` is ``exact``, float64, rounded to y's dtype, but for ``noise``."""
    y, dtype = y.double(), y.dtype
    if dtype == INT8:
        exact = exact * OUT_SCALE[INT8]
        assert (exact.abs() > 128).any()
        assert ((y - exact.clamp(-128, 127)).abs() <= 0.5 + noise * OUT_SCALE[INT8]).all()
        return
    if dtype == FP8:
        exact = (exact * OUT_SCALE[FP8]).clamp(-448, 448)
        torch.testing.assert_close(y, exact, rtol=2**-4 * 1.01, atol=2**-9 + noise * OUT_SCALE[FP8])
        return
    torch.testing.assert_close(y, exact, rtol={torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps), atol=noise)


def exact_gemm(x, weight, scale, bias, residual, act):
    y = x.double() @ weight.double().T * scale.double()
    y = y if bias is None else y + bias.double()
    if act == "geglu":
        hidden, gate = y.chunk(2, 1)
        y = hidden * torch.nn.functional.gelu(gate)
    elif act is not None:
        y = torch.nn.functional.gelu(y, approximate="tanh" if act == "gelu_tanh" else "none")
    return y if residual is None else y + residual.double()


def check_gemm(operand, m, k, n, act, dtype, config, per_column=True, with_bias=True, with_residual=True):
    from sdtrt_backend.kernels.triton_gemm import gemm

    x = codes((m, k + 16), operand)[:, :k]
    weight = codes((n, k), operand)
    scale = scales(n if per_column else 1, operand)
    bias = torch.randn(n, device=DEVICE) if with_bias else None
    n_out = n // 2 if act == "geglu" else n
    residual = torch.randn(m, n_out, device=DEVICE).to(dtype if dtype.itemsize > 1 else torch.float16) if with_residual else None
    around = poisoned((m + 1, n_out + 3), dtype)
    y = gemm(x, weight, scale, bias, residual, act, out_scale(dtype), dtype, config, around[:m, :n_out])
    assert y.data_ptr() == around.data_ptr()
    sums = exact_gemm(x, weight, scale, bias, None, None)
    noise = sum_noise(operand, k, sums) * (1 + float(sums.abs().max()) * (act == "geglu"))
    assert_rounded(y, exact_gemm(x, weight, scale, bias, residual, act), noise)
    assert is_poison(around[m:])
    assert is_poison(around[:, n_out:])


def exact_conv(x, weight, scale, bias, residual, stride, padding):
    y = torch.nn.functional.conv2d(x.double(), weight.double(), None, stride, padding) * scale.double().view(1, -1, 1, 1)
    y = y if bias is None else y + bias.double().view(-1, weight.shape[0], 1, 1)
    return y if residual is None else y + residual.double()


def check_conv(operand, shape, out, kernel, stride, padding, dtype, config, per_column=True, bias_rows=1, with_residual=True):
    """bias_rows: 0 for no bias, 1 for [out], else [images, out]."""
    from sdtrt_backend.kernels.triton_conv import conv2d

    last = {"memory_format": torch.channels_last}
    x = codes(shape, operand).contiguous(**last)
    weight = codes((out, shape[1], kernel, kernel), operand).contiguous(**last)
    scale = scales(out if per_column else 1, operand)
    bias = torch.randn(*[shape[0]] * (bias_rows > 1), out, device=DEVICE) if bias_rows else None
    sums = exact_conv(x, weight, scale, None, None, stride, padding)
    size = sums.shape
    wide = dtype if dtype.itemsize > 1 else torch.float16
    residual = torch.randn(size, device=DEVICE).to(wide).contiguous(**last) if with_residual else None
    around = poisoned((size[0] + 1, size[2], size[3], size[1]), dtype).permute(0, 3, 1, 2)
    y = around[:-1]
    result = conv2d(x, weight, scale, bias, residual, (stride, stride), (padding, padding), dtype, out_scale(dtype), config, y)
    assert result.data_ptr() == y.data_ptr()
    noise = sum_noise(operand, shape[1] * kernel**2, sums)
    assert_rounded(y, exact_conv(x, weight, scale, bias, residual, stride, padding), noise)
    assert is_poison(around[-1])


if not INTERPRETED:
    @pytest.mark.slow
    def test_this_file_passes_under_the_interpreter():
        run = subprocess.run([sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"], capture_output=True, text=True,
                             env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


@on_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, INT8, FP8], ids=str)
@pytest.mark.parametrize("act", [None, "geglu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("operand", [INT8, FP8], ids=str)
def test_gemm_is_the_product_with_its_epilogue(operand, act, dtype):
    from sdtrt_backend.kernels.triton_gemm import GemmConfig

    check_gemm(operand, 75, 176, 70, act, dtype, GemmConfig(64, 32, 64, 2, 4))


@on_device
@pytest.mark.parametrize("act", [None, "geglu"])
@pytest.mark.parametrize(("with_bias", "with_residual", "per_column"), [(False, False, False), (True, False, False),
                                                                         (False, True, True)])
def test_gemm_without_parts_of_the_epilogue(with_bias, with_residual, per_column, act):
    from sdtrt_backend.kernels.triton_gemm import GemmConfig

    check_gemm(INT8, 75, 176, 70, act, torch.float16, GemmConfig(64, 32, 64, 2, 4, flatten=False), per_column, with_bias,
               with_residual)


@on_device
@pytest.mark.parametrize(("m", "k", "n"), [(1, 16, 2), (64, 64, 32), (65, 80, 34), (700, 64, 64), (3, 320, 66)])
@pytest.mark.parametrize("operand", [INT8, FP8], ids=str)
def test_gemm_of_any_size(operand, m, k, n):
    from sdtrt_backend.kernels.triton_gemm import GemmConfig

    check_gemm(operand, m, k, n, None, torch.float16, GemmConfig(64, 32, 64, 2, 4))


@on_device
@pytest.mark.skipif(INTERPRETED, reason="the interpreter knows no stages, warps or shared memory")
@pytest.mark.parametrize("act", [None, "geglu"])
@pytest.mark.parametrize("operand", [INT8, FP8], ids=str)
@pytest.mark.parametrize("index", range(5))
def test_gemm_with_every_shipped_config(index, operand, act):
    from sdtrt_backend.kernels.triton_gemm import GEMM_CONFIGS

    for dtype in (torch.float16, torch.bfloat16, operand):
        check_gemm(operand, 1111, 720, 1232, act, dtype, GEMM_CONFIGS[index])


@on_device
def test_gemm_refuses_what_it_cannot_read():
    from sdtrt_backend.kernels.triton_gemm import gemm

    x, weight, scale = codes((4, 32), INT8), codes((8, 32), INT8), scales(8, INT8)
    with pytest.raises(ValueError, match="multiple of 16"):
        gemm(x[:, :24], weight[:, :24].contiguous(), scale)
    with pytest.raises(ValueError, match="contiguous"):
        gemm(x, codes((32, 8), INT8).T, scale)
    with pytest.raises(ValueError, match="out_scale"):
        gemm(x, weight, scale, dtype=torch.int8)
    with pytest.raises(ValueError, match="scale has"):
        gemm(x, weight, scale[:4])
    with pytest.raises(ValueError, match="int8 or fp8"):
        gemm(x.float(), weight, scale)


@on_device
@pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (1, 1, 0), (3, 2, 1), (1, 2, 0), (3, 1, 0), (3, 2, 0)])
@pytest.mark.parametrize("operand", [INT8, FP8], ids=str)
def test_conv_is_the_convolution_with_its_epilogue(operand, kernel, stride, padding, tma):
    from sdtrt_backend.kernels.triton_conv import ConvConfig

    config = ConvConfig(64, 32, 64, 2, 4, tma=tma)
    check_conv(operand, (2, 80, 10, 14), 37, kernel, stride, padding, torch.float16, config)


@on_device
@pytest.mark.parametrize("tma", [True, False], ids=["tma", "pointers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, INT8, FP8], ids=str)
def test_conv_writes_any_dtype(dtype, tma):
    from sdtrt_backend.kernels.triton_conv import ConvConfig

    for bias_rows in (1, 2):
        check_conv(INT8, (2, 32, 8, 8), 40, 3, 1, 1, dtype, ConvConfig(64, 32, 32, 2, 4, tma=tma, flatten=False),
                   bias_rows=bias_rows)


@on_device
@pytest.mark.parametrize(("per_column", "bias_rows", "with_residual"), [(False, 0, False), (True, 0, True), (False, 2, False)])
def test_conv_without_parts_of_the_epilogue(per_column, bias_rows, with_residual):
    from sdtrt_backend.kernels.triton_conv import ConvConfig

    check_conv(INT8, (3, 32, 4, 4), 40, 3, 1, 1, torch.float16, ConvConfig(64, 32, 32, 2, 4), per_column, bias_rows,
               with_residual)


@on_device
@pytest.mark.parametrize(("shape", "stride"), [((1, 16, 1, 1), 1), ((5, 16, 2, 2), 1), ((1, 16, 3, 70), 1), ((2, 16, 7, 9), 2),
                                               ((3, 32, 6, 2), 2), ((1, 16, 65, 1), 1)])
def test_conv_of_any_size(shape, stride):
    from sdtrt_backend.kernels.triton_conv import ConvConfig

    check_conv(INT8, shape, 17, 3, stride, 1, torch.float16, ConvConfig(64, 32, 32, 2, 4))


@on_device
@pytest.mark.skipif(INTERPRETED, reason="the interpreter knows no stages, warps or shared memory")
@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("operand", [INT8, FP8], ids=str)
@pytest.mark.parametrize("index", range(5))
def test_conv_with_every_shipped_config(index, operand, stride, size):
    from sdtrt_backend.kernels.triton_conv import CONV_CONFIGS

    check_conv(operand, (2, 176, size, size), 200, 3, stride, 1, torch.float16, CONV_CONFIGS[index])


@on_device
def test_conv_refuses_what_it_cannot_read():
    from sdtrt_backend.kernels.triton_conv import conv2d

    last = {"memory_format": torch.channels_last}
    x, weight = codes((1, 32, 4, 4), INT8).contiguous(**last), codes((8, 32, 3, 3), INT8).contiguous(**last)
    scale = scales(8, INT8)
    with pytest.raises(ValueError, match="multiple of 16"):
        conv2d(x[:, :24].contiguous(**last), weight[:, :24].contiguous(**last), scale)
    with pytest.raises(ValueError, match="channels last"):
        conv2d(x.contiguous(), weight, scale)
    with pytest.raises(ValueError, match="bias is"):
        conv2d(x, weight, scale, torch.zeros(2, 8, device=DEVICE))
    with pytest.raises(ValueError, match="strides"):
        conv2d(x, weight, scale, stride=(1, 2))


@on_device
@pytest.mark.parametrize(("images", "height", "width", "pixels", "expected"), [
    (2, 128, 128, 128, (1, 1, 128)), (2, 64, 64, 128, (1, 2, 64)), (2, 96, 96, 128, (1, 4, 32)), (2, 8, 8, 128, (2, 8, 8)),
])
def test_a_box_wastes_no_pixels(images, height, width, pixels, expected):
    from sdtrt_backend.kernels.triton_conv import box

    assert box(images, height, width, pixels) == expected
