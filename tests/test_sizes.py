"""When the steps of further sizes are built, where, and how many are held."""

import contextlib
import threading

import pytest
import torch
from test_situations import REFERENCE, STEPS, Block, accelerated, block_call, close, own, ready

import sdtrt_backend
from sdtrt_backend import unit
from sdtrt_backend.state import states

SOON = 60  # s


@pytest.fixture
def block():
    torch._dynamo.reset()
    yield Block().eval()
    torch._dynamo.reset()


@pytest.fixture
def built(monkeypatch):
    """The sizes of the builds."""
    built, build = [], unit.build

    def noted(request):
        built.append(next(a.shape[0] for a in request.args if isinstance(a, torch.Tensor) and a.dim() == 3))
        return build(request)

    monkeypatch.setattr(unit, "build", noted)
    return built


@pytest.fixture
def held_up(monkeypatch):
    """No build begins while it is not set."""
    goes_on, build = threading.Event(), unit.build

    def waiting(request):
        assert goes_on.wait(SOON)
        return build(request)

    monkeypatch.setattr(unit, "build", waiting)
    yield goes_on
    goes_on.set()


def picture(module, batch):
    return [block_call(module, t, batch) for t in STEPS]


def own_picture(module, batch):
    return [own(module, t, batch) for t in STEPS]


def same(pictures, others):
    return all(map(torch.equal, pictures, others))


def finish(module):
    """The build in the other thread has ended."""
    for state in states(module):
        if state.behind.thread is not None:
            state.behind.thread.join(SOON)
            assert not state.behind.thread.is_alive()


@pytest.mark.parametrize("build_after", [1, 2, 3])
def test_a_size_is_built_with_the_picture_that_it_was_wanted_with(block, built, build_after):
    compiled = torch.compile(block, backend="sd_int8", options=REFERENCE | {"build_after": build_after})
    for _ in range(max(2, build_after) + 1):
        picture(compiled, 2)  # the first one calibrates, and counts
    assert built == [2]
    for seen in range(1, build_after + 2):
        mine = picture(compiled, 3)
        assert same(mine, own_picture(block, 3)) == (seen < build_after)
        close(mine[-1], own(block, STEPS[-1], 3))
        assert built == [2] + [3] * (seen >= build_after)
        waits = f"inputs of 1 sizes were met in fewer than build_after={build_after} pictures each"
        assert (waits in " ".join(sdtrt_backend.explain(block).notes)) == (seen < build_after)
    picture(compiled, 2)
    assert built == [2, 3]


def test_with_a_recipe_the_first_picture_counts_as_any_other(block, built):
    pipe = accelerated(block)
    recipe = sdtrt_backend.calibrate(pipe, ["a"], num_inference_steps=3, progress=False)
    built.clear()
    sdtrt_backend.accelerate(pipe, recipe=recipe, build_after=2, **REFERENCE)
    pipe.draw()
    assert built == []
    for _ in range(2):
        pipe.draw()
    assert built == [2]


def test_no_call_waits_for_a_build_in_the_background(block, held_up):
    compiled = torch.compile(block, backend="sd_int8", options=REFERENCE | {"background": True})
    for _ in range(3):
        assert same(picture(compiled, 2), own_picture(block, 2))
    assert sdtrt_backend.explain(compiled).state == "building"
    held_up.set()
    finish(block)
    mine = picture(compiled, 2)
    assert not same(mine, own_picture(block, 2))
    close(mine[-1], own(block, STEPS[-1], 2))
    held_up.clear()
    assert same(picture(compiled, 3), own_picture(block, 3))
    assert not same(picture(compiled, 2), own_picture(block, 2))  # sizes that are ready go on
    held_up.set()
    finish(block)
    assert not same(picture(compiled, 3), own_picture(block, 3))
    report = sdtrt_backend.explain(compiled)
    assert (report.state, report.fallbacks) == ("ready", ())


def test_sizes_that_are_met_while_another_is_built_have_their_turn(block, built):
    compiled = torch.compile(block, backend="sd_int8", options=REFERENCE | {"background": True})
    for _ in range(4):
        for batch in (2, 3, 4):
            picture(compiled, batch)
        finish(block)
    assert sorted(built) == [2, 3, 4]


def test_a_build_in_the_background_that_fails_is_said_and_the_calls_go_on(block, monkeypatch):
    def failing(request):
        raise ValueError("no such kernel")

    monkeypatch.setattr(unit, "build", failing)
    compiled = torch.compile(block, backend="sd_int8", options=REFERENCE | {"background": True})
    for _ in range(3):
        mine = picture(compiled, 2)
        finish(block)
    close(mine[-1], own(block, STEPS[-1], 2), 1e-4)
    report = sdtrt_backend.explain(compiled)
    assert report.state == "refused"
    assert "no such kernel" in report.fallbacks[0]


def test_restored_while_it_is_built_in_the_background(block, held_up):
    pipe = sdtrt_backend.accelerate(_Pipeline(block), background=True, **REFERENCE)
    for _ in range(2):
        pipe.draw()
    threading.Timer(0.2, held_up.set).start()
    sdtrt_backend.restore(pipe)  # waits
    assert same(picture(block, 2), own_picture(block, 2))
    with pytest.raises(sdtrt_backend.ModelError):
        sdtrt_backend.explain(pipe)


class _Pipeline:
    def __init__(self, unet):
        self.unet = unet

    def draw(self):
        return picture(self.unet, 2)


def test_a_background_build_has_the_precision_and_the_inference_mode_of_the_call(block):
    compiled = torch.compile(block, backend="sd_int8", options=REFERENCE | {"background": True})
    for how in (torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext):
        for _ in range(3):
            with torch.no_grad(), how():
                mine = picture(compiled, 2)
            finish(block)
        with torch.no_grad(), how():
            expected = own_picture(block, 2)
        assert mine[-1].dtype is expected[-1].dtype
        close(mine[-1], expected[-1])
        assert not same(mine, expected)
    assert sdtrt_backend.explain(compiled).fallbacks == ()


def test_as_many_sizes_are_held_as_the_option_says(block, built):
    compiled = ready(block, max_sizes=2)
    for batch in (3, 4, 5, 3):
        for _ in range(2):
            close(block_call(compiled, batch=batch), own(block, batch=batch))
    assert built == [2, 3, 4, 5, 3]
    assert "steps for 2 sizes are held" in " ".join(sdtrt_backend.explain(compiled).notes)
