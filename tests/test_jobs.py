"""Batch jobs: what the lines ask for, what the folder keeps, and that a job that is killed goes on to the same pictures."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sdtrt_backend import cli
from sdtrt_backend.arguments import SOME_FAILED
from sdtrt_backend.errors import OptionError, SdtrtError
from sdtrt_backend.files import lock_of, locked
from sdtrt_backend.serving import jobs
from sdtrt_backend.serving.ask import FIELDS, Facts
from sdtrt_backend.serving.jobs import Actor, Cluster, Manifest, Result, Wanted
from sdtrt_backend.serving.painter import Drawn, Painter, Setup

FACTS = Facts("tiny", "Pipeline", ((64, 64), (96, 64)), 2, 50, 200, 5.0, True, True, ("ink",), (), (4,))
FULL = Setup(backend=None, steps=2, batches=(4,), threads=1)
PNG = jobs._png(Image.new("RGB", (8, 8)))


def written(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def asked(*given, facts=FACTS, model="m"):
    return jobs.wanted([jobs.Line(n, one) for n, one in enumerate(given, 1)], facts, model)


def manifest(folder):
    return [json.loads(line) for line in (folder / jobs.MANIFEST).read_text().splitlines()]


def test_a_line_is_a_json_object_or_of_a_txt_a_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one", "seed": 3, "id": "a"}\r\n\n  \n{"prompt": "two\xe2\x80\xa8lines"}\n')
    first, second = jobs.read_lines(path)
    assert (first.number, first.given, first.id) == (1, {"prompt": "one", "seed": 3}, "a")
    assert (second.number, second.given, second.id) == (4, {"prompt": "two\u2028lines"}, None)
    (tmp_path / "prompts.txt").write_text('one\n\n{"a": 1}\n')
    assert [(line.number, line.given["prompt"]) for line in jobs.read_lines(tmp_path / "prompts.txt")] == [
        (1, "one"), (3, '{"a": 1}')]


@pytest.mark.parametrize(("raw", "says"), [(b"nonsense", "is no JSON"), (b'["a"]', "is no JSON object"),
                                           (b'{"a": \xff}', "is no JSON"), (b"[" * 100_000, "is no JSON")])
def test_what_is_no_object_is_an_error_that_names_its_line(tmp_path, raw, says):
    (tmp_path / "prompts.jsonl").write_bytes(b'{"prompt": "one"}\n' + raw)
    _, wrong = jobs.read_lines(tmp_path / "prompts.jsonl")
    assert wrong.error.startswith("line 2 ")
    assert says in wrong.error
    (drawn,) = jobs.wanted([wrong], FACTS, "m")
    assert drawn.entry() == {"line": 2, "id": None, **dict.fromkeys(FIELDS), "file": None, "seconds": None, "batch": None,
                             "error": wrong.error}


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(SdtrtError, match="is empty"):
        jobs.read_lines(tmp_path / "empty.jsonl")
    for missing in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(SdtrtError, match="cannot be read"):
            jobs.read_lines(missing)


def test_a_line_without_a_seed_gets_one_that_is_the_same_in_every_run():
    first, second = asked({"prompt": "one"}, {"prompt": "one", "seed": None})
    assert first == asked({"prompt": "one"})[0]
    assert 0 <= first.ask.seed < 2**32
    assert first.ask.seed != second.ask.seed  # another line: another picture


def test_a_picture_is_named_by_what_is_asked_and_of_which_model():
    given = {"prompt": "one", "seed": 1}
    first, same, default, seed, size = asked(given, given, {**given, "size": "64x64", "steps": 2}, {**given, "seed": 2},
                                             {**given, "size": "96x64"})
    assert first.file == same.file == default.file
    assert len({first.file, seed.file, size.file, asked(given, model="other")[0].file}) == 4


def test_a_line_that_cannot_be_drawn_says_why():
    unknown, big = asked({"prompt": "one", "sampler": "x"}, {"prompt": "one", "size": "9x9"})
    assert (unknown.file, unknown.ask) == (None, None)
    assert "line 1: unknown field 'sampler'" in unknown.error
    assert big.entry(1.0, 4)["error"].startswith("line 2: size expects one of 64x64, 96x64")


def test_a_call_has_pictures_that_are_alike_each_once_in_the_order_of_the_lines():
    given = [{"prompt": f"p{i}", "seed": i, "size": "96x64" if i % 3 == 0 else "64x64"} for i in range(9)]
    lines = asked(*given, given[4], {"prompt": ""})
    found = jobs.calls(lines, 4)
    assert [[w.line.number for w in call] for call in found] == [[1, 4, 7], [2, 3, 5, 6], [8, 9]]
    assert all(len({w.ask.alike for w in call}) == 1 for call in found)


def test_the_identity_is_of_what_changes_pictures_and_of_nothing_else(tmp_path):
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    weights = model / "unet" / "weights.safetensors"
    weights.write_bytes(bytes(300_000))
    setup = Setup(str(model))
    first = jobs.identity(setup)
    shutil.copytree(model, tmp_path / "copy")
    (model / ".cache").mkdir()
    (model / ".cache" / "x").write_text("x")
    assert first == jobs.identity(setup) == jobs.identity(replace(setup, threads=3, batches=(8,), model=str(tmp_path / "copy")))
    others = [replace(setup, backend=None), replace(setup, backend="sd_fp8"), replace(setup, dtype="bfloat16"),
              replace(setup, recipe=str(model)), replace(setup, loras=str(model)), replace(setup, options={"alpha": 0.4}),
              replace(setup, model=None)]
    weights.write_bytes(bytes(299_999) + b"x")
    assert len({first, jobs.identity(setup), *map(jobs.identity, others)}) == len(others) + 2
    with pytest.raises(OptionError, match="there is no folder"):
        jobs.identity(Setup("nowhere"))


def test_a_picture_is_there_when_its_file_is_whole(tmp_path):
    path = tmp_path / "a.png"
    assert not jobs.is_picture(path)
    for data, whole in ((PNG, True), (PNG[:-1], False), (b"", False), (b"x" + PNG[1:], False)):
        path.write_bytes(data)
        assert jobs.is_picture(path) is whole


def test_the_manifest_goes_on_from_the_folder(tmp_path):
    one, two, three, wrong = lines = asked({"prompt": "one"}, {"prompt": "two"}, {"prompt": "three"}, {"prompt": ""})
    for w in (one, two):
        (tmp_path / w.file).write_bytes(PNG)
    # a picture whose entry was half written, an entry twice, one without a picture, an error of before, what is no entry
    written(tmp_path / jobs.MANIFEST, one.entry(1.5, 4), one.entry(1.5, 4), three.entry(1.0, 4), two.entry(error="died"), "[1]",
            json.dumps(two.entry(2.0, 4))[:-20])
    kept = Manifest(tmp_path, lines)
    assert manifest(tmp_path) == [one.entry(1.5, 4), two.entry(), wrong.entry()]
    assert kept.failed == 1
    assert kept.add(Result(three.file, 3.0, 4, None)) == 1
    assert kept.add(Result(three.file, 3.0, 4, None)) == 0
    assert manifest(tmp_path)[-1] == three.entry(3.0, 4)
    kept.file.close()
    kept.write()
    assert [e["line"] for e in manifest(tmp_path)] == [1, 2, 3, 4]


def test_lines_that_ask_for_the_same_are_all_in_the_manifest(tmp_path):
    lines = asked({"prompt": "one", "seed": 1}, {"prompt": "one", "seed": 1})
    kept = Manifest(tmp_path, lines)
    assert kept.add(Result(lines[0].file, 1.0, 4, None)) == 2
    kept.file.close()
    assert [e["line"] for e in manifest(tmp_path)] == [1, 2]
    assert len({e["file"] for e in manifest(tmp_path)}) == 1


class Brush:
    """A painter for one test: draws grey pictures of the seed, and raises what a prompt says."""

    facts = FACTS

    def __init__(self):
        self.drawn = []

    def draw(self, asks):
        for ask in asks:
            if ask.prompt == "raises":
                raise RuntimeError("out of memory")
            if ask.prompt == "breaks the GPU":
                raise torch.AcceleratorError("illegal memory access")
        self.drawn.append([ask.seed for ask in asks])
        return Drawn([Image.new("L", (8, 8), ask.seed) for ask in asks], 1.25, 4)


@pytest.fixture
def actor(tmp_path):
    made = object.__new__(Actor)
    made.painter, made.folder, made.refused = Brush(), tmp_path, ""
    return made


def call_of(lines):
    return [(w.file, w.ask.to_json()) for w in lines]


def test_an_actor_writes_what_is_missing_and_draws_the_call_as_before(actor, tmp_path):
    lines = asked(*({"prompt": f"p{i}", "seed": i} for i in range(3)))
    row = {"call": json.dumps(call_of(lines))}
    (tmp_path / lines[1].file).write_bytes(PNG)
    results = [Result(**r) for r in json.loads(actor(row)["results"])]
    assert sorted(results, key=lambda r: r.file) == sorted(
        (Result(w.file, *((None, None) if w is lines[1] else (1.25, 4)), None) for w in lines), key=lambda r: r.file)
    assert actor.painter.drawn == [[0, 1, 2]]
    assert (tmp_path / lines[1].file).read_bytes() == PNG
    with Image.open(tmp_path / lines[2].file) as picture:
        assert picture.getpixel((0, 0)) == 2
    assert [Result(**r) for r in json.loads(actor(row)["results"])] == [Result(w.file, None, None, None) for w in lines]
    assert len(actor.painter.drawn) == 1
    assert not list(tmp_path.glob(f".*{jobs.TRYING}"))


def test_a_call_that_raises_is_an_error_of_its_pictures(actor, tmp_path):
    lines = asked({"prompt": "raises"}, {"prompt": "fine"})
    assert {(r.file, r.error) for r in actor.draw(call_of(lines))} == {(w.file, "RuntimeError: out of memory") for w in lines}
    assert list(tmp_path.iterdir()) == []


def test_a_call_that_ends_its_process_is_tried_twice(actor, tmp_path, monkeypatch):
    def ends(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", ends)
    lines = asked({"prompt": "breaks the GPU"})
    for _ in range(jobs.TRIES):
        with pytest.raises(SystemExit):
            actor.draw(call_of(lines))
    assert actor.draw(call_of(lines)) == [Result(lines[0].file, None, None, jobs.DIED)]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def known(monkeypatch):
    """No pipeline is loaded to be asked what it takes."""
    monkeypatch.setattr(Cluster, "facts", lambda self: FACTS)


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setattr(jobs, "find_spec", lambda name: None)


def test_without_ray_it_says_what_to_install(tmp_path, known, no_ray):
    with pytest.raises(SdtrtError, match=r"pip install 'sdtrt_backend\[serve\]'"):
        jobs.run_batch(written(tmp_path / "p.txt", "one"), tmp_path / "out", FULL)


def test_an_address_where_nobody_listens_is_an_error_at_once(tmp_path, known):
    pytest.importorskip("ray")
    with pytest.raises(SdtrtError, match=r"there is no Ray cluster at 127\.0\.0\.1:1 that can be joined"):
        jobs.run_batch(written(tmp_path / "p.txt", "one"), tmp_path / "out", FULL, address="127.0.0.1:1")


def test_where_all_is_drawn_neither_ray_nor_a_model_is_needed(tmp_path, monkeypatch, no_ray):
    path = written(tmp_path / "p.jsonl", {"prompt": "one", "seed": 1}, {"prompt": "one", "seed": 1}, "nonsense")
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Cluster, "facts", lambda self: FACTS)
        patched.setattr(Cluster, "draw", lambda self, todo, folder: [
            Result(w.file, 1.0, 1, None) for call in todo for w in call if (folder / w.file).write_bytes(PNG)])
        assert jobs.run_batch(path, out, FULL) == jobs.Summary(2, 0, 1, out / jobs.MANIFEST)
    before = manifest(out)
    assert [e["line"] for e in before] == [1, 2, 3]
    assert jobs.run_batch(path, out, FULL) == jobs.Summary(0, 2, 1, out / jobs.MANIFEST)
    assert manifest(out) == before


def test_two_jobs_of_one_folder_are_refused(tmp_path, known):
    path = written(tmp_path / "p.txt", "one")
    with locked(lock_of(tmp_path / "out")), pytest.raises(SdtrtError, match="another batch job writes to"):
        jobs.run_batch(path, tmp_path / "out", FULL)


def test_importing_it_or_the_command_line_imports_no_ray():
    code = "import sys, sdtrt_backend.cli, sdtrt_backend.serving.jobs; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize(("hosts", "asked_for", "threads", "shares"), [
    ([{"CPU": 2.0}], None, None, (1, 2, 0.0)), ([{"CPU": 2.0}], 2, None, (2, 1, 0.0)), ([{"CPU": 8.0}], 2, 3, (2, 3, 0.0)),
    ([{"CPU": 8.0}, {"CPU": 4.0}, {}], None, None, (2, 4, 0.0)), ([{"CPU": 8.0}, {"CPU": 8.0}], 3, None, (3, 4, 0.0)),
    ([{"CPU": 2.0}], 1, 9, (1, 2, 0.0)), ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}], None, None, (4, None, 1.0)),
    ([{"CPU": 8.0, "GPU": 4.0}], 2, None, (2, None, 1.0)),
    ([{"CPU": 2.0}], 3, None, "room for 2"), ([{"CPU": 8.0, "GPU": 4.0}], 5, None, "room for 4")])
def test_actors_share_what_the_hosts_have(hosts, asked_for, threads, shares):
    cluster = Cluster(replace(FULL, threads=threads), asked_for, None, 1.0)
    cluster.ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": host} for host in hosts])
    if isinstance(shares, str):
        with pytest.raises(OptionError, match=shares):
            cluster._shares(100)
    else:
        assert cluster._shares(100) == shares
        assert cluster._shares(1)[0] == 1


def test_the_command_makes_a_setup_of_its_options_and_exits_with_3_when_some_failed(tmp_path, monkeypatch):
    called = []

    def run_batch(prompts, out, setup, **how):
        called.append((prompts, out, setup, how))
        return jobs.Summary(3, 2, len(called) - 1, out / jobs.MANIFEST)

    monkeypatch.setattr(jobs, "run_batch", run_batch)
    check = Setup.check
    monkeypatch.setattr(Setup, "check", lambda self: None)  # there are no such folders
    options = ["batch", "p.jsonl", "--out", str(tmp_path), "--model", "m", "--recipe", "r", "--fp8", "--lora-dir", "l", "--size",
               "1024x1024,768x1344", "--batch", "2", "--steps", "120", "--guidance", "4", "--actors", "3", "--threads", "5"]
    done = CliRunner().invoke(cli.app, options)
    assert done.exit_code == 0, done.output
    assert "3 drawn, 2 were there, 0 failed" in done.output
    setup = Setup("m", "sd_fp8", "r", loras="l", sizes=((1024, 1024), (768, 1344)), batches=(2,), steps=120, max_steps=120,
                  guidance=4.0, threads=5)
    assert called == [(Path("p.jsonl"), tmp_path, setup, {"actors": 3, "address": None, "gpus_per_actor": 1.0})]
    assert CliRunner().invoke(cli.app, options).exit_code == SOME_FAILED
    bundled = ["batch", "p.jsonl", "--bundle", "b.sdtrt", "--trust"]
    CliRunner().invoke(cli.app, bundled)
    assert called[-1][2] == Setup(bundle="b.sdtrt", trust=True, batches=(4,))
    monkeypatch.setattr(Setup, "check", check)
    assert "b.sdtrt does not exist" in str(CliRunner().invoke(cli.app, bundled).exception)
    for wrong, says in ((["--size", "10"], "--size expects"), (["--fp8", "--full"], "name one of"), (["--size", "65x64"], "of 8"),
                        (["--full", "--recipe", "r"], "takes no recipe")):
        assert says in str(CliRunner().invoke(cli.app, ["batch", "p.jsonl", *wrong]).exception)


class Mortal:
    """An actor without a pipeline, whose process ends at some prompts."""

    def __init__(self, setup, folder):
        self.actor = object.__new__(Actor)
        self.actor.folder, self.actor.refused = Path(folder), "a setup of no use" if setup.steps == 3 else ""
        self.actor.painter = self

    facts = FACTS

    def draw(self, asks):
        once = self.actor.folder / "died once"
        for ask in asks:
            if ask.prompt == "always" or (ask.prompt == "once" and not once.exists()):
                once.touch()
                os._exit(1)
        return Brush().draw(asks)

    def __call__(self, row):
        return self.actor(row)


@pytest.fixture
def ray_folder(monkeypatch):
    """Ray's files of one test, in a folder of a short name, as a socket's path has at most 107 characters; no process stays."""
    folder = tempfile.mkdtemp(prefix="sdtrt", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield folder
    for process in processes_of(folder):
        os.kill(process, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder):
    """Of this user, but for this one, whose environment has the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if folder.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:  # another user's, or it has ended
            continue
    return found


@pytest.fixture
def ray(ray_folder, monkeypatch):
    """Ray, started already; its processes find what this file defines."""
    found = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    found.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield found
    found.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_a_call_that_ends_its_process_is_in_the_manifest_and_the_rest_goes_on(tmp_path, monkeypatch, known, ray):
    monkeypatch.setattr(jobs, "Actor", Mortal)
    prompts = ["one", "always", "two", "once", *(f"more {i}" for i in range(8))]
    path, out = written(tmp_path / "p.txt", *prompts), tmp_path / "out"
    setup = replace(FULL, batches=(1,))
    done = jobs.run_batch(path, out, setup, actors=2)
    assert (done.drawn, done.failed) == (11, 1)
    assert {e["prompt"]: e["error"] for e in manifest(out)} == {p: jobs.DIED if p == "always" else None for p in prompts}
    assert all((out / e["file"]).is_file() for e in manifest(out) if not e["error"])
    with pytest.raises(SdtrtError, match=r"^a setup of no use$"):
        jobs.run_batch(path, tmp_path / "other", replace(setup, steps=3), actors=1)
    assert ray.is_initialized()  # whoever started it stops it


def until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on_to_the_same_pictures_each_drawn_once(tmp_path, ray_folder):
    pytest.importorskip("ray.data")
    given = [{"prompt": f"thing {i}, noto style", "id": f"p{i}"} for i in range(38)]
    same = {"prompt": "rocket, fluent style", "seed": 7}
    path, out = written(tmp_path / "p.jsonl", *given, same, same, {"prompt": "x", "seed": -1}, "nonsense"), tmp_path / "out"
    command = [str(Path(sys.executable).parent / "sdtrt"), "batch", str(path), "--out", str(out), "--full", "--steps", "2",
               "--actors", "2", "--threads", "1", "--batch", "4"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(list(out.glob("*.png"))) >= 8 or job.poll() is not None, 120)
    finally:
        job.kill()
        job.wait()
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.png")}
    assert 8 <= len(before) < 39

    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == SOME_FAILED, again.stderr
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.png")}
    assert len(after) == 39
    assert {name: after[name] for name in before} == before
    entries = manifest(out)
    assert [e["line"] for e in entries] == list(range(1, 43))
    assert {e["file"] for e in entries} == {*after, None}
    assert [e["line"] for e in entries if e["error"]] == [41, 42]
    assert entries[38]["file"] == entries[39]["file"]

    # one process, the same pictures in other calls: the last first
    painter = Painter(FULL)
    asked_for = [Wanted(jobs.Line(e["line"]), jobs.checked({n: e[n] for n in FIELDS}, painter.facts), e["file"], None)
                 for e in reversed(entries) if not e["error"]]
    for call in jobs.calls(asked_for, 4):
        for w, picture in zip(call, painter.draw([w.ask for w in call]).pictures, strict=True):
            data = io.BytesIO()
            picture.save(data, "PNG")
            assert (out / w.file).read_bytes() == data.getvalue()
    until(lambda: not processes_of(ray_folder), 90)  # the killed job's too: Ray's agents look for their parent every half minute
