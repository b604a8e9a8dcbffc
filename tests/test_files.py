"""What is written is whole or not there, what is read is what was written, and one writer is inside at a time."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch

from sdtrt_backend import files
from sdtrt_backend.files import (
    Format,
    Unusable,
    alone,
    cache_folder,
    digest,
    lock_of,
    locked,
    make_private,
    packed,
    read_json,
    write_atomically,
    write_json,
)


class Refused(Exception):
    """What the format below raises."""


FORMAT = Format("thing", 2, lambda folder, why: Refused(f"{folder.name}: {why}"),
                lambda folder, found: Refused(f"{folder.name}: newer, {found}"), r"thing\.safetensors", lambda body: body["old"])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path_factory.mktemp("cache") / "made" / "here"))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_folders_of_the_cache_are_their_owners_alone_and_others_stay_as_they_are(tmp_path):
    (tmp_path / "there").mkdir(mode=0o755)
    made = make_private(tmp_path / "there" / "a" / "b")
    assert [mode(p) for p in (made, made.parent)] == [0o700, 0o700]
    assert mode(tmp_path / "there") == 0o755
    assert make_private(made) == made
    assert [mode(p) for p in (cache_folder(), cache_folder().parent)] == [0o700, 0o700]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_private(tmp_path / "file")


def test_a_file_is_replaced_whole_and_both_it_and_its_name_reach_the_disk(tmp_path, monkeypatch):
    synced, syncing = [], os.fsync

    def sync(handle):
        synced.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        syncing(handle)

    monkeypatch.setattr(os, "fsync", sync)
    write_atomically(tmp_path / "x", b"one")
    write_atomically(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"two"
    assert synced == ["file", "folder"] * 2
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, broken):
    def full(*_):
        raise OSError("no space left on device")

    write_atomically(tmp_path / "x", b"one")
    with monkeypatch.context() as patched:
        patched.setattr(os, broken, full)
        with pytest.raises(OSError, match="no space left"):
            write_atomically(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_lock_is_waited_for_and_leaves_no_file(tmp_path):
    order, inside = [], threading.Event()

    def second():
        inside.wait()
        with locked(tmp_path / "lock") as mine:
            order.append(("second", mine))

    thread = threading.Thread(target=second)
    thread.start()
    with locked(tmp_path / "lock") as mine:
        inside.set()
        thread.join(0.3)
        order.append(("first", mine))
    thread.join()
    assert order == [("first", True), ("second", True)]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_held_or_cannot_be_had_is_said(tmp_path):
    with locked(tmp_path / "lock"):
        with locked(tmp_path / "lock", wait=False) as mine:
            assert not mine
        assert (tmp_path / "lock").exists()
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "lock") as mine:
        assert not mine
    with pytest.raises(KeyError), locked(tmp_path / "lock"):
        raise KeyError
    with locked(tmp_path / "lock", wait=False) as mine:
        assert mine


def test_a_path_has_its_own_lock_in_the_cache(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    assert lock_of(tmp_path / "a") == lock_of(tmp_path / "link" / "a") != lock_of(tmp_path / "b")
    with alone(tmp_path / "a") as mine, alone(tmp_path / "b") as other:
        assert mine
        assert other
        assert lock_of(tmp_path / "a").exists()
    assert list(cache_folder().iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path / "file" / "cache"))
    with alone(tmp_path / "a") as mine:
        assert not mine


@pytest.mark.slow
def test_processes_that_wait_for_a_lock_whose_file_is_removed_still_enter_one_at_a_time(tmp_path):
    code = """
import sys
from pathlib import Path
from sdtrt_backend.files import locked

folder = Path(sys.argv[1])
for _ in range(100):
    with locked(folder / "lock"):
        count = int((folder / "count").read_text())
        (folder / "count").write_text("")
        (folder / "count").write_text(str(count + 1))
"""
    (tmp_path / "count").write_text("0")
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert (tmp_path / "count").read_text() == "200"


def test_json_is_read_as_it_was_written(tmp_path):
    body = {"b": [1, 2.5, None, "ä"], "a": {"x": (1, 2)}}
    write_json(tmp_path / "x.json", 3, body)
    assert read_json(tmp_path / "x.json", 3) == {"schema": 3, "b": [1, 2.5, None, "ä"], "a": {"x": [1, 2]}}
    assert packed(3, body) == packed(3, dict(reversed(body.items())))
    assert packed(3, body, sort_keys=False) != packed(3, dict(reversed(body.items())), sort_keys=False)


@pytest.mark.parametrize(("text", "why"), [
    (None, "x.json is missing"),
    ("", "truncated or not JSON"), ("{", "truncated or not JSON"), ("[" * 200_000, "truncated or not JSON"),
    ("[]", "no schema number"), ("5", "no schema number"), ("{}", "no schema number"), ('{"schema": true}', "no schema number"),
    ('{"schema": "1"}', "no schema number"), ('{"schema": 9}', "has schema 9, this version reads up to 3"),
    ('{"schema": 3}', "edited or damaged"), ('{"schema": 3, "sha256": "0"}', "edited or damaged"),
])
def test_json_that_is_not_what_was_written_is_unusable_for_a_reason(tmp_path, text, why):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(Unusable, match=why):
        read_json(tmp_path / "x.json", 3)
    with pytest.raises(Refused, match=why):
        read_json(tmp_path / "x.json", 3, Refused)


def test_where_the_file_is_a_folder_or_the_folder_a_file_it_is_unusable(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(Unusable, match="cannot be read"):
        read_json(tmp_path / "x.json", 1)
    (tmp_path / "file").touch()
    with pytest.raises(Unusable, match="expected a folder, this is a file"):
        read_json(tmp_path / "file" / "x.json", 1)


def test_a_folder_holds_one_thing_and_what_is_not_ours_stays(tmp_path):
    ours = "thing.safetensors", f"thing-{'0' * 64}.safetensors", f".thing.json.{'0' * 32}"
    theirs = "other.safetensors", "thing-mine.safetensors", "things.json", ".thing.json", f"{'0' * 64}.safetensors"
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    FORMAT.save(tmp_path, {"n": 1}, {"t": torch.arange(6).view(2, 3).T})
    body, tensors = FORMAT.load(tmp_path)
    assert body["n"] == 1
    assert torch.equal(tensors["t"], torch.arange(6).view(2, 3).T)
    assert {p.name for p in tmp_path.iterdir()} == {*theirs, "thing.json", f"thing-{body['tensors_sha256']}.safetensors"}
    assert list(cache_folder().iterdir()) == []


def test_no_name_in_a_json_leads_out_of_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    FORMAT.save(tmp_path / "in", {}, {})
    (blob,) = (tmp_path / "in").glob("*.safetensors")
    blob.rename(tmp_path / "outside.safetensors")
    body = {"schema": 1, "tensors_sha256": blob.stem.removeprefix("thing-"), "old": "../outside.safetensors"}
    (tmp_path / "in" / "thing.json").write_text(json.dumps({**body, "sha256": digest(body)}))
    with pytest.raises(Refused, match=r"in: outside\.safetensors is missing"):
        FORMAT.load(tmp_path / "in")


def test_bytes_with_the_right_hash_that_are_no_tensors_are_unusable(tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.torch.save", lambda tensors: b"nothing")
    FORMAT.save(tmp_path, {}, {})
    with pytest.raises(Refused, match="holds no tensors that can be read"):
        FORMAT.load(tmp_path)


@pytest.mark.slow
def test_a_reader_in_another_process_never_fails_while_a_writer_replaces(tmp_path):
    code = """
import sys, torch
from pathlib import Path
from sdtrt_backend.recipe import Recipe

for i in range(150):
    Recipe("", {}, {"a": torch.full((4,), float(i % 2))}, {}, (float(i % 2),)).save(sys.argv[1])
"""
    from sdtrt_backend.recipe import Recipe

    Recipe("", {}, {"a": torch.zeros(4)}, {}, (0.0,)).save(tmp_path)
    writer, seen = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]), set()
    while writer.poll() is None:
        recipe = Recipe.load(tmp_path)
        assert recipe.timesteps == (float(recipe.smoothing["a"][0]),)
        seen.add(recipe.timesteps)
    assert writer.returncode == 0
    assert len(seen) == 2


def test_the_names_of_before_are_the_same_functions():
    from sdtrt_backend import recipe, store

    assert recipe.write_atomically is files.write_atomically
    assert recipe.digest is files.digest
    assert store.cache_folder is files.cache_folder
