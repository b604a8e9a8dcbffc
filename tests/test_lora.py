"""LoRAs in the 8-bit codes: equal to a fresh quantisation, undone to the bit, one set for a picture, whatever reads the file."""

import copy
import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small import TIMESTEPS, Offload, SmallPipeline, add_lora, own, small_inputs, small_unet
from torch.multiprocessing.reductions import StorageWeakRef

import sdtrt_backend
from sdtrt_backend import LoraError, ModelError, OptionError, adapters, merge, recurring
from sdtrt_backend.adapters import adapters_of
from sdtrt_backend.measure import compare
from sdtrt_backend.quantize import by_tensor, quantized_weights
from sdtrt_backend.state import states

ATTENTION, CONVOLUTIONS = ("attn", "ff.net"), ("resnets", "conv_in", "proj_in")  # conv_in stays in 16 bits
BOUND = 0.1  # of the error of a step


def lora(unet, targets, seed, strength=0.3, rank=4):
    """A state dict as PEFT writes it: of layers whose path has one of ``targets``, each changed by ``strength`` of its weight."""
    noise, found = torch.Generator().manual_seed(seed), {}
    for path, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and any(t in path for t in targets):
            w = layer.weight.detach()
            fan_in = w[0].numel()
            found[f"{path}.lora_A.weight"] = torch.randn(rank, *w.shape[1:], generator=noise) * fan_in ** -0.5
            found[f"{path}.lora_B.weight"] = (torch.randn(w.shape[0], rank, *[1] * (w.dim() - 2), generator=noise)
                                              * strength * w.std() * fan_in ** 0.5 * rank ** -0.5)
    return found


def merged(unet, loras):
    """A copy of the module with (state dict, weight) of each in its weights."""
    copied = copy.deepcopy(unet)
    with torch.no_grad():
        for factors, strength in loras:
            for path in {key.partition(".lora_")[0] for key in factors}:
                w = copied.get_submodule(path).weight
                down, up = factors[f"{path}.lora_A.weight"].flatten(1), factors[f"{path}.lora_B.weight"].flatten(1)
                w += (up @ down).view(w.shape) * strength
    return copied


@pytest.fixture(scope="module", params=[pytest.param("inductor", marks=pytest.mark.slow), "reference"])
def ready(request):
    """(the pipeline with LoRAs "a" and "b" loaded and a step in use, their state dicts, its module as it was, its picture)."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:  # what it makes of prompt and timestep alone is kept
        patch.setattr(recurring, "LEAST", 1)
        yield from prepared(request.param)


def prepared(engine):
    plain = small_unet()
    unet = copy.deepcopy(plain)
    pipe = sdtrt_backend.accelerate(SmallPipeline(unet), engine=engine)
    for _ in range(3):
        first = pipe.draw()
    derived = [one for unit in states(unet)[0].units for made in unit.results.values() for one in made.derived or ()]
    assert engine != "inductor" or any(isinstance(one, recurring.Held) for one in derived)
    dicts = {"a": lora(plain, ATTENTION, 1, strength=0.8), "b": lora(plain, CONVOLUTIONS, 2)}
    for name, factors in dicts.items():
        sdtrt_backend.load_lora(unet, factors, name)
    yield pipe, dicts, plain, first
    sdtrt_backend.restore(pipe)


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"b": 0.3}, {"b": 1.2}, {"a": 1.0, "b": 0.5}], ids=str)
def test_a_set_gives_the_module_with_it_and_none_what_was_before_to_the_bit(ready, weights):
    pipe, dicts, plain, first = ready
    expected = own(merged(plain, [(dicts[name], w) for name, w in weights.items()]))
    sdtrt_backend.set_loras(pipe.unet, weights)
    got = pipe.draw()
    assert compare(got, expected) < min(BOUND, 0.8 * compare(first, expected))
    assert all(map(torch.equal, got, pipe.draw()))
    sdtrt_backend.set_loras(pipe.unet, {})
    assert all(map(torch.equal, first, pipe.draw()))
    assert all(map(torch.equal, own(plain), own(pipe.unet))), "the module's own weights are never written"


def fresh_codes(pipe, merged_unet):
    """key in the state's codes -> what quantising the merged module gives for it."""
    (state,) = states(pipe.unet)
    paths = {id(p): path for path, p in pipe.unet.named_parameters()}
    weights = dict(merged_unet.named_parameters())
    for unit in state.units:
        for made in unit.results.values():
            for key, members, smoothing in by_tensor(made.plan.decisions):
                of = [replace(d, layer=replace(d.layer, weight=weights[paths[id(d.layer.weight)]])) for d in members]
                yield key, quantized_weights(of, smoothing)


@settings(max_examples=25)
@given(st.lists(st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from([-0.5, 0.3, 1.0, 1.2])), min_size=8, max_size=8))
def test_two_hundred_switches_leave_the_codes_of_a_fresh_quantisation(ready, sets):
    pipe, dicts, plain, _ = ready
    (state,) = states(pipe.unet)
    for weights in sets:
        sdtrt_backend.set_loras(pipe.unet, weights)
    whole = merged(plain, [(dicts[name], sets[-1][name]) for name in sorted(sets[-1])])
    found = list(fresh_codes(pipe, whole))
    assert found
    for key, fresh in found:
        for mine, theirs in zip(state.memory.codes[key].tensors, fresh, strict=True):
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1], theirs[1])


def test_a_size_that_is_first_drawn_with_a_set_has_it(ready):
    pipe, dicts, plain, _ = ready
    sdtrt_backend.set_loras(pipe.unet, {"a": 1.0, "b": 1.0})
    got = pipe.draw(size=16)
    assert compare(got, own(merged(plain, [(dicts["a"], 1.0), (dicts["b"], 1.0)]), size=16)) < BOUND
    sdtrt_backend.set_loras(pipe.unet, {})
    assert compare(pipe.draw(size=16), own(plain, size=16)) < BOUND


def test_a_set_for_a_block_and_the_report_says_what_a_switch_cost(ready):
    pipe, _, _, first = ready
    sdtrt_backend.set_loras(pipe.unet, {})
    with sdtrt_backend.loras(pipe.unet, {"b": 1.0}):
        inside = pipe.draw()
        notes = sdtrt_backend.explain(pipe.unet).notes
    assert not torch.equal(inside[-1], first[-1])
    assert any("LoRAs in the 8-bit codes: b (1); the last switch wrote" in note for note in notes)
    assert all(map(torch.equal, first, pipe.draw()))


def sets_seen(pipe, sets, pictures=60):
    """Which of ``sets`` each picture was of, None for one that is of none of them, while another thread switches."""
    wanted = []
    for loras in sets:
        sdtrt_backend.set_loras(pipe.unet, loras)
        pipe.draw()
        wanted.append(torch.stack(pipe.draw()))
    ended = threading.Event()

    def switch():
        while not ended.is_set():
            for loras in sets:
                sdtrt_backend.set_loras(pipe.unet, loras)
                ended.wait(0.002)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        drawn = [torch.stack(pipe.draw()) for _ in range(pictures)]
    finally:
        ended.set()
        thread.join()
        sdtrt_backend.set_loras(pipe.unet, {})
    return [next((i for i, whole in enumerate(wanted) if torch.equal(whole, picture)), None) for picture in drawn]


def test_every_picture_is_of_one_set_while_another_thread_switches(ready):
    seen = sets_seen(ready[0], ({}, {"a": 1.0}, {"b": 1.0}))
    assert None not in seen
    assert len(set(seen)) > 1, "the test saw no switch"


def test_two_threads_with_a_set_each_draw_their_own(ready):
    pipe, _, _, _ = ready
    sets, expected, got = {"a": {"a": 1.0}, "b": {"b": 1.0}}, {}, {"a": [], "b": []}
    for name, weights in sets.items():
        sdtrt_backend.set_loras(pipe.unet, weights)
        pipe.draw()
        expected[name] = torch.stack(pipe.draw())
    sdtrt_backend.set_loras(pipe.unet, {})

    def serve(name):
        for _ in range(10):
            with sdtrt_backend.loras(pipe.unet, sets[name]):
                got[name].append(torch.stack(pipe.draw()))

    threads = [threading.Thread(target=serve, args=(name,)) for name in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in sets:
        assert len(got[name]) == 10
        assert all(torch.equal(expected[name], picture) for picture in got[name])


@pytest.mark.slow
def test_pictures_that_calibrate_have_the_set_too():
    torch._dynamo.reset()
    plain = small_unet()
    pipe = sdtrt_backend.accelerate(SmallPipeline(copy.deepcopy(plain)), engine="inductor")
    factors = lora(plain, ATTENTION + CONVOLUTIONS, 3)
    sdtrt_backend.load_lora(pipe.unet, factors, "a")
    sdtrt_backend.set_loras(pipe.unet, {"a": 1.0})
    expected = own(merged(plain, [(factors, 1.0)]))
    assert compare(pipe.draw(), expected) < 1e-5
    for _ in range(2):
        got = pipe.draw()
    assert sdtrt_backend.explain(pipe).state == "ready"
    assert compare(got, expected) < BOUND
    sdtrt_backend.restore(pipe)
    assert adapters_of(pipe.unet) is None
    assert all(map(torch.equal, own(plain), pipe.draw()))


def test_a_module_in_pieces_has_the_set_in_every_layer():
    """conv_in is in no graph: Dynamo runs what is between the pieces as it is."""
    torch._dynamo.reset()
    plain = small_unet()
    pipe = SmallPipeline(copy.deepcopy(plain))
    Offload(pipe.unet, whole=False)
    sdtrt_backend.accelerate(pipe, engine="reference")
    for _ in range(5):
        pipe.draw()
    for targets in (["conv_in"], ATTENTION + CONVOLUTIONS):
        factors = lora(plain, targets, 3, strength=0.2)
        sdtrt_backend.load_lora(pipe.unet, factors, "a")
        sdtrt_backend.set_loras(pipe.unet, {"a": 1.0})
        expected = own(merged(plain, [(factors, 1.0)]))
        for _ in range(4):
            assert compare(pipe.draw(), expected) < 0.2 < compare(own(plain), expected)
    sdtrt_backend.restore(pipe)
    assert all(map(torch.equal, own(plain), pipe.draw()))


def test_a_layer_that_only_an_earlier_graph_has_follows_a_set_too():
    torch._dynamo.reset()
    plain = small_unet()
    pipe = sdtrt_backend.accelerate(SmallPipeline(copy.deepcopy(plain)), engine="reference")
    for _ in range(4):
        pipe.draw()  # as one graph
    Offload(pipe.unet, whole=False)
    for _ in range(4):
        pipe.draw()  # in pieces, between which conv_in runs as it is
    factors = lora(plain, ["conv_in"], 3, strength=0.5)
    sdtrt_backend.load_lora(pipe.unet, factors, "a")
    sdtrt_backend.set_loras(pipe.unet, {"a": 1.0})
    expected = own(merged(plain, [(factors, 1.0)]))
    assert compare(pipe.draw(), expected) < 0.4 * compare(own(plain), expected)
    sdtrt_backend.restore(pipe)


def test_a_module_that_is_cut_after_a_set_has_it_in_every_call():
    torch._dynamo.reset()
    plain = small_unet()
    pipe = sdtrt_backend.accelerate(SmallPipeline(copy.deepcopy(plain)), engine="reference")
    for _ in range(4):
        pipe.draw()
    compiled = torch._dynamo.utils.counters["frames"]["ok"]
    factors = lora(plain, ["conv_in"], 3, strength=0.5)
    sdtrt_backend.load_lora(pipe.unet, factors, "a")
    sdtrt_backend.set_loras(pipe.unet, {"a": 1.0})
    expected = own(merged(plain, [(factors, 1.0)]))
    assert compare(pipe.draw(), expected) < 0.4 * compare(own(plain), expected)
    assert torch._dynamo.utils.counters["frames"]["ok"] == compiled
    Offload(pipe.unet, whole=False)
    for mine, theirs in zip(pipe.draw(), expected, strict=True):
        assert compare([mine], [theirs]) < 0.4 * compare(own(plain), expected)
    sdtrt_backend.restore(pipe)


@pytest.mark.parametrize("end", [sdtrt_backend.restore, lambda pipe: None], ids=["restored", "dropped"])
def test_what_dynamo_goes_on_holding_holds_no_weights_and_no_loras(end):
    unet = small_unet()
    pipe = sdtrt_backend.accelerate(SmallPipeline(unet), engine="reference", calibration_runs=1)
    pipe.draw()
    factors = lora(unet, ATTENTION, 1)
    sdtrt_backend.load_lora(unet, factors, "a")
    sdtrt_backend.set_loras(unet, {"a": 1.0})
    pipe.draw()
    add_lora(unet, "b", 1)  # a graph more
    pipe.draw()
    held = [StorageWeakRef(p.untyped_storage()) for p in unet.parameters()]
    loaded = [weakref.ref(f) for f in adapters_of(unet).loaded["a"].values()]
    end(pipe)
    gc.collect()
    assert sum(ref() is not None for ref in loaded) == (0 if end is sdtrt_backend.restore else len(loaded))
    del unet, pipe
    gc.collect()
    gc.collect()  # of what finalizers let go: Python 3.13
    assert not any(ref() is not None for ref in loaded)
    assert all(ref.expired() for ref in held)


def test_layers_that_steps_take_as_inputs_follow_a_set_in_another_dtype_too():
    plain = small_unet()
    pipe = SmallPipeline(copy.deepcopy(plain))
    sdtrt_backend.accelerate(pipe, engine="reference", calibration_runs=1)
    Offload(pipe.unet, whole=True)  # its weights have other memory at each call
    for _ in range(3):
        pipe.draw()
    factors = lora(plain, ATTENTION + CONVOLUTIONS, 3, strength=0.5)
    sdtrt_backend.load_lora(pipe.unet, factors, "a")
    sdtrt_backend.set_loras(pipe.unet, {"a": 1.0})
    assert compare(pipe.draw(), own(merged(plain, [(factors, 1.0)]))) < BOUND
    pipe.unet.to(torch.bfloat16)
    assert compare(pipe.draw(), own(merged(plain, [(factors, 1.0)]).bfloat16())) < BOUND


def test_pieces_follow_a_set_after_another_piece_was_built_again():
    torch._dynamo.reset()
    pipe = SmallPipeline(small_unet())
    Offload(pipe.unet, whole=False)
    sdtrt_backend.accelerate(pipe, engine="reference")
    for _ in range(5):
        pipe.draw()
    factors = lora(small_unet(), ATTENTION, 3, strength=1.0)
    sdtrt_backend.load_lora(pipe.unet, factors, "a")
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.5)
        pipe.unet.up_blocks[-1].resnets[-1].conv2.weight.mul_(2.0)
    pipe.draw()
    changed = small_unet()
    changed.load_state_dict(dict(pipe.unet.named_parameters()))
    sdtrt_backend.set_loras(pipe.unet, {"a": 1.0})
    expected = own(merged(changed, [(factors, 1.0)]))
    assert compare(pipe.draw(), expected) < 0.4 * compare(own(changed), expected)
    assert not any("calibrated anew" in note for note in sdtrt_backend.explain(pipe).notes)
    sdtrt_backend.restore(pipe)


@pytest.mark.slow
def test_a_set_outlives_other_weights_another_dtype_and_accelerating_again():
    torch._dynamo.reset()
    pipe, plain = SmallPipeline(small_unet()), small_unet(seed=5)
    sdtrt_backend.accelerate(pipe, engine="reference")
    for _ in range(3):
        pipe.draw()
    factors = lora(plain, ATTENTION + CONVOLUTIONS, 3)
    expected = own(merged(plain, [(factors, 1.0)]))
    sdtrt_backend.load_lora(pipe.unet, factors, "a")
    sdtrt_backend.set_loras(pipe.unet, {"a": 1.0})

    def like_that(pictures):
        for _ in range(pictures):
            got = pipe.draw()
        assert compare(got, expected) < 0.2
        assert sdtrt_backend.explain(pipe).state == "ready"

    pipe.unet.load_state_dict(plain.state_dict())
    like_that(6)
    pipe.unet.to(torch.bfloat16)
    like_that(4)
    copied = copy.deepcopy(pipe.unet)
    assert compare(SmallPipeline(copied).draw(), own(copied)) == 0, "a copy has none"
    sdtrt_backend.accelerate(pipe, engine="reference")
    like_that(5)


def test_loading_a_name_again_takes_its_place_at_once(ready):
    pipe, dicts, plain, first = ready
    factors = lora(plain, ATTENTION, 7, strength=0.5)
    sdtrt_backend.load_lora(pipe.unet, dicts["a"], "c")
    sdtrt_backend.set_loras(pipe.unet, {"c": 1.0})
    pipe.draw()
    sdtrt_backend.load_lora(pipe.unet, factors, "c")
    assert compare(pipe.draw(), own(merged(plain, [(factors, 1.0)]))) < BOUND
    sdtrt_backend.unload_lora(pipe.unet, "c")
    assert all(map(torch.equal, first, pipe.draw()))
    with pytest.raises(LoraError, match="no LoRA 'c' is loaded; loaded: a, b"):
        sdtrt_backend.set_loras(pipe.unet, {"c": 1.0})


def test_a_picture_that_pauses_keeps_its_set_though_others_draw_meanwhile(ready, monkeypatch):
    pipe, _, _, first = ready
    sdtrt_backend.set_loras(pipe.unet, {})
    monkeypatch.setattr(adapters, "IDLE_S", 0.0)
    monkeypatch.setattr(adapters, "IDLE_STEPS", 0)

    def another():
        sdtrt_backend.set_loras(pipe.unet, {"b": 1.0})
        pipe.draw()
        pipe.draw()

    with torch.no_grad():
        for i, timestep in enumerate(TIMESTEPS):
            assert torch.equal(pipe.unet(*small_inputs(pipe.unet, timestep)).sample, first[i])
            if i == 0:
                thread = threading.Thread(target=another)
                thread.start()
                thread.join()
    sdtrt_backend.set_loras(pipe.unet, {})


def test_after_a_switch_that_failed_half_way_the_next_one_is_whole(ready, monkeypatch):
    pipe, _, _, first = ready
    sdtrt_backend.set_loras(pipe.unet, {})
    pipe.draw()
    left = iter(range(4))

    def some(*args):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("no memory")
        return quantized_weights(*args)

    with monkeypatch.context() as patched:
        patched.setattr(merge, "quantized_weights", some)
        with pytest.raises(torch.OutOfMemoryError):
            sdtrt_backend.set_loras(pipe.unet, {"a": 1.0, "b": 1.0})
    sdtrt_backend.set_loras(pipe.unet, {})
    assert all(map(torch.equal, first, pipe.draw()))


def test_a_picture_keeps_a_lora_that_is_unloaded_meanwhile(ready):
    pipe, _, plain, first = ready
    sdtrt_backend.load_lora(pipe.unet, lora(plain, ATTENTION, 8), "brief")
    with sdtrt_backend.loras(pipe.unet, {"brief": 1.0}):
        before = pipe.draw()
        sdtrt_backend.unload_lora(pipe.unet, "brief")
        other = threading.Thread(target=pipe.draw)  # begins a picture without it
        other.start()
        other.join()
        assert all(map(torch.equal, before, pipe.draw()))
        assert all(map(torch.equal, pipe.draw(size=24), pipe.draw(size=24)))
    assert all(map(torch.equal, first, pipe.draw()))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["calibrate", "own"])
def test_a_set_that_the_ranges_do_not_fit(policy):
    torch._dynamo.reset()
    plain = small_unet()
    pipe = sdtrt_backend.accelerate(SmallPipeline(copy.deepcopy(plain)), engine="inductor", lora_policy=policy, max_error=0.15)
    for _ in range(3):
        first = pipe.draw()
    factors = lora(plain, ["conv1", "to_out", "to_v"], 5, strength=8.0)
    sdtrt_backend.load_lora(pipe.unet, factors, "wild")
    sdtrt_backend.set_loras(pipe.unet, {"wild": 1.0})
    expected = own(merged(plain, [(factors, 1.0)]))
    pictures = [pipe.draw() for _ in range(5)]
    assert all(compare(picture, expected) < 0.2 for picture in pictures)
    report = sdtrt_backend.explain(pipe)
    if policy == "own":
        assert any("with the LoRAs wild the 8-bit output differed by" in sentence for sentence in report.fallbacks)
        assert compare(pictures[-1], expected) < 1e-5
        sdtrt_backend.set_loras(pipe.unet, {})
        assert all(map(torch.equal, first, pipe.draw()))
    else:
        assert any("the ranges are calibrated anew" in note for note in report.notes)
        assert report.state == "ready"


# --- what is read


@pytest.fixture(scope="module")
def demo():
    pipe = sdtrt_backend.accelerate(sdtrt_backend.demo_pipeline())
    yield pipe
    sdtrt_backend.restore(pipe)


def with_prefix(factors, prefix="unet"):
    return {f"{prefix}.{key}": value for key, value in factors.items()}


def kohya(factors, alpha):
    """The same as kohya's trainer writes it."""
    found = {}
    for key, value in factors.items():
        path, _, part = key.partition(".lora_")
        name = "lora_unet_" + path.replace(".", "_")
        found[f"{name}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = value
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


@pytest.mark.parametrize("form", ["state dict", "file", "folder", "kohya"])
def test_what_diffusers_reads_is_read(demo, form, tmp_path):
    factors = lora(demo.unet, ["attn1", "resnets.0.conv1"] if form != "kohya" else ["attn1"], 1)
    source = with_prefix(factors)
    scale = 1.0
    if form == "kohya":
        source, scale = kohya(factors, 2.0), 2.0 / 4
    elif form != "state dict":
        save_file(source, tmp_path / "pytorch_lora_weights.safetensors")
        source = tmp_path / "pytorch_lora_weights.safetensors" if form == "file" else tmp_path
    before = [(n, id(m)) for n, m in demo.unet.named_modules()]
    sdtrt_backend.load_lora(demo, source, "read")
    found = adapters_of(demo.unet).loaded["read"]
    assert found.keys() == {key.partition(".lora_")[0] for key in factors}
    for path, f in found.items():
        weight = demo.unet.get_submodule(path).weight
        up, down = (factors[f"{path}.lora_{x}.weight"].flatten(1) for x in "BA")
        torch.testing.assert_close(f.delta(weight), (up @ down).view(weight.shape) * scale)
    assert [(n, id(m)) for n, m in demo.unet.named_modules()] == before
    assert not hasattr(demo.unet, "peft_config")


def test_the_part_of_a_text_encoder_is_pefts(demo):
    encoder = demo.text_encoder
    path = next(n for n, m in encoder.named_modules() if n.endswith("q_proj"))
    inner = path.removeprefix("text_model.")
    width = encoder.get_submodule(path).weight.shape[0]
    noise = torch.Generator().manual_seed(0)
    text = {f"text_encoder.text_model.{inner}.lora_A.weight": torch.randn(4, width, generator=noise),
            f"text_encoder.text_model.{inner}.lora_B.weight": torch.randn(width, 4, generator=noise)}
    tokens = torch.arange(8)[None]
    before = encoder(tokens).last_hidden_state
    sdtrt_backend.load_lora(demo, {**with_prefix(lora(demo.unet, ["attn1"], 1)), **text}, "both")
    assert torch.equal(before, encoder(tokens).last_hidden_state), "loading is not using"
    sdtrt_backend.set_loras(demo, {"both": 1.0})
    assert not torch.allclose(before, encoder(tokens).last_hidden_state)
    with sdtrt_backend.loras(demo, {}):
        assert torch.equal(before, encoder(tokens).last_hidden_state)
    assert not torch.allclose(before, encoder(tokens).last_hidden_state)
    sdtrt_backend.set_loras(demo, {})
    assert torch.equal(before, encoder(tokens).last_hidden_state)
    sdtrt_backend.unload_lora(demo, "both")
    assert torch.equal(before, encoder(tokens).last_hidden_state)


def test_restore_takes_the_part_of_a_text_encoder_along():
    pipe = sdtrt_backend.accelerate(sdtrt_backend.demo_pipeline())
    path = next(n for n, _ in pipe.text_encoder.named_modules() if n.endswith("q_proj"))
    width = pipe.text_encoder.get_submodule(path).weight.shape[0]
    inner = path.removeprefix("text_model.")
    text = {f"text_encoder.text_model.{inner}.lora_A.weight": torch.ones(4, width),
            f"text_encoder.text_model.{inner}.lora_B.weight": torch.ones(width, 4)}
    tokens = torch.arange(8)[None]
    before = pipe.text_encoder(tokens).last_hidden_state
    sdtrt_backend.load_lora(pipe, text, "text")
    sdtrt_backend.set_loras(pipe, {"text": 1.0})
    assert not torch.allclose(before, pipe.text_encoder(tokens).last_hidden_state)
    sdtrt_backend.restore(pipe)
    assert torch.equal(before, pipe.text_encoder(tokens).last_hidden_state)


REFUSALS = {
    "DoRA of kohya": ({"lora_unet_down_blocks_1_attn.dora_scale": torch.ones(1)}, "is of DoRA"),
    "DoRA of PEFT": ({"unet.conv_in.lora_magnitude_vector.weight": torch.ones(1)}, "is of DoRA"),
    "LoKr": ({"lora_unet_conv_in.lokr_w1": torch.ones(1)}, "is of LoKr"),
    "another model": ({"unet.conv_in.lora_A.weight": torch.ones(4, 7, 3, 3),
                       "unet.conv_in.lora_B.weight": torch.ones(9, 4, 1, 1)},
                      "size mismatch for conv_in"),
    "another part": ({"transformer.x.lora_A.weight": torch.ones(4, 7), "transformer.x.lora_B.weight": torch.ones(9, 4)},
                     "nothing in this file belongs to"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_used_is_refused_and_changes_nothing(demo, case):
    source, said = REFUSALS[case]
    loaded = adapters_of(demo.unet)
    before = {} if loaded is None else dict(loaded.loaded)
    with pytest.raises(LoraError, match=said):
        sdtrt_backend.load_lora(demo, source, "wrong")
    loaded = adapters_of(demo.unet)
    assert before == ({} if loaded is None else loaded.loaded)


@pytest.mark.parametrize("weight", [float("nan"), "1", True, None])
def test_a_weight_that_is_no_number(demo, weight):
    sdtrt_backend.load_lora(demo, with_prefix(lora(demo.unet, ["attn1"], 1)), "a")
    with pytest.raises(LoraError, match="expected a finite number for the weight of 'a'"):
        sdtrt_backend.set_loras(demo, {"a": weight})


def test_a_pipeline_that_is_not_accelerated():
    with pytest.raises(ModelError, match=r"call accelerate\(pipe\) first"):
        sdtrt_backend.load_lora(sdtrt_backend.demo_pipeline(), {}, "a")
    with pytest.raises(ModelError, match=r"call accelerate\(pipe\) first"):
        sdtrt_backend.set_loras(SmallPipeline(small_unet()), {})


def test_of_compiled_blocks_a_lora_of_their_layers_is_used_and_one_of_others_refused():
    torch._dynamo.reset()
    plain = small_unet()
    pipe = SmallPipeline(copy.deepcopy(plain))
    for block in (*pipe.unet.down_blocks, *pipe.unet.up_blocks):
        block.compile(backend="sd_int8", options={"engine": "reference", "calibration_runs": 1})
    for _ in range(4):
        pipe.draw()
    inside, outside = lora(plain, ATTENTION, 3, strength=0.8), lora(plain, CONVOLUTIONS, 3)
    with pytest.raises(LoraError, match="the LoRA changes conv_in, which is in none of the blocks that were compiled"):
        sdtrt_backend.load_lora(pipe.unet, outside, "b")
    sdtrt_backend.load_lora(pipe.unet, inside, "a")
    sdtrt_backend.set_loras(pipe.unet, {"a": 1.0})
    expected = own(merged(plain, [(inside, 1.0)]))
    assert compare(pipe.draw(), expected) < BOUND < compare(own(plain), expected)
    sdtrt_backend.restore(pipe.unet)


def test_a_pipeline_that_reads_no_loras():
    pipe = sdtrt_backend.accelerate(SmallPipeline(small_unet()))
    with pytest.raises(LoraError, match="SmallPipeline has no load_lora_weights"):
        sdtrt_backend.load_lora(pipe, {}, "a")


def test_an_unknown_policy_lists_the_valid_ones():
    with pytest.raises(OptionError, match=r"lora_policy.*calibrate, own"):
        sdtrt_backend.Options.parse({"lora_policy": "never"})


def test_a_layer_that_the_user_compiles_after_a_lora_was_loaded_stays_compiled():
    torch._dynamo.reset()
    pipe = sdtrt_backend.accelerate(SmallPipeline(small_unet()), engine="reference")
    pipe.draw()
    sdtrt_backend.load_lora(pipe.unet, lora(pipe.unet, ATTENTION, 1), "a")
    theirs = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    assert theirs._compiled_call_impl is not None  # by load_lora
    theirs.compile(backend="eager")
    compiled = theirs._compiled_call_impl
    sdtrt_backend.restore(pipe)
    assert theirs._compiled_call_impl is compiled
    assert not [path for path, m in pipe.unet.named_modules() if m._compiled_call_impl is not None and m is not theirs]


def test_a_gpu_without_room_for_a_lora_gets_it_when_it_is_switched_to(monkeypatch):
    torch._dynamo.reset()
    plain = small_unet()
    pipe = sdtrt_backend.accelerate(SmallPipeline(copy.deepcopy(plain)), engine="reference")
    for _ in range(3):
        pipe.draw()
    factors = lora(plain, ATTENTION, 1, strength=0.8)

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(adapters.Adapters, "_factors", full)
        sdtrt_backend.load_lora(pipe.unet, factors, "a")
    sdtrt_backend.set_loras(pipe.unet, {"a": 1.0})
    assert compare(pipe.draw(), own(merged(plain, [(factors, 1.0)]))) < BOUND
