"""Engines on disk: what does not match in every byte and every dependency is built anew, with the reason said."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time

import pytest

from sdtrt_backend.enginecache import EngineCache
from sdtrt_backend.files import digest, locked, write_json

KEY = {"part": "unet 0", "flavour": "tensorrt_rtx", "version": "1.4.0", "driver": "580.1", "scales": "a" * 64,
       "weights": "b" * 64, "shapes": "2x4x32x32"}
ENGINE = bytes(range(256)) * 40


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


@pytest.fixture
def kept(cache):
    cache.get(KEY, lambda: ENGINE)
    return cache


def never():
    raise AssertionError("built although the engine on disk is good")


def test_the_second_time_nothing_is_built(cache):
    assert cache.get(KEY, lambda: ENGINE)[0] == ENGINE
    engine, said = cache.get(dict(reversed(KEY.items())), never)
    assert engine == ENGINE
    assert said.startswith("the engine came from the cache in ")
    assert os.stat(cache.folder).st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("name", "value", "says"), [
    ("version", "1.5.0", "differs in version (1.4.0, now 1.5.0)"),
    ("driver", "581", "differs in driver (580.1, now 581)"),
    ("scales", "c" * 64, "differs in scales"), ("weights", "d" * 64, "differs in weights"),
    ("shapes", "4x4x32x32", "differs in shapes")])
def test_another_dependency_is_another_engine(kept, name, value, says):
    engine, said = kept.get(KEY | {name: value}, lambda: b"new")
    assert engine == b"new"
    assert says in said
    assert kept.get(KEY, never)[0] == ENGINE


def damage_byte(path):
    blob = bytearray(path.read_bytes())
    blob[1234] ^= 1
    path.write_bytes(blob)


def damage_manifest(path):
    path.with_suffix(".json").write_text("{")


def another_key(path):
    body = {"bytes": len(ENGINE), "engine_sha256": hashlib.sha256(ENGINE).hexdigest(), "key": KEY | {"version": "1.3.0"}}
    write_json(path.with_suffix(".json"), 1, body)


def change_version(path):
    manifest = path.with_suffix(".json")
    manifest.write_text(manifest.read_text().replace("1.4.0", "1.3.0"))


@pytest.mark.parametrize(("damage", "says"), [
    (damage_byte, "bytes of the one on disk were changed"),
    (lambda path: path.write_bytes(ENGINE[:-9]), f"has {len(ENGINE) - 9} of {len(ENGINE)} bytes"),
    (lambda path: path.write_bytes(b""), "has 0 of"),
    (damage_manifest, ".json is truncated or not JSON"),
    (lambda path: path.with_suffix(".json").unlink(), ".json is missing"),
    (lambda path: path.with_suffix(".json").write_text("[]"), "has no schema number"),
    (lambda path: write_json(path.with_suffix(".json"), 1, {"key": 5}), "not one of ours"),
    (change_version, "was edited or damaged"),
    (another_key, "differs in version (1.3.0, now 1.4.0)"),
], ids=["byte", "truncated", "empty", "manifest", "no manifest", "foreign manifest", "no fields", "version", "moved"])
def test_what_was_damaged_is_built_anew_and_then_good(kept, damage, says):
    damage(kept.folder / f"{digest(KEY)}.engine")
    assert kept.entries()[0].problem
    engine, said = kept.get(KEY, lambda: ENGINE)
    assert engine == ENGINE
    assert says in said
    assert kept.get(KEY, never)[0] == ENGINE
    assert kept.entries()[0].problem == ""


def test_a_full_disk_costs_a_build_and_leaves_nothing_behind(kept, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(kept.folder.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        engine, said = kept.get(KEY | {"part": "unet 1"}, lambda: b"second")
    assert engine == b"second"
    assert "could not be kept" in said
    assert "No space left on device" in said
    assert sorted(kept.folder.iterdir()) == before
    assert kept.get(KEY, never)[0] == ENGINE


def test_a_build_that_fails_is_the_callers_error_and_leaves_the_cache_usable(kept):
    def refuse():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        kept.get(KEY | {"part": "unet 1"}, refuse)
    assert kept.get(KEY | {"part": "unet 1"}, lambda: b"ok")[0] == b"ok"


@pytest.mark.slow
def test_two_builders_at_once_build_one_engine(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from sdtrt_backend.enginecache import EngineCache

def build():
    with open({str(tmp_path / 'built')!r}, "a") as file:
        file.write("built\\n")
    time.sleep(1.0)
    return {ENGINE!r}

engine, said = EngineCache(Path({str(tmp_path / 'engines')!r})).get({KEY!r}, build)
assert engine == {ENGINE!r}
print(said)
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0].strip() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said[0].startswith("the engine came from the cache in ")
    assert said[1].startswith("the engine was built in 1.")
    assert (tmp_path / "built").read_text() == "built\n"


def test_the_least_recently_used_engines_leave_first(tmp_path):
    cache = EngineCache(tmp_path / "engines", limit=250)
    for i, used in enumerate((30, 10, 20)):  # seconds ago; the second was used last
        cache.get({"part": str(i)}, lambda: bytes(100)[:80])
        os.utime(cache.folder / f"{digest({'part': str(i)})}.engine", (time.time() - used,) * 2)
    cache.get({"part": "3"}, lambda: bytes(80))
    assert sorted(e.key["part"] for e in cache.entries()) == ["1", "2", "3"]
    cache.get({"part": "huge"}, lambda: bytes(1000))
    assert [e.key["part"] for e in cache.entries()] == ["huge"]


def test_clear_deletes_engines_and_nothing_else(kept):
    (kept.folder / "notes.json").write_text("{}")
    assert kept.clear() == len(ENGINE)
    assert [p.name for p in kept.folder.iterdir()] == ["notes.json"]
    assert kept.entries() == []


def test_a_lock_is_there_while_an_engine_is_built_and_goes_with_it(cache):
    lock = cache.folder / f"{digest(KEY)}.lock"

    def build():
        assert lock.exists()
        return ENGINE

    cache.get(KEY, build)
    cache.get(KEY, never)
    assert not lock.exists()
    lock.touch()  # of a process that was killed
    cache.clear()
    assert list(cache.folder.iterdir()) == []


def test_an_engine_that_is_in_use_is_neither_evicted_nor_cleared(kept):
    with locked(kept.folder / f"{digest(KEY)}.lock"):
        small = EngineCache(kept.folder, limit=1)
        small.get(KEY | {"part": "unet 1"}, lambda: b"second")
        small.drop(next(e for e in small.entries() if e.key == KEY))
        assert small.clear() == len(b"second")
        assert [e.key for e in small.entries()] == [KEY]
    small.get(KEY | {"part": "unet 1"}, lambda: b"second")
    assert [e.key["part"] for e in small.entries()] == ["unet 1"]


def test_an_engine_that_is_removed_while_it_is_read_is_built_anew_and_said_so(kept, monkeypatch):
    def removed_first(self, name):
        manifest = type(self)._kept_manifest(self, name)
        self._path(name).unlink()
        return manifest

    monkeypatch.setattr(EngineCache, "_kept_manifest", EngineCache._manifest, raising=False)
    monkeypatch.setattr(EngineCache, "_manifest", removed_first)
    engine, said = kept.get(KEY, lambda: b"anew")
    assert engine == b"anew"
    assert "the one on disk was removed meanwhile" in said


def test_an_engine_that_is_removed_while_all_are_listed_is_left_out(kept, monkeypatch):
    def gone(self, name):
        self._path(name).unlink()
        return "its manifest is missing"

    monkeypatch.setattr(EngineCache, "_manifest", gone)
    assert kept.entries() == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_can_write_to_gives_and_keeps_no_engine(kept, mode):
    kept.folder.chmod(mode)
    before = sorted(kept.folder.iterdir())
    engine, said = kept.get(KEY, lambda: b"mine")
    assert engine == b"mine"
    assert f"is not kept: other users can write to {kept.folder} (mode {mode:o})" in said
    assert f"chmod 700 {kept.folder}" in said
    assert sorted(kept.folder.iterdir()) == before
    kept.folder.chmod(0o755)  # that others read is no harm
    assert kept.get(KEY, never)[0] == ENGINE


def test_the_folder_or_the_engine_of_another_user_is_not_used(kept, monkeypatch):
    mine = kept.folder.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    if mine == 0:  # root's are used by everybody, so make them another's
        os.chown(kept.folder, 7, -1)
    engine, said = kept.get(KEY, lambda: b"mine")
    assert engine == b"mine"
    assert "belongs to another user" in said
    assert "name a folder of your own as engine_dir" in said
    monkeypatch.undo()
    if mine == 0:
        os.chown(kept.folder, 0, -1)
        os.chown(kept.folder / f"{digest(KEY)}.engine", 7, -1)
        engine, said = kept.get(KEY, lambda: b"mine")
        assert engine == b"mine"
        assert f"{digest(KEY)}.engine belongs to another user (number 7)" in said


def test_a_manifest_is_plain_json(kept):
    body = json.loads((kept.folder / f"{digest(KEY)}.json").read_text())
    assert body["key"] == KEY
    assert body["bytes"] == len(ENGINE)
