"""The measured choice, with clocks and kernels made here."""

import pytest
import torch

from sdtrt_backend import kernels, ops
from sdtrt_backend.kernels import Chooser, Problem, Provider, missing

LINEAR = Problem("linear", (8, 32), (16, 32), (1, 1), (0, 0), torch.float16)
CONV = Problem("conv2d", (1, 32, 6, 6), (16, 32, 3, 3), (1, 1), (1, 1), torch.float16)
CPU = torch.device("cpu")


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
            if variant == "refuses":
                raise RuntimeError("no such shape")
            if variant == "hungry":
                raise torch.OutOfMemoryError("CUDA out of memory")
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
    monkeypatch.setattr(kernels, "register", lambda: None)
    monkeypatch.setattr(kernels, "device_key", lambda device: {"gpu": "made here"})
    monkeypatch.setattr(kernels, "graph_ms", graph_ms)
    monkeypatch.setattr(kernels, "COLD_BYTES", 1)
    for op in ("linear8", "conv8"):
        monkeypatch.setitem(ops.KERNELS, (op, "good"), kernel(op))
    return timed


@pytest.mark.parametrize(("problem", "op"), [(LINEAR, "linear8"), (CONV, "conv8")])
def test_the_fastest_correct_kernel_is_chosen_and_remembered(clock, monkeypatch, problem, op):
    monkeypatch.setattr(kernels, "PROVIDERS", rows(op))
    assert Chooser(CPU).best(problem, "int8") == kernels.Choice("good:fast", 1.0)
    # a wrong result is not timed, a refusal is no error, and of the families only the fastest one is timed whole
    assert clock == ["slow", "fast", "slow2"]
    assert Chooser(CPU).best(problem, "int8").kernel == "good:fast"
    assert clock == ["slow", "fast", "slow2"]


def test_the_fallback_is_timed_where_all_else_is_refused(clock, monkeypatch):
    row = Provider("good", "linear8", "int8", "", lambda precision: [("refuses", "wrong"), ("wrong",)], ("spare",))
    monkeypatch.setattr(kernels, "PROVIDERS", (row,))
    assert Chooser(CPU).best(LINEAR, "int8") == kernels.Choice("good:spare", 2.0)


def test_where_every_first_one_is_refused_the_others_are_timed(clock, monkeypatch):
    row = Provider("good", "linear8", "int8", "", lambda precision: [("refuses", "fast"), ("wrong", "slow")], ("spare",))
    monkeypatch.setattr(kernels, "PROVIDERS", (row,))
    assert Chooser(CPU).best(LINEAR, "int8") == kernels.Choice("good:fast", 1.0)
    assert clock == ["fast", "slow"]


def test_a_provider_that_stands_in_for_another_is_timed_without_that_one_only(clock, monkeypatch):
    for other, times in (("torch", []), ("not_installed_anywhere", ["fast"])):
        row = Provider("good", "linear8", "int8", "", lambda precision: [("fast",)], instead_of=other)
        monkeypatch.setattr(kernels, "PROVIDERS", (row,))
        monkeypatch.setattr(kernels, "device_key", lambda device, other=other: {"gpu": other})
        Chooser(CPU).best(LINEAR, "int8")
        assert clock == times


def test_without_a_kernel_there_is_no_choice(clock, monkeypatch):
    monkeypatch.setattr(kernels, "PROVIDERS", (Provider("good", "linear8", "int8", "", lambda p: [("refuses",)]),))
    assert Chooser(CPU).best(LINEAR, "int8") is None
    assert Chooser(CPU).best(LINEAR, "fp8") is None


def test_memory_that_ran_out_is_no_refusal_and_is_not_remembered(clock, monkeypatch):
    monkeypatch.setattr(kernels, "PROVIDERS", (Provider("good", "linear8", "int8", "", lambda p: [("fast",), ("hungry",)]),))
    with pytest.raises(torch.OutOfMemoryError):
        Chooser(CPU).best(LINEAR, "int8")
    monkeypatch.setattr(kernels, "PROVIDERS", (Provider("good", "linear8", "int8", "", lambda p: [("slow",)]),))
    assert Chooser(CPU).best(LINEAR, "int8") == kernels.Choice("good:slow", 3.0)


def test_torchs_own_attention_is_a_candidate_that_pays_for_its_quantisation(clock, monkeypatch):
    chooser = Chooser(CPU)
    monkeypatch.setattr(chooser, "quantize_ms", lambda numel, dtype: 7.0)
    monkeypatch.setattr(kernels, "installed", lambda module: False)
    assert chooser.attention_times((1, 2, 8, 16), 8, torch.float32, torch.float32) == {"torch": 5.0}
    assert chooser.attention_times((1, 2, 8, 16), 8, torch.float32, torch.int8) == {"torch": 12.0}
    assert chooser.attention_kernel((1, 2, 8, 16), 8, torch.float32, torch.int8) is None


@pytest.mark.parametrize(("precision", "capability", "says"), [
    ("int8", (7, 5), "int8 needs a GPU of compute capability 8.0 or newer, this one has 7.5: use a 16-bit torch.compile"),
    ("fp8", (8, 0), "fp8 needs a GPU of compute capability 8.9 or newer, this one has 8.0: use sd_int8"),
    ("fp8", (7, 0), "use a 16-bit torch.compile"),
])
def test_a_gpu_without_the_instructions_is_refused_with_the_alternative(precision, capability, says):
    assert says in missing(precision, capability)


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr(kernels, "installed", lambda module: False)
    assert "pip install nvidia-cudnn-frontend" in missing("int8", (9, 0))
    monkeypatch.setattr(kernels, "installed", lambda module: True)
    assert missing("int8", (8, 0)) is missing("fp8", (9, 0)) is None
