"""The values that travel between stages: their arithmetic, what they know of themselves, and what they do not load."""

import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdtrt_backend import report, values
from sdtrt_backend.values import INT8_MAX, INT16_MAX, UINT8_ZERO, Decision, Layer, LayerReport, Report

LAYER = Layer("a", "linear", "linear", "x", torch.ones(64, 64))
ROW = LayerReport("a", "linear", (64, 64), "int8", "reference", "")


@pytest.mark.parametrize("value", [LAYER, Decision(LAYER, "int8", ""), ROW, Report("ready")])
def test_a_value_is_frozen(value):
    with pytest.raises(FrozenInstanceError):
        value.name = "b"


def test_only_an_int8_decision_is_quantised():
    assert Decision(LAYER, "int8", "", 1.0).quantized
    assert not Decision(LAYER, "16-bit", "excluded").quantized


def test_signed_codes_shifted_by_the_zero_point_fill_unsigned_ones():
    unsigned = torch.iinfo(torch.uint8)
    assert (unsigned.min, unsigned.max) == (-INT8_MAX - 1 + UINT8_ZERO, INT8_MAX + UINT8_ZERO)


@given(st.floats(1e-3, 1e3), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_a_range_reaches_both_ends_and_zero_has_a_code(amax, low, high, low_is_wide):
    low, high = (1.0, high) if low_is_wide else (low, 1.0)
    scale, zero = Decision(LAYER, "int8", "", amax, low=-low * amax, high=high * amax).int8_range
    assert -INT8_MAX - 1 <= zero <= INT8_MAX
    reached = (-INT8_MAX - 1 - zero) * scale, (INT8_MAX - zero) * scale
    half = scale / 2 * (1 + 1e-9)
    assert reached[0] <= -low * amax + 2 * half
    assert reached[1] >= high * amax - 2 * half
    assert scale <= amax / INT8_MAX * (1 + 1e-9)  # a zero point never costs resolution


def test_two_codes_are_a_symmetric_range_of_16_bits():
    both = Decision(LAYER, "int8", "", 3.0, low=-0.1, high=3.0, two_codes=True)
    assert both.int8_range == (3.0 / INT16_MAX, 0)
    assert (both.largest_code, Decision(LAYER, "int8", "").largest_code) == (INT16_MAX, INT8_MAX)


def test_a_report_is_the_same_class_under_both_names():
    assert report.Report is values.Report
    assert report.Watched is values.Watched


def test_a_report_knows_its_work_from_its_layers_unless_it_is_told_more():
    rows = (LayerReport("a", "linear", (), "int8", "", "", 1.0, 9.0, 300),
            LayerReport("b", "linear", (), "16-bit", "", "", flops=100))
    assert (Report("ready", rows).work, Report("ready", rows, flops=500).work) == (400, 500)
    assert Report("ready", rows, quantized_flops_share=0.75).quantized_flops == 300
    assert Report("ready", rows).quantized_flops == 0


UNNEEDED = ("PIL", "rich", "diffusers", "transformers", "typer")


@pytest.mark.slow
def test_the_backend_loads_nothing_that_only_a_pipeline_or_a_table_needs():
    """A module in another process that torch.compile sends here has torch alone."""
    code = f"""
import sys
import sdtrt_backend.backend
loaded = [m for m in {UNNEEDED} if m in sys.modules]
text = str(sdtrt_backend.Report("calibrating"))
print(loaded, text, [m for m in {UNNEEDED} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] state: calibrating []"


@pytest.mark.slow
def test_the_backend_can_be_imported_where_they_are_not_installed():
    code = f"""
import sys
for name in {UNNEEDED}:
    sys.modules[name] = None  # an import of it raises ImportError
import sdtrt_backend.backend
print(sdtrt_backend.Report("refused", (), ("a reason",)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "state: refused\nfallback: a reason\n"
