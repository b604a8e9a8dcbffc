"""All that this package keeps on disk: JSON and safetensors, replaced whole, checked when they are read, one writer at a time.

A thing of two files is written so that it can be read after a stop at any point: its tensors have a name of their own, which
holds their SHA-256, the JSON, written last, says which tensors belong to it, and only then the ones before are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import platformdirs
import torch

SHA256 = re.compile(r"[0-9a-f]{64}")


class Unusable(Exception):
    """Why a file is not used. For callers who go on without it; the others pass an error of ``errors``."""


def cache_folder() -> Path:
    """SDTRT_CACHE, or sdtrt_backend in the user's cache directory; made with mode 0700."""
    named = os.environ.get("SDTRT_CACHE")
    return make_private(Path(named) if named else platformdirs.user_cache_path("sdtrt_backend", appauthor=False))


def make_private(folder: Path) -> Path:
    """``folder``, made where it is missing, for its owner only (0700), and so are the folders above it that were missing."""
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    for above in reversed(missing):  # Path.mkdir gives the mode to the last one alone
        above.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)  # raises where it is a file
    return folder


def digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one, never half of it, also after a power cut."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}")  # not of mkstemp, whose files only their owner may read
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_names(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_names(folder: Path) -> None:
    """The new name of a file is on the disk as well. Windows, and some file systems, cannot be asked for it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked(lock: Path, wait: bool = True) -> Iterator[bool]:
    """Whoever else asks for ``lock`` waits until the context closes. The file is removed then.

    Gives False where no lock can be had: the disk is full or read-only, or, with ``wait`` False, somebody holds it."""
    from filelock import FileLock

    held = FileLock(lock)
    with contextlib.suppress(OSError):  # its Timeout is one
        held.acquire(timeout=-1 if wait else 0)
    try:
        yield held.is_locked
    finally:
        if held.is_locked:
            # before the release: filelock asks again when the file that it has locked has no name any more
            with contextlib.suppress(OSError):
                lock.unlink()
            held.release()


def lock_of(path: Path) -> Path:
    """The lock of a file or folder, in the user's cache directory, so that none is left in folders that are given away."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    return cache_folder() / f"{name}.lock"


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """``locked`` by the path's own lock, False where the cache directory cannot be written either."""
    lock = None
    with contextlib.suppress(OSError):
        lock = lock_of(path)
    with contextlib.nullcontext(False) if lock is None else locked(lock) as mine:
        yield mine


def packed(schema: int, body: Mapping[str, Any], sort_keys: bool = True) -> bytes:
    """The JSON file of ``body``: with the schema's number and a checksum. Raises TypeError for what is no JSON."""
    plain = json.loads(json.dumps({"schema": schema, **body}))  # as a reader sees it: tuples are lists
    plain["sha256"] = digest(plain)
    return (json.dumps(plain, indent=1, sort_keys=sort_keys) + "\n").encode()


def write_json(path: Path, schema: int, body: Mapping[str, Any]) -> None:
    """Write what ``read_json`` reads."""
    write_atomically(path, packed(schema, body))


def read_json(path: Path, schema: int, unusable: Callable[[str], Exception] = Unusable,
              newer: Callable[[int], Exception] | None = None) -> dict[str, Any]:
    """The body that ``write_json`` wrote, with its "schema", which is at most ``schema``.

    unusable: why -> the error to raise for a file that is missing, truncated, edited or of another form; newer: the schema found
    -> the error for that."""
    name = path.name
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise unusable(f"{name} is missing") from None
    except NotADirectoryError:
        raise unusable("expected a folder, this is a file") from None
    except OSError as error:
        raise unusable(f"{name} cannot be read ({error})") from None
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise unusable(f"{name} is truncated or not JSON") from None
    found = body.get("schema") if isinstance(body, dict) else None
    if type(found) is not int:
        raise unusable(f"{name} has no schema number")
    if found > schema:
        raise newer(found) if newer else unusable(f"{name} has schema {found}, this version reads up to {schema}")
    if body.pop("sha256", None) != digest(body):
        raise unusable(f"{name} was edited or damaged (its checksum does not match)")
    return dict(body)


@dataclass(frozen=True)
class Format:
    """A kind of folder: ``<stem>.json``, and beside it ``<stem>-<SHA-256>.safetensors``.

    schema: of what is written; unusable: (folder, why) -> the error to raise; newer: (folder, schema found) -> the error for
    that; old_tensors, old_name: pattern of the names that the tensors had in schema 1, and body -> their name; sort_keys: False
    where the order of keys says something.
    """

    stem: str
    schema: int
    unusable: Callable[[Path, str], Exception]
    newer: Callable[[Path, int], Exception]
    old_tensors: str
    old_name: Callable[[Mapping[str, Any]], str]
    sort_keys: bool = True

    @property
    def json_name(self) -> str:
        return f"{self.stem}.json"

    def files(self, body: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, str, bytes]:
        """What ``save`` writes: the JSON, the name of the tensors' file, and its bytes."""
        from safetensors.torch import save

        blob = save({name: t.contiguous() for name, t in tensors.items()})
        sha = hashlib.sha256(blob).hexdigest()
        return packed(self.schema, {**body, "tensors_sha256": sha}, self.sort_keys), f"{self.stem}-{sha}.safetensors", blob

    def save(self, folder: Path, body: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace what the folder holds. Stopped anywhere, what was there before or the new one can be loaded.

        Others of this user who save here meanwhile wait. Where no lock can be had nothing is removed, so that nobody loses the
        tensors that a JSON names."""
        text, name, blob = self.files(body, tensors)
        with alone(folder) as removing:
            write_atomically(folder / name, blob)
            write_atomically(folder / self.json_name, text)
            for path in folder.iterdir() if removing else ():
                if path.name != name and self._is_ours(path.name):
                    path.unlink(missing_ok=True)

    def _is_ours(self, name: str) -> bool:
        """Tensors of a save, or what a killed one left half written."""
        tensors = rf"{self.stem}-[0-9a-f]{{64}}\.safetensors"
        half = rf"\.({self.stem}\.json|{tensors})\.[0-9a-f]{{32}}"
        return re.fullmatch(rf"{tensors}|{half}|{self.old_tensors}", name) is not None

    def load(self, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(body, tensors) that ``save`` wrote, complete and unchanged, else the error that ``unusable`` or ``newer`` makes."""
        body, path = self._body(folder)
        try:
            blob = path.read_bytes()
        except FileNotFoundError:  # a save took place between the two files: once more, while nobody saves
            with alone(folder):
                body, path = self._body(folder)
                blob = self._blob(folder, path)
        except OSError:
            blob = self._blob(folder, path)
        return body, self._tensors(folder, path.name, body, blob)

    def _blob(self, folder: Path, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise self.unusable(folder, f"{path.name} is missing") from None
        except OSError as error:
            raise self.unusable(folder, f"{path.name} cannot be read ({error})") from None

    def _body(self, folder: Path) -> tuple[dict[str, Any], Path]:
        body = read_json(folder / self.json_name, self.schema, lambda why: self.unusable(folder, why),
                         lambda found: self.newer(folder, found))
        with self.shaped(folder):
            sha = body["tensors_sha256"]
            if not SHA256.fullmatch(sha):
                raise ValueError(sha)
            name = self.old_name(body) if body["schema"] == 1 else f"{self.stem}-{sha}.safetensors"
        return body, folder / Path(name).name

    def _tensors(self, folder: Path, name: str, body: Mapping[str, Any], blob: bytes) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        if hashlib.sha256(blob).hexdigest() != body["tensors_sha256"]:
            raise self.unusable(folder, f"{name} is truncated, edited or of another {self.stem}")
        try:
            return load(blob)
        except (SafetensorError, ValueError) as error:
            raise self.unusable(folder, f"{name} holds no tensors that can be read ({error})") from None

    @contextlib.contextmanager
    def shaped(self, folder: Path) -> Iterator[None]:
        """What is read from a body inside has the form that the schema says, or it is the error for an unusable file."""
        try:
            yield
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise self.unusable(folder, f"{self.json_name} has not the form of its schema ({type(error).__name__}: {error})"
                                ) from None
