"""What Inductor compiled of a graph, found again in another process by what the graph does: nothing is traced or lowered there.

Inductor keeps the code that it generates in its own cache. What is kept here, in JSON, is which file of that cache a graph
became, its SHA-256, what the tensors are that the code holds, and of which inputs it assumes that they are aligned. That file is
code, as everything in Inductor's cache is, and is loaded as Inductor itself loads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
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
from .calls import inputs_changed, shares, tensors_of
from .errors import GraphError
from .files import Unusable, cache_folder, make_private, read_json, write_json
from .fx import described, finish, generated, let_go
from .recipe import versions
from .store import device_key

log = logging.getLogger("sdtrt_backend")
SCHEMA = 1
PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
ALIGNED = 16  # bytes, where a GPU's vector loads begin
SMALL = 2**20  # values that are sooner copied than compiled anew: modulations, tables of a rotary embedding
HERE = Path(__file__)
Call = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]  # it empties the list


def inductor(gm: fx.GraphModule, example: Sequence[torch.Tensor], *sources: Path,
             how: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext) -> Callable[..., Sequence[Any]]:
    """``gm`` (changed in place) through Inductor for the shapes of ``example``, or as it was compiled of such a graph before.

    how: a context to compile in; sources: files that have a say in it."""
    constants = as_inputs(gm)
    inputs = [*example, *constants]
    name = key(gm, inputs, {}, *sources)
    found = None if name is None else find(name)
    if found is not None:
        call = load(found, {})
    else:
        with how():
            call = compiled(gm, inputs)
        if name is not None:
            keep(name, call, {}, {})
    return lambda *tensors: call([*tensors, *constants])


def as_inputs(gm: fx.GraphModule) -> list[torch.Tensor]:
    """The graph's constants become its last inputs, each tensor once, so that its code depends on no weight. Returns them. What a
    graph on a GPU holds on the CPU, and what is more than a tensor, stays where it is."""
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1:]
    tensors: list[torch.Tensor] = []
    placed: dict[int, fx.Node] = {}
    found = ((node, getattr(gm, str(node.target))) for node in gm.graph.find_nodes(op="get_attr"))
    held = [(node, tensor) for node, tensor in found if isinstance(tensor, torch.Tensor)]  # not the graphs in the graph
    on_a_gpu = any(tensor.is_cuda for _, tensor in held)
    for node, tensor in held:
        if type(tensor) not in PLAIN or (on_a_gpu and not tensor.is_cuda):
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
    no result lies in one, and nothing is held; small results that would are copies. settings: of ``torch._inductor.config``."""
    for result in _results_in_inputs(gm.graph):
        if (tensor := tensors_of(result)) and tensor[0].numel() <= SMALL:
            _copied(gm.graph, result)
    holds = next(itertools.chain(gm.parameters(), gm.buffers()), None) is not None  # which torch hands to the code itself
    plain = not (inputs_changed(gm.graph) or _results_in_inputs(gm.graph) or holds)
    aligned = aligned_of(inputs)
    whole, modules = generated(gm, inputs, settings)
    code = [m for m in modules if hasattr(m, "call")]  # the others are kernels
    if plain and len(code) == 1:
        return called(code[0], aligned)

    def through_torch(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        return whole(*tensors)

    weakref.finalize(through_torch, let_go, modules).atexit = False
    return through_torch


def _results_in_inputs(graph: fx.Graph) -> list[fx.Node]:
    """The results that may be an input or share its memory."""
    def lies(result: fx.Node) -> bool:
        waiting, seen = [result], set[fx.Node]()
        while waiting:
            node = waiting.pop()
            if node.op == "placeholder":
                return True
            if node not in seen:
                seen.add(node)
                waiting += shares(node)
        return False

    return list(filter(lies, graph.output_node().all_input_nodes))


def _copied(graph: fx.Graph, result: fx.Node) -> None:
    output = graph.output_node()
    with graph.inserting_before(output):
        output.replace_input_with(result, graph.call_method("clone", (result,)))


def aligned_of(inputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Places of those that code for a GPU takes to begin where vector loads do, because they begin there in their memory."""
    return tuple(i for i, t in enumerate(inputs) if t.is_cuda and not t.storage_offset() * t.element_size() % ALIGNED)


def key(gm: fx.GraphModule, inputs: Sequence[torch.Tensor], settings: Mapping[str, Any], *sources: Path) -> str | None:
    """The name of what ``gm``, which holds no tensors, becomes on inputs of these shapes, strides and dtypes, under this autocast
    and the user's settings of Inductor; None where some call of it has no lasting text. sources: files that have a say in it."""
    from torch._inductor import config

    names = {n: f"v{i}" for i, n in enumerate(gm.graph.nodes)}
    try:
        lines = identity.printed(gm.graph, names.__getitem__)
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
