"""A bundle gives a new worker what was calibrated, measured and compiled, and what of it does not fit is left out and said."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import sdtrt_backend
from sdtrt_backend import bundle, programs
from sdtrt_backend.bundle import MANIFEST, compiling_into, pack, unpack
from sdtrt_backend.errors import BundleError, OptionError
from sdtrt_backend.files import digest, make_private, write_json
from sdtrt_backend.kernels import Unsteady, chooser
from sdtrt_backend.recipe import Recipe
from sdtrt_backend.store import Store, device_key

CPU = torch.device("cpu")


@pytest.fixture
def made(recipe, tmp_path, monkeypatch):
    """A bundle of the toy's recipe, one kernel time, two compiled files, and the note that one of them is a step; caches are
    empty afterwards."""
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path / "there"))
    Store(device_key(CPU)).get("a product", lambda: 1.5)
    monkeypatch.setattr(chooser(CPU).measurements, "passing", {"another": {"onednn": Unsteady(2.5), "own": "no room"}})
    with compiling_into(tmp_path / "work"):
        for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "ab/step.so"), ("TRITON_CACHE_DIR", "cd/kernel.cubin")):
            file = Path(os.environ[variable]) / name
            file.parent.mkdir(parents=True)
            file.write_bytes(name.encode())
            file.with_suffix(".lock").touch()
        for name, there in (("a" * 64, "ab/step.so"), ("b" * 64, "cd/of another process.py")):
            note = {"file": there, "sha256 of it": hashlib.sha256(there.encode()).hexdigest(), "held": {}, "about": {}}
            write_json(make_private(programs.folder()) / f"{name}.json", programs.SCHEMA, note)
    assert pack(tmp_path / "toy.sdtrt", recipe, tmp_path / "work", CPU, {"sizes": [[64, 64]]}) == 7
    monkeypatch.setattr(chooser(CPU).measurements, "passing", {})
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "toy.sdtrt"


def compiled(made):
    return sorted(p.name for folder in ("inductor", "triton") for p in (made.parent / folder).rglob("*") if p.is_file())


def rewritten(path, change):
    """The bundle with some members changed: name -> bytes, None for those to take away."""
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    members |= change(members)
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            if data is not None:
                file.writestr(name, data)
    return path


def with_manifest(members, /, **changes):
    """A manifest that its maker, and not somebody on the way, would have written so."""
    body = json.loads(members[MANIFEST])
    body.pop("sha256")
    body |= changes
    return {MANIFEST: json.dumps({**body, "sha256": digest(body)}).encode()}


def test_all_of_it_is_where_it_is_looked_for(made, recipe):
    opened = unpack(made, CPU, trust=True)
    assert opened.said == ()
    assert Recipe.load(opened.recipe).content_hash() == recipe.content_hash()
    assert Store(device_key(CPU)).values == {"a product": 1.5}
    passing = chooser(CPU).measurements.passing
    assert passing == {"another": {"onednn": 2.5, "own": "no room"}}
    assert isinstance(passing["another"]["onednn"], Unsteady)  # of a machine that was too busy to tell
    assert compiled(made) == ["kernel.cubin", "step.so"]
    assert programs.find("a" * 64)["file"] == "ab/step.so"
    assert programs.find("b" * 64) is None


def test_a_note_of_what_is_gone_is_replaced(made):
    note = make_private(programs.folder()) / f"{'a' * 64}.json"
    write_json(note, programs.SCHEMA, {"file": "ef/gone.py", "sha256 of it": "", "held": {}, "about": {}})
    unpack(made, CPU, trust=True)
    assert programs.find("a" * 64)["file"] == "ab/step.so"


def test_without_trust_no_code_is_unpacked(made):
    opened = unpack(made, CPU, trust=False)
    assert opened.recipe is not None
    assert compiled(made) == []
    assert not programs.folder().exists()
    assert len(opened.said) == 1
    assert "runs what its maker wrote" in opened.said[0]


def test_what_was_compiled_or_measured_here_stays(made):
    mine = made.parent / "inductor" / "ab" / "step.so"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    Store(device_key(CPU)).get("a product", lambda: 2.0)
    assert unpack(made, CPU, trust=True).said == ()
    assert mine.read_bytes() == b"mine"
    assert Store(device_key(CPU)).values == {"a product": 2.0}


def test_of_another_machine_the_recipe_alone_is_used(made, monkeypatch):
    monkeypatch.setattr(bundle, "device_key", lambda device: {"gpu": "NVIDIA X", "torch": "9.9"})
    opened = unpack(made, CPU, trust=True)
    assert opened.recipe is not None
    assert compiled(made) == []
    assert ["gpu none (here NVIDIA X)" in sentence for sentence in opened.said] == [True, True]


def test_of_another_version_of_a_library_no_code_is_used(made):
    def older(members):
        made_for = json.loads(members[MANIFEST])["made_for"] | {"version of torch": "2.0.0"}
        return with_manifest(members, made_for=made_for)

    opened = unpack(rewritten(made, older), CPU, trust=True)
    assert compiled(made) == []
    assert len(opened.said) == 1
    assert "is for version of torch 2.0.0 (here " in opened.said[0]


@pytest.mark.parametrize(("member", "says"), [
    ("inductor/ab/step.so", "inductor/ab/step.so was edited"), ("kernels.json", "kernel times"),
    ("recipe/recipe.json", "the pipeline calibrates itself")])
@pytest.mark.parametrize("change", [b"edited", None])
def test_a_member_that_is_not_the_manifests_is_left_out(made, member, says, change):
    opened = unpack(rewritten(made, lambda _: {member: change}), CPU, trust=True)
    assert len(opened.said) == 1
    assert says in opened.said[0]
    assert (opened.recipe is None) == member.startswith("recipe")
    assert (compiled(made) == []) == member.startswith("inductor")


@pytest.mark.parametrize("change", [
    lambda members: {MANIFEST: members[MANIFEST].replace(b"64", b"65")}, lambda members: {MANIFEST: None},
    lambda members: {MANIFEST: b"{"}, lambda members: {MANIFEST: b"[]"}, lambda members: with_manifest(members, schema=99),
    lambda members: with_manifest(members, members={"x": 3}), lambda members: with_manifest(members, members=None)])
def test_without_its_manifest_nothing_is_used(made, change):
    opened = unpack(rewritten(made, change), CPU, trust=True)
    assert opened.recipe is None
    assert compiled(made) == []
    assert len(opened.said) == 1
    assert "it was left out" in opened.said[0]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_left_out(made, share):
    data = made.read_bytes()
    made.write_bytes(data[: int(share * len(data))])
    opened = unpack(made, CPU, trust=True)
    assert opened.recipe is None
    assert "truncated" in opened.said[0]


@pytest.mark.parametrize("name", ["inductor/../../outside", "inductor//etc/outside", "triton/..\\outside"])
def test_no_member_leaves_its_folder(made, name):
    def outside(members):
        names = json.loads(members[MANIFEST])["members"] | {name: hashlib.sha256(b"x").hexdigest()}
        return {**with_manifest(members, members=names), name: b"x"}

    opened = unpack(rewritten(made, outside), CPU, trust=True)
    assert compiled(made) == []
    assert "outside was edited or damaged" in opened.said[0]
    assert not list(made.parent.rglob("outside"))


def test_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(BundleError, match="make one with sdtrt bundle"):
        unpack(tmp_path / "none.sdtrt", CPU, trust=False)


def test_a_bundle_that_cannot_be_written_leaves_nothing(recipe, tmp_path):
    with pytest.raises(BundleError, match="cannot be written"):
        pack(tmp_path / "missing" / "toy.sdtrt", recipe, tmp_path, CPU, {})


def test_accelerate_takes_a_bundle_in_place_of_a_recipe(made, denoiser, inputs, caplog):
    with pytest.raises(OptionError, match="leave one of them out"):
        sdtrt_backend.accelerate(denoiser, recipe=made, bundle=made)
    with pytest.raises(OptionError, match="trust is for"):
        sdtrt_backend.accelerate(denoiser, trust=True)
    sdtrt_backend.accelerate(denoiser, bundle=made, engine="reference", max_error=1.0)
    with torch.no_grad():
        denoiser(*inputs)
    assert sdtrt_backend.explain(denoiser).state == "ready"
    assert "runs what its maker wrote" in caplog.text


FIRST_STEP = """
import sys
from pathlib import Path
import sdtrt_backend
from sdtrt_backend import programs
from sdtrt_backend.demo import draw
programs.generated = None  # nothing is traced or lowered, but for Dynamo
pipe = sdtrt_backend.demo_pipeline()
sdtrt_backend.accelerate(pipe, bundle=sys.argv[1], trust=True)
draw(pipe, ["owl, noto style"], 2, 0)
report = sdtrt_backend.explain(pipe)
print(report.state, len(list(Path(sys.argv[2]).rglob("*.so"))))
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_new_process_with_empty_caches_compiles_nothing(tmp_path):
    pipe = sdtrt_backend.demo_pipeline()
    sdtrt_backend.calibrate(pipe, ["red apple, noto style"], num_inference_steps=4, progress=False).save(tmp_path / "recipe")
    made = tmp_path / "emoji.sdtrt"
    main = [sys.executable, "-c", "from sdtrt_backend.command import main; main()"]
    run = subprocess.run([*main, "bundle", "--recipe", tmp_path / "recipe", "--batches", "1", "--out", made],
                         env={**os.environ, "SDTRT_CACHE": str(tmp_path / "there")}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    with zipfile.ZipFile(made) as file:
        code = [name for name in file.namelist() if name.endswith(".so")]
        # the step, and what it makes of the prompt and of the timestep
        assert sum(name.startswith("programs/") for name in file.namelist()) == 3
    new = {"SDTRT_CACHE": str(tmp_path / "here"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    run = subprocess.run([sys.executable, "-c", FIRST_STEP, str(made), str(tmp_path / "inductor")],
                         env={**os.environ, **new}, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["ready", str(len(code))], run.stderr[-2000:]
