"""What Inductor compiled of a graph, found again in another process by what the graph does: nothing is traced or lowered there.

Inductor keeps the code that it generates in its own cache. What is kept here, in JSON, is which file of that cache a graph
became, its SHA-256, what the tensors are that the code holds, and of which inputs it assumes that they are aligned. That file is
code, as everything in Inductor's cache is, and is loaded as Inductor itself loads it.
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
from .calls import shares
from .errors import GraphError
from .files import Unusable, cache_folder, make_private, read_json, write_json
from .fx import described, finish, generated, let_go, written
from .recipe import versions
from .store import device_key

log = logging.getLogger("sdtrt_backend")
SCHEMA = 1
ALIGNED = 16  # bytes, where a GPU's vector loads begin
HERE = Path(__file__)
Call = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]  # it empties the list


def as_inputs(gm: fx.GraphModule) -> list[torch.Tensor]:
    """The graph's constants become its last inputs, each tensor once, so that its code depends on no weight; single numbers on
    the CPU that a graph on a GPU reads stay in the code. Returns them."""
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1:]
    tensors: list[torch.Tensor] = []
    placed: dict[int, fx.Node] = {}
    held = [(node, getattr(gm, str(node.target))) for node in gm.graph.find_nodes(op="get_attr")]
    on_a_gpu = any(isinstance(tensor, torch.Tensor) and tensor.is_cuda for _, tensor in held)
    for node, tensor in held:
        if not isinstance(tensor, torch.Tensor) or (on_a_gpu and not tensor.is_cuda):  # the former: a graph in the graph
            continue
        if id(tensor) not in placed:
            with gm.graph.inserting_after(*last) if last else gm.graph.inserting_before():
                last = [gm.graph.placeholder(f"constant_{len(tensors)}")]
            placed[id(tensor)] = last[0]
            tensors.append(tensor)
        node.replace_all_uses_with(placed[id(tensor)])
        gm.graph.erase_node(node)
    for node in gm.graph.find_nodes(op="placeholder"):  # the C++ wrapper would take those of some for those of all
        node.meta.pop("val", None)
    finish(gm)
    return tensors


def compiled(gm: fx.GraphModule, inputs: Sequence[torch.Tensor], settings: Mapping[str, Any] | None = None) -> Call:
    """The code that Inductor makes of the graph, without what torch puts around it where that does nothing: no input is changed,
    no result lies in one. settings: of ``torch._inductor.config``."""
    plain = not written(gm.graph) and not _lies_in_an_input(gm.graph)
    aligned = aligned_of(inputs)
    whole, modules = generated(gm, inputs, settings)
    code = [m for m in modules if hasattr(m, "call")]  # the others are kernels
    if plain and len(code) == 1:
        return called(code[0], aligned)

    def through_torch(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        return whole(*tensors)

    weakref.finalize(through_torch, let_go, modules).atexit = False
    return through_torch


def _lies_in_an_input(graph: fx.Graph) -> bool:
    """Whether a result may be an input or share its memory."""
    waiting, seen = list(graph.output_node().all_input_nodes), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return True
        if node not in seen:
            seen.add(node)
            waiting += shares(node)
    return False


def aligned_of(inputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Places of those that code for a GPU takes to begin where vector loads do, because they begin there in their memory."""
    return tuple(i for i, t in enumerate(inputs) if t.is_cuda and not t.storage_offset() * t.element_size() % ALIGNED)


def key(gm: fx.GraphModule, inputs: Sequence[torch.Tensor], settings: Mapping[str, Any], *sources: Path) -> str | None:
    """The name of what ``gm`` after ``as_inputs`` becomes on inputs of these shapes, strides and dtypes, under this autocast and
    the user's settings of Inductor; None where some call of it has no lasting text. sources: files that have a say in it."""
    from torch._inductor import config

    names = {n: f"v{i}" for i, n in enumerate(gm.graph.nodes)}
    try:
        lines = identity.printed(gm.graph, names.__getitem__)
        lines += [identity.tensor_text(t) for node in gm.graph.find_nodes(op="get_attr")
                  if isinstance(t := getattr(gm, str(node.target)), torch.Tensor)]
    except GraphError as error:
        log.info("what is compiled of this graph is not kept: %s", error)
        return None
    device = next((t.device for t in inputs if t.is_cuda), torch.device("cpu"))
    state = (torch.is_autocast_enabled(device.type) and str(torch.get_autocast_dtype(device.type)),
             torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())
    about = {"settings": {name: repr(value) for name, value in {**config.save_config_portable(), **settings}.items()},
             "state": state, "python": sys.version, "aligned": aligned_of(inputs),
             "versions": versions(("torch", "triton")), "device": device_key(device), "index": device.index,
             "sources": [_digest(source) for source in (HERE, *sources)]}
    text = "\n".join([*lines, *map(described, inputs), json.dumps(about, sort_keys=True)])
    return hashlib.sha256(text.encode()).hexdigest()


def keep(name: str, call: Call, known: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Keep what ``compiled`` returned. known: tensors that the caller can make again, by names of its own; about: what it needs
    for that, as JSON. Nothing is kept of another callable, nor where the code holds another tensor than single numbers."""
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
    body = {"file": path, "sha256 of it": _digest(Path(module.__file__)), "held": held, "about": dict(about),
            "aligned": list(call.aligned)}  # type: ignore[attr-defined]
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
    return called(PyCodeCache.load_by_key_path(file.stem, str(file), attrs=held), found["aligned"])


def called(module: Any, aligned: Sequence[int]) -> Call:
    """The call of generated code, which lets its tensors go when nobody has the call any more. Dtypes were decided when it was
    compiled, under autocast too, and nothing is differentiated."""
    from torch._inductor.utils import clone_preserve_strides

    def call(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        with torch.no_grad(), torch._C._DisableAutocast():
            for i in aligned:
                if tensors[i].data_ptr() % ALIGNED:
                    tensors[i] = clone_preserve_strides(tensors[i])
            return module.call(tensors)  # type: ignore[no-any-return]

    call.module, call.aligned = module, aligned  # type: ignore[attr-defined]
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
