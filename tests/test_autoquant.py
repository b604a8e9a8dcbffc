"""``autoquant``: the fastest scheme inside the bound, never a slower module, and a plan that cannot be mistaken."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import sdtrt_backend
from sdtrt_backend import AutoquantPlan, OptionError, PlanError
from sdtrt_backend import autoquant as function
from sdtrt_backend.demo import LastCall, draw
from sdtrt_backend.files import digest, packed
from sdtrt_backend.stats import sqnr_db

pytest.importorskip("torchao", reason="autoquant applies TorchAO's schemes: pip install torchao")

autoquant = sys.modules["sdtrt_backend.autoquant"]
ROWS = 32


def make_module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 96)).eval()


def example():
    return torch.randn(2, ROWS // 2, 64, generator=torch.Generator().manual_seed(1))


def quantized(module):
    return {name for name, m in module.named_modules() if isinstance(m, nn.Linear) and type(m.weight) is not nn.Parameter}


@pytest.fixture
def timed(monkeypatch):
    """Milliseconds by decree: int8_dynamic wins on every layer; the whole module as the test says."""
    calls = {"layers": 0, "plain": 3.0, "plan": 2.0}

    def step_ms(*steps, repeats):
        if repeats == autoquant.MODULE_REPEATS:
            return [calls["plain"], calls["plan"]]
        calls["layers"] += 1
        return [2.0, 1.5, 1.0][: len(steps)]

    monkeypatch.setattr(autoquant, "step_ms", step_ms)
    monkeypatch.setattr(autoquant, "_compiled", lambda layer, x: lambda: layer(x))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    return calls


@pytest.fixture
def plan(timed):
    return function(make_module(), (example(),))


def test_each_distinct_shape_is_timed_once_and_the_fastest_is_applied(timed):
    module, x = make_module(), example()
    with torch.no_grad():
        expected = module(x)
    plan = function(module, (x,))
    assert timed["layers"] == 2  # the first and the last linear are alike
    assert {name: c.candidate for name, c in plan.layers.items()} == dict.fromkeys("023", "int8_dynamic")
    assert quantized(module) == {"0", "2", "3"}
    assert all(c.sqnr_db >= plan.min_sqnr for c in plan.layers.values())
    with torch.no_grad():
        assert sqnr_db(module(x), expected) >= plan.min_sqnr
    assert "3 of 3 linears in 8 bits" in str(plan)


def test_shapes_with_next_to_no_work_are_not_timed(timed, monkeypatch):
    monkeypatch.setattr(autoquant, "NEGLIGIBLE", 0.5)  # layers 0 and 3 have two thirds of the work
    plan = function(make_module(), (example(),))
    assert (set(plan.layers), timed["layers"]) == ({"0", "3"}, 1)
    assert plan.verdict.startswith("2 of 2 linears in 8 bits")
    assert plan.verdict.endswith("1 linears with next to no work were not timed and stay as is")


def test_keyword_arguments_are_a_dict_and_candidates_can_be_named(timed):
    module = make_module()
    plan = function(module, {"input": example()}, candidates=["int8_weight_only"])
    assert {c.candidate for c in plan.layers.values()} == {"int8_weight_only"}


def test_outside_the_bound_nothing_is_timed_and_nothing_changes(timed):
    module = make_module()
    plan = function(module, (example(),), min_sqnr=200.0)
    assert (timed["layers"], plan.layers, quantized(module)) == (0, {}, set())
    assert "none of 3 linears is faster in 8 bits within 200 dB" in plan.verdict


def test_a_slower_module_empties_the_plan_and_says_so(timed):
    timed["plan"] = 4.0
    module = make_module()
    plan = function(module, (example(),))
    assert (plan.layers, quantized(module)) == ({}, set())
    assert "takes 4.00 ms with the plan and 3.00 ms without, so the plan is empty" in plan.verdict


def test_a_layer_that_gains_less_than_noise_stays(timed, monkeypatch):
    monkeypatch.setattr(autoquant, "GAIN", 0.4)
    assert function(make_module(), (example(),)).layers == {}


def test_nothing_global_changes(timed):
    from torch._inductor import config

    before = config.save_config_portable()
    module = nn.Sequential(nn.Linear(64, 64)).eval()
    random = torch.get_rng_state()
    function(module, (torch.ones(8, 64),))
    assert config.save_config_portable() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not module[0]._forward_hooks


def test_what_cannot_be_done_is_refused_and_changes_nothing(timed):
    module = make_module()
    with pytest.raises(OptionError, match=r"unknown candidate 'int7'.*int8_dynamic, int8_weight_only"):
        function(module, (example(),), candidates=["int7"])
    with pytest.raises(OptionError, match="'float8_rowwise' has no kernels on this hardware"):
        function(module, (example(),), candidates=["float8_rowwise"])
    with pytest.raises(OptionError, match="got Tensor"):
        function(module, example())
    with pytest.raises(sdtrt_backend.ModelError, match="meta device"):
        function(nn.Linear(64, 64, device="meta"), (example(),))
    assert quantized(module) == set()
    assert not module[0]._forward_hooks


def test_a_plan_is_saved_and_loaded_as_it_was(plan, tmp_path):
    assert AutoquantPlan.load(plan.save(tmp_path / "plan.json")) == plan


def test_a_damaged_plan_is_refused(plan, tmp_path):
    path = plan.save(tmp_path / "plan.json")
    body = json.loads(path.read_text())

    def written(text):
        path.write_text(text)
        return path

    changed = {**body, "min_sqnr": 1.0}
    with pytest.raises(PlanError, match="edited or damaged"):
        AutoquantPlan.load(written(json.dumps(changed)))
    with pytest.raises(PlanError, match="truncated or not JSON"):
        AutoquantPlan.load(written(json.dumps(body)[:-20]))
    with pytest.raises(PlanError, match="has schema 99, this version reads up to"):
        AutoquantPlan.load(written(json.dumps({**body, "schema": 99})))
    with pytest.raises(PlanError, match="no schema number"):
        AutoquantPlan.load(written("[]"))
    with pytest.raises(PlanError, match=r"plan.json has not the form of its schema.*run autoquant again"):
        AutoquantPlan.load(written(packed(1, {"layers": {"0": {"candidate": "int8_dynamic"}}}).decode()))
    with pytest.raises(PlanError, match=r"absent.json is missing; run autoquant again"):
        AutoquantPlan.load(tmp_path / "absent.json")


@pytest.mark.parametrize("what", ["device", "capability", "torch", "torchao"])
def test_a_plan_made_elsewhere_is_refused(plan, tmp_path, what):
    path = plan.save(tmp_path / "plan.json")
    body = json.loads(path.read_text())
    del body["sha256"]
    body["environment"][what] = "another"
    path.write_text(json.dumps({**body, "sha256": digest(body)}))
    module = make_module()
    with pytest.raises(PlanError, match=rf"made with {what} another, this is .*run autoquant again"):
        function(module, plan=path)
    assert quantized(module) == set()


def test_the_plan_of_another_module_is_refused(plan):
    module = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32), nn.Linear(32, 96))
    with pytest.raises(PlanError, match=r"weight \(64, 96\) at '2', found \(32, 96\)"):
        function(module, plan=plan)
    assert quantized(module) == set()


@pytest.mark.slow
def test_a_new_process_applies_the_plan_without_timing_anything(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    module = make_module()
    torch.save(module.state_dict(), tmp_path / "w.pt")
    function(module, plan=plan)
    with torch.no_grad():
        torch.save(module(example()), tmp_path / "y.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(__file__.rpartition('/')[0])!r})
import test_autoquant as t
def never(*_, **__): raise AssertionError("timed")
t.autoquant.step_ms = t.autoquant.graph_ms = torch.compile = never
module = t.make_module()
module.load_state_dict(torch.load("w.pt"))
t.function(module, plan="plan.json")
with torch.no_grad():
    assert torch.equal(module(t.example()), torch.load("y.pt"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_really_compiled_and_timed():
    """No figures by decree: whatever wins, the module keeps its bound and its plan agrees with it."""
    module, x = nn.Sequential(nn.Linear(256, 512)).eval(), torch.randn(512, 256)
    with torch.no_grad():
        expected = module(x)
    plan = function(module, [x])
    assert set(plan.times["512 x 256 by 512 bias float32"]) == {autoquant.OWN, "int8_weight_only", "int8_dynamic"}
    assert quantized(module) == plan.layers.keys()
    with torch.no_grad():
        assert sqnr_db(module(x), expected) >= plan.min_sqnr


@pytest.mark.slow
def test_the_bundled_unet_is_not_slower_and_inside_the_bound():
    pipe = sdtrt_backend.demo_pipeline()
    last = LastCall(pipe.unet)
    draw(pipe, ["rocket, fluent style"], 3, 0)
    last.close()
    with torch.no_grad():
        expected = pipe.unet(*last.args, **last.kwargs)[0]
    plan = function(pipe.unet, {"sample": last.args[0], "timestep": last.args[1], **last.kwargs})
    assert plan.module_ms["plan"] <= plan.module_ms["torch.compile"] or not plan.layers
    assert all(c.sqnr_db >= plan.min_sqnr for c in plan.layers.values())
    with torch.no_grad():
        assert sqnr_db(pipe.unet(*last.args, **last.kwargs)[0], expected) > 20
