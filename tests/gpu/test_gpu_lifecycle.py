"""An accelerated module on a GPU lives with its user: copied, written, moved, offloaded and dropped while its weights are away.

SDTRT_LIFECYCLE=100 runs so many sequences of tests/test_lifecycle.py on the GPU; without it there are 20.
"""

import copy
import gc
import os
import random
import threading

import pytest
import torch
from small import SmallPipeline, own, small_unet
from test_lifecycle import BOUND, NOTICED, STEPS, Lifecycle, same
from test_situations import Block, block_call, ready

import sdtrt_backend
from sdtrt_backend import unit
from sdtrt_backend.demo import draw
from sdtrt_backend.measure import compare

pytest.importorskip("diffusers")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from hypothesis.stateful import run_state_machine_as_test  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
PROMPT, GPU = "rocket, fluent style", "cuda"
SEQUENCES = int(os.environ.get("SDTRT_LIFECYCLE", 20))
ENGINES = ["reference", "inductor"]


@pytest.fixture(params=ENGINES)
def accelerated(request):
    """(pipeline in 8 bits, its plain twin on the GPU); the plain weights are away."""
    torch._dynamo.reset()
    unet = small_unet().half().to(GPU)
    plain = copy.deepcopy(unet)
    pipe = SmallPipeline(unet)
    sdtrt_backend.accelerate(pipe, engine=request.param, calibration_runs=1, max_error=BOUND)
    for _ in range(3):
        pipe.draw()
    report = sdtrt_backend.explain(pipe)
    assert (report.state, report.fallbacks) == ("ready", ())
    yield pipe, plain
    sdtrt_backend.restore(pipe)
    torch._dynamo.reset()


def near(pipe, plain, size=8):
    """The pipeline's picture is that of the plain module, up to 8 bits."""
    errors = [compare(mine, theirs) for mine, theirs in zip(pipe.draw(size), own(plain, size), strict=True)]
    assert max(errors) < BOUND, f"relative errors {errors}"


def allocated():
    """Bytes on the GPU that somebody holds."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_released_weights_can_be_read(accelerated):
    pipe, plain = accelerated
    same(dict(pipe.unet.named_parameters()), dict(plain.named_parameters()), "the module")
    same({n: p.cpu() for n, p in pipe.unet.named_parameters()}, {n: p.cpu() for n, p in plain.named_parameters()}, "on the CPU")
    for mine, theirs in zip(own(pipe.unet), own(plain), strict=True):
        assert torch.equal(mine, theirs)


def test_a_copy_is_a_module_of_its_own(accelerated):
    pipe, plain = accelerated
    twin = copy.deepcopy(pipe.unet)
    for mine, theirs in zip(SmallPipeline(twin).draw(), own(plain), strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    same(dict(pipe.unet.named_parameters()), dict(plain.named_parameters()), "the module")
    near(pipe, plain)


@pytest.mark.parametrize("write", [lambda p: p.data.mul_(-1), lambda p: p.data.add_(p.data, alpha=-2),
                                   lambda p: p.data.copy_(-p.data)], ids=["mul_", "add_", "copy_"])
def test_weights_written_as_a_fused_adapter_writes_them_are_followed(accelerated, write):
    pipe, plain = accelerated
    before = own(plain)
    for module in (pipe.unet, plain):
        for name, p in module.named_parameters():
            if "to_q" in name or "to_out" in name or name.endswith("conv1.weight"):
                write(p)
    assert compare(own(plain)[0], before[0]) > BOUND
    for _ in range(NOTICED):
        pipe.draw()
    same(dict(pipe.unet.named_parameters()), dict(plain.named_parameters()), "the module")
    near(pipe, plain)


def test_to_the_cpu_and_back(accelerated):
    pipe, plain = accelerated
    pipe.unet.float().to("cpu")
    same(dict(pipe.unet.named_parameters()), {n: p.float().cpu() for n, p in plain.named_parameters()}, "the moved module")
    for mine, theirs in zip(pipe.draw(), own(copy.deepcopy(plain).float().cpu()), strict=True):
        assert compare(mine, theirs) < BOUND
    pipe.unet.half().to(GPU)
    for _ in range(3):
        near(pipe, plain)
    same(dict(pipe.unet.named_parameters()), dict(plain.named_parameters()), "the module")
    assert sdtrt_backend.explain(pipe).state == "ready"


def test_a_step_for_another_size_is_built_after_the_module_was_away(accelerated):
    """From the 8-bit weights that the first step took along."""
    pipe, plain = accelerated
    for _ in range(2):
        pipe.unet.to("cpu")
        pipe.unet.to(GPU)
        for size in (16, 8, 16):
            near(pipe, plain, size)
    report = sdtrt_backend.explain(pipe)
    assert (report.state, report.fallbacks) == ("ready", ())


def test_built_on_the_cpu_and_moved_to_the_gpu():
    """Its 8-bit weights are of one device."""
    torch._dynamo.reset()
    pipe = SmallPipeline(small_unet())
    plain = copy.deepcopy(pipe.unet).to(GPU)
    sdtrt_backend.accelerate(pipe, engine="reference", calibration_runs=1, max_error=BOUND)
    for _ in range(3):
        pipe.draw()
    assert sdtrt_backend.explain(pipe).state == "ready"
    pipe.unet.to(GPU)
    for _ in range(3):
        near(pipe, plain)
    report = sdtrt_backend.explain(pipe)
    assert (report.state, report.fallbacks) == ("ready", ())
    sdtrt_backend.restore(pipe)


def test_moving_to_the_cpu_frees_the_gpu():
    torch._dynamo.reset()
    _drawn_and_dropped(2)
    before = allocated()
    pipe = _drawn()
    held = allocated() - before
    pipe.to("cpu")
    assert allocated() - before < 0.02 * held
    sdtrt_backend.restore(pipe)


def _drawn(pictures=3, **options):
    """The bundled pipeline on the GPU, in 8 bits."""
    pipe = sdtrt_backend.demo_pipeline(torch.float16).to(GPU)
    sdtrt_backend.accelerate(pipe, calibration_runs=1, engine="inductor", **options)
    for seed in range(pictures):
        draw(pipe, [PROMPT], 4, seed)
    assert sdtrt_backend.explain(pipe).state == "ready"
    return pipe


def _drawn_and_dropped(times):
    for _ in range(times):
        _drawn()
        gc.collect()


@pytest.mark.parametrize("restored", [False, True])
def test_a_dropped_pipeline_leaves_less_than_a_fiftieth_of_its_memory(restored):
    torch._dynamo.reset()
    _drawn_and_dropped(1)  # workspaces of the libraries, made once for a process
    before = allocated()
    for _ in range(3):
        pipe = _drawn()
        held = allocated() - before
        if restored:
            sdtrt_backend.restore(pipe)
        del pipe
        assert allocated() - before < 0.02 * held


def test_restore_lets_go_of_the_8_bit_step_at_once():
    """Also of samples that the drift watch still waits for."""
    torch._dynamo.reset()
    _drawn_and_dropped(1)
    before = allocated()
    pipe = sdtrt_backend.demo_pipeline(torch.float16).to(GPU)
    plain = allocated() - before
    del pipe
    pipe = _drawn()
    draw(pipe, [PROMPT], 1, 0)
    sdtrt_backend.restore(pipe)
    assert allocated() - before < 1.02 * plain


def test_a_module_with_a_buffer_is_not_built_again_for_every_move(monkeypatch):
    built, build = [], unit.build
    monkeypatch.setattr(unit, "build", lambda request: built.append(1) or build(request))
    torch._dynamo.reset()
    block = Block().half().to(GPU)
    compiled = ready(block, engine="inductor")
    before, y = len(built), block_call(compiled)
    for _ in range(3):
        shift = block.shift
        block.to("cpu")
        block.to(GPU)
        assert block.shift is not shift
        assert torch.equal(block_call(compiled), y)
    block.shift.neg_()
    assert compare(block_call(compiled), block_call(block)) < BOUND < compare(block_call(compiled), y)
    assert len(built) == before + 1


@pytest.mark.parametrize("order", ["offload, accelerate", "accelerate, offload"])
def test_model_offload_takes_no_more_memory_than_without_8_bits(order):
    pytest.importorskip("accelerate")
    torch._dynamo.reset()
    plain = sdtrt_backend.demo_pipeline(torch.float16)
    plain.enable_model_cpu_offload()
    expected = draw(plain, [PROMPT], 4, 3)
    del plain
    _drawn_and_dropped(1)
    before = allocated()
    pipe = sdtrt_backend.demo_pipeline(torch.float16)
    for step in order.split(", "):
        if step == "offload":
            pipe.enable_model_cpu_offload()
        else:
            sdtrt_backend.accelerate(pipe, calibration_runs=1, engine="inductor")
    for seed in (0, 1, 2, 3):
        mine = draw(pipe, [PROMPT], 4, seed)
    weights = sum(p.numel() * p.element_size() for p in pipe.unet.parameters())
    pipe.maybe_free_model_hooks()
    assert allocated() - before < weights
    assert ((mine.astype(float) - expected) ** 2).mean() < 0.01 * (expected.astype(float) ** 2).mean()
    report = sdtrt_backend.explain(pipe)
    assert report.state == "ready" or "offload" in " ".join(report.fallbacks)
    sdtrt_backend.restore(pipe)


def test_a_tensor_on_the_cpu_inside_the_module_is_no_obstacle():
    """Made on the host at every call, as rotary tables and token counts are."""
    class OnTheHost(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(256, 256), torch.nn.Linear(256, 256)

        def forward(self, x, timestep):
            table = torch.arange(256, dtype=torch.float32) / 256  # no device named
            h = torch.nn.functional.gelu(self.first(x)) + table.to(x)
            return self.last(h) + torch.tensor(0.5) + timestep / 1000

    torch._dynamo.reset()
    module = OnTheHost().half().to(GPU)
    compiled = torch.compile(module, backend="sd_int8", options={"engine": "inductor", "calibration_runs": 1})
    x = torch.randn(4, 64, 256, device=GPU, dtype=torch.float16)
    with torch.no_grad():
        for t in (900, 500, 100) * 3:
            timestep = torch.tensor(t, device=GPU)
            assert compare(compiled(x, timestep), module(x, timestep)) < BOUND
    assert sdtrt_backend.explain(compiled).state == "ready"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_module_in_fp32_inside_autocast_and_outside(engine, dtype):
    torch._dynamo.reset()
    pipe = SmallPipeline(small_unet().to(GPU))
    plain = copy.deepcopy(pipe.unet)
    sdtrt_backend.accelerate(pipe, engine=engine, calibration_runs=1, max_error=BOUND)
    for inside in (False, True) * 3:
        with torch.autocast(GPU, dtype, enabled=inside):
            mine, theirs = pipe.draw(), own(plain)
        assert [y.dtype for y in mine] == [y.dtype for y in theirs]
        assert max(compare(y, e) for y, e in zip(mine, theirs, strict=True)) < BOUND
    report = sdtrt_backend.explain(pipe)
    assert (report.state, report.fallbacks) == ("ready", ())
    assert all(any(row.precision == "int8" for row in piece.layers) for _, piece in report.pieces)
    sdtrt_backend.restore(pipe)


def test_threads_that_need_the_plain_weights_on_streams_of_their_own(accelerated):
    """One thread runs in 8 bits, the others read weights that are away, each on its stream."""
    pipe, plain = accelerated
    expected, failed = [y.clone() for y in own(plain)], []

    def read():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    assert all(torch.equal(y, e) for y, e in zip(own(pipe.unet), expected, strict=True))
        except Exception as error:  # collected: an assertion in a thread would be lost
            failed.append(error)

    def run():
        try:
            for _ in range(20):
                near(pipe, plain)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=target) for target in (run, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


class OnTheGpu(Lifecycle):
    """The same life on a GPU, where moving a module moves it, and the plain weights really leave."""

    device = GPU


def test_whatever_its_user_does_an_accelerated_module_stays_the_module(tmp_path, monkeypatch):
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path))
    seed = int(os.environ.get("SDTRT_LIFECYCLE_SEED") or random.SystemRandom().randrange(2**32))
    print(f"\nSDTRT_LIFECYCLE={SEQUENCES} SDTRT_LIFECYCLE_SEED={seed}", flush=True)
    run_state_machine_as_test(hypothesis.seed(seed)(OnTheGpu), settings=settings(
        max_examples=SEQUENCES, stateful_step_count=STEPS, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False))
