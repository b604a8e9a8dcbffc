"""LoRAs in the 8-bit codes on a GPU: undone to the bit, no new graph, one set for a picture, with released weights too."""

import copy

import pytest
import torch
from small import SmallPipeline, own, small_unet
from test_lora import ATTENTION, CONVOLUTIONS, lora, merged, sets_seen

import sdtrt_backend
from sdtrt_backend import graphs
from sdtrt_backend.measure import compare
from sdtrt_backend.state import states
from sdtrt_backend.weights import away

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
BOUND = 0.1


@pytest.fixture(scope="module", params=[("sd_int8", "keep"), ("sd_int8", "release"), ("sd_fp8", "release")], ids="-".join)
def ready(request):
    torch._dynamo.reset()
    backend, weights = request.param
    plain = small_unet().cuda().half().to(memory_format=torch.channels_last)
    pipe = SmallPipeline(copy.deepcopy(plain))
    sdtrt_backend.accelerate(pipe, backend=backend, engine="inductor", weights=weights)
    for _ in range(3):
        first = pipe.draw()
    assert sdtrt_backend.explain(pipe).state == "ready"
    dicts = {"a": lora(small_unet(), ATTENTION, 1, strength=0.8), "b": lora(small_unet(), CONVOLUTIONS, 2)}
    for name, factors in dicts.items():
        sdtrt_backend.load_lora(pipe.unet, factors, name)
    yield pipe, dicts, plain, first, weights
    sdtrt_backend.restore(pipe)


def expected(plain, dicts, weights):
    device = {name: {k: v.to("cuda", torch.float16) for k, v in factors.items()} for name, factors in dicts.items()}
    return own(merged(plain, [(device[name], w) for name, w in weights.items()]))


def test_a_set_and_back_to_the_bit_without_a_new_graph(ready, monkeypatch):
    pipe, dicts, plain, first, weights = ready
    for loras in ({"a": 1.0}, {"b": 1.0}):  # the second changes a layer that stays in 16 bits: built once more
        sdtrt_backend.set_loras(pipe.unet, loras)
        pipe.draw()
    captured = []
    record = graphs.record
    monkeypatch.setattr(graphs, "record", lambda *args, **kwargs: captured.append(1) or record(*args, **kwargs))
    for loras in ({"a": 1.0}, {"b": 1.2}, {"a": 0.5, "b": 0.5}):
        sdtrt_backend.set_loras(pipe.unet, loras)
        assert compare(pipe.draw(), expected(plain, dicts, loras)) < BOUND
    sdtrt_backend.set_loras(pipe.unet, {})
    assert all(map(torch.equal, first, pipe.draw()))
    assert not captured
    assert any(away(p) for p in pipe.unet.parameters()) == (weights == "release")
    if weights == "keep":
        assert all(map(torch.equal, own(plain), own(pipe.unet)))


def test_every_picture_is_of_one_set_while_another_thread_switches(ready):
    seen = sets_seen(ready[0], ({}, {"a": 1.0}, {"b": 1.0}))
    assert None not in seen
    assert len(set(seen)) > 1, "the test saw no switch"


def test_moved_away_and_back_with_a_set(ready):
    pipe, dicts, plain, _, _ = ready
    sdtrt_backend.set_loras(pipe.unet, {"a": 1.0})
    before = pipe.draw()
    pipe.unet.to("cpu")
    pipe.unet.to("cuda")
    assert all(map(torch.equal, before, pipe.draw()))
    pipe.unet.to("cpu")
    sdtrt_backend.set_loras(pipe.unet, {"a": 0.5})
    pipe.unet.to("cuda")
    assert compare(pipe.draw(), expected(plain, dicts, {"a": 0.5})) < BOUND
    sdtrt_backend.set_loras(pipe.unet, {})


def test_tables_of_a_switch_follow_weights_to_other_memory(ready):
    pipe, dicts, plain, _, _ = ready
    for loras in ({"a": 1.0}, {"b": 1.0}, {"a": 1.0}):
        sdtrt_backend.set_loras(pipe.unet, loras)
    (state,) = states(pipe.unet)
    for p in [weight for one in state.memory.codes.values() for weight, *_ in one.parts]:
        old, p.data = p.data, p.data.clone()
        old.fill_(1.0)  # what is read from there now is wrong
    for loras in ({"b": 1.0}, {"a": 0.7}):
        sdtrt_backend.set_loras(pipe.unet, loras)
        assert compare(pipe.draw(), expected(plain, dicts, loras)) < BOUND
    sdtrt_backend.set_loras(pipe.unet, {})


def test_a_hot_swap_captures_nothing_and_the_next_call_has_it(monkeypatch):
    torch._dynamo.reset()
    unet = small_unet().cuda().half().to(memory_format=torch.channels_last)
    unet.enable_lora_hotswap(target_rank=8)

    def swap(seed, hotswap=True):
        unet.load_lora_adapter(lora(small_unet(), ATTENTION, seed, strength=1.2), prefix=None, adapter_name="a", hotswap=hotswap)

    swap(1, hotswap=False)
    pipe = sdtrt_backend.accelerate(SmallPipeline(unet), engine="inductor")
    for _ in range(4):
        before = pipe.draw()
    captured = []
    record = graphs.record
    monkeypatch.setattr(graphs, "record", lambda *args, **kwargs: captured.append(1) or record(*args, **kwargs))
    for seed in (2, 3):
        swap(seed)
        got = pipe.draw()
        right = own(unet)
        assert compare(got, right) < 0.2 < compare(before, right)
        before = got
    for _ in range(10):
        pipe.draw()
    assert not captured
    assert sdtrt_backend.explain(pipe).state == "ready"
