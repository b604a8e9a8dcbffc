"""One file that a new worker begins with: recipe, kernel times, and what Inductor and Triton compiled.

A zip. ``manifest.json`` says where it was made and has the SHA-256 of every other member. Recipe and kernel times are data. What
was compiled is code, and is put where Inductor and Triton look for it only if the caller trusts the file and it was made for this
machine and these versions. What cannot be used is left out with a sentence, and calibrated, measured or compiled here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch

from . import programs
from .errors import BundleError, RecipeError
from .files import Unusable, digest, make_private, packed, write_atomically
from .kernels import Unsteady, chooser
from .recipe import Recipe, versions
from .store import Store, cache_folder, device_key

log = logging.getLogger("sdtrt_backend")
SCHEMA = 1
MANIFEST, KERNELS, BUSY = "manifest.json", "kernels.json", "busy.json"
RECIPE, CODE = "recipe/", ("inductor/", "triton/", "programs/")
LIBRARIES = ("sdtrt_backend", "torch", "triton", "nvidia-cudnn-frontend")
MOST_BYTES, MOST_MEMBERS = 16 * 2**30, 200_000
NO_CODE = (".lock", ".tmp")  # what the compilers leave beside it


@dataclass(frozen=True)
class Opened:
    """recipe: folder of the recipe, None where it cannot be used. said: a sentence for each thing that was left out."""

    recipe: Path | None
    said: tuple[str, ...]


@contextlib.contextmanager
def compiling_into(folder: Path) -> Iterator[None]:
    """Inductor and Triton keep what they compile in ``folder``, for ``pack``. For a process that compiled nothing before."""
    with contextlib.ExitStack() as undone:
        for name, inside in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
            undone.callback(_put_back, name, os.environ.get(name))
            os.environ[name] = str(folder / inside)
        yield


def _put_back(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def pack(out: Path, recipe: Recipe, compiled: Path, device: torch.device, about: Mapping[str, Any]) -> int:
    """Write the bundle, whole or not at all; returns its members. compiled: the folder of ``compiling_into``; about: plain values
    that the manifest tells a reader, such as the sizes that were built."""
    with TemporaryDirectory() as work:
        recipe.save(Path(work))
        members = {f"{RECIPE}{path.name}": path.read_bytes() for path in sorted(Path(work).iterdir())}
    members[KERNELS] = json.dumps(Store(device_key(device)).values, sort_keys=True).encode()
    # what was measured on a machine too busy to tell is kept by no process for the next, but what was compiled was chosen by it
    members[BUSY] = json.dumps(chooser(device).measurements.passing, sort_keys=True).encode()
    for path in sorted(p for p in compiled.rglob("*") if p.is_file() and p.suffix not in NO_CODE):
        members[path.relative_to(compiled).as_posix()] = path.read_bytes()
    members |= {f"programs/{path.name}": path.read_bytes() for path in programs.of(compiled / "inductor")}
    body = {"made_for": made_for(device), "about": dict(about),
            "members": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}}
    partial = out.with_name(f".{out.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in {MANIFEST: packed(SCHEMA, body), **members}.items():
                file.writestr(name, data)
        os.replace(partial, out)
    except OSError as error:
        raise BundleError(f"bundle {out} cannot be written ({error}); name a file in a folder to write in") from None
    finally:
        partial.unlink(missing_ok=True)
    return len(members)


def made_for(device: torch.device) -> dict[str, str]:
    """What compiled code and times depend on: the device, its driver, the versions, the interpreter."""
    found = {f"version of {name}": version for name, version in versions(LIBRARIES).items()}
    return {**device_key(device), **found, "python": platform.python_version(), "machine": platform.machine(),
            "system": sys.platform, "environment": sys.prefix}


def unpack(path: str | os.PathLike[str], device: torch.device, trust: bool) -> Opened:
    """Put what can be used where it is looked for. Raises BundleError where there is no such file.

    A member that is not what the manifest says is not used, and of the code nothing where one of its members is not."""
    path = Path(path)
    said: list[str] = []
    recipe = None
    try:
        with zipfile.ZipFile(path) as file:
            body = _manifest(file)
            recipe = _recipe(file, body, said)
            _kernels(file, body, device, said)
            _code(file, body, device, trust, said)
    except FileNotFoundError:
        raise BundleError.missing(path) from None
    except (Unusable, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        said.append(f"it was left out, as it is truncated, edited or no bundle ({error}); make it anew with sdtrt bundle")
    sentences = tuple(f"bundle {path}: {sentence}" for sentence in said)
    for sentence in sentences:
        log.warning("%s", sentence)
    return Opened(recipe, sentences)


def _manifest(file: zipfile.ZipFile) -> dict[str, Any]:
    infos = file.infolist()
    if len(infos) > MOST_MEMBERS or sum(info.file_size for info in infos) > MOST_BYTES:
        raise Unusable(f"it has more than {MOST_MEMBERS} members or {MOST_BYTES >> 30} GiB")
    try:
        body = json.loads(file.read(MANIFEST))
        checksum = body.pop("sha256")
        if body["schema"] > SCHEMA:
            raise Unusable(f"it has schema {body['schema']}, this version reads up to {SCHEMA}")
        made, members = body["made_for"], body["members"]
        texts = all(isinstance(text, str) for of in (made, members) for pair in of.items() for text in pair)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Unusable(f"{MANIFEST} has not the form of its schema: {error!r}") from None
    if digest(body) != checksum or not texts:
        raise Unusable(f"the checksum of {MANIFEST} does not match")
    return dict(body)


def _read(file: zipfile.ZipFile, body: Mapping[str, Any], name: str) -> bytes | None:
    """A member, None where it is not what the manifest says."""
    try:
        data = file.read(name)
    except (KeyError, zipfile.BadZipFile, OSError):
        return None
    return data if hashlib.sha256(data).hexdigest() == body["members"].get(name) else None


def _recipe(file: zipfile.ZipFile, body: Mapping[str, Any], said: list[str]) -> Path | None:
    data = {name.removeprefix(RECIPE): _read(file, body, name) for name in body["members"] if name.startswith(RECIPE)}
    try:
        with TemporaryDirectory() as work:
            for name, content in data.items():
                if content is None or PurePosixPath(name).name != name:
                    raise RecipeError.unreadable(name, "it was edited or damaged")
                (Path(work) / name).write_bytes(content)
            recipe = Recipe.load(work)
        return recipe.save(cache_folder() / "recipes" / recipe.content_hash())
    except RecipeError as error:
        said.append(f"its recipe was left out ({error}); the pipeline calibrates itself")
        return None


def _kernels(file: zipfile.ZipFile, body: Mapping[str, Any], device: torch.device, said: list[str]) -> None:
    key = device_key(device)
    wrong = _differences(body["made_for"], key)
    data = _read(file, body, KERNELS)
    if data is None:
        said.append("its kernel times were left out, as they were edited or damaged; they are measured here")
    elif wrong:
        said.append(f"its kernel times were left out, as they are of {wrong}; they are measured here")
    else:
        store = Store(key)
        store.values = {**json.loads(data), **store.values}  # what was measured here is newer
        store.save()
        passing = chooser(device).measurements.passing
        for name, found in json.loads(_read(file, body, BUSY) or b"{}").items():
            passing.setdefault(name, {kernel: Unsteady(ms) if isinstance(ms, float) else ms for kernel, ms in found.items()})


def _code(file: zipfile.ZipFile, body: Mapping[str, Any], device: torch.device, trust: bool, said: list[str]) -> None:
    """All of it, or nothing: it is one program in many files."""
    names = [name for name in body["members"] if name.startswith(CODE)]
    wrong = _differences(body["made_for"], made_for(device))
    if not names:
        return
    if not trust:
        said.append("its compiled code was left out, as loading it runs what its maker wrote; with trust=True it is used, else "
                    "everything is compiled here")
    elif wrong:
        said.append(f"its compiled code was left out, as it is for {wrong}; everything is compiled here")
    elif damaged := next((name for name in names if not _inside(name) or _read(file, body, name) is None), None):
        said.append(f"its compiled code was left out, as {damaged} was edited or damaged; everything is compiled here")
    else:
        for name in names:
            _place(name, _read(file, body, name) or b"")


def _place(name: str, data: bytes) -> None:
    kind, _, inside = name.partition("/")
    for folder in _looked_for(kind):
        target = folder / inside
        if not target.exists() or (kind == "programs" and programs.find(target.stem) is None):  # what is there was made here
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(target, data)


def _looked_for(kind: str) -> tuple[Path, ...]:
    """Where Inductor and Triton keep what they compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    if kind == "inductor":
        return (Path(cache_dir()),)
    if kind == "programs":
        return (make_private(programs.folder()),)
    own = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    return tuple(dict.fromkeys((Path(triton_cache_dir(0)), Path(own))))  # of Inductor's kernels, and of ours


def _inside(name: str) -> bool:
    """Whether what follows the first part of a member's name stays in the folder that stands for it."""
    path = PurePosixPath(name.partition("/")[2])
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _differences(made: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What differs, as a sentence's end; "" where nothing does."""
    return ", ".join(f"{name} {made.get(name, 'none')} (here {here[name]})" for name in here if made.get(name) != here[name])
