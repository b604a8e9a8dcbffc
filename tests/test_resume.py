"""An interrupted calibration goes on to the same bytes, and nothing that is kept is mixed with another call or overwritten."""

from __future__ import annotations

import json
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm

import sdtrt_backend
from sdtrt_backend.errors import CalibrationError
from sdtrt_backend.files import digest
from sdtrt_backend.recipe import versions
from sdtrt_backend.resume import FORMAT, SCHEMA, ResumeFolder, described, pack

JSON_NAME = FORMAT.json_name
PROMPTS = ["red apple, noto style", "rocket, fluent style", "owl, fluent style"]
STEPS = 3
CRASH = """
import os, sys, sdtrt_backend
pipe, calls = sdtrt_backend.demo_pipeline(), []
pipe.unet.register_forward_hook(lambda *_: os._exit(9) if len(calls) == 4 else calls.append(1))
sdtrt_backend.calibrate(pipe, {prompts!r}, num_inference_steps={steps}, resume=sys.argv[1], progress=False)
"""


@pytest.fixture(scope="module")
def pipe():
    return sdtrt_backend.demo_pipeline()


def calibrate(pipe, prompts=PROMPTS, **settings):
    return sdtrt_backend.calibrate(pipe, prompts, **{"num_inference_steps": STEPS, "progress": False, **settings})


def recipe_bytes(recipe, folder):
    recipe.save(folder)
    return contents(folder)


@pytest.fixture(scope="module")
def uninterrupted(pipe, tmp_path_factory):
    return recipe_bytes(calibrate(pipe), tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="module")
def finished(pipe, tmp_path_factory):
    """A folder with all prompts done; made with mode 0700. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("kept") / "made"
    calibrate(pipe, resume=folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder):
    (path,) = folder.glob("calibration-*.safetensors")
    return path


class Calls:
    """Counts the denoiser's calls while the context is open; Ctrl-C in call number ``stop``."""

    def __init__(self, pipe, stop=None):
        self.unet, self.stop, self.count = pipe.unet, stop, 0

    def tick(self, *_):
        self.count += 1
        if self.count == self.stop:
            raise KeyboardInterrupt

    def __enter__(self):
        self.hook = self.unet.register_forward_hook(self.tick)
        return self

    def __exit__(self, *_):
        self.hook.remove()


def interrupt(pipe, folder, call, **settings):
    with Calls(pipe, stop=call), pytest.raises(KeyboardInterrupt) as caught:
        calibrate(pipe, resume=folder, **settings)
    return caught.value.__notes__[0]


@pytest.mark.slow
def test_an_interrupted_calibration_goes_on_to_the_same_bytes(pipe, uninterrupted, tmp_path):
    folder = tmp_path / "kept"
    assert f"{folder} holds 1 of 3 prompts" in interrupt(pipe, folder, STEPS + 2)
    assert f"{folder} holds 2 of 3 prompts" in interrupt(pipe, folder, 2 * STEPS - 1)
    assert sorted(contents(folder)) == [tensors(folder).name, JSON_NAME]
    with Calls(pipe) as calls:
        recipe = calibrate(pipe, resume=folder)
    assert calls.count == STEPS
    assert recipe_bytes(recipe, tmp_path / "resumed") == uninterrupted


@pytest.mark.slow
def test_it_goes_on_after_a_crash_in_another_process(pipe, uninterrupted, tmp_path):
    code = CRASH.format(prompts=PROMPTS, steps=STEPS)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "kept")], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    with Calls(pipe) as calls:
        recipe = calibrate(pipe, resume=tmp_path / "kept")
    assert calls.count == 2 * STEPS
    assert recipe_bytes(recipe, tmp_path / "resumed") == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"batch_size": 2, "guidance_scale": 5.0}, {"options": {"rule": "modelopt_min_mean", "percentile": 0.4}}])
def test_batches_and_rules_that_count_calls_go_on_as_well(pipe, tmp_path, settings):
    interrupt(pipe, tmp_path / "kept", 2 * STEPS, **settings)
    with Calls(pipe) as calls:
        resumed = calibrate(pipe, resume=tmp_path / "kept", **settings)
    assert calls.count < 3 * STEPS
    assert recipe_bytes(resumed, tmp_path / "a") == recipe_bytes(calibrate(pipe, **settings), tmp_path / "b")


@pytest.mark.slow
def test_when_all_is_done_nothing_runs_and_other_rules_can_be_tried(pipe, uninterrupted, finished, tmp_path):
    options = {"rule": "max", "percentile": 0.5, "alpha": None, "alpha_conv": 0.3}
    with Calls(pipe) as calls:
        same, other = calibrate(pipe, resume=finished), calibrate(pipe, resume=str(finished), options=options)
    assert calls.count == 0
    assert recipe_bytes(same, tmp_path / "same") == uninterrupted
    assert recipe_bytes(other, tmp_path / "a") == recipe_bytes(calibrate(pipe, options=options), tmp_path / "b")


def test_the_folder_is_for_its_owner_only_and_holds_no_prompt(finished):
    assert stat.S_IMODE(finished.stat().st_mode) == 0o700
    assert sorted(contents(finished)) == [tensors(finished).name, JSON_NAME]
    assert not any(prompt.encode() in data for prompt in PROMPTS for data in contents(finished).values())


def test_statistics_survive_the_disk_to_the_bit_in_their_order(finished, tmp_path):
    settings = json.loads((finished / JSON_NAME).read_text())["settings"]
    calibrations, done = ResumeFolder(finished, settings).load("unet")
    calibration = calibrations["unet"]
    ResumeFolder(tmp_path, settings).save(calibrations, done)
    assert contents(tmp_path) == contents(finished)
    facts, tensors = pack(calibration)
    assert list(facts["timesteps"]) != sorted(facts["timesteps"])
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.float64, torch.int64}


@pytest.mark.slow
def test_the_progress_bar_starts_at_what_is_done(pipe, tmp_path, monkeypatch):
    interrupt(pipe, tmp_path, STEPS + 1)
    bars = []

    def recorded(**settings):
        bars.append(tqdm(**settings))
        return bars[-1]

    monkeypatch.setattr("tqdm.auto.tqdm", recorded)
    calibrate(pipe, resume=tmp_path, progress=True)
    assert (bars[0].initial, bars[0].n, bars[0].total) == (STEPS, 3 * STEPS, 3 * STEPS)


def test_ctrl_c_without_a_folder_says_that_there_is_one(pipe):
    with Calls(pipe, stop=1), pytest.raises(KeyboardInterrupt) as caught:
        calibrate(pipe)
    assert "resume=" in caught.value.__notes__[0]


@pytest.mark.parametrize(("settings", "says"), [
    ({"seed": 1}, "seed was 0, is 1"),
    ({"num_inference_steps": 4}, "num_inference_steps was 3, is 4"),
    ({"batch_size": 2}, "batch_size was 1, is 2"),
    ({"guidance_scale": 5.0}, r"argument guidance_scale was not given, is 5\.0"),
    ({"height": 96}, "argument height was not given, is 96"),
    ({"latents": torch.zeros(1, 4, 32, 32)}, "argument latents is another one"),
    ({"options": {"rule": "modelopt_min_mean"}}, "steps counted by the rule was 0, is 3"),
    ({"prompts": [*PROMPTS[:2], "sun"]}, "prompt 3 is another one"),
    ({"prompts": [*PROMPTS, "sun"]}, "3 prompts, now 4"),
    ({"prompts": PROMPTS[:2], "seed": 1}, "seed was 0, is 1; 3 prompts, now 2"),
])
def test_other_settings_are_refused_and_nothing_is_overwritten(pipe, finished, settings, says):
    before = contents(finished)
    with Calls(pipe) as calls, pytest.raises(CalibrationError, match=says) as caught:
        calibrate(pipe, resume=finished, **settings)
    assert "another folder" in str(caught.value)
    assert (calls.count, contents(finished)) == (0, before)


def other_weights(pipe):
    pipe.unet.conv_out.bias.data.add_(1)


def other_text_encoder(pipe):
    next(pipe.text_encoder.parameters()).data.mul_(2)


def other_precision(pipe):
    pipe.unet.to(torch.bfloat16)


def other_scheduler(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="leading")


@pytest.mark.parametrize(("change", "part"), [(other_weights, "unet"), (other_text_encoder, "text_encoder"),
                                              (other_precision, "unet"), (other_scheduler, "scheduler")])
def test_another_model_is_refused_and_nothing_is_overwritten(finished, change, part):
    before, other = contents(finished), sdtrt_backend.demo_pipeline()
    change(other)
    with pytest.raises(CalibrationError, match=rf"another call: {part} has other weights, precision or configuration;"):
        calibrate(other, resume=finished)
    assert contents(finished) == before


def test_another_version_is_refused(pipe, finished, monkeypatch):
    monkeypatch.setattr("sdtrt_backend.resume.versions", lambda: {**versions(), "torch": "9.9"})
    with pytest.raises(CalibrationError, match=r"version of torch was '2.*', is '9\.9'"):
        calibrate(pipe, resume=finished)


def resealed(folder, edit):
    body = json.loads((folder / JSON_NAME).read_text())
    del body["sha256"]
    edit(body)
    (folder / JSON_NAME).write_text(json.dumps({**body, "sha256": digest(body)}))


def newer(folder):
    resealed(folder, lambda body: body.update(schema=SCHEMA + 1))


@pytest.mark.slow
def test_a_calibration_kept_in_schema_1_goes_on(pipe, uninterrupted, tmp_path):
    folder = tmp_path / "kept"
    interrupt(pipe, folder, STEPS + 2)
    tensors(folder).rename(folder / "calibration-1.safetensors")
    resealed(folder, lambda body: body.update(schema=1))
    with Calls(pipe) as calls:
        recipe = calibrate(pipe, resume=folder)
    assert calls.count == 2 * STEPS
    assert recipe_bytes(recipe, tmp_path / "resumed") == uninterrupted
    assert sorted(contents(folder)) == [tensors(folder).name, JSON_NAME]


@pytest.mark.parametrize(("damage", "says"), [
    (lambda f: (f / JSON_NAME).write_bytes((f / JSON_NAME).read_bytes()[:100]), "calibration.json is truncated or not JSON"),
    (lambda f: (f / JSON_NAME).write_bytes(b"\xff\xfe\x00"), "calibration.json is truncated or not JSON"),
    (lambda f: (f / JSON_NAME).write_text((f / JSON_NAME).read_text().replace('"done": 3', '"done": 2')), "edited or damaged"),
    (lambda f: tensors(f).write_bytes(b""), r"calibration-[0-9a-f]{64}\.safetensors is truncated"),
    (lambda f: tensors(f).unlink(), r"calibration-[0-9a-f]{64}\.safetensors is missing"),
    (newer, f"schema {SCHEMA + 1}, this version reads up to {SCHEMA}"),
    (lambda f: resealed(f, lambda body: body.pop("calibration")), "has not the form of its schema"),
    (lambda f: resealed(f, lambda body: body.pop("settings")), "has not the form of its schema"),
])
def test_damage_is_refused_with_its_sentence_and_nothing_is_overwritten(pipe, finished, tmp_path, damage, says):
    for name, data in contents(finished).items():
        (tmp_path / name).write_bytes(data)
    damage(tmp_path)
    before = contents(tmp_path)
    with Calls(pipe) as calls, pytest.raises(CalibrationError, match=says) as caught:
        calibrate(pipe, resume=tmp_path)
    assert "delete it to start anew" in str(caught.value)
    assert (calls.count, contents(tmp_path)) == (0, before)


def test_a_file_in_the_place_of_the_folder_is_refused(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="expected a folder, this is a file"):
        calibrate(pipe, resume=tmp_path / "file")


def test_a_save_that_stops_half_way_leaves_the_one_before(finished, tmp_path, killed_before):
    settings = json.loads((finished / JSON_NAME).read_text())["settings"]
    folder = ResumeFolder(tmp_path, settings)
    calibrations, _ = ResumeFolder(finished, settings).load("unet")
    folder.save(calibrations, 1)
    before = contents(tmp_path)
    next(iter(calibrations["unet"].weights.values())).amax.add_(1)  # other tensors
    with killed_before(JSON_NAME):
        folder.save(calibrations, 2)
    assert folder.load("unet")[1] == 1
    assert before.items() < contents(tmp_path).items()
    folder.save(calibrations, 3)
    assert folder.load("unet")[1] == 3
    assert sorted(contents(tmp_path)) == [tensors(tmp_path).name, JSON_NAME]


def test_arguments_are_told_apart_by_their_values():
    picture = Image.new("RGB", (4, 4))
    values = [None, 1, 2.5, "a", [1, "a"], {"a": 1}, torch.zeros(2), torch.ones(2), torch.zeros(2, 1), np.zeros(2, np.float32),
              np.ones(2, np.float32), picture, Image.new("RGB", (4, 4), "red"), [picture], torch.float16, digest,
              torch.zeros((), dtype=torch.bfloat16), torch.nn.Linear(2, 2)]
    found = [described("x", value) for value in values]
    assert found == [described("x", value) for value in values]
    assert len({json.dumps(f) for f in found}) == len(values)
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(CalibrationError, match="cannot tell whether image, a object, is the same"):
        described("image", [object()])
