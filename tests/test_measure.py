"""Measuring measures what it says."""

import math

import pytest
import torch

from sdtrt_backend import measure


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
