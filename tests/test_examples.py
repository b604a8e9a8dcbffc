"""The examples, word for word, with small random pipelines instead of the hub's and the lowering that needs no compiler."""

import functools
import importlib.util
import threading
import urllib.request
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_small_pipelines import emoji, flux, sdxl, text_encoder

import sdtrt_backend

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.slow


def wan():
    """Of two random blocks, with a random VAE of videos."""
    plain, t5 = emoji(), text_encoder("t5")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                     temperal_downsample=[False, True, True])
    transformer = diffusers.WanTransformer3DModel(num_attention_heads=2, attention_head_dim=32, text_dim=t5.config.d_model,
                                                  ffn_dim=128, num_layers=2, rope_max_seq_len=32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.WanPipeline(plain.tokenizer, t5, vae.eval(), scheduler, transformer.eval())


@pytest.fixture
def example(monkeypatch, tmp_path):
    """(name, pipeline that from_pretrained gives) -> the example as a module."""
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    accelerate = sdtrt_backend.accelerate
    monkeypatch.setattr(sdtrt_backend, "accelerate", functools.partial(accelerate, engine="reference", max_error=1.0))

    def load(name, pipe):
        pipe.set_progress_bar_config(disable=True)
        for kind in (diffusers.DiffusionPipeline, type(pipe)):
            monkeypatch.setattr(kind, "from_pretrained", classmethod(lambda cls, model, dtype: pipe))
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    torch._dynamo.reset()


def test_each_is_short():
    lines = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    del lines["train_tiny_emoji"]  # what made the bundled model
    assert len(lines) == 6
    assert max(lines.values()) < 40, lines


@pytest.mark.parametrize("parts", [[], ["--all-parts"]])
def test_sdxl(example, capsys, tmp_path, parts):
    prompts = ["a lighthouse", "a fox", "a bowl", "a boat"]
    example("sdxl", sdxl()).main([*prompts, "--steps", "3", *parts])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"sdxl_{i}.png" for i in range(4)]
    assert "state: ready" in capsys.readouterr().out


def test_flux(example, capsys, tmp_path):
    example("flux", flux()).main(["a lighthouse", "--steps", "3"])
    assert len(list(tmp_path.glob("flux_*.png"))) == 4
    assert "state: ready" in capsys.readouterr().out


def test_calibrate_and_ship(example, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple\n\ncat face\n")
    pipe = emoji()
    module = example("calibrate_and_ship", pipe)
    module.main(["emoji", "calibrate", "prompts.txt", "recipe", "--steps", "3"])
    module.main(["emoji", "draw", "recipe", "green apple", "--steps", "3"])
    said = capsys.readouterr().out
    assert "layers -> recipe" in said
    assert "ready -> picture.png" in said
    assert Image.open("picture.png").size == (64, 64)


def test_video(example, capsys, tmp_path):
    example("video", wan()).main(["a lighthouse", "--size", "5", "32", "32", "--steps", "3"])
    clips = [Image.open(path) for path in sorted(tmp_path.glob("video_*.gif"))]
    assert [(clip.n_frames, clip.size) for clip in clips] == [(5, (32, 32))] * 3
    assert "state: ready" in capsys.readouterr().out


def test_lora_server(example, tmp_path):
    pipe = emoji()
    layer, noise = "unet.mid_block.attentions.0.proj_in", torch.Generator().manual_seed(0)
    width = pipe.unet.get_submodule(layer.removeprefix("unet.")).weight.shape[0]
    save_file({f"{layer}.lora_A.weight": torch.randn(4, width, 1, 1, generator=noise),
               f"{layer}.lora_B.weight": torch.randn(width, 4, 1, 1, generator=noise)}, tmp_path / "ink.safetensors")
    running = example("lora_server", pipe).server("emoji", str(tmp_path), port=0, num_inference_steps=3)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()

    def get(query):
        torch.manual_seed(0)
        with urllib.request.urlopen(f"http://127.0.0.1:{running.server_port}/?prompt=red+apple{query}", timeout=120) as answer:
            return answer.read()

    try:
        for _ in range(2):
            get("")
        plain, strong, again = get(""), get("&ink=1.0"), get("&other=3")
    finally:
        running.shutdown()
        thread.join()
        running.server_close()
    assert plain.startswith(b"\x89PNG")
    assert plain == again != strong
    assert sdtrt_backend.explain(pipe).state == "ready"
