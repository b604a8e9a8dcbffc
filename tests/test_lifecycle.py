"""An accelerated module lives with its user: whatever the user does to it, in any order, it stays the module.

Beside the accelerated module lives a shadow that nothing of this package ever saw, and that is done the same things to. After
every step of a sequence the module's own output and its parameters are the shadow's to the bit, the accelerated output is
within its bound, and the report tells the truth.

SDTRT_LIFECYCLE=500 draws so many sequences from a new seed, which it prints; SDTRT_LIFECYCLE_SEED takes one again.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import random
import sys

import pytest
import torch
from small import TIMESTEPS, Offload, SmallPipeline, add_lora, other_weights, own, small_inputs, small_unet
from torch.multiprocessing.reductions import StorageWeakRef

import sdtrt_backend
from sdtrt_backend.adapters import weight_of
from sdtrt_backend.measure import compare

pytest.importorskip("diffusers")
pytest.importorskip("peft")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, note, settings, strategies  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

SEQUENCES, STEPS = int(os.environ.get("SDTRT_LIFECYCLE", 0)), 8
BOUND = 0.2  # of the relative error of an 8-bit output; what the user does here changes the output by more than twice as much
NOTICED = 8  # calls after which a weight that was written past its version counter is seen
PICTURES = 4  # one calibrates, the next one builds, and two for modules whose graph breaks
SETS = ("ink", "pixel")  # LoRAs of load_lora
MODES = strategies.sampled_from([torch.float32, torch.bfloat16])


class Lifecycle(RuleBasedStateMachine):
    """The user's life with one pipeline."""

    device = "cpu"
    options = {"engine": "reference", "calibration_runs": 1, "max_error": BOUND}  # noqa: RUF012

    @initialize(weights=strategies.sampled_from(["release", "keep", None]))
    def a_new_pipeline(self, weights):
        """weights: None for a pipeline that is not accelerated yet."""
        self.made = 0
        self._new()
        if weights is not None:
            self._accelerate(weights)

    def _new(self):
        self.unet, self.shadow = (small_unet(self.made).to(self.device) for _ in range(2))
        self.pipe, self.recipe, self.size, self.dtype = SmallPipeline(self.unet), None, 8, torch.float32
        self.accelerated, self.pictures, self.weights_changed, self.unseen = False, 0, False, False
        self.adapters, self.active, self.fused, self.offloads, self.loras = [], True, False, [], {}
        self.made += 1

    def both(self, do):
        """The same operation on the module and on its shadow."""
        do(self.unet)
        do(self.shadow)

    def changed(self, unseen=False):
        """The user wrote weights: a recipe of before may be of another model. unseen: no version counter saw it."""
        self.recipe, self.weights_changed, self.unseen = None, True, unseen

    # what users do: the package itself

    @rule(with_recipe=strategies.booleans(), weights=strategies.sampled_from(["keep", "release"]))
    def accelerate(self, with_recipe, weights):
        if with_recipe and self.recipe is None:
            self._calibrate()
        self._accelerate(weights, self.recipe if with_recipe else None)

    def _accelerate(self, weights, recipe=None):
        sdtrt_backend.accelerate(self.pipe, recipe=recipe, weights=weights, **self.options)
        self.accelerated, self.pictures, self.weights_changed = True, 0, False

    @rule()
    def calibrate(self):
        self._calibrate()

    def _calibrate(self):
        self.recipe = sdtrt_backend.calibrate(self.pipe, ["a", "b"], num_inference_steps=3, progress=False)
        assert layers(self.unet) <= set(self.recipe.layers), "calibrate saw every layer, each by its own name"

    @precondition(lambda self: self.accelerated)
    @rule()
    def restore(self):
        sdtrt_backend.restore(self.pipe)
        self.accelerated, self.loras = False, {}

    @rule()
    def draw_another_size(self):
        self.size = 24 - self.size

    @rule()
    def a_second_pipeline_of_the_same_module(self):
        self.pipe = SmallPipeline(self.unet)

    @rule()
    def drop_the_pipeline(self):
        memory = [StorageWeakRef(p.untyped_storage()) for p in self.unet.parameters()]
        self.unet = self.pipe = self.shadow = self.offloads = None
        gc.collect()
        held = sum(not ref.expired() for ref in memory)
        assert held == 0, f"{held} of {len(memory)} weights live on after the pipeline is gone"
        self._new()

    # what users do: PyTorch

    @rule()
    def to_the_device_and_back(self):
        self.both(lambda m: m.to("cpu"))
        self.both(lambda m: m.to(self.device))

    @rule(dtype=MODES)
    def to_a_dtype(self, dtype):
        if dtype is not self.dtype:
            self.both(lambda m: m.to(dtype))
            self.dtype, self.recipe = dtype, None

    @rule()
    def save(self):
        file = io.BytesIO()
        torch.save(self.unet.state_dict(), file)
        file.seek(0)
        same(torch.load(file), self.shadow.state_dict(), "what was saved")

    @precondition(lambda self: not self.fused)
    @rule(seed=strategies.integers(1, 9), assign=strategies.booleans())
    def load_state_dict(self, seed, assign):
        weights = other_weights(self.shadow, seed)
        self.both(lambda m: m.load_state_dict({name: t.clone() for name, t in weights.items()}, assign=assign))
        self.both(lambda m: m.requires_grad_(False))
        self.changed()

    @precondition(lambda self: not self.offloads)
    @rule()
    def copy_the_module(self):
        twin = copy.deepcopy(self.unet)
        same(dict(twin.named_parameters()), dict(self.shadow.named_parameters()), "the copy")
        for mine, theirs in zip(SmallPipeline(twin).draw(self.size), own(self.shadow, self.size), strict=True):
            assert torch.equal(mine, theirs), "a copy of the module is the module, to the bit"

    @rule(seed=strategies.integers(1, 9))
    def write_weights_past_their_version(self, seed):
        weights = other_weights(self.shadow, seed)

        def write(module):
            for name, p in module.named_parameters():
                p.data.copy_(weights[name])

        self.both(write)
        self.changed(unseen=True)

    # what users do: adapters

    @precondition(lambda self: len(self.adapters) < 2 and not self.fused and self.active)
    @rule(seed=strategies.integers(1, 9))
    def add_a_lora(self, seed):
        name = next(n for n in "ab" if n not in self.adapters)
        self.both(lambda m: add_lora(m, name, seed))
        self.adapters.append(name)

    @precondition(lambda self: self.adapters and not self.fused and self.active)
    @rule(strength=strategies.sampled_from([0.0, 0.5, 1.0]))
    def scale_the_loras(self, strength):
        self.both(lambda m: m.set_adapters(self.adapters, [strength] * len(self.adapters)))

    @precondition(lambda self: self.adapters and not self.fused)
    @rule()
    def switch_the_loras(self):
        self.active = not self.active
        self.both(lambda m: m.enable_adapters() if self.active else m.disable_adapters())

    @precondition(lambda self: self.adapters and not self.fused and self.active)
    @rule()
    def delete_a_lora(self):
        name = self.adapters.pop(0)
        self.both(lambda m: m.delete_adapters(name) if self.adapters else m.unload_lora())

    @precondition(lambda self: self.adapters and not self.fused and self.active)
    @rule()
    def fuse_the_loras(self):
        self.both(lambda m: m.fuse_lora())
        self.fused = True
        self.changed(unseen=True)

    @precondition(lambda self: self.fused)
    @rule(unfuse=strategies.booleans())
    def unfuse_or_unload(self, unfuse):
        self.both(lambda m: m.unfuse_lora() if unfuse else m.unload_lora())
        self.adapters, self.fused = self.adapters if unfuse else [], False
        if unfuse:
            self.changed(unseen=True)

    @precondition(lambda self: self.accelerated)
    @rule(weights=strategies.dictionaries(strategies.sampled_from(SETS), strategies.sampled_from([0.5, 1.0])))
    def set_loras(self, weights):
        for name in weights:
            sdtrt_backend.load_lora(self.unet, state_dict(self.shadow, name), name)
        sdtrt_backend.set_loras(self.unet, weights)
        self.loras, self.weights_changed = weights, True

    # what users do: offload

    @rule(whole=strategies.booleans())
    def offload(self, whole):
        if not self.offloads:
            self.offloads = [Offload(module, whole) for module in (self.unet, self.shadow)]

    @precondition(lambda self: self.offloads)
    @rule()
    def end_the_offload(self):
        for offload in self.offloads:
            offload.remove()
        self.offloads = []

    # what has to be true whatever they did

    @invariant()
    def the_module_is_itself(self):
        for name, p in self.unet.named_parameters():
            assert p.untyped_storage().nbytes() >= p.numel() * p.element_size(), f"{name} has no memory: nobody can read it"
        same(dict(self.unet.named_parameters()), dict(self.shadow.named_parameters()), "the module")
        expected = own(self.shadow, self.size)
        for mine, theirs in zip(own(self.unet, self.size), expected, strict=True):
            assert torch.equal(mine, theirs), "the module's own forward gives its own output, to the bit"
        if self.loras:
            expected = own(with_loras(self.shadow, self.loras), self.size)
        attempts = 1 + (NOTICED // len(TIMESTEPS) if self.unseen else 0)
        for _ in range(attempts):
            errors = [compare(y, e) for y, e in zip(self.pipe.draw(self.size), expected, strict=True)]
            self.pictures += 1
        self.unseen = False
        note(f"errors {', '.join(f'{e:.3f}' for e in errors)}")
        assert max(errors) <= (BOUND if self.accelerated else 0), f"relative errors {errors}"
        if self.accelerated:
            self.the_report_tells_the_truth()

    def the_report_tells_the_truth(self):
        report = sdtrt_backend.explain(self.pipe)
        assert str(report)
        if self.pictures >= PICTURES and not self.weights_changed:
            assert report.state == "ready", f"{report.state} after {self.pictures} pictures: {report.fallbacks} {report.notes}"
        if report.state != "ready":
            assert report.state in ("calibrating", "building") or report.fallbacks, "a refusal is a sentence"
            return
        known, listed = layers(self.unet), {row.name for row in report.layers}
        assert known <= listed, f"not in the report: {sorted(known - listed)}"
        # a size may need more of its layers in 16 bits for the error bound than another one
        shape = "x".join(map(str, small_inputs(self.unet, TIMESTEPS[0], self.size)[0].shape))
        pieces = [piece for _, piece in report.pieces if shape in piece.sizes.split(", ")]
        # of a module in pieces the one with the latents, if any, is its first convolution, in 16 bits
        in_8_bits = _in_8_bits(*pieces) or _in_8_bits(report)
        # some calls are sampled for drift, which reads the codes once more
        ran = min(products_in_8_bits(self.unet, self.size) for _ in range(3))
        if sdtrt_backend.explain(self.pipe).state != "ready":
            return  # one of these calls was the one beyond the bound for which the ranges are calibrated anew
        assert len(in_8_bits) == ran, f"the report names {len(in_8_bits)} layers in 8 bits, a call ran {ran}"

    def teardown(self):
        if getattr(self, "accelerated", False):
            sdtrt_backend.restore(self.pipe)
        torch._dynamo.reset()


def state_dict(module, name):
    """A LoRA of some of its layers, as PEFT writes it."""
    noise, found = torch.Generator().manual_seed(SETS.index(name)), {}
    for path in sorted(layers(module)):
        if any(part in path for part in ("attn1", "conv1", "conv_in")):
            w = weight_of(module, path)
            down, up = torch.randn(2, *w.shape[1:], generator=noise), torch.randn(w.shape[0], 2, generator=noise)
            found[f"{path}.lora_A.weight"] = down * w[0].numel() ** -0.5
            found[f"{path}.lora_B.weight"] = up.view(-1, 2, *[1] * (w.dim() - 2)) * 0.2
    return found


def with_loras(module, weights):
    """A copy with these LoRAs in its weights."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        vars(part).pop("forward", None)  # of an offload: it calls what was copied
    with torch.no_grad():
        for name, strength in weights.items():
            factors = state_dict(module, name)
            for path in {key.partition(".lora_")[0] for key in factors}:
                w = weight_of(copied, path)
                up, down = (factors[f"{path}.lora_{x}.weight"].to(w.device).flatten(1) for x in "BA")
                w += ((up @ down).view(w.shape) * strength).to(w.dtype)
    return copied


def layers(module):
    """Names of the convolutions and linears, as the user knows them: without what an adapter wraps around or puts beside them."""
    kinds = torch.nn.Linear | torch.nn.Conv2d
    return {name.removesuffix(".base_layer") for name, m in module.named_modules()
            if isinstance(m, kinds) and not {"lora_A", "lora_B"} & set(name.split("."))}


def _in_8_bits(*reports):
    return {row.name for report in reports for row in report.layers if row.precision == "int8"}


def same(mine, theirs, what):
    """The same names, and the same tensors to the bit."""
    assert list(mine) == list(theirs), f"{what}: the names differ"
    for name, t in theirs.items():
        assert mine[name].dtype == t.dtype, f"{what}: {name} is {mine[name].dtype}, not {t.dtype}"
        assert torch.equal(mine[name], t), f"{what}: {name} is another one"


@torch.no_grad()
def products_in_8_bits(module, size):
    """How many weights one call of the module reads as codes, counted by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(*small_inputs(module, TIMESTEPS[0], size))
    return sum(event.name() == "quantized_decomposed::dequantize_per_channel"
               for event in profile.profiler.kineto_results.events())  # ten times as fast as the profiler's own list of events


@pytest.mark.slow
def test_pieces_of_a_module_stay_inside_the_bound_after_weights_changed(weights_leave_the_cpu_too, tmp_path, monkeypatch):
    """Each was inside it, and the module 0.217 from its own precision."""
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path))
    monkeypatch.setattr(sys.modules[__name__], "note", lambda text: None)
    life = Lifecycle()
    life.a_new_pipeline(weights="keep")
    try:
        life.the_module_is_itself()
        for rule_of_it, given in ((life.offload, {"whole": False}), (life.add_a_lora, {"seed": 5}),
                                  (life.write_weights_past_their_version, {"seed": 8}), (life.draw_another_size, {}),
                                  (life.draw_another_size, {}), (life.load_state_dict, {"assign": True, "seed": 8}),
                                  (life.draw_another_size, {})):
            rule_of_it(**given)
            life.the_module_is_itself()
    finally:
        life.teardown()


@pytest.mark.slow
def test_whatever_its_user_does_an_accelerated_module_stays_the_module(weights_leave_the_cpu_too, tmp_path, monkeypatch):
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path))
    machine = Lifecycle
    if SEQUENCES:
        seed = int(os.environ.get("SDTRT_LIFECYCLE_SEED") or random.SystemRandom().randrange(2**32))
        print(f"\nSDTRT_LIFECYCLE={SEQUENCES} SDTRT_LIFECYCLE_SEED={seed}", flush=True)
        machine = hypothesis.seed(seed)(Lifecycle)
    run_state_machine_as_test(machine, settings=settings(
        max_examples=SEQUENCES or 24, stateful_step_count=STEPS, deadline=None, derandomize=not SEQUENCES, database=None,
        # a sequence is short, and trying shorter ones would take minutes
        phases=[Phase.generate], suppress_health_check=list(HealthCheck), report_multiple_bugs=False))
