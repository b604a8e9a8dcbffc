"""What is said in a report reaches the reader, in text and in HTML."""

import json
import math
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdtrt_backend.graphs import Memory
from sdtrt_backend.report import (
    Chart,
    Report,
    Watched,
    comparison_picture,
    kept_layers,
    layer_rows,
    merged,
    numbered,
    render_text,
    result_html,
    result_json,
)
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


def test_work_that_stays_is_named_with_its_part_of_all_the_work():
    rows = (*LAYERS, LayerReport("patch", "conv3d", (64, 4, 1, 2, 2), "float32", "inductor", "conv3d: no 8-bit kernel", flops=95))
    text = render_text(Report("ready", rows, quantized_flops_share=0.75))
    assert "1 layers float32, 23.8% of the FLOPs, conv3d: no 8-bit kernel: patch" in text
    assert "FLOPs of all operations with a weight that run in 8 bits: 75.0%" in text


def test_a_ready_module_says_so_where_nothing_runs_in_8_bits():
    assert "run in 8 bits: 0.0%" in render_text(Report("ready", quantized_flops_share=0.0))
    assert "in 8 bits" not in render_text(Report("calibrating", quantized_flops_share=0.0))


def test_json_holds_every_layer(report):
    body = json.loads(result_json(RESULT, report))
    assert [layer["name"] for layer in body["layers"]] == ["noisy", "clean", "conv_in"]
    assert body["fallbacks"] == list(report.fallbacks)


def test_a_comparison_has_a_row_per_label_and_a_column_per_caption():
    pictures = np.random.default_rng(0).random((3, 64, 64, 3), dtype=np.float32)
    one, two = (comparison_picture([("row", pictures)] * n, ["a", "b", "c"]) for n in (1, 2))
    assert two.size[0] == one.size[0] > 3 * 128
    assert two.size[1] - one.size[1] > 128


# --- one report of many graphs -----------------------------------------------------------------------------------------
def block(i, state="ready", **more):
    rows = (LayerReport(f"blocks.{i}.to_q", "linear", (64, 64), "int8", "inductor", "", 1.0 + i, 30.0 + i, 300),
            LayerReport(f"blocks.{i}.norm.linear", "linear", (64, 64), "float32", "inductor", "final modulation", flops=100))
    given = {"error": 0.01 * i, "quantized_flops_share": 0.75 if state == "ready" else 0.0,
             "timings": {"sd_int8_ms": 2.0, "eager_ms": 3.0, "build_s": 5.0}} | more
    return Report(state, rows, **given)


def test_the_report_of_many_graphs_tells_of_all():
    one = merged([block(0), block(1), block(2)], ["blocks.0", "blocks.1", "blocks.2"])
    assert (one.state, len(one.layers), one.error, one.quantized_flops_share) == ("ready", 6, 0.02, 0.75)
    assert one.timings == {"sd_int8_ms": 6.0, "eager_ms": 9.0, "build_s": 15.0}
    assert one.work == 1200
    assert "state: ready (3 graphs)" in str(one)


@pytest.mark.parametrize(("states", "merges_to"), [
    (("ready", "ready"), "ready"), (("refused", "refused"), "refused"), (("calibrating", "calibrating"), "calibrating"),
    (("ready", "refused"), "partly refused"), (("calibrating", "refused", "ready"), "partly refused"),
    (("ready", "building"), "partly ready"), (("ready", "calibrating", "ready"), "partly ready")])
def test_the_state_of_many_graphs(states, merges_to):
    one = merged([Report(state) for state in states], [""] * len(states))
    assert one.state == merges_to
    assert str(one).startswith(f"state: {merges_to} ({len(states)} graphs")
    if len(set(states)) > 1:
        assert f"1 {states[1]}" in str(one).splitlines()[0]


def test_a_layer_that_runs_in_8_bits_for_some_sizes_only_has_both_rows_with_the_sizes():
    row = LayerReport("to_q", "linear", (64, 64), "int8", "inductor", "", 2.0, 30.0, 300)
    slow = replace(row, precision="float32", amax=None, sqnr_db=None, reason="slower in 8 bits", flops=10)
    noisier = replace(row, sqnr_db=25.0, amax=3.0)
    one = merged([Report("ready", (row,), sizes="2x4x64x64"), Report("ready", (noisier,), sizes="1x4x96x96"),
                  Report("ready", (slow,), sizes="1x4x8x8")], ["", "", ""])
    assert [(la.precision, la.where, la.amax, la.sqnr_db, la.flops) for la in one.layers] == [
        ("int8", ("2x4x64x64", "1x4x96x96"), 3.0, 25.0, 600), ("float32", ("1x4x8x8",), None, None, 10)]
    text = str(one)
    assert re.search(r"to_q +64x64 +inductor +3 +25.0 +2x4x64x64, 1x4x96x96", text)
    assert "slower in 8 bits: to_q (in 1x4x8x8)" in text


def test_layers_of_one_name_and_other_weights_stay_apart():
    row = LayerReport("to_q", "linear", (64, 64), "int8", "inductor", "", 2.0, 30.0, 300)
    one = merged([Report("ready", (row,)), Report("ready", (replace(row, shape=(32, 64)),))], ["a", "b"])
    assert [la.shape for la in one.layers] == [(64, 64), (32, 64)]


def test_a_graph_that_is_refused_lowers_the_share_and_is_named():
    refused = block(1, "refused", fallbacks=("it is slower; the module runs in its own precision",))
    one = merged([block(0), refused, block(2)], ["blocks.0", "blocks.1", "blocks.2"])
    assert one.quantized_flops_share == 0.5
    assert one.timings["sd_int8_ms"] == 4.0  # of those that run in 8 bits; built were all
    assert one.timings["build_s"] == 15.0
    text = str(one)
    assert "fallback: it is slower; the module runs in its own precision (in blocks.1)" in text
    assert "graph blocks.1: refused, relative error 0.0100, sd_int8_ms 2.00, eager_ms 3.00" in text


def test_the_share_says_where_work_is_not_counted_yet():
    one = merged([block(0), Report("calibrating", quantized_flops_share=0.0)], ["a", "b"])
    assert one.quantized_flops_share == 0.75
    assert "8 bits, without 1 of 2 graphs, whose work is not counted yet: 75.0%" in str(one)
    counted = merged([block(0), Report("calibrating", quantized_flops_share=0.0, flops=200)], ["a", "b"])
    assert counted.quantized_flops_share == 0.5
    assert "not counted" not in str(counted)


def test_milliseconds_have_no_sum_over_sizes_of_one_graph_nor_where_some_were_not_timed():
    sizes = merged([block(0, sizes="64x64"), block(0, sizes="96x96")], ["", ""])
    assert sizes.timings == {"build_s": 10.0}
    assert "graph 96x96: ready, 75.0% in 8 bits, relative error 0.0000, sd_int8_ms 2.00" in str(sizes)
    some = merged([block(0), block(1, timings={"sd_int8_ms": 2.0, "compile_ms": 7.0})], ["a", "b"])
    assert some.timings == {"sd_int8_ms": 4.0, "build_s": 5.0}


def test_what_every_graph_says_is_said_once_and_what_one_says_tells_where():
    one = merged([Report("ready", notes=("all", f"{i} ms")) for i in range(7)], [f"b{i}" for i in range(7)])
    assert one.notes == ("all", *(f"{i} ms" for i in range(7)))
    assert [line for line in str(one).splitlines() if line.startswith(("note", "and"))] == [
        "note: all", "note: 0 ms (in b0)", "note: 1 ms (in b1)", "note: 2 ms (in b2)",
        "note: and 4 more that differ from the last one in their numbers alone"]


def test_provenance_holds_what_no_graph_contradicts():
    facts = [{"front_door": "self-calibration", "calls": 5}, {"front_door": "self-calibration", "calls": 6}, {}]
    assert merged([Report("ready", provenance=f) for f in facts], "abc").provenance == {"front_door": "self-calibration"}


def test_fifty_graphs_are_a_page():
    layers = 12
    rows = [LayerReport(f"blocks.{i}.attn.to_{j}", "linear", (64, 64), "int8", "inductor", "", 1.0, 20.0 + i + j, 9)
            for i, j in product(range(50), range(layers))]
    kept = [LayerReport(f"blocks.{i}.norm.linear", "linear", (64, 64), "float32", "inductor", "modulation", flops=1)
            for i in range(50)]
    reports = [Report("ready" if i % 5 else "refused", (*rows[layers * i:layers * i + layers], kept[i]),
                      (f"slow: {i} ms",) * (not i % 5)) for i in range(50)]
    one = merged(reports, [f"blocks.{i}" for i in range(50)])
    text = str(one)
    assert len(text.splitlines()) < 90
    assert "state: partly refused (50 graphs: 40 ready, 10 refused)" in text
    assert "graph blocks.45: refused" in text
    assert "graph blocks.1: ready" not in text
    assert "blocks.0.attn.to_0 " in text  # the noisiest
    assert f"and {50 * layers - 60} 8-bit layers with less noise" in text
    assert "50 layers float32, 0.9% of the FLOPs, modulation: blocks.0-49.norm.linear" in text
    assert len(layer_rows(one)) == 601  # a page of HTML or a caller has them all
    assert len(json.loads(result_json(RESULT, one))["graphs"]) == 50
    assert len(kept_layers(one)["float32", "modulation"]) == 50


def test_no_report_cannot_be_merged():
    with pytest.raises(ValueError, match="at least one"):
        merged([], [])
    with pytest.raises(ValueError, match="zip"):
        merged([Report("ready")], ["a", "b"])


ROWS = st.builds(LayerReport, st.sampled_from(["a", "b.0.c", "b.1.c"]), st.just("linear"), st.sampled_from([(64, 64), (32, 64)]),
                 st.sampled_from(["int8", "float32"]), st.just("inductor"), st.sampled_from(["", "slow"]),
                 st.none() | st.floats(0.1, 9), st.none() | st.floats(0, 60), st.integers(0, 10**13))
TIMES = st.dictionaries(st.sampled_from(["sd_int8_ms", "eager_ms", "build_s", "fp8_attentions"]), st.integers(0, 99).map(float))
WATCHED = st.builds(Watched, st.integers(0, 9), st.integers(0, 9),
                    st.dictionaries(st.tuples(st.sampled_from("ab")), st.tuples(st.floats(0, 1), st.floats(0, 1))))
SENTENCES = st.lists(st.sampled_from(["one", "two", "3 ms", "4 ms", "5 ms"]), unique=True).map(tuple)
REPORTS = st.builds(Report, st.sampled_from(["ready", "refused", "calibrating", "building"]),
                    st.lists(ROWS, max_size=4).map(tuple), SENTENCES, SENTENCES, TIMES,
                    st.none() | st.floats(0, 1), st.none() | st.floats(0, 1),
                    st.dictionaries(st.sampled_from("xy"), st.integers(0, 1)), st.none() | WATCHED,
                    sizes=st.sampled_from(["", "64x64", "96x96"]))
NAMED = st.lists(st.tuples(REPORTS, st.sampled_from(["", "u", "v", "w"])), min_size=1, max_size=6)


def unordered(report):
    """What a report says, whatever the order of its rows and sentences."""
    rows = sorted(repr(replace(la, where=tuple(sorted(la.where)))) for la in report.layers)
    return (report.state, rows, sorted(report.fallbacks), sorted(report.notes), dict(report.timings), report.error,
            report.quantized_flops_share, dict(report.provenance), report.watched, report.flops,
            sorted(map(repr, report.pieces)))


def merge(named):
    return merged([report for report, _ in named], [name for _, name in named])


@given(NAMED, st.data())
def test_merging_is_associative(named, data):
    cut = data.draw(st.integers(0, len(named) - 1))
    parts = [(merge(part), "") for part in (named[:cut], named[cut:]) if part]
    assert merge(parts) == merge(named)
    assert str(merge(parts)) == str(merge(named))


@given(NAMED, st.randoms(use_true_random=False))
def test_the_order_of_graphs_is_the_order_of_rows_and_sentences_alone(named, random):
    shuffled = random.sample(named, len(named))
    assert unordered(merge(shuffled)) == unordered(merge(named))


@given(NAMED)
def test_a_merged_report_holds_what_its_pieces_hold(named):
    one, reports = merge(named), [report for report, _ in named]
    shares = [r.quantized_flops_share or 0.0 for r in reports if r.work]
    if one.quantized_flops_share is not None and shares:
        whole = len(reports) / one.work + 1e-9  # FLOPs are counted in whole ones
        assert min(shares) - whole <= one.quantized_flops_share <= max(shares) + whole
        assert abs(one.quantized_flops - sum(r.quantized_flops for r in reports)) <= 1
    assert one.work == sum(r.work for r in reports) == sum(la.flops for la in one.layers)
    assert set(one.fallbacks) == {s for r in reports for s in r.fallbacks}
    assert {(la.name, la.shape, la.precision) for la in one.layers} == {(a.name, a.shape, a.precision) for r in reports
                                                                        for a in r.layers}
    assert one.error == max((r.error for r in reports if r.error is not None), default=None)
    assert len({(la.name, la.shape, la.precision, la.reason, la.amax is None) for la in one.layers}) == len(one.layers)


@given(REPORTS)
def test_the_report_of_one_graph_tells_what_the_graph_tells(report):
    one = merged([report], [""])
    assert (one.state, one.fallbacks, one.notes, one.timings) == (report.state, report.fallbacks, report.notes, report.timings)
    assert (one.error, one.provenance, one.watched, one.work) == (report.error, report.provenance, report.watched, report.work)
    assert math.isclose(one.quantized_flops, report.quantized_flops, abs_tol=1)


def spelled_out(short):
    """The names that a shortened one stands for."""
    where = re.search(r"(?<![^.])(\d+(?:[-,]\d+)*)(?=\.|$)", short)
    if where is None:
        return [short]
    runs = [run.split("-") for run in where.group(1).split(",")]
    numbers = [n for run in runs for n in range(int(run[0]), int(run[-1]) + 1)]
    return [short[:where.start()] + str(n) + short[where.end():] for n in numbers]


PATHS = st.tuples(st.sampled_from(["a", "b.mid", ""]), st.integers(0, 12), st.sampled_from(["", ".x", ".x.3"]))


@given(st.lists(PATHS, unique=True))
def test_shortened_names_lose_none(parts):
    names = [f"{head}.{n}{tail}".strip(".") for head, n, tail in parts] + ["plain", "conv1"]
    assert sorted(name for short in numbered(names) for name in spelled_out(short)) == sorted(set(names))


def test_names_that_differ_in_one_number_are_one():
    assert numbered(["b.0.x", "b.1.x", "c", "b.2.x", "b.4.x", "b.1.y.7", "b.2.y.7", "conv1"]) == [
        "b.0-2,4.x", "c", "b.1-2.y.7", "conv1"]


def test_memory_of_graphs_and_the_peak_are_told(monkeypatch):
    memory = Memory()
    assert memory.graph_bytes() == 0
    memory.pool = (0, 7)
    segments = [{"total_size": 2**20, "segment_pool_id": (0, 7)}, {"total_size": 2**21, "segment_pool_id": (0, 0)},
                {"total_size": 2**20, "segment_pool_id": (0, 7)}]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert memory.graph_bytes() == 2**21
    text = str(Report("ready", memory={"unet": {"codes": 3_000_000, "graphs": memory.graph_bytes()}}, peak=12_000_000))
    assert "memory of unet: codes 3.0 MB, graphs 2.1 MB\n" in text
    assert "memory of the process on this GPU, at most so far: 12.0 MB" in text
    assert "at most so far" not in str(Report("ready"))
