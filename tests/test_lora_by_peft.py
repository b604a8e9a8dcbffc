"""LoRAs as diffusers and PEFT load them, around an accelerated module: never an error, base layers stay in 8 bits."""

import pytest
import torch
from small import SmallPipeline, own, small_unet
from test_lora import ATTENTION, CONVOLUTIONS, lora

import sdtrt_backend
from sdtrt_backend.measure import compare
from sdtrt_backend.state import states

pytestmark = pytest.mark.slow
BOUND = 0.15
NOTICED = 10  # pictures of three calls in which whatever was written is noticed


def load(unet, name="a", seed=1):
    unet.load_lora_adapter(lora(unet, ATTENTION, seed, strength=0.8), prefix=None, adapter_name=name)


def hot_swap(unet, seed=9):
    unet.load_lora_adapter(lora(small_unet(), ATTENTION, seed, strength=1.2), prefix=None, adapter_name="a", hotswap=True)


def with_two(unet):
    unet.load_lora_adapter(lora(small_unet(), CONVOLUTIONS, 2), prefix=None, adapter_name="b")
    unet.set_adapters(["a", "b"], [0.5, 1.0])


CALLS = {
    "load_lora_weights": lambda unet: None,
    "set_adapters": lambda unet: unet.set_adapters(["a"], [0.4]),
    "a second adapter": with_two,
    "disable_lora": lambda unet: unet.disable_lora(),
    "unload_lora_weights": lambda unet: unet.unload_lora(),
    "fuse_lora": lambda unet: unet.fuse_lora(),
    "enable_lora_hotswap": hot_swap,
}


def in_8_bits(pipe):
    return {row.name for row in sdtrt_backend.explain(pipe).layers if row.precision == "int8"}


@pytest.fixture(scope="module")
def recipe():
    torch._dynamo.reset()
    return sdtrt_backend.calibrate(SmallPipeline(small_unet()), ["a", "b"], steps=3)


@pytest.fixture(scope="module")
def base():
    """Layers that are in 8 bits without a LoRA, and the error of a picture."""
    torch._dynamo.reset()
    pipe = sdtrt_backend.accelerate(SmallPipeline(small_unet()), engine="reference")
    for _ in range(3):
        got = pipe.draw()
    return in_8_bits(pipe), compare(got, own(pipe.unet))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("with_recipe", [False, True], ids=["calibrates itself", "recipe"])
def test_what_a_user_does_with_loras(call, order, with_recipe, recipe, base):
    torch._dynamo.reset()
    pipe = SmallPipeline(small_unet())
    unet = pipe.unet
    if call == "enable_lora_hotswap":
        unet.enable_lora_hotswap(target_rank=8, check_compiled="ignore" if order == "after" else "error")
    if order == "before":
        load(unet)
    sdtrt_backend.accelerate(pipe, engine="reference", **({"recipe": recipe} if with_recipe else {}))
    for _ in range(3):
        pipe.draw()
    if order == "after":
        load(unet)
    with_the_first = [pipe.draw() for _ in range(2)][-1]
    assert compare(with_the_first, own(unet)) < BOUND
    CALLS[call](unet)
    for _ in range(NOTICED):
        got = pipe.draw()
    assert compare(got, own(unet)) < BOUND
    if call != "load_lora_weights":
        assert compare(got, with_the_first) > 1e-3, "the call changed the picture"
    assert in_8_bits(pipe) == base[0]
    said = sdtrt_backend.explain(pipe).notes
    beside = any("lora_A" in name for name, _ in unet.named_modules())
    assert any("sdtrt_backend.load_lora writes them" in note for note in said) == beside


def test_a_fused_lora_is_served_in_8_bits_after_accelerate_again(base):
    torch._dynamo.reset()
    pipe = sdtrt_backend.accelerate(SmallPipeline(small_unet()), engine="reference")
    for _ in range(3):
        pipe.draw()
    load(pipe.unet)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    sdtrt_backend.accelerate(pipe, engine="reference")
    for _ in range(3):
        got = pipe.draw()
    assert sdtrt_backend.explain(pipe).state == "ready"
    assert in_8_bits(pipe) == base[0]
    assert compare(got, own(pipe.unet)) < BOUND


@pytest.mark.parametrize("engine", ["reference", "inductor"])
@pytest.mark.parametrize("past_its_version", [True, False])
def test_a_hot_swap_builds_nothing_and_the_next_call_has_it(engine, past_its_version):
    """PEFT writes the values past their version, ``load_state_dict`` does not."""
    torch._dynamo.reset()
    pipe = SmallPipeline(small_unet())
    unet = pipe.unet
    unet.enable_lora_hotswap(target_rank=8)
    load(unet)
    sdtrt_backend.accelerate(pipe, engine=engine, calibration_runs=1)
    for _ in range(3):
        pipe.draw()
    (state,) = states(unet)
    made = [result for unit in state.units for result in unit.results.values()]
    for seed in (9, 10):
        if past_its_version:
            hot_swap(unet, seed)
        else:
            swapped = {n: torch.randn_like(p) * p.std() for n, p in unet.named_parameters() if ".lora_" in n}
            unet.load_state_dict(swapped, strict=False)
        assert compare(pipe.draw(), own(unet)) < BOUND
    for _ in range(NOTICED):
        pipe.draw()
    assert [result for unit in state.units for result in unit.results.values()] == made
    assert not any("built again" in note for note in sdtrt_backend.explain(pipe).notes)
