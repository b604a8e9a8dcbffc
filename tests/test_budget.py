"""``min_psnr``: what stays unquantised is measured, solved for and verified on prompts that calibrated nothing."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch

import sdtrt_backend
from sdtrt_backend import budget
from sdtrt_backend.budget import Part
from sdtrt_backend.demo import LastCall
from sdtrt_backend.errors import CalibrationError, OptionError
from sdtrt_backend.measure import compare
from sdtrt_backend.metrics import psnr
from sdtrt_backend.options import Options
from sdtrt_backend.quantize import free_convs, insert, plan
from sdtrt_backend.recipe import LayerRecipe, Recipe
from sdtrt_backend.report import budget_table

PROMPTS = ["rocket, fluent style", "owl, fluent style", "guitar, noto style", "cactus, fluent style"]


def test_the_fastest_parts_fit_the_budget_and_are_near_the_best_of_all_choices():
    rng = random.Random(0)
    for _ in range(200):
        parts = [Part(f"p{i}", (), rng.random() ** 4, rng.random()) for i in range(8)]
        allowed = rng.random() * sum(p.error for p in parts)
        kept = budget.fastest(parts, allowed)
        assert sum(p.error for p in parts if p not in kept) <= allowed + 1e-12
        choices = (c for r in range(9) for c in itertools.combinations(parts, r))
        best = min(sum(p.gain_ms for p in c) for c in choices if sum(p.error for p in parts if p not in c) <= allowed)
        lost = sum(p.gain_ms for p in kept)
        assert best <= lost + 1e-12
        assert lost <= best + 2 * max(p.gain_ms for p in parts)
    assert budget.fastest(parts, 1e9) == []
    assert len(budget.fastest(parts, 0.0)) == len(parts)


@pytest.mark.parametrize(("prompts", "judges"), [(4, 2), (8, 2), (12, 3), (32, 8), (128, 8)])
def test_a_quarter_of_the_prompts_judges(prompts, judges):
    texts = [str(i) for i in range(prompts)]
    calibrating, judging = budget.split(texts)
    assert len(judging) == judges
    assert calibrating + judging == texts


def test_too_few_prompts_are_refused():
    with pytest.raises(CalibrationError, match="at least 4 prompts, got 3"):
        budget.split(["a", "b", "c"])


def test_parts_are_kinds_of_layers_in_a_stage_and_of_all_stages_when_there_are_too_many(monkeypatch):
    groups = {f"down.{i}.resnets.{j}.conv{k}": f"down.{i}.resnets.{j}.conv{k}" for i in (0, 1) for j in (0, 1) for k in (1, 2)}
    groups |= {"mid.0.to_k": "mid.0.to_q", "mid.0.to_q": "mid.0.to_q"}
    recipe = Recipe("", {name: LayerRecipe("linear", "", group, 1.0) for name, group in groups.items()})
    parts = budget.grouped(recipe, list(groups))
    assert parts["down.0.resnets.*.conv1"] == ("down.0.resnets.0.conv1", "down.0.resnets.1.conv1")
    assert parts["mid.0.to_q"] == ("mid.0.to_k", "mid.0.to_q")
    assert len(parts) == 5
    monkeypatch.setattr(budget, "MAX_PARTS", 4)
    assert set(budget.grouped(recipe, list(groups))) == {"down.*.resnets.*.conv1", "down.*.resnets.*.conv2", "mid.*.to_q"}


def test_emulation_gives_what_the_inserted_graph_gives_and_leaves_nothing(graph, recipe, denoiser, inputs):
    captured, args = graph
    decisions = plan(captured.layers, recipe, (), free_convs=True)
    from sdtrt_backend.capture import bind, tensor_inputs

    bound, nodes = bind(captured, args)
    with torch.no_grad():
        expected = insert(bound, nodes, decisions)(*tensor_inputs(captured, args))[0]
        mine = {d.layer.name: d for d in budget.decided(denoiser, recipe, Options()) if d.quantized}
        assert set(mine) == {d.layer.name for d in decisions if d.quantized}
        weights = {n: budget.stats.fake_quantize_weight(d, d.layer.weight) for n, d in mine.items()}
        plain = denoiser(*inputs)
        with budget.emulated(denoiser, mine, weights):
            assert torch.allclose(denoiser(*inputs), expected, atol=1e-5)
        with pytest.raises(ZeroDivisionError), budget.emulated(denoiser, mine, weights):
            raise ZeroDivisionError
        assert torch.equal(denoiser(*inputs), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
    assert free_convs(torch.device("cpu"), "int8")


def test_pictures_that_are_not_finite_judge_nothing(denoiser, recipe):
    with pytest.raises(CalibrationError, match="in its own precision are not finite"):
        budget.fit(denoiser, recipe, Options(min_psnr=30.0), lambda *_: np.full((2, 8, 8, 3), np.nan), 2, 4, None)


@pytest.mark.slow
def test_a_pipeline_without_pictures_is_refused(pipe, monkeypatch):
    kind = type(pipe)
    plain = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *args, **kwargs: (plain(self, *args, **kwargs),))
    with pytest.raises(CalibrationError, match=f"{kind.__name__} gives none"):
        solved(pipe, 30.0)


@pytest.fixture
def pipe():
    torch._dynamo.reset()
    return sdtrt_backend.demo_pipeline()


@pytest.fixture
def quick(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path_factory.getbasetemp()))  # times of layers are measured once
    for name, smaller in {"PICTURES": 4, "TRIED": 1, "TRIAL_STEPS": 2, "MAX_PARTS": 12}.items():
        monkeypatch.setattr(budget, name, smaller)


def solved(pipe, target):
    return sdtrt_backend.calibrate(pipe, PROMPTS, num_inference_steps=4, guidance_scale=5.0, progress=False,
                                   options={"min_psnr": target})


@pytest.mark.slow
def test_a_budget_that_is_kept_anyway_keeps_every_layer_in_8_bits(pipe, quick):
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    recipe = solved(pipe, 10.0)
    assert not any(layer.keep for layer in recipe.layers.values())
    assert recipe.provenance["min_psnr"]["surely_db"] >= 10
    assert recipe.provenance["prompts"] == 2
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


@pytest.mark.slow
def test_a_tight_budget_names_layers_with_their_price_and_the_step_obeys(pipe, quick, tmp_path):
    loose = solved(pipe, 10.0).provenance["min_psnr"]["mean_db"]
    target = loose + 4
    recipe = solved(pipe, target)
    kept = {name: layer.keep or layer.second for name, layer in recipe.layers.items() if layer.keep or layer.second}
    facts = recipe.provenance["min_psnr"]
    assert kept
    assert len(kept) < len(recipe.layers)
    assert facts["mean_db"] > facts["surely_db"] >= target
    assert all(f"for min_psnr={target:g}: " in why and "ms a step" in why for why in kept.values())
    assert 0 < sum(p["kept"] or p["two_codes"] for p in facts["parts"]) < len(facts["parts"])

    again = sdtrt_backend.Recipe.load(recipe.save(tmp_path))
    assert {n: layer.keep or layer.second for n, layer in again.layers.items() if layer.keep or layer.second} == kept

    def pictures():
        noise = [torch.Generator().manual_seed(2 + i) for i in range(budget.PICTURES)]  # of the prompts that judged
        return pipe(PROMPTS[2:] * (budget.PICTURES // 2), num_inference_steps=4, guidance_scale=5.0, generator=noise,
                    output_type="np").images

    def step():
        return pipe.unet(*last.args, **last.kwargs)[0]

    last = LastCall(pipe.unet)
    plain = pictures()
    last.close()
    decisions = {d.layer.name: d for d in budget.decided(pipe.unet, again, Options()) if d.quantized}
    weights = {n: budget.stats.fake_quantize_weight(d, d.layer.weight) for n, d in decisions.items()}
    with torch.no_grad():
        exact = step()
        with budget.emulated(pipe.unet, decisions, weights):
            judged = compare(step(), exact)
        with sdtrt_backend.accelerated(pipe, recipe=tmp_path, engine="reference", min_psnr=target):
            each, error = psnr(pictures(), plain), compare(step(), exact)
            report = sdtrt_backend.explain(pipe)
    assert report.state == "ready"
    assert {layer.name: layer.reason for layer in report.layers if layer.name in kept} == kept
    # Its error is that of the step that judged, but not its values, nor facts["mean_db"] of four pictures: sums in another order
    # round ties otherwise, which moves the output by half of the error.
    assert error == pytest.approx(judged, rel=0.1)
    assert sum(each) / len(each) >= target


@pytest.mark.slow
@pytest.mark.long
def test_a_second_code_is_taken_where_it_costs_less_and_elsewhere_the_layer_is_out_of_8_bits(pipe, quick, monkeypatch):
    monkeypatch.setattr(budget, "times_ms", lambda problem, device: (3.0, 1.0))
    loose = solved(pipe, 10.0)
    recipe = solved(pipe, loose.provenance["min_psnr"]["mean_db"] + 6)
    twice = {name for name, layer in recipe.layers.items() if layer.second}
    assert twice
    two_already = {d.layer.name for d in budget.decided(pipe.unet, loose, Options()) if d.two_codes}
    assert {name for name, layer in recipe.layers.items() if layer.keep} <= two_already
    free, plain = (budget.decided(pipe.unet, recipe, Options(precision=p)) for p in ("int8", "fp8"))
    assert twice <= {d.layer.name for d in free if d.two_codes}
    assert {d.layer.name: d.reason for d in plain if d.layer.name in twice} == {
        n: f"kernels take one code here, and it {recipe.layers[n].second}" for n in twice}
    said = list(budget_table(recipe).columns[-1].cells)
    assert said.count("two codes") == sum(p["two_codes"] for p in recipe.provenance["min_psnr"]["parts"]) > 0
    assert said.count("its own precision") == sum(p["kept"] for p in recipe.provenance["min_psnr"]["parts"])
    assert not any(d.quantized for d in plain if d.layer.name in twice)


@pytest.mark.slow
@pytest.mark.long
def test_a_budget_beyond_reach_is_said(pipe, quick):
    with pytest.raises(CalibrationError, match=r"min_psnr=99 is out of reach: pictures have \d+\.\d dB, surely .* of \d+ parts"):
        solved(pipe, 99.0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


@pytest.mark.parametrize("made_for", [None, 30.0])
def test_without_a_recipe_made_for_it_the_backend_refuses_the_option(denoiser, inputs, recipe, tmp_path, made_for):
    facts = {} if made_for is None else {"min_psnr": {"target_db": made_for}}
    folder = Recipe(recipe.model_hash, recipe.layers, recipe.smoothing, provenance=facts).save(tmp_path)
    options = {"min_psnr": 35.0} if made_for is None else {"min_psnr": 35.0, "recipe": str(folder)}
    compiled = torch.compile(denoiser, backend="sd_int8", options=options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="OptionError: min_psnr=35 is solved with pictures"):
        compiled(*inputs)


def test_the_option_takes_decibels():
    for wrong in (0, -3, 100, "32", True):
        with pytest.raises(OptionError, match=r"'min_psnr' expects a number in \(0, 100\) or None"):
            Options.parse({"min_psnr": wrong})
    assert Options.parse({"min_psnr": 32}).min_psnr == 32


@pytest.mark.slow
def test_a_step_beyond_max_error_keeps_what_brings_most_of_it(denoiser, inputs, recipe, tmp_path):
    folder = str(recipe.save(tmp_path))

    def step(max_error):
        torch._dynamo.reset()
        unet = torch.compile(copy.deepcopy(denoiser), backend="sd_int8",
                             options={"recipe": folder, "engine": "inductor", "max_error": max_error})
        with torch.no_grad():
            unet(*inputs)
        return sdtrt_backend.explain(unet)

    whole = step(10.0)
    bound = 0.7 * whole.error
    report = step(bound)
    assert report.state == "ready"
    assert report.error <= bound
    kept = [layer for layer in report.layers if layer.reason.startswith(f"kept for max_error={bound:g}: in 8 bits")]
    assert 0 < len(kept) < len([layer for layer in whole.layers if layer.amax is not None])
    assert any(f"differed by {whole.error:.3f}, max_error is {bound}: {len(kept)} layers stay" in n for n in report.notes)
    assert not any(layer.keep for layer in sdtrt_backend.Recipe.load(folder).layers.values())
