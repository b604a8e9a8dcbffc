"""The measured choice, with clocks and kernels made here."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from sdtrt_backend import kernels, ops
from sdtrt_backend.kernels import (
    Choice,
    CpuChooser,
    MeasuredChooser,
    Problem,
    Provider,
    Unsteady,
    gpu,
    measurements,
    missing,
    onednn,
    providers,
    timing,
)
from sdtrt_backend.kernels.timing import Refusal
from sdtrt_backend.stats import relative_error

LINEAR = Problem("linear", (8, 32), (16, 32), (1, 1), (0, 0), torch.float16)
CONV = Problem("conv2d", (1, 32, 6, 6), (16, 32, 3, 3), (1, 1), (1, 1), torch.float16)
CPU = torch.device("cpu")


# what a kernel of this name raises
ERRORS = {"refuses": RuntimeError("CUDNN_STATUS_NOT_SUPPORTED; no such shape"), "ours": ValueError("width 7 is odd"),
          "hungry": torch.OutOfMemoryError("CUDA out of memory"), "starved": RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
          "unlucky": RuntimeError("CUDNN_STATUS_EXECUTION_FAILED"), "mistaken": TypeError("run() takes 3 arguments")}


def rows(op):
    return (Provider("good", op, "int8", "", lambda precision: [("slow",), ("fast", "slow2"), ("wrong", "fast2"), ("refuses",)],
                     ("spare",)),
            Provider("other", op, "int8", "not_installed_anywhere", lambda precision: [("",)]))


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Kernels that take as long as their name says; returns the names that were timed."""
    timed = []

    def kernel(op):
        def run(*arguments):
            *arguments, variant = arguments
            if variant in ERRORS:
                raise ERRORS[variant]
            run.last = variant
            y = ops.KERNELS[op, "reference"](*arguments)
            return y * 2 if variant == "wrong" else y
        return run

    def graph_ms(calls):
        calls[0]()
        name = (getattr(calls[0], "args", None) or (None,))[-1]
        timed.append(name)
        return {"slow": 3.0, "fast": 1.0, "slow2": 3.0, "spare": 2.0}.get(name, 5.0) if isinstance(name, str) else 5.0

    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path))
    monkeypatch.setattr(providers, "register", lambda: None)
    monkeypatch.setattr(measurements, "device_key", lambda device: {"gpu": "made here"})
    monkeypatch.setattr(timing, "graph_ms", graph_ms)
    monkeypatch.setattr(timing, "COLD_BYTES", 1)
    for op in ("linear8", "conv8"):
        monkeypatch.setitem(ops.KERNELS, (op, "good"), kernel(op))
    return timed


@pytest.mark.parametrize(("problem", "op"), [(LINEAR, "linear8"), (CONV, "conv8")])
def test_the_fastest_correct_kernel_is_chosen_and_remembered(clock, monkeypatch, problem, op):
    monkeypatch.setattr(providers, "PROVIDERS", rows(op))
    assert MeasuredChooser(CPU).best(problem, "int8") == Choice("good:fast", 1.0)
    # a wrong result is not timed, a refusal is no error, and of the families only the fastest one is timed whole
    assert clock == ["slow", "fast", "slow2"]
    assert MeasuredChooser(CPU).best(problem, "int8").kernel == "good:fast"
    assert clock == ["slow", "fast", "slow2"]


def test_the_fallback_is_timed_where_all_else_is_refused(clock, monkeypatch):
    row = Provider("good", "linear8", "int8", "", lambda precision: [("refuses", "wrong"), ("wrong",)], ("spare",))
    monkeypatch.setattr(providers, "PROVIDERS", (row,))
    assert MeasuredChooser(CPU).best(LINEAR, "int8") == Choice("good:spare", 2.0)


def test_where_every_first_one_is_refused_the_others_are_timed(clock, monkeypatch):
    row = Provider("good", "linear8", "int8", "", lambda precision: [("refuses", "fast"), ("wrong", "slow")], ("spare",))
    monkeypatch.setattr(providers, "PROVIDERS", (row,))
    assert MeasuredChooser(CPU).best(LINEAR, "int8") == Choice("good:fast", 1.0)
    assert clock == ["fast", "slow"]


def test_a_provider_that_stands_in_for_another_is_timed_without_that_one_only(clock, monkeypatch):
    for other, times in (("torch", []), ("not_installed_anywhere", ["fast"])):
        row = Provider("good", "linear8", "int8", "", lambda precision: [("fast",)], instead_of=other)
        monkeypatch.setattr(providers, "PROVIDERS", (row,))
        monkeypatch.setattr(measurements, "device_key", lambda device, other=other: {"gpu": other})
        MeasuredChooser(CPU).best(LINEAR, "int8")
        assert clock == times


def test_without_a_kernel_there_is_no_choice(clock, monkeypatch):
    monkeypatch.setattr(providers, "PROVIDERS", (Provider("good", "linear8", "int8", "", lambda p: [("refuses",)]),))
    assert MeasuredChooser(CPU).best(LINEAR, "int8") is None
    assert MeasuredChooser(CPU).best(LINEAR, "fp8") is None


def only(monkeypatch, *variants, op="linear8"):
    monkeypatch.setattr(providers, "PROVIDERS", (Provider("good", op, "int8", "", lambda p: [(v,) for v in variants]),))


def stored(folder):
    """What the store has on disk, by name; nothing without a file."""
    files = [json.loads(file.read_text())["values"] for file in folder.glob("kernels-*.json")]
    return {name: value for values in files for name, value in values.items()}


@pytest.mark.parametrize("variant", ["hungry", "starved"])
def test_memory_that_ran_out_is_no_refusal_and_is_not_remembered(clock, monkeypatch, tmp_path, variant):
    only(monkeypatch, "fast", variant)
    with pytest.raises(torch.OutOfMemoryError):
        MeasuredChooser(CPU).best(LINEAR, "int8")
    assert clock == ["fast", "fast"]  # all of it was tried twice
    assert not stored(tmp_path)
    only(monkeypatch, "slow")
    assert MeasuredChooser(CPU).best(LINEAR, "int8") == Choice("good:slow", 3.0)


def test_memory_that_is_there_at_the_second_try_is_enough(clock, monkeypatch, tmp_path):
    only(monkeypatch, "fast")
    plain, tries = ops.KERNELS["linear8", "good"], []

    def once(*arguments):
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")
        return plain(*arguments)

    monkeypatch.setitem(ops.KERNELS, ("linear8", "good"), once)
    assert MeasuredChooser(CPU).best(LINEAR, "int8") == Choice("good:fast", 1.0)
    assert stored(tmp_path) == {f"int8 {LINEAR}": {"good:fast": 1.0}}


def test_a_shape_that_is_not_taken_is_remembered_with_its_reason(clock, monkeypatch, tmp_path):
    only(monkeypatch, "refuses", "ours", "wrong")
    reasons = MeasuredChooser(CPU).reasons(LINEAR, "int8")
    assert reasons[:2] == ("good:refuses: RuntimeError: CUDNN_STATUS_NOT_SUPPORTED; no such shape",
                           "good:ours: ValueError: width 7 is odd")
    assert reasons[2].startswith("good:wrong: its result is wrong: relative error 1")
    assert list(stored(tmp_path)[f"int8 {LINEAR}"]) == ["good:ours", "good:refuses", "good:wrong"]
    only(monkeypatch, "fast")
    assert MeasuredChooser(CPU).reasons(LINEAR, "int8")[0].startswith("good:ours")  # the same three, read again
    assert MeasuredChooser(CPU).best(LINEAR, "int8") is None


def test_a_failure_that_need_not_last_stands_for_this_process_only(clock, monkeypatch, tmp_path):
    only(monkeypatch, "unlucky", "slow")
    first = MeasuredChooser(CPU)
    assert first.best(LINEAR, "int8") == first.best(LINEAR, "int8") == Choice("good:slow", 3.0)
    assert clock == ["slow"]
    assert not stored(tmp_path)
    only(monkeypatch, "fast")
    assert first.best(LINEAR, "int8") == Choice("good:slow", 3.0)
    assert MeasuredChooser(CPU).best(LINEAR, "int8") == Choice("good:fast", 1.0)


def test_a_mistake_of_ours_is_raised(clock, monkeypatch, tmp_path):
    only(monkeypatch, "fast", "mistaken")
    with pytest.raises(TypeError, match="takes 3 arguments"):
        MeasuredChooser(CPU).best(LINEAR, "int8")
    assert not stored(tmp_path)


def test_where_a_kernel_runs_there_are_no_reasons(clock, monkeypatch):
    only(monkeypatch, "refuses", "fast")
    assert MeasuredChooser(CPU).reasons(LINEAR, "int8") == ()
    assert MeasuredChooser(CPU).reasons(LINEAR, "fp8") == ("no package with fp8 kernels for linear is installed",)


def test_a_file_of_before_reasons_were_kept_is_read_as_no_kernel(clock, monkeypatch):
    chooser = MeasuredChooser(CPU)
    chooser.measurements.store.values[f"int8 {LINEAR}"] = {"cudnn:4.49": None, "cudnn:4.26": None}
    assert chooser.best(LINEAR, "int8") is None
    assert chooser.reasons(LINEAR, "int8")[0] == "cudnn:4.49: it was refused when it was measured"


def test_a_dilated_convolution_has_no_kernel_on_a_gpu_and_nothing_is_timed(clock, monkeypatch):
    only(monkeypatch, "fast", op="conv8")
    dilated = Problem("conv2d", (1, 32, 6, 6), (16, 32, 3, 3), (1, 1), (1, 1), torch.float16, (2, 2))
    assert MeasuredChooser(CPU).best(dilated, "int8") is None
    assert MeasuredChooser(CPU).reasons(dilated, "int8") == ("no 8-bit kernel takes a dilated convolution",)
    assert clock == []
    assert str(dilated) == str(CONV).replace(" float16", " dilation 2x2 float16")


@pytest.mark.parametrize(("error", "lasting"), [
    (RuntimeError("[cudnn_frontend] ERROR: CUDNN_STATUS_NOT_SUPPORTED"), True),
    (type("cudnnGraphNotSupportedError", (Exception,), {})("No valid engine configs for Conv"), True),
    (type("OutOfResources", (Exception,), {})("out of resource: shared memory, Required: 300000, Hardware limit: 200000"), True),
    (RuntimeError("Expected trailing dimension of mat1 to be divisible by 16"), True),
    (NotImplementedError("no kernel"), True),
    (RuntimeError("CUDA error: unspecified launch failure"), False),
    (OSError("libcudnn.so.9: cannot open shared object file"), False),
])
def test_what_a_library_says_tells_whether_it_lasts(error, lasting):
    def work():
        raise error

    found = timing.attempt(work)
    assert isinstance(found, Refusal)
    assert found.lasting is lasting
    assert str(error) in found.reason


@pytest.mark.parametrize(("ms", "taken"), [(1.5, True), (3.5, False), (None, False)], ids=["faster", "slower", "refused"])
def test_gelu_is_applied_by_the_product_where_that_is_faster(clock, monkeypatch, ms, taken):
    asked = []

    def graph_ms(calls):
        calls[0]()
        return 1.0 if calls[0].func is ops.KERNELS["linear8", "cudnn"] else ms

    def fused(*arguments):
        *arguments, variant = arguments
        asked.append(variant)
        if ms is None:
            raise ERRORS["refuses"]
        return ops.KERNELS["linear_gelu8", "reference"](*arguments)

    monkeypatch.setitem(ops.KERNELS, ("linear8", "cudnn"), lambda *a: ops.KERNELS["linear8", "reference"](*a))
    monkeypatch.setitem(ops.KERNELS, ("linear_gelu8", "cudnn"), fused)
    monkeypatch.setattr(providers, "PROVIDERS", (Provider("cudnn", "linear8", "int8", "", lambda p: [("4.2",)]),))
    monkeypatch.setattr(timing, "graph_ms", graph_ms)
    chooser = MeasuredChooser(CPU)
    monkeypatch.setattr(chooser, "quantize_ms", lambda numel, dtype: 4.0)  # a pass is half of it: 1.0 + 2.0 in two steps
    assert chooser.gelu_kernel(LINEAR, torch.int8) == ("cudnn:4.2" if taken else None)
    assert chooser.gelu_saves(LINEAR, torch.int8) == (1.5 if taken else 0.0)
    assert asked[:1] == ["4.2"]


def test_torchs_own_attention_is_a_candidate_that_pays_for_its_quantisation(clock, monkeypatch):
    chooser = MeasuredChooser(CPU)
    monkeypatch.setattr(chooser, "quantize_ms", lambda numel, dtype: 7.0)
    monkeypatch.setattr(providers, "installed", lambda module: False)
    assert chooser.attention_times((1, 2, 8, 16), 8, torch.float32, torch.float32) == {"torch": 5.0}
    assert chooser.attention_times((1, 2, 8, 16), 8, torch.float32, torch.int8) == {"torch": 12.0}
    assert chooser.attention_kernel((1, 2, 8, 16), 8, torch.float32, torch.int8) is None


@pytest.fixture
def attentions(clock, monkeypatch):
    """Sets the milliseconds of variants "s1" and "s2" of a Triton attention; returns (setter, names that ran, in order)."""
    times, ran = {}, []

    def run(q, *arguments):
        *arguments, variant = arguments
        ran.append((variant, arguments[-1]))
        return ops.KERNELS["attention8", "reference"](q, *arguments)

    def graph_ms(calls):
        calls[0]()
        return times.get((getattr(calls[0], "args", None) or (None,))[-1], 5.0)

    monkeypatch.setitem(ops.KERNELS, ("attention8", "triton"), run)
    monkeypatch.setattr(timing, "graph_ms", graph_ms)
    monkeypatch.setattr(providers, "attention_variants", lambda tokens, width: ("s1", "s2"))
    monkeypatch.setattr(MeasuredChooser, "quantize_ms", lambda *_: 1.0)
    return times.update, ran


@pytest.mark.parametrize(("ms", "wide", "narrow"), [
    ({"s1": 4.0, "s2": 3.0}, ["s1", "s2"], ["s1", "s2"]),  # faster than torch's 5.0
    ({"s1": 6.1, "s2": 5.9}, ["s1", "s2"], ["s2"]),  # one is faster than torch's and its pass of 1.0
    ({"s1": 7.0, "s2": 4.0}, ["s1"], []),  # far from torch's: no other configuration is compiled for 16 bits
])
def test_of_a_slow_attention_kernel_few_configurations_are_compiled(attentions, ms, wide, narrow):
    set_times, ran = attentions
    set_times(ms)
    query, half = (1, 2, 32, 16), torch.float16
    times = MeasuredChooser(CPU).attention_times(query, 32, half, half)
    assert list(times) == ["torch", *(f"triton:{v}" for v in wide)]
    assert [v for v, _ in dict.fromkeys(ran)] == wide
    ran.clear()
    MeasuredChooser(CPU).attention_times(query, 32, half, torch.int8)
    assert [v for v, dtype in dict.fromkeys(ran)] == narrow


@pytest.mark.parametrize("tokens", [77, 4096, 32768])
def test_the_tokens_of_a_video_take_no_fp8_attention_out_of_the_error_bound(clock, monkeypatch, tokens):
    """What is compared with the kernel's result is itself rounded to e4m3: that is half of the bound at most."""
    errors = []

    def compared(result, expected, bound):
        errors.append((relative_error(result, expected), bound))

    def exact(q, k, v, scales, scale, dtype):
        return torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).transpose(
            1, 2).flatten(2)

    monkeypatch.setattr(providers, "installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(timing, "checked", compared)
    for kernel in providers.ATTENTION_FP8:
        monkeypatch.setitem(ops.KERNELS, ("attention_fp8", kernel), exact)
    assert MeasuredChooser(CPU).attention_fp8((1, 2, 64, 16), tokens) == Choice("cudnn", 5.0)
    (error, bound), (of_fa3, _) = errors
    assert 0.01 < error < bound / 2
    assert of_fa3 < error  # its result is not rounded to e4m3


def test_attention_over_fp8_codes_is_asked_of_what_is_installed_and_made_for_the_gpu(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(providers, "installed", lambda module: module == "fa3_fwd_interface")
    chooser = MeasuredChooser(CPU)
    assert chooser.attention_fp8((1, 2, 64, 16), 77) is None
    assert chooser.measurements.store.values["attention fp8 1x2x64x16 over 77"] == {
        "cudnn": "nvidia-cudnn-frontend is not installed", "fa3": "fa3-fwd has no fp8 attention for compute capability 12.0"}


def test_a_product_at_the_rate_of_the_fastest_one_has_nothing_to_win(clock, monkeypatch):
    monkeypatch.setattr(providers, "PROVIDERS", rows("linear8"))
    chooser, small = MeasuredChooser(CPU), replace(LINEAR, x=(LINEAR.x[0] // 2, LINEAR.x[1]))
    assert small.flops == LINEAR.flops / 2
    assert chooser.room(LINEAR, "int8") == 1  # nothing to compare it with
    assert chooser.room(small, "int8") == 0.5  # as slow as one of twice its work
    as_fast = replace(LINEAR, dtype=torch.bfloat16)
    assert chooser.room(as_fast, "int8") == 0
    other = MeasuredChooser(CPU)  # of another process, which meets the last one first
    assert other.room(as_fast, "int8") == 0
    assert other.room(LINEAR, "int8") == 1
    assert CONV.flops == 2 * CONV.x[0] * CONV.x[2] * CONV.x[3] * math.prod(CONV.weight)


def names_tried(chooser, clock, problem):
    clock.clear()
    assert chooser.best(problem, "int8").kernel == "good:fast"
    assert "fast" in clock
    return [name for name in clock if name in ("slow", "slow2")]


def test_a_configuration_that_lost_twice_is_not_compiled_for_other_linears(clock, monkeypatch):
    monkeypatch.setattr(providers, "PROVIDERS", (*rows("linear8"), *rows("conv8")))
    chooser, asked = MeasuredChooser(CPU), [LINEAR, CONV, LINEAR, LINEAR, CONV]
    tried = [names_tried(chooser, clock, replace(problem, weight=(16 + 16 * times, *problem.weight[1:])))
             for times, problem in enumerate(asked)]
    both = ["slow", "slow2"]
    assert tried == [both, both, both, [], both]  # a convolution's best one depends on its place in the model


def test_a_configuration_that_lost_once_by_far_is_not_compiled_for_other_large_linears(clock, monkeypatch):
    monkeypatch.setattr(providers, "PROVIDERS", rows("linear8"))
    monkeypatch.setattr(gpu, "LARGE", LINEAR.x[0] * LINEAR.weight[0])
    monkeypatch.setattr(gpu, "NEAR_ENOUGH", math.inf)  # here the same milliseconds are of any size
    chooser, (rows_in, width) = MeasuredChooser(CPU), LINEAR.x
    like_it = [replace(LINEAR, x=(rows_in * n, width)) for n in (1, 2)]
    longer, small = (replace(LINEAR, x=(rows_in * 3, 2 * width), weight=(16, 2 * width)), replace(LINEAR, weight=(8, width)))
    assert [names_tried(chooser, clock, p) for p in (*like_it, longer, small)] == [
        ["slow", "slow2"], [], ["slow", "slow2"], ["slow", "slow2"]]


@pytest.mark.parametrize(("large", "share", "kernel"), [(True, 0.95, "slow"), (True, 0.85, "fast"), (False, 0.95, "fast")])
def test_a_large_linear_near_the_highest_rate_takes_the_first_configuration(clock, monkeypatch, large, share, kernel):
    """"slow", which takes 3 ms, has ``share`` of the highest rate."""
    monkeypatch.setattr(providers, "PROVIDERS", rows("linear8"))
    monkeypatch.setattr(gpu, "LARGE", LINEAR.x[0] * LINEAR.weight[0] + (not large))
    chooser = MeasuredChooser(CPU)
    chooser.rate = LINEAR.flops / 3.0 / share
    assert chooser.best(LINEAR, "int8").kernel == f"good:{kernel}"
    assert ("fast" in clock) is (kernel == "fast")


@pytest.mark.parametrize(("tokens", "capability", "ours"), [(4096, (9, 0), False), (4096, (8, 9), True), (77, (9, 0), True)])
def test_attention_of_many_keys_is_torchs_own_where_that_is_cudnns(attentions, monkeypatch, tokens, capability, ours):
    set_times, ran = attentions
    set_times({"s1": 4.0, "s2": 3.0})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for out in (torch.float16, torch.int8):
        times = MeasuredChooser(CPU).attention_times((1, 1, 16, 16), tokens, torch.float16, out)
        assert (set(times) == {"torch"}) is not ours
    assert bool(ran) is ours


@pytest.mark.parametrize(("ms", "losses"), [((1.0, 1.05), 1), ((1.0, 1.2), 2), ((1.0, 1.0), 0)])
def test_what_counts_as_a_loss_among_large_linears(clock, ms, losses):
    chooser = MeasuredChooser(CPU)
    chooser._remember(lambda variant: (variant,), dict(zip("ab", ms, strict=True)), True)
    assert [chooser.lost["a",], chooser.lost["b",]] == [0, losses]
    chooser._remember(lambda variant: (variant,), {"b": 1.0}, True)
    assert chooser.lost["b",] == 0  # in a row


@pytest.mark.parametrize(("precision", "capability", "says"), [
    ("int8", (7, 5), "int8 needs a GPU of compute capability 8.0 or newer, this one has 7.5: use a 16-bit torch.compile"),
    ("fp8", (8, 0), "fp8 needs a GPU of compute capability 8.9 or newer, this one has 8.0: use sd_int8"),
    ("fp8", (7, 0), "use a 16-bit torch.compile"),
])
def test_a_gpu_without_the_instructions_is_refused_with_the_alternative(precision, capability, says):
    assert says in missing(precision, capability)


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr(providers, "installed", lambda module: False)
    assert "pip install nvidia-cudnn-frontend" in missing("int8", (9, 0))
    monkeypatch.setattr(providers, "installed", lambda module: True)
    assert missing("int8", (8, 0)) is missing("fp8", (9, 0)) is None


FLOAT = {"linear": Problem("linear", (8, 32), (16, 32), (1, 1), (0, 0), torch.float32),
         "conv2d": Problem("conv2d", (1, 32, 6, 6), (16, 32, 3, 3), (2, 1), (1, 0), torch.float32),
         "dilated": Problem("conv2d", (1, 32, 9, 9), (16, 32, 3, 3), (1, 1), (1, 1), torch.float32, (2, 2)),
         "bf16": Problem("conv2d", (1, 32, 6, 6), (16, 32, 3, 3), (1, 1), (1, 1), torch.bfloat16)}


@pytest.fixture
def races(monkeypatch, tmp_path):
    """Every call of a race is made, and takes as many milliseconds as its place; returns the number of calls of each race."""
    made = []

    def race_ms(*calls):
        for call in calls:
            call()
        made.append(len(calls))
        return [float(place) for place in range(len(calls), 0, -1)]

    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "race_ms", race_ms)
    return made


@pytest.mark.parametrize("name", FLOAT)
def test_onednn_races_the_kernel_of_the_users_precision_once_and_for_all_processes(races, name):
    chooser = CpuChooser(CPU)
    assert chooser.best(FLOAT[name], "int8") == Choice("onednn", 1.0)
    assert chooser.wide_ms(FLOAT[name]) == 2.0
    assert chooser.reasons(FLOAT[name], "int8") == ()
    assert CpuChooser(CPU).best(FLOAT[name], "int8") == Choice("onednn", 1.0)
    assert races == [2]


@pytest.mark.parametrize("name", ["linear", "conv2d", "dilated"])
def test_both_sides_of_the_race_compute_the_layer(name):
    problem = FLOAT[name]
    product, expected = onednn._product(problem)
    assert timing.checked(product(), expected, 1e-5) is None
    own = onednn._own(problem)()
    assert own.shape == expected.shape
    assert own.dtype is expected.dtype is torch.float32
    noise = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=noise) for shape in (problem.x, problem.weight, problem.weight[:1]))
    plain = (torch.nn.functional.linear(x, w, b) if problem.op == "linear" else
             torch.nn.functional.conv2d(x, w, b, problem.stride, problem.padding, problem.dilation))
    assert torch.allclose(own, plain, atol=1e-4)


def test_another_number_of_threads_is_another_measurement(races, monkeypatch):
    chooser = CpuChooser(CPU)
    for threads in (1, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        chooser.best(FLOAT["linear"], "int8")
    assert races == [2, 2]


def test_a_product_that_saturates_is_no_kernel_and_the_layer_is_timed_all_the_same(races, monkeypatch):
    product = onednn._product

    def saturated(problem):
        run, expected = product(problem)
        return lambda: run() * 0.9, expected

    monkeypatch.setattr(onednn, "_product", saturated)
    chooser = CpuChooser(CPU)
    assert chooser.best(FLOAT["linear"], "int8") is None
    assert chooser.reasons(FLOAT["linear"], "int8")[0].startswith("onednn: its result is wrong")
    assert chooser.wide_ms(FLOAT["linear"]) == 1.0
    assert races == [1]


def test_a_time_of_a_busy_machine_is_good_for_a_day(monkeypatch, tmp_path):
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "race_ms", lambda *calls: [Unsteady(2.0), Unsteady(1.0)])
    busy = CpuChooser(CPU)
    assert isinstance(busy.best(FLOAT["linear"], "int8").ms, Unsteady)
    assert isinstance(busy.wide_ms(FLOAT["linear"]), Unsteady)
    assert not stored(tmp_path)
    monkeypatch.setattr(timing, "race_ms", lambda *calls: [2.0, 1.0])
    assert isinstance(busy.wide_ms(FLOAT["linear"]), Unsteady)
    assert isinstance(CpuChooser(CPU).wide_ms(FLOAT["linear"]), Unsteady)  # the next process finds what this one has compiled
    assert not stored(tmp_path)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 24 * 3600)
    assert CpuChooser(CPU).wide_ms(FLOAT["linear"]) == 2.0
    assert stored(tmp_path)


def clocks(monkeypatch, wall, own):
    """Clocks that advance by ``wall`` and ``own`` seconds whenever they are read."""
    ticks = {"perf_counter": 0.0, "thread_time": 0.0}

    def clock(name, step):
        def read():
            ticks[name] += step
            return ticks[name]
        return read

    monkeypatch.setattr(timing.time, "perf_counter", clock("perf_counter", wall))
    monkeypatch.setattr(timing.time, "thread_time", clock("thread_time", own))


def test_rounds_in_which_this_thread_waited_do_not_count(monkeypatch):
    clocks(monkeypatch, 1e-3, 1e-3)
    calls = []
    (ms,) = timing.race_ms(lambda: calls.append(1))
    assert ms == pytest.approx(1.0)
    assert not isinstance(ms, Unsteady)
    clocks(monkeypatch, 1e-3, 0.5e-3)
    (ms,) = timing.race_ms(lambda: calls.append(1))
    assert isinstance(ms, Unsteady)
    assert len(calls) < 100  # it gives up


def test_a_race_has_a_winner_on_this_machine():
    few, many = torch.randn(8, 8), torch.randn(512, 512)
    short, long = timing.race_ms(lambda: few @ few, lambda: many @ many)
    assert 0 < short < long


def test_what_only_gpus_have_is_not_on_the_cpu(races):
    chooser = CpuChooser(CPU)
    assert chooser.best(FLOAT["linear"], "fp8") is chooser.producer("group_norm8") is None
    assert chooser.attention_fp8((1, 2, 8, 16), 8) is None
    assert chooser.encoding_saves(FLOAT["linear"]) == 0
    assert chooser.reasons(FLOAT["linear"], "fp8") == ("fp8 kernels need an NVIDIA GPU",)
    assert chooser.attention_times((1, 2, 8, 16), 8, torch.float32, torch.float32) == {"torch": 1.0}
    assert chooser.attention_ms((1, 2, 8, 16), 8, torch.float32, torch.int8) == 2.0  # and a pass that quantises
    assert races == [1, 1]


def test_the_factory_knows_cpus_and_says_what_it_does_not_know(races):
    kernels.chooser.cache_clear()  # a chooser of before this test has its file elsewhere
    assert isinstance(kernels.chooser(CPU), CpuChooser)
    with pytest.raises(NotImplementedError, match="not on meta: move the module there"):
        kernels.chooser(torch.device("meta"))
    kernels.chooser.cache_clear()
