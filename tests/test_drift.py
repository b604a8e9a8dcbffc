"""A step that leaves its calibrated ranges is noticed once; NaN and black fall back; who is not to blame is not blamed."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import sdtrt_backend
from sdtrt_backend import drift
from sdtrt_backend.lower import LOWERINGS, Lowered, reference
from sdtrt_backend.state import states

STEPS = (999, 666, 333, 1)


def call(module, timestep=500, seed=0, text=1.0, sample=1.0):
    noise = torch.Generator().manual_seed(1000 * seed + timestep)
    with torch.no_grad():
        return module(sample * torch.randn(2, 4, 8, 8, generator=noise), torch.tensor(timestep),
                      encoder_hidden_states=text * torch.randn(2, 5, 64, generator=noise))


class Broken:
    """The reference lowering with a switch: what ``spoil`` makes of its output."""

    def __init__(self):
        self.spoil = lambda y: y

    def lower(self, gm, example, options):
        step = reference.lower(gm, example, options).step
        return Lowered(lambda *tensors: tuple(self.spoil(y) for y in step(*tensors)))


@pytest.fixture
def broken(monkeypatch):
    broken = Broken()
    monkeypatch.setitem(LOWERINGS, "reference", replace(LOWERINGS["reference"], lower=broken.lower))
    return broken


@pytest.fixture
def ready(denoiser):
    """A denoiser in use in 8 bits; options as for torch.compile."""
    def make(**options):
        compiled = torch.compile(denoiser, backend="sd_int8", options={"engine": "reference", **options})
        for seed in (0, 1):
            for t in STEPS:
                call(compiled, t, seed)
        call(compiled, 999, 2)
        assert sdtrt_backend.explain(compiled).state == "ready"
        return compiled
    return make


def notes(compiled):
    return [n for n in sdtrt_backend.explain(compiled).notes if "calibrated ranges" in n]


def test_inputs_beyond_the_calibrated_range_are_said_once_with_the_layers(ready, caplog):
    compiled = ready()
    for i in range(300):
        call(compiled, seed=i, text=10.0)
    (note,) = notes(compiled)
    assert "context_k" in note
    assert "recalibrate on prompts like these" in note
    assert len([r for r in caplog.records if "calibrated ranges" in r.message]) == 1
    report = sdtrt_backend.explain(compiled)
    assert report.state == "ready"
    assert report.watched.groups["context_k", "context_v"][1] > 0.2 > report.watched.groups["context_k", "context_v"][0]
    assert "of what a layer reads lay beyond its calibrated range (to_out, 0.0" in str(report)


def test_drift_shows_within_a_first_picture(ready):
    compiled = ready()
    for i in range(max(drift.FIRST) + 1):
        call(compiled, seed=i, text=10.0)
    assert notes(compiled)


@pytest.mark.parametrize("rule", ["mean_max", "global_min"])
def test_inputs_like_those_of_the_calibration_are_no_drift(ready, rule, monkeypatch):
    """A rule that clips on purpose is no drift either."""
    monkeypatch.setattr(drift, "INTERVALS", (2,))
    compiled = ready(rule=rule)
    for i in range(80):
        call(compiled, STEPS[i % 4], seed=10 + i)
    assert notes(compiled) == []
    watched = sdtrt_backend.explain(compiled).watched
    assert watched.samples > 40
    assert max(lately for _, lately in watched.groups.values()) < drift.DRIFTED_SHARE


def test_one_odd_input_among_many_is_no_drift(ready, monkeypatch):
    monkeypatch.setattr(drift, "INTERVALS", (1,))
    compiled = ready()
    for i in range(20):
        call(compiled, seed=i, text=1.2 if i % 5 == 0 else 1.0)
    assert notes(compiled) == []


@pytest.mark.slow
def test_the_unfused_graph_runs_on_sampled_calls_only(ready, monkeypatch):
    ran = []
    monkeypatch.setattr(drift.Drift, "sample", lambda self, step, tensors: ran.append(self.called))
    compiled = ready()
    for i in range(230):
        call(compiled, seed=i)
    every = 101  # the reference lowering is not timed
    assert ran == [*drift.FIRST, every, 2 * every]


def test_the_interval_keeps_samples_under_their_share_of_the_time(monkeypatch):
    counts = drift.Counter((("a",),), lambda x: x)
    monkeypatch.setattr(drift.measure, "step_ms", lambda *_, **__: [4.0])
    for step_ms, every in ((None, 101), (4.0, 101), (2.0, 211), (1.0, 401), (0.001, drift.INTERVALS[-1])):
        assert drift.watch(counts, [torch.zeros(1)], step_ms).every == every


def test_a_sample_counts_what_the_graph_feeds_each_group(ready, denoiser, steps):
    """Against forward hooks on the module itself, with a range nobody keeps."""
    compiled = ready(alpha=None)
    state = states(compiled)[0]
    seen = {}
    with torch.no_grad():
        hooks = [getattr(denoiser, name).register_forward_pre_hook(lambda m, a, name=name: seen.setdefault(name, a[0]))
                 for name in ("conv1", "to_q", "context_k")]
        call(denoiser, 999, 2, text=3.0)
    for hook in hooks:
        hook.remove()
    (watch,) = (v.watch for v in steps[-1].variants.values())
    noise = torch.Generator().manual_seed(2999)
    sample, text = torch.randn(2, 4, 8, 8, generator=noise), 3.0 * torch.randn(2, 5, 64, generator=noise)
    with torch.no_grad():
        shares = dict(zip(watch.counter.groups, watch.counter.shares(sample, torch.tensor(999), text).tolist(), strict=True))
    for group, name in ((("conv1",), "conv1"), (("to_q", "to_k", "to_v"), "to_q"), (("context_k", "context_v"), "context_k")):
        layer = state.recipe.layers[name]
        limit = max(layer.amax, float(state.recipe.amax_by_timestep[layer.group][:, 0].max()))
        assert shares[group] == pytest.approx(float((seen[name].abs() > limit).float().mean()), abs=2e-3)


def test_a_sample_reads_no_16_bit_weight_of_a_quantised_layer(ready, steps):
    """They may have left the GPU."""
    ready()
    (built,) = (v.watch for v in steps[-1].variants.values())
    held = {t.data_ptr() for t in built.counter.shares.__self__.buffers()}
    quantised = {name for group in built.counter.groups for name in group}
    assert quantised == {layer.name for layer in steps[-1].state.report().layers if layer.precision == "int8"}
    assert not any(layer.weight.data_ptr() in held for layer in steps[-1].plain.layers if layer.name in quantised)


def test_a_graph_that_quantises_in_an_unknown_way_still_has_its_outputs_watched(ready, broken, monkeypatch):
    monkeypatch.setattr(drift, "QUANTIZE", ())
    compiled = ready()
    for i in range(6):
        call(compiled, seed=i)
    assert sdtrt_backend.explain(compiled).watched.groups == {}
    broken.spoil = lambda y: y * float("nan")
    assert call(compiled).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "words"), [
    (lambda y: y * float("nan"), "NaN or infinite values"), (lambda y: y / 0, "NaN or infinite values"),
    (torch.zeros_like, "nothing but zeros")])
def test_a_bad_output_of_the_8_bit_step_alone_falls_back_with_the_right_result(broken, ready, denoiser, spoil, words):
    compiled = ready()
    broken.spoil = spoil
    torch.testing.assert_close(call(compiled, 333, 3), call(denoiser, 333, 3), rtol=1e-4, atol=1e-5)
    report = sdtrt_backend.explain(compiled)
    assert report.state == "refused"
    (said,) = report.fallbacks
    assert f"the 8-bit step gave {words} on call 2 at timestep 333" in said
    assert "runs in its own precision" in said
    torch.testing.assert_close(call(compiled, 1, 3), call(denoiser, 1, 3), rtol=1e-4, atol=1e-5)


def test_nan_of_the_users_own_is_not_blamed_on_the_8_bit_step(ready, denoiser):
    compiled = ready()
    for i in range(3):
        assert not call(compiled, seed=i, sample=float("nan")).isfinite().any()
    report = sdtrt_backend.explain(compiled)
    assert (report.state, report.fallbacks) == ("ready", ())
    assert sum("was given NaN or infinite inputs" in n for n in report.notes) == 1
    assert call(compiled).isfinite().all()


def test_an_overflow_that_the_module_has_itself_is_not_blamed(ready, denoiser, broken):
    compiled = ready()
    broken.spoil = lambda y: y * float("nan")
    call(compiled, sample=1e37)
    report = sdtrt_backend.explain(compiled)
    assert not call(denoiser, sample=1e37).isfinite().all()
    assert (report.state, report.fallbacks) == ("ready", ())
    assert any("gives the same in its own precision" in n for n in report.notes)


def test_a_module_that_gives_zeros_itself_is_asked_once(ready, broken, steps, monkeypatch):
    compiled, asked = ready(), []
    zeros = lambda *args: asked.append(1) or (torch.zeros(2, 4, 8, 8),)  # noqa: E731
    monkeypatch.setattr(steps[-1].plain.graph, "forward", zeros)
    broken.spoil = torch.zeros_like
    for _ in range(3):
        assert not call(compiled).any()
    assert sdtrt_backend.explain(compiled).state == "ready"
    assert len(asked) == 1


def test_watch_false_switches_it_off(ready, broken):
    compiled = ready(watch=False)
    broken.spoil = lambda y: y * float("nan")
    assert not call(compiled, text=10.0).isfinite().any()
    report = sdtrt_backend.explain(compiled)
    assert (report.state, report.fallbacks, report.watched) == ("ready", (), None)


class Slow(drift.Later):
    """Numbers that arrive when the test says so: the stand-in of a GPU."""

    arrived = False

    def ready(self):
        return Slow.arrived


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(drift, "Later", Slow)
    monkeypatch.setattr("sdtrt_backend.unit.Later", Slow)
    monkeypatch.setattr(Slow, "arrived", False)


@pytest.mark.slow
def test_numbers_that_arrive_later_refuse_the_step_on_a_later_call(slow, broken, ready, denoiser):
    compiled = ready()
    broken.spoil = lambda y: y * float("nan")
    assert not call(compiled, 666, 3).isfinite().any()  # nobody waited
    broken.spoil = lambda y: y
    call(compiled, 333, 3)
    assert sdtrt_backend.explain(compiled).state == "ready"
    Slow.arrived = True
    torch.testing.assert_close(call(compiled, 1, 3), call(denoiser, 1, 3), rtol=1e-4, atol=1e-5)
    (said,) = sdtrt_backend.explain(compiled).fallbacks
    assert "NaN or infinite values on call 2 at timestep 666" in said
    assert "results since that call are to be made again" in said


def test_the_report_looks_at_numbers_that_arrived_after_the_last_call(slow, broken, ready):
    compiled = ready()
    broken.spoil = lambda y: y * float("nan")
    call(compiled)
    Slow.arrived = True
    assert sdtrt_backend.explain(compiled).state == "refused"


def test_inputs_too_large_to_keep_are_judged_by_being_finite(slow, broken, ready, monkeypatch):
    monkeypatch.setattr("sdtrt_backend.unit.KEPT_BYTES", 0)
    compiled = ready()
    broken.spoil = lambda y: y * float("nan")
    call(compiled, sample=float("nan"))
    Slow.arrived = True
    assert sdtrt_backend.explain(compiled).state == "ready"
    Slow.arrived = False
    call(compiled)
    Slow.arrived = True
    (said,) = sdtrt_backend.explain(compiled).fallbacks
    assert "from finite inputs" in said


def test_drift_is_noticed_from_numbers_that_arrive_later(slow, ready):
    compiled = ready()
    for i in range(30):
        call(compiled, seed=i, text=10.0)
    assert notes(compiled) == []
    Slow.arrived = True
    assert len(notes(compiled)) == 1


def test_threads_say_a_fallback_and_a_drift_once(ready, broken):
    compiled, errors = ready(), []

    def work():
        try:
            for i in range(20):
                call(compiled, seed=i, text=10.0)
        except Exception as error:  # collected: an assertion in a thread would be lost
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(notes(compiled)) == 1


def test_a_sample_without_memory_stops_the_watch_of_ranges_and_says_so(ready, steps):
    compiled = ready()

    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    for sizes, old in steps[-1].variants.items():
        watch = drift.Watch(drift.Counter(old.watch.counter.groups, no_memory), old.watch.baseline, 1)
        steps[-1].variants[sizes] = replace(old, made=replace(old.made, watch=watch))
    for i in range(3):
        call(compiled, seed=i)
    assert sum("the drift watch stopped" in n for n in sdtrt_backend.explain(compiled).notes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_peaks_tell_nan_infinity_and_zero_in_every_precision(dtype):
    t = torch.tensor([-3.0, 2.0], dtype=dtype)
    nan, inf = torch.tensor([1.0, float("nan"), 2.0], dtype=dtype), torch.tensor([1.0, -float("inf")], dtype=dtype)
    assert drift.peaks([t, t * 0, t[:0]]).tolist() == [3.0, 0.0, 0.0]
    assert drift.trouble(drift.peaks([t, t * 0]).tolist()) is None
    assert drift.trouble(drift.peaks([t * 0, t[:0]]).tolist()) == drift.ZEROS
    assert all(drift.trouble(drift.peaks([t, bad]).tolist()) == drift.NOT_FINITE for bad in (nan, inf))
    assert drift.trouble([]) is None
