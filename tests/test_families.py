"""The one line on a tiny model of every family, and the whole way for some: a saved recipe on a fresh copy, the compiled step
against the reference at every step, the model's own output to the bit once it is restored; and of every family the graph for a
GPU, one operation after the other.

The whole way takes a model from 20 seconds to 2 minutes, so a few go it in every run. All of them do with

    SDTRT_FAMILIES=all python -m pytest tests/test_families.py
"""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, controlnet, sdxl_unet
from more_models import MORE
from test_teacher_forcing import for_cuda, for_the_cpu, forced, whole_for_cuda
from tolerances import TOLERANCES
from torch import nn
from torch.utils import _pytree

import sdtrt_backend
from sdtrt_backend import measure
from sdtrt_backend.calibrate import Calibration, observed
from sdtrt_backend.calls import written
from sdtrt_backend.capture import bind, capture
from sdtrt_backend.options import Options
from sdtrt_backend.quantize import covering

OPTIONS = {"engine": "reference", "calibration_runs": 1}
SHARES = (1.0, 0.7, 0.4, 0.1)  # of noise, at the steps of a picture
MOST_PICTURES = 5
ALL = {name: make for name, make in {**FAMILIES, **MORE}.items() if name != "controlnet"}  # which is a part of a pipeline
FOR_A_GPU = ("flux", "flux2", "chroma", "qwen_image", "z_image", "sd3", "ltx", "wan", "pixart", "lumina2")
QUICK = ("chroma", "flux2", "hunyuan_dit", "cogview4", "sana", "cogvideox", "stable_cascade", "kandinsky_prior")
EVERY = os.environ.get("SDTRT_FAMILIES") == "all"
WHOLE = tuple(ALL) if EVERY else ("sana",)
ONE_LINE = [name for name in ALL if name not in WHOLE and (name in FAMILIES or name in QUICK)]
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NOT_BUILT = "nothing was built of its part"  # said of a layer, but no reason that its rule has
NAMED = 0.95  # of the layers that ran, in 8 bits or named with a reason of their own
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NUDGES = range(3)  # seeds


class Pipeline:
    """What ``calibrate`` and ``accelerate`` take for a pipeline of a family: its denoiser, and a call that draws one picture.
    ``steps``: keyword arguments of the denoiser at every step of another picture."""

    def __init__(self, family):
        self.transformer, self.draw = ALL[family]()
        noise = torch.Generator().manual_seed(1)
        self.steps = [self.draw(noise, share) for share in SHARES]

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, output_type="latent"):
        noise = torch.Generator().manual_seed(0)
        for share in SHARES[:num_inference_steps]:
            y = self.transformer(**self.draw(noise, share))
        return y

    @torch.no_grad()
    def each_step(self):
        """The tensors that the denoiser gives for each of ``steps``."""
        return [tensors(self.transformer(**step)) for step in self.steps]


def tensors(result):
    return [t for t in _pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def cosine(mine, theirs):
    """The least over the tensors of two results."""
    return min(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()
               for a, b in zip(mine, theirs, strict=True))


def pictures(step, done):
    """Simulated pictures, ``step`` at falling shares of noise, until ``done``; how many were drawn."""
    noise = torch.Generator().manual_seed(0)
    for drawn in range(1, MOST_PICTURES + 1):
        for share in SHARES:
            step(noise, share)
        if done():
            return drawn
    return MOST_PICTURES


def layers_that_run(module, call):
    """Names of the linears and convolutions that a call goes through."""
    ran = set()
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
             for name, m in module.named_modules() if isinstance(m, LAYERS)]
    call()
    for hook in hooks:
        hook.remove()
    return ran


def error(mine, own):
    """Largest relative error over the tensors of two results, which may be nested."""
    return measure.compare(*(_pytree.tree_leaves(result) for result in (mine, own)))


def check_report(report, ran):
    """The module is ready, each layer that ran is in 8 bits or has a sentence, and the former are good enough."""
    eight_bits, rows = check_names(report, ran)
    noisy = {row.name: round(row.sqnr_db, 1) for row in eight_bits if row.sqnr_db < TOLERANCES["family_layer_db"]}
    assert not noisy, noisy
    assert len(eight_bits) >= len(rows) / 3, report


def check_names(report, ran):
    """The module is ready, and each layer that ran is in 8 bits or has a sentence; the rows of the former, and all by name."""
    assert report.state == "ready", report
    rows = {row.name.rstrip("'"): row for row in report.layers}
    said = " ".join((*report.notes, *report.fallbacks))
    lost = sorted(name for name in ran if name not in rows and name not in said)
    assert not lost, f"{len(lost)} of {len(ran)} layers are nowhere in the report: {', '.join(lost[:5])}"
    assert all(row.amax is not None or row.reason for row in rows.values())
    return [row for row in rows.values() if row.precision == "int8"], rows


def check_the_one_line(family):
    """A few pictures, then 8 bits; every layer that ran is named; another picture's step is near the model's own. The report."""
    torch._dynamo.reset()
    module, draw = ALL[family]()
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    pictures(lambda noise, share: compiled(**draw(noise, share)), lambda: sdtrt_backend.explain(module).state == "ready")
    other = draw(torch.Generator().manual_seed(1), SHARES[2])
    report, ran = sdtrt_backend.explain(module), layers_that_run(module, lambda: module(**other))
    if family in FAMILIES:
        check_report(report, ran)
    else:
        eight_bits, _ = check_names(report, ran)
        assert len(eight_bits) >= 8
    not_built = [row.name for row in report.layers if row.name in ran and row.reason == NOT_BUILT]
    assert len(not_built) <= (1 - NAMED) * len(ran), f"nothing was built of {len(not_built)} of {len(ran)} layers"
    mine, own = compiled(**other), module(**other)
    bound = TOLERANCES["family_step" if family in FAMILIES else "more_families_step"]
    assert 0 < error(mine, own) < bound, f"the output is {error(mine, own):.2f} from the model's own"
    return report


def with_recipe(family, folder, **options):
    """A fresh pipeline that a saved recipe accelerates, after the calls until every layer that may be is in 8 bits: those that
    Dynamo has no graph of are looked for in the second."""
    torch._dynamo.reset()
    pipe = Pipeline(family)
    sdtrt_backend.accelerate(pipe, recipe=folder, **{"max_error": 1.0, **options})
    with torch.no_grad():
        for _ in range(2):
            pipe.transformer(**pipe.steps[0])
    return pipe


def in_8_bits(report):
    return {row.name for row in report.layers if row.precision == "int8"}


@torch.no_grad()
def check_the_recipe(family, folder):
    """Ready at the first call of a fresh copy; the compiled step gives what the reference gives on the inputs of every step;
    restored, the copy is what it was. The least cosine of the compiled step to the reference."""
    plain = Pipeline(family)
    own = plain.each_step()
    compiled = with_recipe(family, folder, engine="inductor", rest="float32")
    report = sdtrt_backend.explain(compiled)
    assert (report.state, report.provenance["front_door"]) == ("ready", "calibrate"), report
    mine = compiled.each_step()
    left = sorted({row.name for row in report.layers} - in_8_bits(report))  # for want of a kernel, say
    reference = with_recipe(family, folder, engine="reference", exclude=left)
    assert in_8_bits(sdtrt_backend.explain(reference)) == in_8_bits(report) != set()
    theirs = reference.each_step()
    assert max(map(cosine, theirs, own)) < 1 - 1e-6, "the step that was compared is not in 8 bits"
    found = min(map(cosine, mine, theirs))
    if found < TOLERANCES["family_cosine"]:
        check_each_operation(family)
    check_cosine(found, reference, theirs)
    check_the_restore(compiled, plain)
    return found


@torch.no_grad()
def check_cosine(found, reference, theirs):
    """``found`` is the least cosine of something to ``theirs``, of the first steps of ``reference``: near 1, unless the reference
    is as far from itself where rounding alone differs."""
    bound = 1 - TOLERANCES["family_cosine"]
    if 1 - found > bound:
        again = [cosine(tensors(reference.transformer(**nudged(step, seed))), its)
                 for seed in NUDGES for step, its in zip(reference.steps, theirs, strict=False)]
        bound = TOLERANCES["family_ties"] * (1 - min(again))
    assert 1 - found <= bound, f"cosine {found:.6f} to the reference lowering, {1 - bound:.6f} or more was expected"


@torch.no_grad()
def check_the_restore(pipe, plain):
    """Restored, an accelerated pipeline is, to the bit, what one of the same family is that never was anything else."""
    sdtrt_backend.restore(pipe)
    for step, its in zip(pipe.each_step(), plain.each_step(), strict=True):
        assert all(map(torch.equal, step, its)), "restored, the output is another one"
    for (name, p), (_, its) in zip(pipe.transformer.named_parameters(), plain.transformer.named_parameters(), strict=True):
        assert torch.equal(p, its), f"restored, {name} is another one"


def nudged(step, seed):
    """The same arguments, text and latents changed by what rounding may change them by."""
    noise = torch.Generator().manual_seed(seed)
    return _pytree.tree_map(lambda t: t * (1 + 1e-6 * torch.randn(t.shape, generator=noise)) if isinstance(t, torch.Tensor)
                            and t.is_floating_point() and t.dim() > 1 else t, step)


@torch.no_grad()
def check_each_operation(family):
    """Every lowered operation, fed what the reference has there, gives what the reference gives, to its own rounding: see
    test_teacher_forcing.py."""
    (made,) = calibrated_graphs(family)
    case = for_the_cpu(made)
    assert forced(case).failures == []
    assert len(case.layers) >= 8


def calibrated_graphs(family):
    """(captured, args, recipe) of each graph with layers whose result somebody uses, in one step."""
    torch._dynamo.reset()
    pipe, calibration, graphs = Pipeline(family), Calibration(), []
    with observed(pipe.transformer, calibration):
        pipe("a")

    def backend(graph, example_inputs):
        captured = capture(graph, example_inputs)
        return lambda *args: (graphs.append((captured, args)), graph(*args))[1]

    torch.compile(pipe.transformer, backend=backend)(**pipe.steps[1])
    recipe = calibration.recipe(Options(), {})
    for captured, args in graphs:
        _, nodes = bind(captured, args)
        used = tuple(layer for layer in captured.layers if layer.node in nodes)
        if used:
            yield replace(captured, layers=used), args, covering(recipe, used)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL if EVERY else FOR_A_GPU)
@torch.no_grad()
def test_the_graph_for_a_gpu_does_what_the_reference_does(family):
    """With the plain-torch kernels. A graph that changes values in place is compared as a whole."""
    compared = 0
    for made in calibrated_graphs(family):
        captured, args, _ = made
        for precision in ("int8", "fp8"):
            if written(bind(captured, args)[0].graph):
                gm, reference, tensors = whole_for_cuda(made, precision)
                mine, theirs = gm(*tensors), reference(*tensors)
                assert 1 - cosine(mine, theirs) < 1 - TOLERANCES["family_cosine"], precision
            else:
                assert forced(for_cuda(made, precision)).failures == [], precision
            compared += 1
    assert compared >= 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_LINE)
@torch.no_grad()
def test_a_model_of_the_family_is_ready_after_a_few_pictures(family):
    check_the_one_line(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", WHOLE)
@torch.no_grad()
def test_a_model_of_the_family_goes_the_whole_way(family, tmp_path):
    check_the_one_line(family)
    recipe = sdtrt_backend.calibrate(Pipeline(family), ["a"], num_inference_steps=len(SHARES), progress=False)
    check_the_recipe(family, recipe.save(tmp_path))


@pytest.mark.slow
@torch.no_grad()
def test_a_controlnet_and_its_unet_are_both_ready_after_a_few_pictures():
    torch._dynamo.reset()
    (control, draw_control), (unet, _) = controlnet(), sdxl_unet()
    modules = control, unet
    both = [torch.compile(m, backend="sd_int8", options=OPTIONS) for m in modules]

    def arguments(noise, share):
        given = draw_control(noise, share)
        return given, {name: value for name, value in given.items() if name != "controlnet_cond"}

    def step(noise, share, control=both[0], unet=both[1]):
        for_control, for_unet = arguments(noise, share)
        down, middle = control(**for_control)
        return unet(**for_unet, down_block_additional_residuals=down, mid_block_additional_residual=middle)

    pictures(step, lambda: all(sdtrt_backend.explain(m).state == "ready" for m in modules))
    noise = itertools.repeat(torch.Generator().manual_seed(1).get_state())

    def fresh():
        return torch.Generator().set_state(next(noise))

    for module in modules:
        check_report(sdtrt_backend.explain(module), layers_that_run(module, lambda: step(fresh(), SHARES[2], *modules)))
    assert 0 < error(step(fresh(), SHARES[2]), step(fresh(), SHARES[2], *modules)) < TOLERANCES["family_step"]


def test_the_support_table_says_what_was_found_of_every_family(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import support

    found = json.loads(support.RESULTS.read_text())
    assert set(support.MODELS) == set(ALL) - {"sdxl_unet"}  # the narrower one of two
    assert set(found["models"]) == set(support.MODELS)
    assert support.TABLE.read_text() == support.table(found)


def test_the_pictures_of_this_file_end():
    """The loop above stops at MOST_PICTURES for a module that never gets ready."""
    calls = []
    assert pictures(lambda noise, share: calls.append(share), lambda: False) == MOST_PICTURES
    assert calls == list(SHARES) * MOST_PICTURES
