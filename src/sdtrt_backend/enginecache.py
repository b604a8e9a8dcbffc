"""Built engines kept on disk: trusted only when every byte and everything they depend on is as it was written."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .recipe import digest, write_atomically
from .store import cache_folder

log = logging.getLogger("sdtrt_backend")
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

    The key is a flat mapping of strings: ``part`` says which graph it is, everything else what the engine depends on
    (TensorRT's flavour and version, torch, CUDA, driver, compute capability, hashes of graph, scales and weights, shapes).
    folder: in the user's cache directory by default; limit: bytes, least recently used engines beyond it are deleted.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = cache_folder() / "engines" if folder is None else folder
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        gigabytes = float(os.environ.get("SDTRT_CACHE_GB", LIMIT_GB))
        self.limit = int(gigabytes * 1e9) if limit is None else limit

    def get(self, key: Mapping[str, str], build: Callable[[], bytes]) -> tuple[bytes, str]:
        """(engine, sentence that says where it came from). ``build`` runs where no engine on disk can be trusted; of several
        processes that want one engine, one builds and the others wait for it. A disk that is full costs the next start
        a build, no more."""
        from filelock import FileLock

        name, start = digest(dict(key)), time.perf_counter()
        with FileLock(self.folder / f"{name}.lock"):
            found = self._load(name, key)
            if isinstance(found, bytes):
                os.utime(self._path(name))
                return found, f"the engine came from the cache in {time.perf_counter() - start:.2f} s"
            start = time.perf_counter()
            engine = build()
            seconds = time.perf_counter() - start
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
        return sorted((self._entry(p.stem) for p in self._engines()), key=lambda e: -e.used)

    def clear(self) -> int:
        """Delete everything; bytes that became free."""
        freed = sum(p.stat().st_size for p in self._engines())
        for path in self.folder.iterdir():
            if NAME.fullmatch(path.stem) and path.suffix in (".engine", ".json", ".lock"):
                path.unlink(missing_ok=True)
        return freed

    def drop(self, entry: Entry) -> None:
        """Delete one engine."""
        self._delete(entry.name)

    def _engines(self) -> Iterator[Path]:
        return (p for p in self.folder.glob("*.engine") if NAME.fullmatch(p.stem))

    def _path(self, name: str, suffix: str = ".engine") -> Path:
        return self.folder / (name + suffix)

    def _load(self, name: str, key: Mapping[str, str]) -> bytes | str:
        """The engine, or the reason why there is none to trust."""
        if not self._path(name).exists():
            return self._nearest(key)
        manifest = self._manifest(name)
        if isinstance(manifest, str):
            return manifest
        if manifest["key"] != dict(key):
            return f"the one on disk differs in {_differences(manifest['key'], key)}"
        engine = self._path(name).read_bytes()
        return _problem(engine, manifest) or engine

    def _manifest(self, name: str) -> dict[str, Any] | str:
        try:
            body = json.loads(self._path(name, ".json").read_text())
        except (OSError, ValueError) as error:
            return f"the manifest of the one on disk cannot be read ({error})"
        if (not isinstance(body, dict) or not isinstance(body.get("key"), dict) or not isinstance(body.get("bytes"), int)
                or not isinstance(body.get("sha256"), str)):
            return "the manifest of the one on disk is not one of ours"
        return body

    def _nearest(self, key: Mapping[str, str]) -> str:
        """What changed since an engine of the same part was built."""
        for path in sorted(self._engines(), key=lambda p: -p.stat().st_mtime):
            manifest = self._manifest(path.stem)
            if not isinstance(manifest, str) and manifest["key"].get("part") == key.get("part"):
                return f"the one on disk differs in {_differences(manifest['key'], key)}"
        return "there was none on disk"

    def _entry(self, name: str) -> Entry:
        path, manifest = self._path(name), self._manifest(name)
        stat = path.stat()
        if isinstance(manifest, str):
            return Entry(name, stat.st_size, stat.st_mtime, {}, manifest)
        problem = _problem(path.read_bytes(), manifest)
        if digest(manifest["key"]) != name:
            problem = "its manifest was changed"
        return Entry(name, stat.st_size, stat.st_mtime, manifest["key"], problem)

    def _save(self, name: str, key: Mapping[str, str], engine: bytes) -> None:
        """The manifest last: an engine without one is not loaded."""
        body = {"key": dict(key), "bytes": len(engine), "sha256": hashlib.sha256(engine).hexdigest()}
        self._path(name, ".json").unlink(missing_ok=True)
        write_atomically(self._path(name), engine)
        write_atomically(self._path(name, ".json"), (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())

    def _delete(self, name: str) -> None:
        for suffix in (".json", ".engine"):
            self._path(name, suffix).unlink(missing_ok=True)

    def _evict(self, newest: str) -> None:
        """Least recently used first, never the one just built."""
        held = sorted(((p.stat().st_mtime, p.stat().st_size, p.stem) for p in self._engines()), reverse=True)
        total = 0
        for _, size, name in sorted(held, key=lambda e: e[2] != newest):
            total += size
            if total > self.limit and name != newest:
                self._delete(name)
                log.info("an engine of %.1f GB was deleted: the cache holds %.1f GB at most (SDTRT_CACHE_GB)", size / 1e9,
                         self.limit / 1e9)


def _problem(engine: bytes, manifest: Mapping[str, Any]) -> str:
    if len(engine) != manifest["bytes"]:
        return f"the one on disk has {len(engine)} of {manifest['bytes']} bytes"
    return "" if hashlib.sha256(engine).hexdigest() == manifest["sha256"] else "the bytes of the one on disk were changed"


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Names of what differs, with both values where they are short."""
    names = sorted(n for n in {*old, *new} if old.get(n) != new.get(n))
    said = [f"{n} ({old.get(n, 'none')}, now {new.get(n, 'none')})" if max(len(old.get(n, "")), len(new.get(n, ""))) <= 24 else n
            for n in names]
    return " and ".join(said)
