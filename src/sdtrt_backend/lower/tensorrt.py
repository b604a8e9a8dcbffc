"""Q/DQ graph -> TensorRT engines for the parts that TensorRT takes, Inductor for the others.

An engine is built from the part's ONNX file (the one that ``sdtrt export`` writes), kept in the engine cache, and trusted
only after it ran on a real input and gave what the part's Q/DQ graph gives in plain torch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import operator
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .. import engine
from ..enginecache import EngineCache
from ..errors import ExportError
from ..fx import propagate
from ..identity import printed, tensor_text
from ..measure import compare
from ..options import Options
from ..partition import CODING, ENGINE, REST, Part, Parts, halve, join, partition
from ..store import device_key
from . import inductor_cuda, onnx
from .lowered import Lowered

log = logging.getLogger("sdtrt_backend")
# relative error of an engine's output to the part's graph in plain torch: a cosine of 0.999. Rounding ties that fall to the
# other side add up over the layers of a part
TRUST = 0.045
# How often a part is halved at most, and how many engines one step tries beyond one per part: each takes seconds to build
HALVINGS, RETRIES = 3, 24


def lower(gm: fx.GraphModule, example: Sequence[torch.Tensor], options: Options) -> Lowered:
    """Compile ``gm`` for the shapes of ``example``, whose values each engine is tried on."""
    flavour = engine.installed()
    if flavour is None:
        raise ExportError.not_installed("engine='tensorrt'", "'sdtrt_backend[engine]'")
    propagate(gm, example)
    cache = EngineCache(None if options.engine_dir is None else Path(options.engine_dir))
    values = {n.name: t.contiguous() for n, t in zip(gm.graph.find_nodes(op="placeholder"), example, strict=True)}
    placed, notes = _place(partition(gm), values, lambda part, inputs, expected: _trusted(part, inputs, expected, flavour,
                                                                                          options.precision, cache))
    steps: list[tuple[Callable[..., Any], Sequence[str], Sequence[str]]] = []
    for for_engines, group in groupby(placed, lambda member: member[1] is not None):
        members = list(group)
        if for_engines:
            steps += [(run, part.inputs, part.outputs) for part, run in members if run is not None]
            continue
        part = join(gm, [part for part, _ in members])
        step = inductor_cuda.lower(part.graph, [values[name] for name in part.inputs], options).step
        steps.append((step, part.inputs, part.outputs))
    engines = {name: REST if run is None else ENGINE for part, run in placed for name in part.layers}
    return Lowered(Parts(gm, steps), (), engines, notes)


def _place(parts: Sequence[Part], values: dict[str, torch.Tensor],
           attempt: Callable[[Part, Sequence[torch.Tensor], Sequence[torch.Tensor]], tuple[Callable[..., Any] | None, str]],
           ) -> tuple[list[tuple[Part, Callable[..., Any] | None]], list[str]]:
    """([part, its engine or None], sentences), in the order they run. A part without a trusted engine is tried in halves, so
    that as little as possible is left to Inductor.

    values: name -> tensor of the whole graph's inputs; what crosses a border is added. attempt: see ``_trusted``; after an
    UnsupportedGPU there is no other.
    """
    placed, notes, retries, hopeless = [], [], RETRIES, ""

    def note(sentence: str) -> None:
        notes.append(sentence)
        log.info("%s", sentence)  # a build of many parts takes minutes

    left = [(str(i), part, HALVINGS) for i, part in enumerate(parts, 1)]
    while left:
        number, part, halvings = left.pop(0)
        inputs = [values[name] for name in part.inputs]
        with torch.no_grad():
            expected = part.graph(*inputs)
        values.update((name, t.contiguous()) for name, t in zip(part.outputs, expected, strict=True))
        run, said = None, part.reason
        if part.target == ENGINE and hopeless:
            said = hopeless
        elif part.target == ENGINE:
            try:
                run, said = attempt(part, inputs, expected)
            except engine.UnsupportedGPU as failure:
                said = hopeless = _first_line(failure)
        what = f"part {number} of {len(parts)}, {len(part.layers)} layers,"
        again = part.target == ENGINE and run is None and not hopeless and halvings and retries > 1
        halves = halve(part) if again else None
        if halves is not None:
            torch.cuda.empty_cache()  # memory may be what was missing, and TensorRT allocates beside torch
            retries -= 2
            left[:0] = [(f"{number}.{i}", half, halvings - 1) for i, half in enumerate(halves, 1)]
            note(f"{what} is tried in halves of {' and '.join(str(len(h.layers)) for h in halves)}: {said}")
            continue
        placed.append((part, run))
        note(f"{what} runs through {REST if run is None else ENGINE}: {said}")
    return placed, notes


def _trusted(part: Part, inputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], flavour: str, precision: str,
             cache: EngineCache) -> tuple[Callable[..., Any] | None, str]:
    """(the part as an engine, where it came from), or (None, why it is not trusted)."""
    try:
        blob, said = cache.get(key(part, inputs, flavour), lambda: _build(part, inputs, flavour, precision))
        run = engine.Runner(flavour, blob, *_names(part))
        error = compare(run(*inputs), expected)
    except engine.UnsupportedGPU:
        raise
    except Exception as failure:  # whatever a builder, a parser or a driver raises: this part has another way to run
        log.debug("no engine", exc_info=True)
        return None, _first_line(failure)
    if not error < TRUST:
        return None, f"the engine's output differs from the reference by {error:.3f}, {TRUST} is allowed"
    return run, f"{said}; relative error to the reference {error:.4f}"


def _first_line(failure: Exception) -> str:
    return f"no engine: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}"


def _names(part: Part) -> tuple[list[str], list[str]]:
    return [f"in_{i}" for i in range(len(part.inputs))], [f"out_{i}" for i in range(len(part.outputs))]


def _build(part: Part, inputs: Sequence[torch.Tensor], flavour: str, precision: str) -> bytes:
    names, outputs = _names(part)
    named = dict(zip(names, inputs, strict=True))
    ranges = {name: (tuple(t.shape),) * 3 for name, t in named.items()}
    with tempfile.TemporaryDirectory() as folder:
        files = onnx.write(_renamed(part.graph, names), named, outputs, Path(folder))
        return engine.build(flavour, precision, files[0], ranges, None)[0]


def _renamed(gm: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """A copy whose placeholders have these names."""
    graph = fx.Graph()
    result = graph.graph_copy(gm.graph, {})
    graph.output(result)
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        node.name = node.target = name
    return fx.GraphModule(gm, graph)


def key(part: Part, inputs: Sequence[torch.Tensor], flavour: str) -> dict[str, str]:
    """Everything the engine depends on: see ``EngineCache``. The same in every process, for the same part.

    part: its calls with all arguments but the scales; scales: numbers of the calls that go to codes and back; weights: what its
    constants hold, in the order they are read."""
    here = device_key(inputs[0].device)
    nodes = list(part.graph.graph.nodes)
    held = list(dict.fromkeys(str(n.target) for n in nodes if n.op == "get_attr"))
    place = {n: f"c{held.index(str(n.target))}" if n.op == "get_attr" else f"v{i}" for i, n in enumerate(nodes)}
    scales: list[str] = []

    def without_scales(node: fx.Node) -> tuple[Any, Any]:
        """Arguments of a call that goes to codes or back have no numbers: they are kept for themselves."""
        def taken(a: Any) -> Any:
            if type(a) not in (int, float):
                return a
            scales.append(f"{place[node]} {a!r}")
            return ...

        return fx.node.map_aggregate((node.args, node.kwargs), taken) if node.target in CODING else (node.args, node.kwargs)

    calls = printed(part.graph.graph, place.__getitem__, without_scales)
    constants = (operator.attrgetter(name)(part.graph) for name in held)
    weights = [tensor_text(t) for t in constants if isinstance(t, torch.Tensor)]  # a graph is printed where it is read
    return {"part": _sha256([*part.layers, *calls]), "scales": _sha256(scales), "weights": _sha256(weights),
            "builder": _builder(), "flavour": flavour, "version": engine.version(flavour), "torch": here["torch"],
            "cuda": here["cuda"], "driver": here["driver"], "gpu": here["gpu"], "sm": here["capability"],
            "shapes": " ".join(f"{'x'.join(map(str, t.shape))} {str(t.dtype)[6:]}" for t in inputs)}


@cache
def _builder() -> str:
    """Hash of the source that writes a part as ONNX and builds it: an engine of an older one is not what this one builds."""
    return _sha256([inspect.getsource(module) for module in (engine, onnx)])


def _sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()
