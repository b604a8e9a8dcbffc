"""A Triton model repository: what is written and refused, and what a real server does with it (make triton fetches it)."""

import ast
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sdtrt_backend import cli
from sdtrt_backend.errors import ExportError, ModelError, OptionError, RecipeError, SdtrtError
from sdtrt_backend.serving import triton
from sdtrt_backend.serving.ask import Facts, checked
from sdtrt_backend.serving.painter import Drawn, Painter, Setup
from sdtrt_backend.serving.triton import export_triton
from sdtrt_backend.serving.triton_model import INPUTS, Saved, TritonModel

ROOT = Path(__file__).resolve().parents[1]
SERVER = Path(os.environ.get("SDTRT_TRITON") or ROOT / ".venv" / "triton" / "pytriton" / "tritonserver")
SIZES = ((64, 64), (96, 64))
PLAIN = Setup(backend=None)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_of_the_repository_is_its_config_a_short_program_its_setup_and_warm_up_data(tmp_path):
    export_triton(tmp_path / "new" / "repository", {"tiny": PLAIN})
    assert set(files(tmp_path / "new" / "repository")) == {
        "tiny/config.pbtxt", "tiny/1/model.py", "tiny/1/setup.json", "tiny/warmup/prompt", "tiny/warmup/steps"}
    assert len((tmp_path / "new/repository/tiny/1/model.py").read_text().splitlines()) < 20


def test_the_config_says_what_the_setup_says(tmp_path):
    export_triton(tmp_path, {"tiny": Setup(backend=None, batches=(4, 1), steps=1)}, instances=3, max_queue_delay_ms=1.5,
                  memory_budget=2)
    config = (tmp_path / "tiny" / "config.pbtxt").read_text()
    for line in ('name: "tiny"', 'backend: "python"', "max_batch_size: 4",
                 "dynamic_batching { preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 1500 }",
                 "instance_group [ { count: 3 kind: KIND_AUTO } ]", "version_policy { latest { num_versions: 1 } }",
                 '  { name: "PROMPT" data_type: TYPE_STRING dims: [ 1 ] },',
                 '  { name: "GUIDANCE" data_type: TYPE_FP64 dims: [ 1 ] optional: true },',
                 '  { name: "IMAGE" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] },',
                 '    name: "batch of 1" batch_size: 1', '    name: "batch of 4" batch_size: 4',
                 'parameters { key: "memory_budget_bytes" value { string_value: "2000000000" } }'):
        assert line in config.splitlines()
    assert config.count("optional: true") == len(INPUTS) - 1
    assert (tmp_path / "tiny" / "warmup" / "steps").read_bytes() == b"\1\0\0\0"


def test_pictures_of_one_at_a_time_are_not_batched(tmp_path):
    export_triton(tmp_path, {"tiny": PLAIN})
    assert "dynamic_batching" not in (tmp_path / "tiny" / "config.pbtxt").read_text()


def test_a_gpu_can_be_demanded(tmp_path):
    export_triton(tmp_path, {"tiny": PLAIN}, gpu=True)
    assert "kind: KIND_GPU " in (tmp_path / "tiny" / "config.pbtxt").read_text()


def test_the_setup_is_read_back_with_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    setup = Setup(model="model", sizes=SIZES, batches=(1, 4), prompts=("a",), options={"rule": "max", "engine_dir": Path("kept")})
    export_triton("repository", {"tiny": setup})
    absolute = replace(setup, model=str(tmp_path / "model"), options={"rule": "max", "engine_dir": str(tmp_path / "kept")})
    assert Saved.load(Path("repository/tiny/1")) == Saved(absolute, 2, 1, None)


def test_another_name_is_added_and_the_same_is_replaced(tmp_path):
    export_triton(tmp_path, {"a": PLAIN, "b": PLAIN})
    before = files(tmp_path)
    made = export_triton(tmp_path, {"b": Setup(backend=None, steps=7)})
    after = files(tmp_path)
    assert made.written == ("b",)
    assert {name for name in after if after[name] != before.get(name)} == {"b/1/setup.json"}
    assert Saved.load(tmp_path / "b" / "1").setup.steps == 7


def test_the_newest_version_counts(tmp_path):
    export_triton(tmp_path, {"a": PLAIN})
    export_triton(tmp_path, {"a": PLAIN}, version=12, instances=2)
    made = export_triton(tmp_path, {"b": PLAIN})
    assert made.saved["a"].instances == 2
    assert (tmp_path / "a" / "1" / "model.py").exists()


@pytest.mark.parametrize("stranger", ["notes.txt", "photos/me.png", "other_model/1/model.py"])
def test_a_folder_with_other_things_is_refused_by_their_names(tmp_path, stranger):
    export_triton(tmp_path, {"a": PLAIN})
    (tmp_path / stranger).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / stranger).write_text("mine")
    before = files(tmp_path)
    with pytest.raises(ExportError, match=f"holds what is no model of sdtrt export: {stranger.split('/')[0]}; expected a new"):
        export_triton(tmp_path, {"b": PLAIN})
    assert files(tmp_path) == before


def test_a_damaged_model_is_refused_with_what_is_wrong_with_it(tmp_path):
    export_triton(tmp_path, {"a": PLAIN})
    (tmp_path / "a" / "1" / "setup.json").write_text('{"schema": 1}')
    with pytest.raises(ExportError, match=r"a \(.* setup\.json was edited or damaged"):
        export_triton(tmp_path, {"b": PLAIN})
    with pytest.raises(ModelError, match="write it with sdtrt export --to triton"):
        Saved.load(tmp_path / "a" / "1")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="is a file; expected a new or empty folder"):
        export_triton(tmp_path / "file", {"a": PLAIN})


def test_the_export_that_was_stopped_is_done_by_the_next(tmp_path, killed_before):
    with killed_before("config.pbtxt"):
        export_triton(tmp_path, {"a": PLAIN})
    export_triton(tmp_path, {"a": PLAIN})
    assert (tmp_path / "a" / "config.pbtxt").exists()


@pytest.mark.parametrize(("setup", "how", "error", "said"), [
    (PLAIN, {"instances": 0}, ExportError, "instances expects a number from 1, got 0"),
    (PLAIN, {"version": 0}, ExportError, "version expects a number from 1, got 0"),
    (PLAIN, {"max_queue_delay_ms": float("nan")}, ExportError, "max_queue_delay_ms expects a number from 0, got nan"),
    (PLAIN, {"memory_budget": 0}, ExportError, "memory_budget expects gigabytes, more than 0, got 0"),
    (Setup(batches=(0,)), {}, OptionError, "batches expects whole numbers"),
    (Setup(model="nowhere"), {}, ModelError, "nowhere is not a diffusers pipeline folder"),
    (Setup(recipe="nowhere"), {}, RecipeError, "nowhere"),
    (Setup(loras="nowhere"), {}, OptionError, r"the folder of LoRAs, nowhere, holds no \.safetensors file")])
def test_what_could_not_be_served_is_refused_before_anything_is_written(tmp_path, setup, how, error, said):
    with pytest.raises(error, match=said):
        export_triton(tmp_path, {"fine": PLAIN, "tiny": setup}, **how)
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "two words", "né", 'a"b'])
def test_a_name_that_is_no_folder_or_address_is_refused(tmp_path, name):
    with pytest.raises(ExportError, match="a model's name expects letters, digits"):
        export_triton(tmp_path, {name: PLAIN})


def test_weights_beyond_the_budget_are_refused_with_the_figures(tmp_path):
    made = export_triton(tmp_path, {"a": PLAIN}, memory_budget=0.1, instances=2)
    assert made.weights == pytest.approx(0.067e9, rel=0.1)
    before = files(tmp_path)
    # the budget of the first holds until another is named
    with pytest.raises(ExportError, match=r"a 0\.033\d GB x 2, b 0\.033\d GB x 2 make 0\.13\d GB, the memory budget is 0\.1 GB; "
                                          "raise --memory-budget"):
        export_triton(tmp_path, {"b": PLAIN}, instances=2)
    assert files(tmp_path) == before
    export_triton(tmp_path, {"b": PLAIN}, memory_budget=0.11)
    export_triton(tmp_path, {"a": PLAIN}, memory_budget=0.07)  # in place of itself: one of each


# the command line


def export(*args):
    return CliRunner().invoke(cli.app, ["export", *map(str, args)])


def test_the_command_writes_adds_and_says_what_to_do(tmp_path):
    first = export(tmp_path, "--to", "triton", "--full", "--size", "64x64,96x64", "--batches", "1,2", "--steps", 9)
    second = export(tmp_path, "--to", "triton", "--name", "other", "--fp8", "--dtype", "float32", "--threads", 1)
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert f"tritonserver --model-repository {tmp_path}" in second.output
    assert "other has no recipe: it calibrates itself at every start" in second.output
    assert "recipe" not in first.output
    assert Saved.load(tmp_path / "tiny-emoji" / "1").setup == Setup(backend=None, sizes=SIZES, batches=(1, 2), steps=9)
    assert Saved.load(tmp_path / "other" / "1").setup == Setup(backend="sd_fp8", batches=(1, 4), dtype="float32", threads=1)


@pytest.mark.parametrize(("args", "said"), [
    (["--to", "nowhere"], "unknown --to 'nowhere'; valid: onnx, engine, triton"),
    (["--to", "triton", "--flavour", "tensorrt", "--max-width", 64], "--to triton takes no --flavour, --max-width: leave it out"),
    (["--name", "a", "--gpu"], "--name, --gpu means something with --to triton alone"),
    (["--to", "triton", "--full", "--int8"], "name one of --int8, --fp8 and --full"),
    (["--to", "triton", "--batches", "1,x"], "--batches expects whole numbers")])
def test_the_command_refuses_what_the_target_does_not_take(tmp_path, args, said):
    result = export(tmp_path, *args)
    assert isinstance(result.exception, SdtrtError)
    assert said in str(result.exception)
    assert not files(tmp_path)


# what runs in the server, without one


class Log:
    """What a server says."""

    log_info = staticmethod(lambda text: None)


class Tensor:
    """Of the module that the server gives."""

    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


class Refusal:
    """Of the module that the server gives."""

    INVALID_ARG = 3

    def __init__(self, text, code):
        self.text, self.code = text, code


UTILS = SimpleNamespace(
    Tensor=Tensor, TritonError=Refusal, Logger=Log, get_input_tensor_by_name=lambda request, name: request.get(name),
    InferenceResponse=lambda tensors=(), error=None: SimpleNamespace(error=error, **{t.name: t.array for t in tensors}))


class Colours:
    """A painter whose picture is all of its seed; ``calls`` are the seeds of each."""

    facts = Facts("m", "P", SIZES, 4, 10, 50, 5.0, True, True, ("ink",), (), (1, 2))

    def __init__(self):
        self.calls = []

    def draw(self, asks):
        from PIL import Image

        self.calls.append([ask.seed for ask in asks])
        return Drawn([Image.new("RGB", (ask.width, ask.height), (ask.seed,) * 3) for ask in asks], 0.5, len(asks))


@pytest.fixture
def model():
    made = TritonModel()
    made.triton, made.painter = UTILS, Colours()
    return made


def request(**given):
    """Strings as Triton gives them: bytes."""
    def column(values):
        strings = any(isinstance(v, str) for v in values)
        return np.array([v.encode() if isinstance(v, str) else v for v in values], object if strings else None)[:, None]

    return {name: Tensor(name, column(values)) for name, values in given.items()}


def test_what_is_alike_is_drawn_together_and_each_request_gets_its_own(model):
    wide = request(PROMPT=["a"], SIZE=["96x64"], SEED=[3])
    done = model.execute([request(PROMPT=["a", "b"], SEED=[1, 2]), wide, request(PROMPT=["c"], SEED=[4])])
    assert model.painter.calls == [[1, 2], [4], [3]]  # at most two at once
    assert [response.IMAGE.shape for response in done] == [(2, 64, 64, 3), (1, 64, 96, 3), (1, 64, 64, 3)]
    assert [response.IMAGE[:, 0, 0, 0].tolist() for response in done] == [[1, 2], [3], [4]]
    assert done[0].SEED.tolist() == [[1], [2]]
    assert json.loads(done[1].INFO[0, 0]) == {"prompt": "a", "negative_prompt": None, "size": "96x64", "steps": 4,
                                              "guidance": 5.0, "seed": 3, "loras": {}, "seconds": 0.5, "batch": 1}


@pytest.mark.parametrize(("wrong", "said"), [
    ({"PROMPT": [""]}, "prompt is empty"),
    ({"SEED": [1]}, "prompt expects a text, got None"),
    ({}, "prompt expects one text per picture, got none"),
    ({"PROMPT": ["a"], "STEPS": [11]}, "steps expects an integer from 1 to 10, got 11"),
    ({"PROMPT": ["a"], "LORAS": ["{"]}, "loras expects JSON"),
    ({"PROMPT": ["a"], "LORAS": ['{"oil": 1}']}, "there is no LoRA 'oil'; valid: ink"),
    ({"PROMPT": ["a", "b"], "SIZE": ["64x64", "96x64"]}, "one size for all pictures of a request")])
def test_a_bad_request_gets_its_sentence_and_the_others_their_pictures(model, wrong, said):
    first, bad, last = model.execute([request(PROMPT=["a"], SEED=[1]), request(**wrong), request(PROMPT=["b"], SEED=[2])])
    assert said in bad.error.text
    assert bad.error.code == Refusal.INVALID_ARG
    assert model.painter.calls == [[1, 2]]
    assert (first.IMAGE[0, 0, 0, 0], last.IMAGE[0, 0, 0, 0]) == (1, 2)


def test_bytes_that_are_no_text_are_refused(model):
    (response,) = model.execute([{"PROMPT": Tensor("PROMPT", np.array([[b"\xff"]], object))}])
    assert response.error.text == "prompt is no text in UTF-8"


def test_fields_arrive_as_they_were_sent(model):
    (response,) = model.execute([request(PROMPT=["né"], NEGATIVE_PROMPT=["fog"], GUIDANCE=[4.3], SEED=[5],
                                         LORAS=['{"ink": 0.8}'])])
    info = json.loads(response.INFO[0, 0])
    assert (info["prompt"], info["negative_prompt"], info["guidance"], info["loras"]) == ("né", "fog", 4.3, {"ink": 0.8})


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_an_instance_on_a_gpu_that_torch_does_not_see_is_refused():
    with pytest.raises(ModelError, match="Triton gives this instance GPU 1, and the torch of its Python sees none"):
        TritonModel().initialize({"model_instance_kind": "GPU", "model_instance_device_id": "1"})


@pytest.mark.slow
def test_an_instance_reads_utf8_where_its_python_takes_files_for_ascii(tmp_path):
    """As that of Triton before 2.52 does, whatever the environment says; Inductor reads sources that are not ASCII."""
    (tmp_path / "text").write_bytes("né".encode())
    code = """
import locale, pathlib, sys
from sdtrt_backend.serving.triton_model import TritonModel
before = locale.getencoding()
try:
    TritonModel().initialize({})
except KeyError as error:  # what it looks at next
    print(ascii([before, str(error), pathlib.Path(sys.argv[1]).read_text()]))
"""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "text"], env=env, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == ["ANSI_X3.4-1968", "'model_instance_kind'", "né"]


# a real server

SERVED = {"one": Setup(backend=None, threads=1, batches=(1, 4), sizes=SIZES, steps=4),
          "other": Setup(backend=None, threads=1, steps=2)}
TYPES = {"TYPE_STRING": "BYTES", "TYPE_INT32": "INT32", "TYPE_INT64": "INT64", "TYPE_FP64": "FP64"}
START_S, ASK_S, STOP_S = 240, 60, 30  # of a machine that has other things to do


class Server:
    """A tritonserver of this repository, at a free port of this machine."""

    def __init__(self, repository, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        python = SERVER.parents[1] / "env" / "bin"  # of tests/triton_server.sh; another server has a Python of its own
        env = {**os.environ, "OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),
               "PATH": f"{python if python.exists() else Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.log = log
        # without --disable-auto-complete-config each model is started twice
        self.process = subprocess.Popen(
            [SERVER / "bin" / "tritonserver", "--model-repository", repository, "--backend-directory", SERVER / "backends",
             "--http-address", "127.0.0.1", "--http-port", str(self.port), "--allow-grpc", "false", "--allow-metrics", "false",
             "--disable-auto-complete-config", "--exit-timeout-secs", str(STOP_S)],
            env=env, stdout=log.open("w"), stderr=subprocess.STDOUT)

    def wait(self):
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("health/ready")
                return
            except urllib.error.URLError:  # and HTTPError, which is one: not yet
                time.sleep(0.2)
        pytest.fail(f"the server did not become ready:\n{self.log.read_text()[-5000:]}")

    def get(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/{path}", data, ASK_S) as answer:
            return answer.read()

    def infer(self, model, **given):
        """Name -> array; or (status, sentence)."""
        inputs = [{"name": name, "datatype": TYPES[INPUTS[name]], "shape": [len(values), 1], "data": values}
                  for name, values in given.items()]
        try:
            answer = json.loads(self.get(f"models/{model}/infer", {"inputs": inputs}))
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]
        return {out["name"]: np.array(out["data"]).reshape(out["shape"]) for out in answer["outputs"]}

    def at_once(self, model, *requests):
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda given: self.infer(model, **given), requests))

    def executions(self, model):
        """Batch size -> how often it was drawn."""
        (stats,) = json.loads(self.get(f"models/{model}/stats"))["model_stats"]
        return {batch["batch_size"]: batch["compute_infer"]["count"] for batch in stats["batch_stats"]}

    def stop(self):
        """Its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S + 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not (SERVER / "bin" / "tritonserver").exists():
        pytest.skip(f"there is no Triton server at {SERVER}: make triton, or name the folder of one in SDTRT_TRITON")
    folder = tmp_path_factory.mktemp("triton")
    # requests that are sent at once come well within the delay, and four of them do not wait for it
    export_triton(folder / "repository", SERVED, max_queue_delay_ms=1500)
    running = Server(folder / "repository", folder / "log")
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def draw():
    """(model, fields of requests) -> pictures that a painter of this process draws in one batch."""
    threads = torch.get_num_threads()
    painters = {name: Painter(setup) for name, setup in SERVED.items()}

    def pictures(name, *given):
        painter = painters[name]
        return np.stack([np.asarray(p) for p in painter.draw([checked(g, painter.facts) for g in given]).pictures])

    yield pictures
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_real_server_draws_what_a_painter_draws(server, draw):
    """To the last bit: two models, a batch of one, four requests in one batch, and four pictures of one request."""
    asked = [{"prompt": "a red fox", "seed": seed} for seed in range(4)]
    one = server.infer("one", PROMPT=["a red fox"], SEED=[2])
    assert np.array_equal(one["IMAGE"], draw("one", asked[2]))
    assert one["SEED"].tolist() == [[2]]
    assert json.loads(one["INFO"].item())["steps"] == 4
    other = server.infer("other", PROMPT=["a red fox"], SEED=[2])
    assert np.array_equal(other["IMAGE"], draw("other", asked[2]))
    assert not np.array_equal(other["IMAGE"], one["IMAGE"])

    before, four = server.executions("one"), draw("one", *asked)
    parallel = server.at_once("one", *({"PROMPT": ["a red fox"], "SEED": [seed]} for seed in range(4)))
    assert server.executions("one") == {**before, 4: before[4] + 1}
    assert all(np.array_equal(answer["IMAGE"][0], picture) for answer, picture in zip(parallel, four, strict=True))
    together = server.infer("one", PROMPT=["a red fox"] * 4, SEED=[0, 1, 2, 3])
    assert np.array_equal(together["IMAGE"], four)


@pytest.mark.slow
def test_in_one_batch_of_a_real_server_are_other_sizes_and_what_cannot_be_drawn(server, draw):
    before = server.executions("one")
    small, wide, bad, again = server.at_once("one", *({"PROMPT": ["a boat"], "SEED": [seed], "SIZE": [size]} for seed, size in (
        (1, "64x64"), (2, "96x64"), (3, "63x64"), (4, "64x64"))))
    assert server.executions("one") == {**before, 4: before[4] + 1}
    assert bad == (400, "size expects one of 64x64, 96x64 or auto, got '63x64'")
    two = draw("one", {"prompt": "a boat", "seed": 1}, {"prompt": "a boat", "seed": 4})
    assert np.array_equal(np.concatenate([small["IMAGE"], again["IMAGE"]]), two)
    assert np.array_equal(wide["IMAGE"], draw("one", {"prompt": "a boat", "seed": 2, "size": "96x64"}))


@pytest.mark.slow
@pytest.mark.parametrize(("given", "said"), [
    ({"PROMPT": [" "]}, "prompt is empty: say what to draw"),
    ({"SEED": [1]}, "prompt expects a text, got None"),
    ({"PROMPT": ["a"], "GUIDANCE": [0.5]}, "guidance expects a number from 1 to 30, got 0.5"),
    ({"PROMPT": ["a"], "LORAS": ['{"ink": 1}']}, "there is no LoRA 'ink'; valid: none is loaded")])
def test_a_real_server_says_what_is_wrong(server, given, said):
    assert server.infer("other", **given) == (400, said)


@pytest.mark.slow
def test_a_real_server_tells_of_the_config_and_stops_cleanly(server):
    config = json.loads(server.get("models/one/config"))
    assert config["parameters"]["weights_bytes"]["string_value"] == str(triton._weights(SERVED["one"]))
    assert len(json.loads(server.get("models/one"))["inputs"]) == len(INPUTS)
    assert server.stop() == 0
