"""Measurements on disk: read back, and measured anew with a sentence when they are not this machine's."""

import json
import logging
import stat

import pytest

from sdtrt_backend import store
from sdtrt_backend.store import Store

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


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(monkeypatch, caplog):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(store.tempfile, "mkstemp", full)
    mine = Store(KEY)
    assert mine.get("x", lambda: 1) == 1
    assert mine.get("x", never) == 1
    assert "no space left" in caplog.text
