"""Denoisers that Dynamo compiles in pieces, or not at all: blocks, graph breaks, offload; and layers that others were made of."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small import Offload, SmallPipeline, small_unet
from torch import nn

import sdtrt_backend
from sdtrt_backend.measure import compare
from sdtrt_backend.observe import Calibration, observed
from sdtrt_backend.options import Options
from sdtrt_backend.state import states

STEPS = (900, 500, 100)
OPTIONS = {"engine": "reference", "calibration_runs": 1}
MAXIMA = OPTIONS | {"max_error": 0.1, "rule": "max"}
CLOSE = 0.1  # relative error of a few layers in 8 bits


class Block(nn.Module):
    """x [n, 8, 64] -> [n, 8, 64]; first and last read other tensors."""

    def __init__(self, inner=64):
        super().__init__()
        self.first, self.last = nn.Linear(64, inner), nn.Linear(inner, 64)

    def forward(self, x):
        return x + self.last(F.gelu(self.first(x)))


class Blocks(nn.Module):
    """x [n, 8, 64], timestep [] -> [n, 8, 64]. broken: Dynamo ends a graph in front of every block."""

    def __init__(self, widths=(64, 64, 64), broken=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.broken = nn.ModuleList(map(Block, widths)), broken

    def forward(self, x, timestep):
        x = x + timestep / 1000
        for block in self.blocks:
            if self.broken:
                torch._dynamo.graph_break()
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def call(module, timestep=500, seed=0):
    noise = torch.Generator().manual_seed(1000 * seed + timestep)
    return module(torch.randn(2, 8, 64, generator=noise), torch.tensor(timestep))


def draw(module, seed=0):
    return [call(module, t, seed) for t in STEPS]


class Pipeline:
    """What ``calibrate`` takes for a pipeline."""

    def __init__(self, unet):
        self.unet = unet

    def __call__(self, prompt, num_inference_steps, generator, output_type):
        for t in STEPS[:num_inference_steps]:
            call(self.unet, t, seed=len(prompt))


@torch.no_grad()
def with_recipe(module, options=OPTIONS):
    """A pipeline of the module that its own recipe accelerates, after one picture."""
    pipe = Pipeline(module)
    recipe = sdtrt_backend.calibrate(pipe, ["a"], num_inference_steps=3, progress=False)
    sdtrt_backend.accelerate(pipe, recipe=recipe, **options)
    draw(pipe.unet)
    return pipe


def layers(module):
    return {name for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def in_8_bits(report):
    return {row.name for row in report.layers if row.precision == "int8"}


def test_blocks_compiled_one_by_one_calibrate_on_whole_pictures_of_the_denoiser():
    module = Blocks()
    expected = call(module)
    for block in module.blocks:
        block.compile(backend="sd_int8", options={**OPTIONS, "calibration_runs": 2})
    draw(module, 1)
    draw(module, 2)
    assert sdtrt_backend.explain(module).state == "calibrating"
    draw(module, 3)
    report = sdtrt_backend.explain(module)
    assert report.provenance["calls"] == 2 * len(STEPS)  # also the call in which the first block was compiled
    assert in_8_bits(report) == layers(module)
    assert all(sdtrt_backend.explain(block).state == "ready" for block in module.blocks)
    assert compare(call(module), expected) < CLOSE


def test_a_module_of_many_graphs_is_told_the_time_by_its_own_call():
    module = Blocks(broken=True)
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    for seed in range(3):
        draw(compiled, seed)
    report = sdtrt_backend.explain(module)
    assert report.state == "ready"
    assert report.provenance["calls"] == len(STEPS)
    assert in_8_bits(report) == layers(module)
    assert not any("no timestep is known" in note for note in report.notes)


@pytest.mark.slow
def test_a_piece_whose_layers_all_stay_has_their_reasons_and_is_no_fallback():
    module = Blocks((64, 72), broken=True)  # the second block's are no multiples of 16
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    for seed in range(3):
        draw(compiled, seed)
    report = sdtrt_backend.explain(module)
    assert (report.state, report.fallbacks) == ("ready", ())
    assert {row.name: row.reason.partition(":")[2].strip() for row in report.layers if row.precision != "int8"} == dict.fromkeys(
        ("blocks.1.first", "blocks.1.last"), "not multiples of 16")
    assert all(row.flops for row in report.layers)


@pytest.mark.parametrize(("widths", "state"), [((72, 64), "ready"), ((72, 72), "refused")])
def test_with_a_recipe_a_piece_that_stays_is_no_fallback_though_the_others_are_not_built_yet(widths, state, tmp_path):
    module, calibration = Blocks(widths, broken=True), Calibration()
    with observed(module, calibration):
        draw(module)
    calibration.recipe(Options(), {}).save(tmp_path)
    draw(torch.compile(module, backend="sd_int8", options={"engine": "reference", "recipe": str(tmp_path)}))
    report = sdtrt_backend.explain(module)
    assert (report.state, bool(report.fallbacks)) == (state, state == "refused")


@pytest.mark.slow
def test_pieces_whose_layers_all_stay_are_said_where_nothing_else_is_in_8_bits():
    module = Blocks((72, 72), broken=True)
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    for seed in range(3):
        draw(compiled, seed)
    report = sdtrt_backend.explain(module)
    assert report.state == "refused"
    assert "no layer can be quantised (blocks.1.first: 64 -> 72 channels: not multiples of 16)" in " ".join(report.fallbacks)


def test_a_layer_that_no_call_reaches_does_not_silence_the_sentence():
    module = Blocks((72,))
    module.unused = nn.Linear(64, 64)
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    for seed in range(3):
        draw(compiled, seed)
    report = sdtrt_backend.explain(module)
    assert report.state == "refused"
    (said,) = report.fallbacks
    assert "no layer can be quantised (blocks.0.first: 64 -> 72 channels" in said


def test_the_timestep_is_read_from_the_call_where_no_graph_has_a_name_for_it():
    module = Blocks()
    forward = module.forward

    def hooked(*args, **kwargs):
        return forward(*args, **kwargs)

    module.forward = hooked
    hooked.__wrapped__ = forward
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    draw(compiled, 0)
    assert sdtrt_backend.explain(module).state == "calibrating"
    draw(compiled, 1)
    report = sdtrt_backend.explain(module)
    assert report.state == "ready"
    assert report.provenance["calls"] == len(STEPS)


def test_layers_that_dynamo_gave_up_on_are_in_the_report():
    module = Blocks((64, 80, 96, 112))
    forward = module.forward

    def broken(x, timestep):
        torch._dynamo.graph_break()
        return forward(x, timestep)

    for block in module.blocks:
        block.forward = _called_after_a_break(block.forward)
    module.forward = broken
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    with torch._dynamo.config.patch(recompile_limit=2):
        for seed in range(3):
            draw(compiled, seed)
    report = sdtrt_backend.explain(module)
    assert {row.name for row in report.layers} == layers(module)
    left = layers(module) - in_8_bits(report)
    assert left
    assert left < layers(module)
    assert any("recompile_limit" in note and f"{len(left)} layers" in note for note in report.notes)


def test_a_layer_that_nothing_was_built_of_has_its_own_reason_where_it_would_stay_anyway():
    module = Blocks(broken=True)
    module.norm_out, module.spare = nn.Linear(64, 64), nn.Linear(64, 64)  # no call reaches them
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    for seed in range(3):
        draw(compiled, seed)
    reasons = {row.name: row.reason for row in sdtrt_backend.explain(module).layers if row.precision != "int8"}
    assert "final modulation" in reasons["norm_out"]
    assert reasons["spare"] == "nothing was built of its part"


def _called_after_a_break(forward):
    def called(x):
        torch._dynamo.graph_break()
        return forward(x)

    return called


def offload(module):
    pytest.importorskip("accelerate").cpu_offload(module, execution_device=torch.device("cpu"))


def cast_by_layer(module):
    pytest.importorskip("diffusers").hooks.apply_layerwise_casting(module, torch.float8_e4m3fn, torch.float32)


def offload_groups(module):
    pytest.importorskip("diffusers").hooks.apply_group_offloading(module, torch.device("cpu"), offload_type="leaf_level")


IN_PIECES = [(offload, "sequential CPU offload"), (cast_by_layer, "layerwise casting"), (offload_groups, "group offloading")]


@pytest.mark.parametrize(("prepare", "said"), IN_PIECES)
def test_a_module_whose_weights_come_in_pieces_is_refused_at_once(prepare, said):
    module = Blocks()
    prepare(module)
    expected = call(module)
    with pytest.raises(sdtrt_backend.ModelError, match=f"^Blocks: the module is under {said}.*: (use|load)"):
        sdtrt_backend.accelerate(module)
    assert module._compiled_call_impl is None
    assert torch.equal(call(module), expected)


@pytest.mark.parametrize(("prepare", "said"), IN_PIECES[1:])  # accelerate itself refuses a module that is on the meta device
def test_a_module_whose_weights_come_in_pieces_later_runs_in_its_own_precision(prepare, said):
    module = Blocks()
    sdtrt_backend.accelerate(module, **OPTIONS)
    for seed in range(3):
        draw(module, seed)
    assert sdtrt_backend.explain(module).state == "ready"
    plain = Blocks()
    for one in (module, plain):
        prepare(one)
    assert max(compare(mine, own) for mine, own in zip(draw(module), draw(plain), strict=True)) < 1e-5
    report = sdtrt_backend.explain(module)
    assert report.state == "refused"
    assert said in report.fallbacks[0]


@pytest.mark.parametrize(("prepare", "said"), IN_PIECES)
def test_weights_that_are_others_at_each_call_are_named_by_the_report(prepare, said):
    module = Blocks()
    prepare(module)
    expected = call(module)
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    for seed in range(3):
        draw(compiled, seed)
    assert compare(call(compiled), expected) < 1e-5
    report = sdtrt_backend.explain(module)
    assert report.state == "refused"
    assert said in report.fallbacks[0]


class Attention(nn.Module):
    """x [n, 8, 64], timestep [] -> [n, 8, 64], with the projections of one tensor apart or in one product."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.Module()
        self.attn.to_q, self.attn.to_k, self.attn.to_v = (nn.Linear(64, 64) for _ in range(3))
        self.out = nn.Linear(64, 64)

    def forward(self, x, timestep):
        x = x + timestep / 1000
        if hasattr(self.attn, "to_qkv"):
            q, k, v = self.attn.to_qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.attn.to_q(x), self.attn.to_k(x), self.attn.to_v(x)
        return self.out(F.scaled_dot_product_attention(q, k, v))

    def fuse(self):
        parts = self.attn.to_q, self.attn.to_k, self.attn.to_v
        self.attn.to_qkv = nn.Linear(64, 192)
        with torch.no_grad():
            self.attn.to_qkv.weight.copy_(torch.cat([m.weight for m in parts]))
            self.attn.to_qkv.bias.copy_(torch.cat([m.bias for m in parts]))


@pytest.mark.parametrize("fused_first", [False, True])
def test_projections_fused_or_parted_after_calibration_have_the_range_of_their_tensor(fused_first, tmp_path):
    module = Attention()
    expected = call(module)
    calibrated = Attention()
    for m in (calibrated,) if fused_first else (module,):
        m.fuse()
    compiled = torch.compile(calibrated, backend="sd_int8", options=OPTIONS)
    for seed in range(3):
        draw(compiled, seed)
    sdtrt_backend.state.states(calibrated)[-1].recipe.save(tmp_path)
    torch._dynamo.reset()
    other = torch.compile(module, backend="sd_int8", options={**OPTIONS, "recipe": str(tmp_path)})
    assert compare(call(other), expected) < CLOSE
    wanted = {"attn.to_q", "attn.to_k", "attn.to_v"} if fused_first else {"attn.to_qkv"}
    assert in_8_bits(sdtrt_backend.explain(module)) == {"out", *wanted}


def test_the_side_branch_of_a_lora_is_named_and_neither_calibrated_nor_in_8_bits():
    peft = pytest.importorskip("peft")
    module = Attention()
    peft.inject_adapter_in_model(peft.LoraConfig(r=32, target_modules=["to_q"], init_lora_weights=False), module)
    expected = call(module)
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    for seed in range(3):
        draw(compiled, seed)
    assert compare(call(compiled), expected) < CLOSE
    report = sdtrt_backend.explain(module)
    assert in_8_bits(report) == {"attn.to_q", "attn.to_k", "attn.to_v", "out"}
    side = {row.name: row.reason for row in report.layers if row.precision != "int8"}
    assert set(side) == {"attn.to_q.lora_A.default", "attn.to_q.lora_B.default"}
    assert all("side branch" in why for why in side.values())
    assert set(sdtrt_backend.state.states(module)[-1].recipe.layers) == in_8_bits(report)
    calibration = Calibration()
    with observed(module, calibration):
        call(module)
    assert set(calibration.ops) == in_8_bits(report)


class Video(nn.Module):
    """x [n, 8, 64], timestep [] -> [n, 8, 64]: a linear, and a convolution in three dimensions over it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.over_time = nn.Linear(64, 64), nn.Conv3d(64, 64, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x, timestep):
        x = self.first(x + timestep / 1000)
        return self.over_time(x.permute(0, 2, 1)[..., None, None])[..., 0, 0].permute(0, 2, 1)


def test_a_convolution_in_three_dimensions_is_named_with_its_work():
    module = Video()
    expected = call(module)
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    for seed in range(3):
        draw(compiled, seed)
    assert compare(call(compiled), expected) < CLOSE
    report = sdtrt_backend.explain(module)
    flops = {row.name: row.flops for row in report.layers}
    assert flops == {"first": 2 * 16 * 64 * 64, "over_time": 2 * 16 * 64 * 64 * 3}
    assert in_8_bits(report) == {"first"}
    assert "over_time" in str(report)


@pytest.mark.slow
def test_a_module_whose_forward_is_wrapped_while_it_calibrates_is_told_the_time_all_the_same():
    torch._dynamo.reset()
    unet = small_unet(0)
    pipe = SmallPipeline(unet)
    sdtrt_backend.accelerate(pipe, engine="reference", calibration_runs=1, max_error=0.3)
    pipe.draw()
    offload = Offload(unet, whole=True)  # takes *args, **kwargs
    for _ in range(2):
        pipe.draw()
    report = sdtrt_backend.explain(pipe)
    assert (report.state, report.fallbacks) == ("ready", ())
    offload.remove()


class Picking(nn.Module):
    """x [n, 8, 64], timestep [] -> [n, 8, 64]. ``attend`` loops over a call whose result's size depends on values, as attention
    over the tokens of a mask does: Dynamo leaves such a function to eager as a whole."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.q, self.k, self.after = (nn.Linear(64, 64) for _ in range(4))

    def attend(self, x):
        q, k = self.q(x), self.k(x)
        picked = []
        for i in range(len(x)):
            tokens = torch.nonzero(x[i, :, 0] > -9).flatten()
            picked.append(q[i, tokens] + k[i, tokens])
        return torch.stack(picked)

    def forward(self, x, timestep):
        return self.after(self.attend(self.before(x + timestep / 1000)))


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_layers_of_a_function_that_dynamo_gives_up_on_are_in_8_bits(in_place):
    module = Picking()
    plain, pipe = copy.deepcopy(module), SimpleNamespace(unet=module)
    if in_place:
        sdtrt_backend.accelerate(pipe, **OPTIONS)
        compiled = module
    else:
        compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    for seed in range(4):
        draw(compiled, seed)
    report = sdtrt_backend.explain(module)
    assert (report.state, report.fallbacks, report.notes) == ("ready", (), ())
    assert in_8_bits(report) == layers(module)
    for mine, own in zip(draw(compiled, 5), draw(plain, 5), strict=True):
        assert 0 < compare(mine, own) < CLOSE
    if not in_place:
        assert torch.equal(call(module), call(plain))
    assert torch.equal(call(copy.deepcopy(module)), call(plain))
    sdtrt_backend.restore(SimpleNamespace(unet=module))
    assert not any(m._compiled_call_impl for m in module.modules())
    assert torch.equal(call(module), call(plain))


@torch.no_grad()
def test_layers_of_no_graph_belong_to_a_module_whose_timestep_has_another_name():
    class Moments(Picking):
        def forward(self, x, moment):
            return Picking.forward(self, x, moment)

    module = Moments()
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    for seed in range(10):
        draw(compiled, seed)
    report = sdtrt_backend.explain(module)
    assert report.state == "ready"
    assert in_8_bits(report) == layers(module)
    assert len(states(module)) == 1


@torch.no_grad()
def test_a_failure_to_look_for_layers_of_no_graph_is_said_and_not_raised(monkeypatch):
    def broken(*_):
        raise RuntimeError("made here")

    module = Picking()
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    monkeypatch.setattr("sdtrt_backend.state.names.step_into", broken)
    for seed in range(3):
        draw(compiled, seed)
    report = sdtrt_backend.explain(module)
    assert report.state == "ready"
    assert any("looking for layers that no graph has failed with RuntimeError: made here" in note for note in report.notes)
    assert all(m._compiled_call_impl is None for m in module.modules())


@torch.no_grad()
def test_layers_of_no_graph_follow_a_recipe_too():
    pipe = with_recipe(Picking())
    draw(pipe.unet, 1)
    report = sdtrt_backend.explain(pipe)
    assert in_8_bits(report) == layers(pipe.unet)
    assert report.provenance["front_door"] == "calibrate"


class Louder(nn.Module):
    """x [n, 8, 64], timestep [] -> [n, 8, 64]: what ``second`` reads is ten times as large late in a picture."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, timestep):
        return self.second(self.first(x) * (1 - timestep / 1000))


@torch.no_grad()
def test_weights_that_were_changed_are_judged_at_more_than_the_first_timestep():
    module = Louder()
    compiled = torch.compile(module, backend="sd_int8", options=MAXIMA)
    for seed in range(2):
        draw(compiled, seed)
    assert sdtrt_backend.explain(module).state == "ready"
    module.first.weight.mul_(3)  # fits at timestep 900, where the step is built anew, and is clipped at 100
    assert 0 < compare(call(compiled, 900), call(module, 900)) < 0.1
    assert sdtrt_backend.explain(module).state == "ready"
    assert torch.equal(call(compiled, 100), call(module, 100))
    report = sdtrt_backend.explain(module)
    assert (report.state, report.fallbacks) == ("calibrating", ())
    (said,) = [n for n in report.notes if "calibrated anew" in n]
    assert "weights were changed after they were calibrated" in said
    assert "at timestep 100" in said
    for seed in range(2, 4):
        draw(compiled, seed)
    for mine, own in zip(draw(compiled, 4), draw(module, 4), strict=True):
        assert 0 < compare(mine, own) < 0.1
    assert sdtrt_backend.explain(module).state == "ready"


@torch.no_grad()
def test_a_recipe_whose_ranges_do_not_fit_weights_that_came_later_is_calibrated_anew():
    pipe = with_recipe(Louder(), MAXIMA)
    assert sdtrt_backend.explain(pipe).provenance["front_door"] == "calibrate"
    pipe.unet.first.weight.mul_(100)  # beyond the bound at once
    plain = copy.deepcopy(pipe.unet)
    for seed in range(4):
        for mine, own in zip(draw(pipe.unet, seed), draw(plain, seed), strict=True):
            assert compare(mine, own) < 0.1
    report = sdtrt_backend.explain(pipe)
    assert (report.state, report.fallbacks) == ("ready", ())
    assert report.provenance["front_door"] == "self-calibration"
    pipe.unet(torch.randn(3, 2, 5, 64), torch.tensor(100))  # a graph of its own, which asks for the recipe no more
    assert sdtrt_backend.explain(pipe).state == "ready"


@torch.no_grad()
def test_weights_that_took_the_place_of_the_calibrated_ones_are_judged_too():
    module = Louder()
    compiled = torch.compile(module, backend="sd_int8", options=MAXIMA)
    for seed in range(2):
        draw(compiled, seed)
    louder = {name: 3 * t if name == "first.weight" else t.clone() for name, t in module.state_dict().items()}
    module.load_state_dict(louder, assign=True)
    for seed in range(5):
        for mine, own in zip(draw(compiled, seed), draw(module, seed), strict=True):
            assert compare(mine, own) < 0.1
    report = sdtrt_backend.explain(module)
    assert report.state == "ready"
    assert any("calibrated anew" in note for note in report.notes)


@torch.no_grad()
def test_changed_weights_that_stay_inside_the_bound_stay_in_8_bits():
    module = Louder()
    compiled = torch.compile(module, backend="sd_int8", options=MAXIMA)
    for seed in range(2):
        draw(compiled, seed)
    module.first.weight.mul_(1.02)
    for seed in range(5):
        for mine, own in zip(draw(compiled, seed), draw(module, seed), strict=True):
            assert 0 < compare(mine, own) < 0.1
    assert sdtrt_backend.explain(module).state == "ready"
