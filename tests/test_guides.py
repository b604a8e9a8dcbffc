"""Every guide, followed word for word: its programs and commands, in their order. In the place of the reader's model is the
bundled pipeline or a random one, and its pictures have 64 pixels."""

import base64
import contextlib
import functools
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import safetensors.torch
import torch
from packaging.requirements import Requirement
from PIL import Image
from test_docs import ROOT, blocks
from test_small_pipelines import emoji, sdxl
from test_triton_server import SERVER, Server
from typer.testing import CliRunner

import sdtrt_backend
from sdtrt_backend import cli
from sdtrt_backend.pipeline import ASSETS

pytestmark = pytest.mark.slow
PROMPTS = ["owl, noto style", "rocket, fluent style"]
# what a reader has another of
OWN = {"DIR": str(ASSETS / "tiny_emoji"), "1024x1024,768x1344": "64x64", "1024x1024": "64x64", "--batches 1,4": "--batches 1"}


def blocks_of(page):
    return blocks((ROOT / "docs" / page).read_text())


def with_own(text, instead):
    for word, own in {**OWN, **instead}.items():
        text = re.sub(rf"(?<![\w-]){re.escape(word)}(?!\w)", lambda _, own=own: own, text)
    return text


class Guide:
    """left: its blocks that were not followed yet. names: what its reader's Python has."""

    def __init__(self, page):
        self.left, self.names = blocks_of(page), {"torch": torch, "sdtrt_backend": sdtrt_backend, "prompts": PROMPTS}

    def program(self, instead=None, **names):
        """Runs the next block, with these names besides those of the blocks before."""
        self.names.update(names)
        exec(compile(with_own(self.left.pop(0), instead or {}), "guide", "exec"), self.names)

    def commands(self, **instead):
        """The lines of the next block, one for each command. instead: word of the guide -> the reader's own."""
        text = with_own(self.left.pop(0).replace("\\\n", ""), instead)
        return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]

    def run(self, **instead):
        """What the commands of the next block print; those of pip are looked at only."""
        said = ""
        for program, *words in self.commands(**instead):
            if program == "pip":
                installs(words)
            else:
                assert program == "sdtrt"
                done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
                assert done.exit_code == 0, done.output
                said += done.output
        return said

    def shell(self, **instead):
        """What the next block prints in a shell."""
        script = with_own(self.left.pop(0), instead)
        done = subprocess.run(["sh", "-ec", script], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def environment():
    """That of a reader who has activated theirs."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def installs(words):
    """There are such extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for requirement in map(Requirement, words[1:]):
        assert requirement.name == "sdtrt_backend"
        assert requirement.extras <= extras.keys()


@pytest.fixture
def follow(monkeypatch, tmp_path):
    """page -> Guide, in an empty folder; all of it must be followed."""
    torch._dynamo.reset()
    monkeypatch.chdir(tmp_path)
    guides = []
    yield lambda page: guides.append(Guide(page)) or guides[-1]
    torch._dynamo.reset()
    assert [guide.left for guide in guides] == [[]]


@pytest.fixture
def no_compiler(monkeypatch):
    """The lowering that needs none, whose pictures are those of the others, and no bound, for random pipelines."""
    plain = functools.partial(sdtrt_backend.accelerate, engine="reference", max_error=1.0)
    monkeypatch.setattr(sdtrt_backend, "accelerate", plain)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Of the bundled model, as the guides' readers have one."""
    folder = tmp_path_factory.mktemp("calibrated") / "recipe"
    sdtrt_backend.calibrate(emoji(), PROMPTS, num_inference_steps=4, guidance_scale=5.0, seed=0).save(folder)
    return folder


def draw(pipe, pictures=3):
    pipe.set_progress_bar_config(disable=True)
    for prompt in (PROMPTS * 2)[:pictures]:
        pipe(prompt, num_inference_steps=3)


def linears():
    """Two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.SiLU(), torch.nn.Linear(1024, 512)).eval()


def state(pipe):
    return sdtrt_backend.explain(pipe).state


def test_each_guide_has_its_test():
    guides = re.findall(r"^      - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text().partition("Reference:")[0], re.MULTILINE)
    assert len(guides) == 12
    assert {path.name for path in (ROOT / "docs").glob("*.md") if blocks_of(path.name)} <= {*guides}
    assert {page.removesuffix(".md").replace("-", "_") for page in guides} <= {
        name.removeprefix("test_") for name in globals() if name.startswith("test_")}


def test_first_pictures(follow, no_compiler, capsys):
    guide, one_line = follow("first-pictures.md"), sdxl()
    guide.program(pipe=one_line)
    draw(one_line)
    assert state(one_line.unet) == "ready"
    pipe = emoji()
    guide.program(pipe=pipe)
    assert "state: ready" in capsys.readouterr().out
    assert Image.open("lighthouse.png").size == (64, 64)
    assert pipe.unet._compiled_call_impl is None
    guide.program()
    draw(pipe, pictures=2)
    for _ in range(100):
        if state(pipe) == "ready":
            break
        time.sleep(0.1)
    assert state(pipe) == "ready"


@pytest.mark.long
def test_recipes(follow):
    """test_budget has the same on a smaller module."""
    guide = follow("recipes.md")
    guide.program(pipe=sdxl(), prompts=PROMPTS * 2)
    assert guide.names["recipe"].provenance["min_psnr"]["target_db"] == 45


def save_lora(path):
    """Of one layer of the bundled model."""
    layer, width = "unet.mid_block.attentions.0.proj_in", 192
    noise = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=noise) for shape in ((4, width, 1, 1), (width, 4, 1, 1)))
    safetensors.torch.save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, path)


def test_lora(follow, no_compiler):
    guide, pipe = follow("lora.md"), emoji()
    for name in ("pixel_art", "ink"):
        save_lora(f"{name}.safetensors")
    guide.program(pipe=pipe)
    assert guide.names["picture"].size == (64, 64)


def test_vae_and_text(follow, no_compiler):
    guide = follow("vae-and-text.md")
    guide.program(pipe=emoji())
    draw(guide.names["pipe"], pictures=1)
    assert "vae.decoder" in str(sdtrt_backend.explain(guide.names["pipe"]))
    guide.program(pipe=emoji())
    draw(guide.names["pipe"])
    assert state(guide.names["pipe"]) == "ready"


def test_offload(follow, no_compiler, monkeypatch):
    guide, pipe = follow("offload.md"), emoji()
    # where there is no GPU the parts come to the CPU, one at a time all the same
    monkeypatch.setattr(pipe, "enable_model_cpu_offload", functools.partial(pipe.enable_model_cpu_offload, device="cpu"))
    guide.program(pipe=pipe)
    draw(pipe)
    assert state(pipe) == "ready"


def test_torchao(follow, recipe):
    from torchao.quantization import quantize_

    guide, pipe, fresh = follow("torchao.md"), emoji(), emoji().unet
    guide.program(pipe=pipe, recipe=sdtrt_backend.Recipe.load(recipe), quantize_=quantize_, safetensors=safetensors,
                  fresh_unet=fresh)
    inputs = torch.randn(2, 4, 32, 32), torch.tensor(500), torch.randn(2, 32, 192)
    with torch.no_grad():
        assert torch.equal(fresh(*inputs).sample, pipe.unet(*inputs).sample)
    guide.program(pipe=SimpleNamespace(unet=linears()), example_inputs=(torch.randn(2, 256, 512),))
    assert Path("plan.json").is_file()
    guide.program(pipe=SimpleNamespace(unet=linears()))


def test_modelopt(follow, no_compiler):
    import modelopt.torch.quantization as mtq

    guide, pipe = follow("modelopt.md"), emoji()

    def quantised():
        other = emoji()
        return mtq.quantize(other.unet, mtq.INT8_DEFAULT_CFG, lambda unet: other(PROMPTS[0], num_inference_steps=2))

    guide.program(pipe=pipe, quantized_unet=quantised(), other_quantized_unet=quantised())
    draw(pipe, pictures=1)
    assert state(pipe) == "ready"


def test_onnx_tensorrt(follow, recipe):
    guide = follow("onnx-tensorrt.md")
    said = guide.run(my_recipe=str(recipe))
    printed = [line.strip() for line in guide.left.pop(0).splitlines() if "..." not in line]
    plain = re.sub(r"\s+", " ", said)
    for line in printed:
        pattern = re.sub(r"\d+(\\\.\d+)*", r"[\\d.]+", re.escape(line))
        assert re.search(pattern, plain), line


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextlib.contextmanager
def running(command, port):
    """A server that has said that it is ready."""
    with Path("server.log").open("w") as log:
        process = subprocess.Popen([*command, "--port", port], env=environment(), stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(1200):
            said = Path("server.log").read_text()
            if process.poll() is not None or re.search("^ready", said, re.MULTILINE):
                break
            time.sleep(0.2)
        assert re.search("^ready", said, re.MULTILINE), said[-3000:]
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture
def loras():
    """The reader's folder."""
    Path("loras").mkdir()
    save_lora("loras/ink.safetensors")


@pytest.mark.long
def test_serving(follow, recipe, port, loras):
    guide = follow("serving.md")
    install, serve = guide.commands(recipe=str(recipe))
    installs(install[1:])
    with running(serve, port):
        answer = json.loads(guide.shell(**{"8000": port}))
        assert Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).size == (64, 64)
        guide.program({"8000": port, "DIR": "tiny_emoji"})
        assert guide.names["picture"].data[0].b64_json
        Path("prompts.txt").write_text("\n".join(PROMPTS))
        guide.shell(**{"8000": port, "60": "5"})
        assert json.loads(Path("load/load.json").read_text())
        assert Path("load/load.svg").is_file()


@pytest.mark.long
def test_batch(follow, recipe, loras):
    guide = follow("batch.md")
    install, batch = guide.commands(recipe=str(recipe))
    installs(install[1:])
    Path("prompts.jsonl").write_text(with_own(guide.left.pop(0), {}) + "\n")
    done = subprocess.run(batch, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = [json.loads(line) for line in Path("pictures/manifest.jsonl").read_text().splitlines()]
    assert [entry["error"] for entry in entries] == [None] * 3
    assert all((Path("pictures") / entry["file"]).is_file() for entry in entries)
    hosts = guide.commands()  # more than one: looked at only
    assert [words[0] for words in hosts] == ["pip", "ray", "ray", "sdtrt"]


@pytest.mark.long
def test_bundle(follow, recipe, port):
    guide = follow("bundle.md")
    guide.shell(recipe=str(recipe))
    guide.program(pipe=emoji())
    draw(guide.names["pipe"], pictures=1)
    assert state(guide.names["pipe"]) == "ready"
    (serve,) = guide.commands()
    with running(serve, port):
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200


@pytest.mark.long
def test_triton(follow, recipe, tmp_path):
    if not (SERVER / "bin" / "tritonserver").exists():
        pytest.skip(f"there is no Triton server at {SERVER}: make triton, or name the folder of one in SDTRT_TRITON")
    guide, own = follow("triton.md"), str(ASSETS / "tiny_emoji")
    guide.run(**{"--model sdxl": f"--model {own}", "--model flux": f"--model {own}"}, my_recipe=str(recipe),
              flux_recipe=str(recipe))
    assert sorted(path.name for path in Path("repository").iterdir()) == ["flux-fp8", "tiny_emoji"]
    (start,) = guide.commands()
    server = Server(tmp_path / "repository", tmp_path / "log")
    assert server.process.args[0].name == start[0]
    assert {*start[1:]} <= {"repository", *server.process.args}
    try:
        server.wait()
        guide.shell(**{"8000": str(server.port)})
    finally:
        server.stop()
    assert Image.open("fox.png").size == (64, 64)
