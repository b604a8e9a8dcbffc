"""What Inductor compiled of a graph, found again in another process by what the graph does: nothing is traced or lowered there.

Inductor keeps the code that it generates in its own cache. What is kept here, in JSON, is which file of that cache a graph
became, its SHA-256, and what the tensors are that the code holds. That file is code, as everything in Inductor's cache is, and is
loaded as Inductor itself loads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from . import identity
from .errors import GraphError
from .files import Unusable, cache_folder, make_private, read_json, write_json
from .fx import described, let_go
from .recipe import versions
from .store import device_key

log = logging.getLogger("sdtrt_backend")
SCHEMA = 1
Call = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]  # it empties the list


def key(gm: fx.GraphModule, inputs: Sequence[torch.Tensor], settings: Mapping[str, Any], source: Path) -> str | None:
    """The name of what ``gm``, which holds no tensors, becomes on inputs of these shapes, strides and dtypes, under this autocast
    and the user's settings of Inductor; None where some call of it has no lasting text. source: the file of the lowering, which
    has a say in it."""
    from torch._inductor import config

    names = {n: f"v{i}" for i, n in enumerate(gm.graph.nodes)}
    try:
        lines = identity.printed(gm.graph, names.__getitem__)
    except GraphError as error:
        log.info("what is compiled of this graph is not kept: %s", error)
        return None
    state = (torch.is_autocast_enabled("cpu") and str(torch.get_autocast_dtype("cpu")), torch.get_float32_matmul_precision(),
             torch.are_deterministic_algorithms_enabled())
    about = {"settings": {name: repr(value) for name, value in {**config.save_config_portable(), **settings}.items()},
             "state": state, "python": sys.version,
             "versions": versions(("torch",)), "device": device_key(torch.device("cpu")),
             "source": hashlib.sha256(source.read_bytes()).hexdigest()}
    text = "\n".join([*lines, *map(described, inputs), json.dumps(about, sort_keys=True)])
    return hashlib.sha256(text.encode()).hexdigest()


def keep(name: str, call: Call, known: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Keep what ``called`` returned. known: tensors that the caller can make again, by names of its own; about: what it needs for
    that, as JSON. Nothing is kept of another callable, nor where the code holds another tensor than single numbers."""
    module = getattr(call, "module", None)
    if module is None or (path := _inside(module.__file__)) is None:
        return
    named = {id(t): word for word, t in known.items()}
    held: dict[str, Any] = {}
    for word, value in vars(module).items():
        if not isinstance(value, torch.Tensor):
            continue
        if id(value) in named:
            held[word] = named[id(value)]
        elif value.dim() == 0 and not value.is_mkldnn:
            held[word] = [str(value.dtype).removeprefix("torch."), value.item()]
        else:
            return
    body = {"file": path, "sha256 of it": _digest(Path(module.__file__)), "held": held, "about": dict(about)}
    try:
        write_json(make_private(folder()) / f"{name}.json", SCHEMA, body)
    except OSError as error:
        log.warning("a compiled step cannot be kept in %s: %s", folder(), error)


def find(name: str) -> dict[str, Any] | None:
    """What ``keep`` wrote under this name, if the file is still the same."""
    path = folder() / f"{name}.json"
    if not path.exists():
        return None
    try:
        body = read_json(path, SCHEMA)
        file = _cache() / body["file"]
        if not file.is_file():  # Inductor's cache was emptied
            return None
        if _inside(file) != body["file"] or _digest(file) != body["sha256 of it"]:
            raise Unusable(f"{file} is not what was compiled")
    except (Unusable, KeyError, TypeError) as error:
        log.warning("%s is not used: %s; compiling anew", path, error)
        return None
    return body


def load(found: Mapping[str, Any], known: Mapping[str, torch.Tensor]) -> Call:
    """The call of the code that was kept, with the tensors that it held."""
    from torch._inductor.codecache import PyCodeCache

    held = {word: known[what] if isinstance(what, str) else torch.tensor(what[1], dtype=getattr(torch, what[0]))
            for word, what in found["held"].items()}
    file = _cache() / found["file"]
    return called(PyCodeCache.load_by_key_path(file.stem, str(file), attrs=held))


def called(module: Any) -> Call:
    """The call of generated code, which lets its tensors go when nobody has the call any more. Dtypes were decided when it was
    compiled, under autocast too, and nothing is differentiated."""
    def call(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        with torch.no_grad(), torch._C._DisableAutocast():
            return module.call(tensors)  # type: ignore[no-any-return]

    call.module = module  # type: ignore[attr-defined]
    weakref.finalize(call, let_go, [module]).atexit = False
    return call


def of(inductor: Path) -> list[Path]:
    """What was kept of code in this folder, which is Inductor's cache or a copy."""
    found = []
    for path in sorted(folder().glob("*.json")):
        with contextlib.suppress(Unusable, KeyError, TypeError):  # a damaged one is of nobody's use
            if (inductor / read_json(path, SCHEMA)["file"]).is_file():
                found.append(path)
    return found


def folder() -> Path:
    """In the user's cache."""
    return cache_folder() / "programs"


def _cache() -> Path:
    """Inductor's, which depends on the environment."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()).resolve()


def _inside(file: str | Path) -> str | None:
    """The path of a file in Inductor's cache from there, None for one that is elsewhere."""
    file = Path(file).resolve()
    return file.relative_to(_cache()).as_posix() if file.is_relative_to(_cache()) else None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
