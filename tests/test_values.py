"""The values that travel between stages cannot be changed on the way."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from sdtrt_backend.values import INT8_MAX, UINT8_ZERO, Decision, Layer, LayerReport

LAYER = Layer("a", "linear", "linear", "x", torch.ones(64, 64))
ROW = LayerReport("a", "linear", (64, 64), "int8", "reference", "")


@pytest.mark.parametrize("value", [LAYER, Decision(LAYER, "int8", ""), ROW])
def test_a_value_is_frozen(value):
    with pytest.raises(FrozenInstanceError):
        value.name = "b"


def test_only_an_int8_decision_is_quantised():
    assert Decision(LAYER, "int8", "", 1.0).quantized
    assert not Decision(LAYER, "16-bit", "excluded").quantized


def test_signed_codes_shifted_by_the_zero_point_fill_unsigned_ones():
    unsigned = torch.iinfo(torch.uint8)
    assert (unsigned.min, unsigned.max) == (-INT8_MAX - 1 + UINT8_ZERO, INT8_MAX + UINT8_ZERO)
