"""The whole path on a GPU: the bundled model in fp16, every shape and pipeline in turn, weights away and back."""

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdtrt_backend
from sdtrt_backend import measure
from sdtrt_backend.demo import CALIBRATION_PROMPTS, LastCall, draw
from sdtrt_backend.kernels import MeasuredChooser, Problem, installed
from sdtrt_backend.lower import inductor_cuda
from sdtrt_backend.state import states
from sdtrt_backend.weights import away

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
BACKENDS = ["sd_int8", "sd_fp8"]
FRESH = """
import sys, torch, sdtrt_backend
from safetensors.torch import load_file, save_file
backend, recipe, folder = sys.argv[1:]
given = load_file(f"{folder}/inputs.safetensors", device="cuda")
unet = sdtrt_backend.demo_pipeline(torch.float16).to("cuda").unet
unet = torch.compile(unet, backend=backend, dynamic=False, options={"recipe": recipe, "engine": "inductor"})
with torch.no_grad():
    y = unet(given["sample"].repeat(2, 1, 1, 1), given["timestep"], given["text"].repeat(2, 1, 1), return_dict=False)[0]
save_file({"y": y.contiguous()}, f"{folder}/output.safetensors")
"""


def calls(unet, args, text, repeat):
    """The inputs of a real step, ``repeat`` times along the batch."""
    sample, timestep = args
    return unet(sample.repeat(repeat, 1, 1, 1), timestep, text.repeat(repeat, 1, 1), return_dict=False)[0]


def allocated(unet):
    """Bytes when no call waits for its verdict any more: until then the drift watch keeps a call's inputs."""
    torch.cuda.synchronize()
    sdtrt_backend.explain(unet)
    return torch.cuda.memory_allocated()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(pipeline in fp16 on the GPU, recipe folder, positional arguments and text of a real step)."""
    torch._dynamo.reset()
    pipe = sdtrt_backend.demo_pipeline(torch.float16).to("cuda")
    recipe = sdtrt_backend.calibrate(pipe, CALIBRATION_PROMPTS[:2], guidance_scale=5.0, progress=False)
    last = LastCall(pipe.unet)
    draw(pipe, ["rocket, fluent style"], 5, 0)
    last.close()
    args = last.args[:2]
    return pipe, recipe.save(tmp_path_factory.mktemp("recipe")), args, last.kwargs["encoder_hidden_states"]


@pytest.fixture(scope="module", params=BACKENDS)
def compiled(request, prepared):
    """(compiled copy of the UNet, the unquantised UNet, arguments, text); every layer that can runs in 8 bits. One for all
    tests of a backend, because it compiles once per shape, and at most the 8 times that Dynamo allows: tests that reset it come
    last."""
    torch._dynamo.reset()
    pipe, recipe, args, text = prepared
    unet = torch.compile(copy.deepcopy(pipe.unet), backend=request.param, dynamic=False,
                         options={"recipe": str(recipe), "engine": "inductor"})
    return unet, pipe.unet, args, text


@torch.no_grad()
def test_the_step_is_8_bit_and_close_to_fp16(compiled):
    unet, plain, args, text = compiled
    for repeat in (1, 3):
        error = measure.compare(calls(unet, args, text, repeat), calls(plain, args, text, repeat))
        assert 0 < error < 0.2
    report = sdtrt_backend.explain(unet)
    assert report.state == "ready"
    assert report.quantized_flops_share > 0.9


@torch.no_grad()
def test_two_hundred_steps_of_alternating_shapes_equal_the_first_and_take_no_memory(compiled):
    unet, _, args, text = compiled
    first = {repeat: calls(unet, args, text, repeat) for repeat in (1, 2, 3)}
    before = allocated(unet)
    for step in range(200):
        repeat = 1 + step % 3
        assert torch.equal(calls(unet, args, text, repeat), first[repeat])
    assert allocated(unet) <= before


@torch.no_grad()
def test_streams_and_inference_mode_give_the_same(compiled):
    unet, _, args, text = compiled
    first = calls(unet, args, text, 2)
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams * 3:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(calls(unet, args, text, 2))
    torch.cuda.synchronize()
    assert all(torch.equal(r, first) for r in results)
    with torch.inference_mode():
        assert torch.equal(calls(unet, args, text, 2), first)
        built_here = calls(unet, args, text, 4)
    assert torch.equal(calls(unet, args, text, 4), built_here)


@torch.no_grad()
def test_timesteps_on_the_cpu_or_expanded_over_the_batch_give_the_same(compiled):
    """Loops of one's own leave the scheduler's timesteps on the CPU; transformers' pipelines expand them."""
    unet, _, (sample, timestep), text = compiled
    first = calls(unet, (sample, timestep), text, 2)
    assert torch.equal(calls(unet, (sample, timestep.cpu()), text, 2), first)
    assert torch.equal(calls(unet, (sample, timestep.expand(2 * len(sample))), text, 2), first)
    report = sdtrt_backend.explain(unet)
    assert (report.state, report.fallbacks) == ("ready", ())


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_module_on_another_gpu_than_the_current_one(compiled, prepared, request):
    unet, plain, args, text = compiled
    first = calls(unet, args, text, 2)
    backend = request.node.callspec.params["compiled"]
    options = {"recipe": str(prepared[1]), "engine": "inductor"}
    other = torch.compile(copy.deepcopy(plain).to("cuda:1"), backend=backend, dynamic=False, options=options)
    moved = [t.to("cuda:1") for t in (*args, text)]
    for _ in range(3):
        y = calls(other, moved[:2], moved[2], 2)
        assert y.device.index == 1
        assert torch.equal(y.to("cuda:0"), first)
    assert torch.cuda.current_device() == 0
    assert sdtrt_backend.explain(other).state == "ready"


def test_two_threads_build_and_run_a_module_each(compiled, prepared, request):
    """One times kernels and captures its graph while the other runs in its own precision."""
    unet, plain, args, text = compiled
    options = {"recipe": str(prepared[1]), "engine": "inductor"}
    unets = [torch.compile(copy.deepcopy(plain), backend=request.node.callspec.params["compiled"], dynamic=False, options=options)
             for _ in range(2)]

    @torch.no_grad()
    def work(mine):
        calls(mine, args, text, 2)
        while sdtrt_backend.explain(mine).state not in ("ready", "refused"):
            calls(mine, args, text, 2)
        return [calls(mine, args, text, 2) for _ in range(20)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, unets))
    first = work(unet)[0]
    with torch.no_grad():
        own = calls(plain, args, text, 2)
        after = [calls(mine, args, text, 2) for mine in unets]
    for results, last, mine in zip(found, after, unets, strict=True):
        assert all(torch.equal(y, first) or torch.equal(y, own) for y in results)  # the latter while the other one builds
        assert torch.equal(last, first)
        report = sdtrt_backend.explain(mine)
        assert (report.state, report.fallbacks) == ("ready", ())


@torch.no_grad()
def test_two_pipelines_in_turn_share_one_unet(compiled):
    unet, _, args, text = compiled
    other = text.roll(1, 0)
    mine, theirs = calls(unet, args, text, 1), calls(unet, args, other, 1)
    for _ in range(10):
        assert torch.equal(calls(unet, args, text, 1), mine)
        assert torch.equal(calls(unet, args, other, 1), theirs)


@torch.no_grad()
def test_a_fresh_process_gives_the_same_to_the_bit(prepared, compiled, request, tmp_path):
    """After all the shapes and pipelines of the tests before; the caches on disk are shared, as they are for a user."""
    unet, _, args, text = compiled
    save_file({"sample": args[0], "timestep": args[1].clone(), "text": text}, tmp_path / "inputs.safetensors")
    backend = request.node.callspec.params["compiled"]
    subprocess.run([sys.executable, "-c", FRESH, backend, str(prepared[1]), str(tmp_path)], check=True)
    fresh = load_file(tmp_path / "output.safetensors", device="cuda")["y"]
    assert torch.equal(calls(unet, args, text, 2), fresh)


def test_a_norm_of_a_wide_row_reads_it_once():
    def norm(x):
        return (torch.nn.functional.layer_norm(x, (2432,)),)

    x = torch.randn(64, 2432, device="cuda", dtype=torch.float16)
    step = inductor_cuda.compiled(torch.fx.symbolic_trace(norm), [x])
    step(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        (y,) = step(x)
        torch.cuda.synchronize()
    kernels_run = {event.name for event in profile.events() if event.name.startswith("triton_")}
    assert len(kernels_run) == 1
    assert all(name.startswith("triton_per_") for name in kernels_run)  # Inductor's word for a row at once
    assert measure.compare(y, norm(x)[0]) < 1e-3


@pytest.mark.skipif(not installed("cudnn"), reason="needs nvidia-cudnn-frontend")
def test_timing_kernels_keeps_no_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path))
    timer = MeasuredChooser(torch.device("cuda", 0))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    problems = [Problem("conv2d", (2, 96, 24, 24), (160, 96, 3, 3), (1, 1), (1, 1), torch.float16),
                *(Problem("linear", (rows, 320), (640, 320), (1, 1), (0, 0), torch.float16) for rows in (64, 128, 256, 512))]
    held = []
    for problem in problems:  # cuBLAS makes its workspace at the first linear, and once
        assert min(timer.best(problem, "int8").ms, timer.best(problem, "fp8").ms, timer.wide_ms(problem)) > 0
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[0] == before
    assert set(held[2:]) == {held[1]}


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_leave_the_gpu_and_come_back_to_the_bit(prepared, backend):
    torch._dynamo.reset()
    pipe, recipe, args, text = prepared
    mine = copy.copy(pipe)
    mine.unet = copy.deepcopy(pipe.unet)
    before = {k: v.cpu() for k, v in mine.unet.state_dict().items()}
    torch.cuda.synchronize()
    full = torch.cuda.memory_allocated()
    weights = sum(p.numel() * p.element_size() for p in mine.unet.parameters())
    with torch.no_grad():
        sdtrt_backend.accelerate(mine, recipe=recipe, backend=backend, engine="inductor")
        first = calls(mine.unet, args, text, 1)
        assert away(mine.unet.down_blocks[0].resnets[0].conv1.weight)
        calls(mine.unet, args, text, 2)  # another shape needs the weights for a while
        assert torch.equal(calls(mine.unet, args, text, 1), first)
        (state,) = states(mine.unet)
        held = sum(c.numel() for coded in state.memory.codes.values() for c, _ in coded.tensors)
        gone = sum(p.numel() * p.element_size() for p in mine.unet.parameters() if away(p))
        assert weights - gone + held < 0.56 * weights
        assert torch.cuda.memory_allocated() < full + 64e6
        assert all(torch.equal(v.cpu(), before[k]) for k, v in mine.unet.state_dict().items())  # readable where they are
        sdtrt_backend.restore(mine)
        assert all(torch.equal(v.cpu(), before[k]) for k, v in mine.unet.state_dict().items())
        assert torch.equal(calls(mine.unet, args, text, 1), calls(pipe.unet, args, text, 1))


@torch.no_grad()
def test_left_to_itself_the_step_is_never_slower_than_torch_compile(prepared):
    torch._dynamo.reset()
    pipe, recipe, args, text = prepared
    unet = torch.compile(copy.deepcopy(pipe.unet), backend="sd_int8", dynamic=False, options={"recipe": str(recipe)})
    calls(unet, args, text, 1)
    report = sdtrt_backend.explain(unet)
    assert report.state == "ready" or "ms" in report.fallbacks[0]
