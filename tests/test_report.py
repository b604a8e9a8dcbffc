"""What is said in a report reaches the reader, in text and in HTML."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sdtrt_backend.report import Chart, Report, Watched, comparison_picture, render_text, result_html, result_json
from sdtrt_backend.values import LayerReport

LAYERS = (LayerReport("noisy", "linear", (64, 64), "int8", "inductor", "", 1.5, 12.0, 100),
          LayerReport("clean", "conv2d", (64, 64, 3, 3), "int8", "inductor", "", 2.5, 40.0, 200),
          LayerReport("conv_in", "conv2d", (64, 4, 3, 3), "16-bit", "inductor", "few <channels>", None, None, 5))
RESULT = {"title": "a <title>", "machine": "a machine", "versions": {"torch": "2"}, "quantized_flops_share": 0.9,
          "step_ms": {"eager": 30.0, "compile": 20.0, "sd_int8": 10.0}, "psnr_db": {"mean": 30.0, "min": 20.0},
          "ssim": {"mean": 0.9, "min": 0.8}, "cold_start_s": 5.0, "compile_cold_start_s": 4.0}


@pytest.fixture
def report():
    return Report("ready", LAYERS, ("a fallback & its reason",), ("a note",), {"sd_int8_ms": 10.0}, 0.01, 0.98)


def test_text_says_state_fallbacks_notes_and_every_layer_with_its_reason(report):
    text = render_text(report)
    assert str(report) == text
    for said in ("state: ready", "a fallback & its reason", "a note", "98.0%", "0.0100", "few <channels>: conv_in"):
        assert said in text
    assert text.index("noisy") < text.index("clean")  # the noisiest layer first


def test_a_report_without_layers_is_still_readable():
    assert render_text(Report("calibrating")) == "state: calibrating"


def test_html_is_self_contained_and_escaped(report):
    page = result_html(RESULT, report, comparison_picture([("a", np.zeros((1, 8, 8, 3), np.float32))], ["b"]))
    assert "data:image/png;base64," in page
    assert "few &lt;channels&gt;" in page
    assert "a &lt;title&gt;" in page
    assert "2.00x" in page
    assert "http" not in page


def test_charts_and_the_drift_watch_are_on_the_page(report):
    picture = comparison_picture([("a", np.zeros((1, 8, 8, 3), np.float32))], ["b"])
    watched = Watched(40, 3, {("first",): (0.0, 0.001), ("worst", "twin"): (0.002, 0.05)})
    page = result_html(RESULT, replace(report, watched=watched), picture, [Chart("noise", "Noise <dB>", "What it is.", picture)])
    assert page.count("data:image/png;base64,") == 2
    assert "Noise &lt;dB&gt;" in page
    assert "What it is." in page
    said = "3 sampled: at most 5.00% of what a layer reads lay beyond its calibrated range (worst, 0.20% when it was built)"
    assert said in page
    assert said in render_text(replace(report, watched=watched))
    assert str(Watched(40, 0, {})) == "40 calls in 8 bits watched, 0 sampled"


def test_json_holds_every_layer(report):
    body = json.loads(result_json(RESULT, report))
    assert [layer["name"] for layer in body["layers"]] == ["noisy", "clean", "conv_in"]
    assert body["fallbacks"] == list(report.fallbacks)


def test_a_comparison_has_a_row_per_label_and_a_column_per_caption():
    pictures = np.random.default_rng(0).random((3, 64, 64, 3), dtype=np.float32)
    one, two = (comparison_picture([("row", pictures)] * n, ["a", "b", "c"]) for n in (1, 2))
    assert two.size[0] == one.size[0] > 3 * 128
    assert two.size[1] - one.size[1] > 128
