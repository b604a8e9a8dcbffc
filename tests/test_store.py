"""Measurements on disk: read back, and measured anew with a sentence when they are not this machine's."""

import json
import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sdtrt_backend import store
from sdtrt_backend.store import Store, device_key

KEY = {"gpu": "a", "driver": "1"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SDTRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never():
    raise AssertionError("measured again")


def test_a_value_is_measured_once_and_read_by_the_next_process(folder):
    assert Store(KEY).get("x", lambda: {"k": 1.5}) == {"k": 1.5}
    assert Store(KEY).get("x", never) == {"k": 1.5}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [p.suffix for p in folder.iterdir()] == [".json"]


def test_another_driver_measures_for_itself():
    Store(KEY).get("x", lambda: 1)
    assert Store({**KEY, "driver": "2"}).get("x", lambda: 2) == 2
    assert Store(KEY).get("x", never) == 1


@pytest.mark.parametrize("spoil", [lambda text: text[:-5], lambda text: "[]",
                                   lambda text: json.dumps({"key": {"gpu": "b"}, "values": {"x": 9}})])
def test_a_file_that_is_not_this_machines_is_measured_anew_and_said_so(spoil, caplog):
    mine = Store(KEY)
    mine.get("x", lambda: 1)
    mine.path.write_text(spoil(mine.path.read_text()))
    with caplog.at_level(logging.WARNING):
        assert Store(KEY).get("x", lambda: 2) == 2
    assert "measuring anew" in caplog.text


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(folder, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError("no space left on device")

    mine = Store(KEY)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        assert mine.get("x", lambda: 1) == 1
    assert mine.get("x", never) == 1
    assert "no space left" in caplog.text
    assert list(folder.iterdir()) == []  # not even half a file
    assert mine.get("y", lambda: 2) == 2
    assert Store(KEY).values == {"x": 1, "y": 2}


@pytest.mark.parametrize("value", [{"ms": 1.25}, "cuDNN has no kernel for this shape", None, [1, {"a": None}], {}])
def test_any_json_is_kept_as_it_is(value):
    assert Store(KEY).get("x", lambda: value) == value
    assert Store(KEY).get("x", never) == value


def test_a_measurement_that_fails_is_the_callers_error_and_nothing_is_kept():
    def out_of_memory():
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        Store(KEY).get("x", out_of_memory)
    assert Store(KEY).get("x", lambda: 1) == 1


def test_what_another_process_measured_meanwhile_is_used():
    first, second = Store(KEY), Store(KEY)  # each read an empty file
    assert first.get("x", lambda: 1) == 1
    assert second.get("x", never) == 1
    assert second.get("y", lambda: first.get("y", lambda: 1) + 1) == 1  # measured by both at once: one value for all
    assert Store(KEY).values == {"x": 1, "y": 1}


def test_threads_lose_nothing():
    mine = Store(KEY)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: mine.get(f"x{i}", lambda: i), range(40))) == list(range(40))
    assert Store(KEY).values == {f"x{i}": i for i in range(40)}


@pytest.mark.slow
def test_two_processes_that_measure_at_once_keep_both(folder):
    code = """
import sys, time
from pathlib import Path
from sdtrt_backend.store import Store, device_key

mine, folder, name = Store({"gpu": "a", "driver": "1"}), Path(sys.argv[1]), sys.argv[2]
(folder / f"ready-{name}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.01)
for i in range(25):
    mine.get(f"{name}{i}", lambda: {"ms": i / 2})
"""
    folder.mkdir()
    both = [subprocess.Popen([sys.executable, "-c", code, str(folder), name]) for name in "ab"]
    assert [process.wait(120) for process in both] == [0, 0]
    assert Store(KEY).values == {f"{name}{i}": {"ms": i / 2} for name in "ab" for i in range(25)}
    assert sorted(p.suffix for p in folder.iterdir()) == ["", "", ".json"]


def test_the_key_of_the_cpu_tells_processor_and_threads(monkeypatch):
    cpu = torch.device("cpu")
    key = device_key(cpu)
    assert key["cpu"] == store.processor()
    assert key["torch"] == torch.__version__
    assert key["threads"] == str(torch.get_num_threads())
    assert set(key) == {"cpu", "capability", "torch", "threads", "kernels"}
    assert all(isinstance(v, str) and v for v in key.values())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    assert device_key(cpu) == key | {"threads": "97"}


@pytest.mark.slow
def test_the_times_of_one_process_are_found_by_the_next():
    code = """
import sys, torch
from sdtrt_backend.store import Store, device_key

torch.set_num_threads(2)
print(Store(device_key(torch.device("cpu"))).get("linear 2x5", lambda: sys.argv[1]))
"""
    said = [subprocess.run([sys.executable, "-c", code, who], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": seed}).stdout for who, seed in (("first", "1"), ("second", "2"))]
    assert said == ["first\n", "first\n"]
