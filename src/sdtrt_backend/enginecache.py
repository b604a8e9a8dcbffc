"""Built engines kept on disk: trusted only when every byte and everything they depend on is as it was written."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import Unusable, cache_folder, digest, locked, make_private, read_json, write_atomically, write_json

log = logging.getLogger("sdtrt_backend")
SCHEMA = 1
LIMIT_GB = 20.0  # SDTRT_CACHE_GB overrides it; an SDXL UNet in 8 bits is 2.7 GB
NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One engine on disk. problem: why it must not be loaded, or ""; used: seconds since the epoch."""

    name: str
    size: int
    used: float
    key: Mapping[str, str]
    problem: str


class EngineCache:
    """Files ``<digest>.engine`` and ``<digest>.json``: the digest is of the key, the manifest holds the key, size and SHA-256.
    ``<digest>.lock`` is there while somebody builds or reads it. A folder that others can write to, or that is another user's
    (root's is not), is not used, and the sentence says so.

    The key is a flat mapping of strings: ``part`` says which graph it is, everything else what the engine depends on
    (TensorRT's flavour and version, torch, CUDA, driver, compute capability, hashes of graph, scales and weights, shapes).
    folder: in the user's cache directory by default; limit: bytes, least recently used engines beyond it are deleted.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = cache_folder() / "engines" if folder is None else folder
        make_private(self.folder)
        gigabytes = float(os.environ.get("SDTRT_CACHE_GB", LIMIT_GB))
        self.limit = int(gigabytes * 1e9) if limit is None else limit

    def get(self, key: Mapping[str, str], build: Callable[[], bytes]) -> tuple[bytes, str]:
        """(engine, sentence that says where it came from). ``build`` runs where no engine on disk can be trusted; of several
        processes that want one engine, one builds and the others wait for it. A disk that is full costs the next start
        a build, no more."""
        refused = _of_others(self.folder) or _open_to_others(self.folder)
        if refused:
            engine, seconds = _timed(build)
            return engine, f"the engine was built in {seconds:.1f} s and is not kept: {refused}"
        name, start = digest(dict(key)), time.perf_counter()
        with self._locked(name):
            found = self._load(name, key)
            if isinstance(found, bytes):
                with contextlib.suppress(OSError):  # a folder that is only read
                    os.utime(self._path(name))
                return found, f"the engine came from the cache in {time.perf_counter() - start:.2f} s"
            engine, seconds = _timed(build)
            try:
                self._save(name, key, engine)
                kept = ""
            except OSError as error:
                self._delete(name)
                kept = f", and could not be kept in {self.folder}: {error.strerror or error}"
        self._evict(name)
        return engine, f"the engine was built in {seconds:.1f} s: {found}{kept}"

    def entries(self) -> list[Entry]:
        """Every engine, the most recently used first; each is read whole and checked."""
        found = [self._entry(path.stem, stat) for path, stat in self._engines()]
        return sorted((e for e in found if e is not None), key=lambda e: -e.used)

    def clear(self) -> int:
        """Delete everything but what another process is building or reading; bytes that became free."""
        sizes = {path.stem: stat.st_size for path, stat in self._engines()}
        suffixes = (".engine", ".json", ".lock")
        names = {p.stem for p in self.folder.iterdir() if NAME.fullmatch(p.stem) and p.suffix in suffixes}
        return sum(sizes.get(name, 0) for name in names if self._removed(name))

    def drop(self, entry: Entry) -> None:
        """Delete one engine, unless another process is building or reading it."""
        self._removed(entry.name)

    def _locked(self, name: str, wait: bool = True) -> AbstractContextManager[bool]:
        return locked(self._path(name, ".lock"), wait)

    def _removed(self, name: str) -> bool:
        """Delete an engine that nobody uses at this moment, or leave it and say so."""
        with self._locked(name, wait=False) as mine:
            if mine:
                self._delete(name)
        return mine

    def _engines(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files of engines, without those that another process removes meanwhile."""
        for path in self.folder.glob("*.engine"):
            with contextlib.suppress(FileNotFoundError):
                if NAME.fullmatch(path.stem):
                    yield path, path.stat()

    def _path(self, name: str, suffix: str = ".engine") -> Path:
        return self.folder / (name + suffix)

    def _load(self, name: str, key: Mapping[str, str]) -> bytes | str:
        """The engine, or the reason why there is none to trust."""
        path = self._path(name)
        if not path.exists():
            return self._nearest(key)
        manifest = self._manifest(name)
        if isinstance(manifest, str):
            return manifest
        if manifest["key"] != dict(key):
            return f"the one on disk differs in {_differences(manifest['key'], key)}"
        try:
            refused = _of_others(path)
            engine = path.read_bytes()
        except FileNotFoundError:
            return "the one on disk was removed meanwhile"
        except OSError as error:
            return f"the one on disk cannot be read ({error})"
        return refused or _problem(engine, manifest) or engine

    def _manifest(self, name: str) -> dict[str, Any] | str:
        try:
            body = read_json(self._path(name, ".json"), SCHEMA)
        except Unusable as why:
            return f"the manifest of the one on disk is not used: {why}"
        kinds = {"key": dict, "bytes": int, "engine_sha256": str}
        if any(not isinstance(body.get(field), kind) for field, kind in kinds.items()):
            return "the manifest of the one on disk is not one of ours"
        return body

    def _nearest(self, key: Mapping[str, str]) -> str:
        """What changed since an engine of the same part was built."""
        for path, _ in sorted(self._engines(), key=lambda e: -e[1].st_mtime):
            manifest = self._manifest(path.stem)
            if not isinstance(manifest, str) and manifest["key"].get("part") == key.get("part"):
                return f"the one on disk differs in {_differences(manifest['key'], key)}"
        return "there was none on disk"

    def _entry(self, name: str, stat: os.stat_result) -> Entry | None:
        """What is on disk under ``name``; None where it was removed meanwhile."""
        manifest = self._manifest(name)
        if isinstance(manifest, str):
            return Entry(name, stat.st_size, stat.st_mtime, {}, manifest) if self._path(name).exists() else None
        try:
            problem = _problem(self._path(name).read_bytes(), manifest)
        except FileNotFoundError:
            return None
        if digest(manifest["key"]) != name:
            problem = "its manifest was changed"
        return Entry(name, stat.st_size, stat.st_mtime, manifest["key"], problem)

    def _save(self, name: str, key: Mapping[str, str], engine: bytes) -> None:
        """The manifest last: an engine without one is not loaded."""
        body = {"key": dict(key), "bytes": len(engine), "engine_sha256": hashlib.sha256(engine).hexdigest()}
        self._path(name, ".json").unlink(missing_ok=True)
        write_atomically(self._path(name), engine)
        write_json(self._path(name, ".json"), SCHEMA, body)

    def _delete(self, name: str) -> None:
        for suffix in (".json", ".engine"):
            self._path(name, suffix).unlink(missing_ok=True)

    def _evict(self, newest: str) -> None:
        """Least recently used first, never the one just built, nor one that another process is building or reading."""
        held = sorted(((stat.st_mtime, stat.st_size, path.stem) for path, stat in self._engines()), reverse=True)
        total = 0
        for _, size, name in sorted(held, key=lambda e: e[2] != newest):
            total += size
            if total > self.limit and name != newest and self._removed(name):
                log.info("an engine of %.1f GB was deleted: the cache holds %.1f GB at most (SDTRT_CACHE_GB)", size / 1e9,
                         self.limit / 1e9)


def _timed(build: Callable[[], bytes]) -> tuple[bytes, float]:
    """(engine, seconds that building it took)."""
    start = time.perf_counter()
    return build(), time.perf_counter() - start


def _of_others(path: Path) -> str:
    """Why nothing from there may run: an engine is code, and its manifest proves no origin. Root could change us anyway."""
    owner = path.stat().st_uid
    if not hasattr(os, "getuid") or owner in (os.getuid(), 0):
        return ""
    return f"{path} belongs to another user (number {owner}), and an engine is code: name a folder of your own as engine_dir"


def _open_to_others(folder: Path) -> str:
    mode = stat.S_IMODE(folder.stat().st_mode)
    if not hasattr(os, "getuid") or not mode & (stat.S_IWGRP | stat.S_IWOTH):
        return ""
    return (f"other users can write to {folder} (mode {mode:o}), and an engine is code: chmod 700 {folder} and delete what you "
            "did not put there, or name another engine_dir")


def _problem(engine: bytes, manifest: Mapping[str, Any]) -> str:
    if len(engine) != manifest["bytes"]:
        return f"the one on disk has {len(engine)} of {manifest['bytes']} bytes"
    return "" if hashlib.sha256(engine).hexdigest() == manifest["engine_sha256"] else "the bytes of the one on disk were changed"


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Names of what differs, with both values where they are short."""
    names = sorted(n for n in {*old, *new} if old.get(n) != new.get(n))
    said = [f"{n} ({old.get(n, 'none')}, now {new.get(n, 'none')})" if max(len(old.get(n, "")), len(new.get(n, ""))) <= 24 else n
            for n in names]
    return " and ".join(said)
