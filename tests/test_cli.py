"""The command line: exit codes, files, one-line errors."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
from PIL import Image
from test_report import RESULT
from typer.testing import CliRunner

from sdtrt_backend import cli, demo, demo_pipeline
from sdtrt_backend.enginecache import EngineCache
from sdtrt_backend.errors import SdtrtError
from sdtrt_backend.recipe import digest
from sdtrt_backend.report import Report, result_json
from sdtrt_backend.resume import ResumeFolder

run = CliRunner().invoke


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red apple, noto style\n\nrocket, fluent style\n")
    return path


def test_help_names_every_command():
    text = run(cli.app, ["--help"]).output
    commands = ("demo", "report", "calibrate", "show", "generate", "export", "bundle", "batch", "serve", "load", "doctor",
                "cache")
    assert all(command in text for command in commands)


@pytest.mark.slow
def test_doctor_counts_what_would_be_quantised():
    result = run(cli.app, ["doctor"])
    assert result.exit_code == 0
    assert "117 of 132 layers would be quantised" in result.output
    assert "does not fit" not in result.output
    told = json.loads(run(cli.app, ["doctor", "--json"]).output)
    assert told["layers"]["int8"] == 117
    assert told["machine"]["torch"] == {"found": metadata.version("torch"), "means": "fits"}


def test_report_prints_a_saved_one_and_opens_its_page(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(cli.typer, "launch", lambda url: opened.append(url) or 0)
    (tmp_path / "report.json").write_text(result_json(RESULT, Report("ready", notes=("a note",), fallbacks=("a fallback",))))
    shown = run(cli.app, ["report", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert all(text in shown.output for text in ("2.00x", "a note", "a fallback"))
    assert opened == [(tmp_path / "report.html").as_uri()]
    assert run(cli.app, ["report", str(tmp_path), "--no-browser"]).exit_code == 0
    assert len(opened) == 1
    monkeypatch.setattr(cli.typer, "launch", lambda url: 1)
    assert "no browser" in run(cli.app, ["report", str(tmp_path)]).output
    for wrong in ("nowhere", "broken"):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / "report.json").write_text("{}")
        assert "holds no report" in str(run(cli.app, ["report", str(tmp_path / wrong)]).exception)


def test_calibrate_writes_a_recipe_that_show_draws(prompts, tmp_path):
    result = run(cli.app, ["calibrate", str(prompts), "--out", str(tmp_path / "recipe"), "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "recipe" / "recipe.json").read_text())["provenance"]["prompts"] == 2
    shown = run(cli.app, ["show", str(tmp_path / "recipe"), "--layer", "*.attn1.to_q", "--out", str(tmp_path / "shown")])
    assert shown.exit_code == 0, shown.output
    assert sorted(f.name for f in (tmp_path / "shown").iterdir()) == ["layers.png", "ranges.html", "ranges.png"]
    assert "http" not in (tmp_path / "shown" / "ranges.html").read_text()
    assert "no layer matches" in str(run(cli.app, ["show", str(tmp_path / "recipe"), "--layer", "nothing"]).exception)


@pytest.mark.slow
def test_calibrate_keeps_finished_prompts_and_ctrl_c_says_so(prompts, tmp_path, monkeypatch):
    def arguments(seed):
        return ["calibrate", str(prompts), "--out", str(tmp_path / "recipe"), "--steps", "2", "--seed", seed,
                "--resume", str(tmp_path / "kept")]

    save = ResumeFolder.save

    def stopped_at_the_second(self, calibration, done):
        save(self, calibration, done)
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ResumeFolder, "save", stopped_at_the_second)
        stopped = run(cli.app, arguments("0"))
    assert stopped.exit_code != 0
    assert f"{tmp_path / 'kept'} holds 1 of 2 prompts, the same call goes on from there" in stopped.output
    assert "seed was 0, is 1" in str(run(cli.app, arguments("1")).exception)
    assert not (tmp_path / "recipe").exists()
    assert run(cli.app, arguments("0")).exit_code == 0
    assert (tmp_path / "recipe" / "recipe.json").is_file()


def test_generate_draws_a_picture(tmp_path):
    result = run(cli.app, ["generate", "dog face, noto style", "--full", "--steps", "2", "--count", "1",
                           "--out", str(tmp_path / "a.png")])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "a.png").size[0] > 128


@pytest.fixture
def img2img(tmp_path):
    """The folder of an image-to-image pipeline, a picture, and a folder of two."""
    from diffusers import StableDiffusionImg2ImgPipeline

    folder, photos = tmp_path / "img2img", tmp_path / "photos"
    StableDiffusionImg2ImgPipeline(**demo_pipeline().components).save_pretrained(folder)
    photos.mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (60 * i, 90, 120)).save(photos / f"{i}.png")
    return folder, photos / "0.png", photos


@pytest.mark.slow
def test_an_image_to_image_pipeline_gets_its_pictures(img2img, prompts, tmp_path):
    folder, photo, photos = img2img
    for given in (photo, photos):
        result = run(cli.app, ["calibrate", str(prompts), "--model", str(folder), "--steps", "4", "--input", f"image={given}",
                               "--input", "strength=0.5", "--parts", "unet,vae.encoder", "--out", str(tmp_path / "recipe")])
        assert result.exit_code == 0, (result.output, result.exception)
    body = json.loads((tmp_path / "recipe" / "recipe.json").read_text())
    assert (body["provenance"]["pipeline"], body["provenance"]["prompts"]) == ("StableDiffusionImg2ImgPipeline", 2)
    assert list(body["parts"]) == ["vae.encoder"]
    result = run(cli.app, ["generate", "owl", "--full", "--model", str(folder), "--steps", "4", "--count", "1",
                           "--input", f"image={photo}", "--out", str(tmp_path / "a.png")])
    assert result.exit_code == 0, (result.output, result.exception)


@pytest.mark.slow
def test_an_export_gets_the_pictures_of_its_pipeline(img2img, tmp_path, monkeypatch):
    folder, photo, _ = img2img
    got = {}
    monkeypatch.setattr("sdtrt_backend.export.export_onnx", lambda *_, **given: got.update(given))
    monkeypatch.setattr("sdtrt_backend.recipe.Recipe.load", lambda _: None)
    result = run(cli.app, ["export", str(tmp_path / "out"), "--recipe", "any", "--model", str(folder), "--input",
                           f"image={photo}", "--input", "strength=0.5"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert (got["image"].size, got["strength"]) == ((64, 64), 0.5)


@pytest.mark.parametrize(("given", "says"), [
    (["image"], "expects NAME=VALUE"), (["image=missing.png"], "no file or folder missing.png"),
    (["strength=1", "strength=2"], "strength is given twice"), (["image={photos}"], "holds 2 pictures, and there are 1 prompts"),
    (["image={prompts}"], "cannot identify image file")])
def test_inputs_that_cannot_be_used_are_named(img2img, prompts, given, says):
    values = [g.format(photos=img2img[2], prompts=prompts) for g in given]
    result = run(cli.app, ["generate", "owl", "--full", *(a for v in values for a in ("--input", v))])
    assert isinstance(result.exception, SdtrtError)
    assert says in str(result.exception)


@pytest.mark.parametrize("arguments", [["calibrate", "missing.txt"], ["demo", "--model", "nowhere"],
                                       ["demo", "--prompts", "missing.txt"]])
def test_bad_input_is_one_line_and_exit_code_2(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sdtrt", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == cli.BAD_INPUT
    assert "error:" in capsys.readouterr().out


@pytest.mark.slow
def test_demo_writes_picture_page_and_numbers(tmp_path, prompts, monkeypatch):
    """The whole demo at two steps and two prompts, with the 8-bit build by the real kernels."""
    monkeypatch.setattr(demo, "CALIBRATION_PROMPTS", demo.CALIBRATION_PROMPTS[:1])
    result = run(cli.app, ["demo", "--steps", "2", "--prompts", str(prompts), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    body = json.loads((tmp_path / "report.json").read_text())
    assert set(body["step_ms"]) == {"eager", "compile", "sd_int8"}
    assert body["speedup_vs_compile"] == pytest.approx(body["step_ms"]["compile"] / body["step_ms"]["sd_int8"])
    assert body["quantized_flops_share"] > 0.9
    assert len(body["psnr_db"]["each"]) == len(body["ssim"]["each"]) == 2
    assert body["layers"]
    assert body["fallbacks"] == []
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # the pictures, noise, ranges, single layers
    assert all((tmp_path / f"{name}.png").is_file() for name in ("noise", "ranges", "layers"))
    assert "data:image/png;base64," in page
    assert "src=\"http" not in page
    assert Image.open(tmp_path / "demo.png").size[0] > 256


@pytest.mark.parametrize(("flags", "says"), [
    (["--int8", "--fp8"], "one of --int8, --fp8 and --full"), (["--full", "--engine-dir", "e"], "not for --full"),
    (["--onnx-dir", "o"], "--onnx-dir needs a recipe"), (["--recipe", "nowhere"], "nowhere"),
    (["--quantization-level", "5"], "option 'level' expects one of 1, 2, 2.5, 3, 4"), (["--out", "pictures"], "picture.png")])
def test_generate_refuses_what_does_not_go_together(flags, says):
    result = run(cli.app, ["generate", "owl, fluent style", "--steps", "1", *flags])
    assert says in str(result.exception)


@pytest.mark.slow
def test_generate_calibrates_and_tells_the_latency_of_warm_pictures_only(tmp_path):
    result = run(cli.app, ["generate", "owl, fluent style", "--steps", "2", "--count", "1", "--out", str(tmp_path / "a.png")])
    assert result.exit_code == 0, result.output
    assert "state: calibrating" in result.output
    assert "none of the 1 pictures came after calibrating" in result.output
    result = run(cli.app, ["generate", "owl, fluent style", "--full", "--steps", "3", "--count", "3",
                           "--out", str(tmp_path / "a.png")])
    assert "latency of 2 pictures, 3 steps each" in result.output
    assert all(part in result.output for part in ("text_encoder", "denoiser step", "vae decoder", "pipeline"))


def test_cache_lists_engines_deletes_damaged_ones_and_clears(tmp_path, monkeypatch):
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path))
    assert "0 engines" in run(cli.app, ["cache"]).output
    engines = EngineCache()
    for part in ("first", "second"):
        engines.get({"part": part, "version": "1.4.0"}, lambda: bytes(2_000_000))
    listed = run(cli.app, ["cache", "ls"])
    assert listed.exit_code == 0
    assert "2 engines, 4.0 MB of 20000 MB" in listed.output
    assert run(cli.app, ["cache", "verify"]).exit_code == 0
    (engines.folder / f"{digest({'part': 'first', 'version': '1.4.0'})}.engine").write_bytes(b"")
    assert run(cli.app, ["cache", "verify"]).exit_code == 3
    assert [e.key["part"] for e in engines.entries()] == ["second"]
    assert "2.0 MB freed" in run(cli.app, ["cache", "clear"]).output
    with pytest.raises(SdtrtError, match="valid: ls, verify, clear"):
        run(cli.app, ["cache", "purge"], catch_exceptions=False)
