"""The one line on a tiny model of every family: a few pictures, then 8 bits, near its own output, with every layer named."""

import itertools
import os

import pytest
import torch
from models import FAMILIES, controlnet, sdxl_unet
from more_models import MORE
from tolerances import TOLERANCES
from torch import nn
from torch.utils import _pytree

import sdtrt_backend
from sdtrt_backend import measure

OPTIONS = {"engine": "reference", "calibration_runs": 1}
SHARES = (1.0, 0.7, 0.4, 0.1)  # of noise, at the steps of a picture
MOST_PICTURES = 5
# the others take half a minute each: SDTRT_FAMILIES=all
QUICK = ("chroma", "flux2", "hunyuan_dit", "cogview4", "sana", "cogvideox", "stable_cascade", "kandinsky_prior")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "controlnet"])
@torch.no_grad()
def test_a_model_of_the_family_is_ready_after_a_few_pictures(family):
    torch._dynamo.reset()
    module, draw = FAMILIES[family]()
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    pictures(lambda noise, share: compiled(**draw(noise, share)), lambda: sdtrt_backend.explain(module).state == "ready")
    assert sdtrt_backend.explain(module).state == "ready", sdtrt_backend.explain(module)
    other = draw(torch.Generator().manual_seed(1), SHARES[2])
    ran = layers_that_run(module, lambda: module(**other))
    check_report(sdtrt_backend.explain(module), ran)
    assert 0 < error(compiled(**other), module(**other)) < TOLERANCES["family_step"]


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE if os.environ.get("SDTRT_FAMILIES") == "all" else QUICK)
@torch.no_grad()
def test_a_model_of_another_family_is_ready_and_near_its_own_output(family):
    torch._dynamo.reset()
    module, draw = MORE[family]()
    compiled = torch.compile(module, backend="sd_int8", options=OPTIONS)
    pictures(lambda noise, share: compiled(**draw(noise, share)), lambda: sdtrt_backend.explain(module).state == "ready")
    other = draw(torch.Generator().manual_seed(1), SHARES[2])
    eight_bits, _ = check_names(sdtrt_backend.explain(module), layers_that_run(module, lambda: module(**other)))
    assert len(eight_bits) >= 8
    assert 0 < error(compiled(**other), module(**other)) < TOLERANCES["more_families_step"]


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


def test_the_pictures_of_this_file_end():
    """The loop above stops at MOST_PICTURES for a module that never gets ready."""
    calls = []
    assert pictures(lambda noise, share: calls.append(share), lambda: False) == MOST_PICTURES
    assert calls == list(SHARES) * MOST_PICTURES
