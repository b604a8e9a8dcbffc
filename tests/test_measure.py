"""Measuring measures what it says."""

import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sdtrt_backend import measure, ops, stats
from sdtrt_backend.values import Decision, Layer


def test_an_error_is_relative_and_the_largest_of_all_outputs():
    a, b = torch.ones(4), 2 * torch.ones(4)
    assert measure.compare((1.1 * a, b), (a, b)) == pytest.approx(0.1, rel=1e-4)
    assert measure.compare((a, torch.tensor(3)), (a, torch.tensor(5))) == 0.0  # integers are no measured output


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad):
    assert measure.compare(torch.tensor([bad]), torch.ones(1)) == math.inf
    assert measure.compare(torch.ones(1), torch.tensor([bad])) == math.inf


def test_steps_take_turns():
    calls = []
    times = measure.step_ms(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3)
    assert "".join(calls) == "ababab"
    assert len(times) == 2


def test_floating_point_kernels_count_no_int8_flops():
    with measure.CountInt8() as counted:
        torch.nn.functional.linear(torch.randn(4, 64), torch.randn(64, 64))
    assert counted.flops == 0


def test_int8_flops_are_two_per_multiplication():
    weight, scale = torch.ones(32, 64, dtype=torch.int8), torch.ones(32)
    packed = torch.ops.onednn.qlinear_prepack(weight, [4, 64])
    codes = torch.full((4, 64), 128, dtype=torch.uint8)
    with measure.CountInt8() as counted:
        torch.ops.onednn.qlinear_pointwise(codes, 1.0, 128, packed, scale, torch.zeros(32, dtype=torch.int32), None, 1.0, 0,
                                           torch.float32, "none", [], "")
    assert counted.flops == 2 * 4 * 64 * 32


GEOMETRY = [(1, 1), (1, 2), (2, 1), (2, 4), (2, 16), (3, 1), (3, 2)]


@pytest.mark.parametrize(("dims", "groups"), GEOMETRY)
@pytest.mark.parametrize("own_name", [False, True])
def test_an_int8_convolution_has_the_flops_of_the_one_it_stands_for(dims, groups, own_name):
    onednn, scale = torch.ops.onednn, torch.ones(32)
    weight, x = torch.ones(32, 16 // groups, *[3] * dims, dtype=torch.int8), torch.zeros(2, 16, *[7] * dims, dtype=torch.uint8)
    packed = onednn.qconv_prepack(weight, scale, 1.0, 0, [2] * dims, [1] * dims, [1] * dims, groups, list(x.shape))
    kernel = getattr(onednn, f"qconv{dims}d_pointwise" if own_name else "qconv_pointwise")
    with measure.CountInt8() as counted:
        kernel(x, 1.0, 0, packed, scale, torch.zeros(32, dtype=torch.int32), None, [2] * dims, [1] * dims, [1] * dims, groups,
               1.0, 0, torch.float32, "none", [], "")
    convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[dims - 1]
    with FlopCounterMode(display=False) as expected:
        convolution(x.float(), weight.float(), None, 2, 1, 1, groups)
    assert counted.flops == expected.get_total_flops() > 0


def test_packing_a_weight_is_no_work():
    weight = torch.ones(32, 16, 3, 3, dtype=torch.int8)
    with measure.CountInt8() as counted:
        torch.ops.onednn.qconv_prepack(weight, torch.ones(32), 1.0, 0, [1, 1], [1, 1], [1, 1], 1, [2, 16, 7, 7])
        torch.ops.onednn.qlinear_prepack(torch.ones(32, 64, dtype=torch.int8), None)
    assert counted.flops == 0


def test_torchs_own_8_bit_products_count():
    codes, other = torch.ones(32, 64, dtype=torch.int8), torch.ones(64, 48, dtype=torch.int8)
    with measure.CountInt8() as counted:
        torch._int_mm(codes, other)
        torch.ops.aten._int_mm.out(codes, other, out=torch.empty(32, 48, dtype=torch.int32))
    assert counted.flops == 2 * 2 * 32 * 64 * 48
    half, one = torch.float8_e4m3fn, torch.ones(())
    with measure.CountInt8() as counted:
        torch._scaled_mm(codes.to(half), codes[:16].to(half).t(), one, one, out_dtype=torch.bfloat16)
        torch._scaled_mm(codes.to(half), codes[:16].to(half).t(), scale_a=one, scale_b=one, bias=None, out_dtype=torch.bfloat16)
    assert counted.flops == 2 * 2 * 32 * 64 * 16


@pytest.mark.parametrize("kernel", ["reference", "counted"])
def test_our_operators_count_where_their_kernel_has_8_bits(monkeypatch, kernel):
    for op in ("linear8", "linear_gelu8", "conv8"):  # a kernel of another name, which computes what the reference does
        monkeypatch.setitem(ops.KERNELS, (op, "counted"), ops.KERNELS[op, "reference"])
    x, weight = torch.ones(2, 5, 64, dtype=torch.int8), torch.ones(32, 64, dtype=torch.int8)
    image, kernels = torch.ones(2, 16, 7, 7, dtype=torch.int8), torch.ones(32, 16, 3, 3, dtype=torch.int8)
    with measure.CountInt8() as counted:
        ops.linear8(x, weight, torch.ones(32), None, torch.float32, kernel)
        ops.linear_gelu8(x, weight, torch.ones(32), None, torch.ones(32), torch.int8, kernel)
        ops.conv8(image, kernels, torch.ones(32), None, None, [2, 2], [1, 1], torch.float32, kernel)
    assert counted.flops == (0 if kernel == "reference" else 2 * 2 * 10 * 64 * 32 + 2 * 2 * 32 * 16 * 16 * 9)


def test_layers_that_hold_a_packed_weight_count():
    scale, zero = torch.ones(32), torch.zeros(32, dtype=torch.int32)
    linear = torch.ops.onednn.qlinear_prepack(torch.ones(32, 64, dtype=torch.int8), None)
    kernels = torch.ones(32, 16, 3, 3, dtype=torch.int8)
    conv = torch.ops.onednn.qconv_prepack(kernels, scale, 1.0, 0, [1, 1], [1, 1], [1, 1], 1, None)
    with measure.CountInt8() as counted:
        ops.packed_linear(torch.zeros(2, 5, 64, dtype=torch.uint8), 1.0, 0, linear, scale, zero, None, torch.float32)
        ops.packed_conv2d(torch.zeros(2, 16, 7, 7, dtype=torch.uint8), 1.0, 0, conv, scale, zero, None, [1, 1], [1, 1], [1, 1],
                          torch.float32)
    assert counted.flops == 2 * 10 * 64 * 32 + 2 * 2 * 32 * 49 * 16 * 9


def test_every_counted_operator_exists_with_the_arguments_it_is_counted_by():
    for name in measure.KERNELS_8:
        namespace, _, short = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), short)
        for overload in packet.overloads():
            names = {a.name for a in getattr(packet, overload)._schema.arguments}
            assert names & {"qw", "packed", "weight", "mat2"}, (name, overload)
            assert names & {"qx", "x", "self"}, (name, overload)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_the_noise_of_a_layer_in_16_bits_is_that_of_its_codes(dtype, precision, smoothed):
    """What the operands and the result are rounded to is below what 8 bits do: half a dB in bf16."""
    seeded = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=seeded).to(dtype) for shape in ((512, 256), (128, 256), (128,)))
    s = torch.rand(256, generator=seeded) + 0.5 if smoothed else None
    decision = Decision(Layer("a", "linear", "a", "x", weight), precision, "", 4.0, s)
    found, flops = measure.layer_noise(decision, (x, weight, bias), F.linear)
    wide = stats.fake_quantize_input(decision, x), stats.fake_quantize_weight(decision, weight)
    expected = stats.sqnr_db(F.linear(*wide, bias.float()), F.linear(x.float(), weight.float(), bias.float()))
    assert found == pytest.approx(expected, abs=0.5)
    assert 20 < found < 45
    assert flops == 2 * 512 * 256 * 128


def test_a_stopwatch_runs_from_when_it_is_made_to_its_stop():
    watch = measure.Stopwatch(torch.device("cpu"))
    time.sleep(0.02)
    watch.stop()
    stopped = watch.ms
    time.sleep(0.02)
    assert 20 <= stopped == watch.ms
