"""The 8-bit operators and the lowering to oneDNN, each against its plain-torch reference."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES

from sdtrt_backend import measure, ops
from sdtrt_backend.capture import bind, tensor_inputs
from sdtrt_backend.lower import LOWERINGS, choose, inductor_cpu
from sdtrt_backend.options import Options
from sdtrt_backend.quantize import insert, plan


def operands(*shape, channels=64, kernel=()):
    g = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (channels, shape[1 if kernel else -1], *kernel), generator=g, dtype=torch.int8)
    return codes, weight, torch.rand(channels, generator=g) / 50, torch.randn(channels, generator=g)


@pytest.mark.parametrize(("size", "kernel", "stride"), [((2, 32, 9, 7), 3, 1), ((1, 64, 8, 8), 3, 2), ((3, 32, 5, 5), 1, 1)])
def test_convolution_equals_float64(size, kernel, stride):
    x, w, scale, bias = operands(*size, kernel=(kernel, kernel))
    pad = [kernel // 2] * 2
    mine = ops.int8_conv2d(x, 0.02, 128, w, scale, bias, [stride] * 2, pad, [1, 1], torch.float32)
    exact = F.conv2d((x.double() - 128) * 0.02, w.double() * scale.double().view(-1, 1, 1, 1), bias.double(), stride, pad)
    assert mine.is_contiguous(memory_format=torch.channels_last)
    assert measure.compare(mine, exact) < TOLERANCES["int8_operator"]


def test_linear_equals_float64():
    x, w, scale, bias = operands(3, 5, 64)
    mine = ops.int8_linear(x, 0.02, 128, w, scale, bias, torch.float32)
    exact = F.linear((x.double() - 128) * 0.02, w.double() * scale.double()[:, None], bias.double())
    assert measure.compare(mine, exact) < TOLERANCES["int8_operator"]


def test_fake_implementations_agree_with_the_real_ones():
    x, w, scale, bias = operands(2, 32, 8, 8, kernel=(3, 3))
    torch.library.opcheck(ops.int8_conv2d, (x, 0.02, 128, w, scale, bias, [2, 2], [1, 1], [1, 1], torch.bfloat16))
    x, w, scale, bias = operands(2, 5, 64)
    torch.library.opcheck(ops.int8_linear, (x, 0.02, 128, w, scale, None, torch.float32))
    y = torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last)
    torch.library.opcheck(ops.group_norm, (y, 8, torch.ones(32), torch.zeros(32), 1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["float32", "bfloat16", "auto"])
def test_the_compiled_graph_equals_the_reference_lowering_and_runs_int8_kernels(graph, recipe, rest):
    captured, args = graph
    tensors = tensor_inputs(captured, args)
    reference, compiled = (LOWERINGS[target].lower(insert(*bind(captured, args), plan(captured.layers, recipe, ())), tensors,
                                                   Options(rest=rest))
                           for target in ("reference", "inductor"))
    with torch.no_grad(), measure.CountInt8() as counted:
        mine = compiled.step(*tensors)
    with torch.no_grad():
        assert measure.compare(mine, reference.step(*tensors)) < TOLERANCES["kernels_vs_reference_step"]
    assert counted.flops == compiled.eight_bit_flops > 0


def test_the_precision_of_the_rest_is_decided_by_time_once(graph, monkeypatch, tmp_path):
    captured, args = graph
    bound, _ = bind(captured, args)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for case, (times, expected) in enumerate((([1.0, 2.0], True), ([2.0, 1.0], False), ([0.95, 1.0], False))):
        monkeypatch.setenv("SDTRT_CACHE", str(tmp_path / str(case)))
        monkeypatch.setattr(inductor_cpu, "step_ms", lambda *steps, repeats=1, times=times: times)
        before = torch.random.get_rng_state()
        assert inductor_cpu.bf16_pays(bound) is expected
        monkeypatch.setattr(inductor_cpu, "step_ms", None)
        assert inductor_cpu.bf16_pays(bound) is expected
        assert torch.equal(torch.random.get_rng_state(), before)


def test_devices_without_kernels_are_refused_with_the_reason():
    assert choose(Options(), torch.device("cpu")) == (LOWERINGS["inductor"], None)
    assert choose(Options(engine="reference"), torch.device("xpu")) == (LOWERINGS["reference"], None)
    for options, device, expected in ((Options(), "xpu", "not for xpu"),
                                      (Options(precision="fp8"), "cpu", "use sd_int8 on the CPU")):
        target, why = choose(options, torch.device(device))
        assert target is None
        assert expected in why


def test_signed_codes_give_what_the_shifted_unsigned_ones_give():
    x, w, scale, bias = operands(3, 5, 64)
    signed = (x.int() - 128).to(torch.int8)
    assert torch.equal(ops.int8_linear(x, 0.02, 128, w, scale, bias, torch.float32),
                       ops.int8_linear(signed, 0.02, 0, w, scale, bias, torch.float32))


def codes8(dtype, *shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (x * 30).round().clamp(-128, 127).to(torch.int8) if dtype is torch.int8 else x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_operators_with_a_chosen_kernel_have_the_shape_and_layout_they_promise(dtype):
    """Fake and real agree for every operator that writes or reads 8 bits."""
    one, half = torch.ones(1), torch.float16
    x, w = codes8(dtype, 2, 5, 32), codes8(dtype, 16, 32)
    pixels, taps = (codes8(dtype, *s).contiguous(memory_format=torch.channels_last) for s in ((2, 32, 7, 6), (16, 32, 3, 3)))
    wide, tokens = torch.randn(2, 32, 7, 6).half(), torch.randn(2, 5, 32).half()
    heads = torch.randn(2, 4, 5, 16).half()
    affine = torch.rand(32).half()
    cases = [(ops.linear8, (x, w, torch.rand(16), None, half, "reference")),
             (ops.linear8, (x, w, one, torch.rand(16), torch.bfloat16, "reference")),
             (ops.linear_gelu8, (x, w, torch.rand(16), torch.rand(16), torch.rand(16), dtype, "reference")),
             (ops.conv8, (pixels, taps, torch.rand(16), torch.rand(16), None, [2, 2], [1, 1], half, "reference")),
             (ops.conv8, (pixels, taps, torch.rand(16), torch.rand(16), torch.randn(2, 16, 5, 4).half(), [1, 1], [0, 0], half,
                          "reference")),
             (ops.group_norm8, (wide, None, torch.rand(2, 32), 8, affine, affine, 1e-5, True, one, dtype, "reference")),
             (ops.group_norm8, (wide, wide, None, 8, None, None, 1e-5, False, None, half, "reference")),
             (ops.layer_norm8, (tokens, affine, affine, 1e-5, one, dtype, "reference")),
             (ops.add_layer_norm8, (tokens, tokens, affine, None, 1e-5, torch.rand(32), dtype, "reference")),
             (ops.geglu8, (tokens, torch.rand(16), dtype, "reference")),
             (ops.attention8, (heads, heads, heads, 0.25, torch.rand(64), dtype, "reference"))]
    for op, arguments in cases:
        # the schema check multiplies its inputs, which fp8 tensors cannot
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor")[dtype is not torch.int8:])


def test_8_bit_results_saturate_and_round_to_nearest_even():
    y = torch.tensor([-1000.0, -0.5, 0.5, 1.5, 2.5, 1000.0])
    assert ops.encode(y, None, torch.int8).tolist() == [-128, 0, 0, 2, 2, 127]
    assert ops.encode(y, torch.tensor([2.0]), torch.int8).tolist() == [-128, -1, 1, 3, 5, 127]
    assert ops.encode(y, None, torch.float8_e4m3fn).float().tolist() == [-448.0, -0.5, 0.5, 1.5, 2.5, 448.0]
