"""``sdtrt export``: a pipeline's denoiser in 8 bits as an ONNX file, or as a TensorRT engine. The stages, one line each."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import engine
from .calibrate import uncompiled
from .capture import bind, trace
from .errors import ExportError, ModelError, SdtrtError
from .lower import onnx
from .parts import denoiser_name
from .pictures import asked
from .quantize import for_engine, insert, plan
from .recipe import Recipe, fingerprint, write_atomically
from .rotate import rotate_heads
from .rules import ENGINE_MIN_SM, LEVELS, MODULES
from .timesteps import TIMESTEP_NAMES
from .values import Decision

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OUTPUT = "out_sample"  # "sample" is an input of most denoisers


@dataclass(frozen=True)
class Size:
    """What one call of the pipeline draws: prompts at once, and pixels (None: the pipeline's own)."""

    batch: int = 1
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Exported:
    """An ONNX file and what is in it. files: the model, then its external data; ranges: input -> (least, usual, largest) shape;
    decisions: one per layer; flavour: the TensorRT the file was made for; recipe: the hash of the model it was calibrated on."""

    files: tuple[Path, ...]
    precision: str
    dtype: str
    flavour: str
    ranges: engine.Ranges
    decisions: tuple[Decision, ...]
    recipe: str

    @property
    def command(self) -> str:
        """The line that builds an engine from the file by hand."""
        return engine.command_line(self.flavour, self.files[0], self.files[0].with_suffix(".engine"), self.ranges)

    def kept(self) -> dict[str, int]:
        """Reason -> how many layers stay in 16 bits for it."""
        return dict(Counter(d.reason for d in self.decisions if not d.quantized))

    def __str__(self) -> str:
        layers = Counter(d.layer.op for d in self.decisions if d.quantized)
        lines = [f"{self.files[0]}: {sum(f.stat().st_size for f in self.files) / 1e6:.1f} MB, {self.precision}: "
                 + ", ".join(f"{n} {op}" for op, n in sorted(layers.items())) + f"; the rest {self.dtype}"]
        lines += [f"  kept in {self.dtype}: {n} x {reason}" for reason, n in self.kept().items()]
        lines += [f"  input {name}: " + (shape(usual) if least == most else f"{shape(least)} to {shape(most)}")
                  for name, (least, usual, most) in self.ranges.items()]
        return "\n".join([*lines, self.command])


@dataclass(frozen=True)
class Engine:
    """A built engine. layers: as TensorRT lists them, empty where it lists none."""

    path: Path
    manifest: Mapping[str, Any]
    layers: tuple[engine.EngineLayer, ...]

    def __str__(self) -> str:
        m = self.manifest
        where = "this machine's GPU" if m["sm"] is None else f"SM{m['sm']}"
        counts = "; ".join(f"{kind}: " + ", ".join(f"{n} {dtype}" for dtype, n in types.items())
                           for kind, types in m["layers"].items() if kind in ("gemm", "correlation"))
        return f"{self.path}: {self.path.stat().st_size / 1e6:.1f} MB for {where}, {m['flavour']} {m['version']}; {counts}"


def shape(sizes: Sequence[int]) -> str:
    """2x4x32x32, or scalar."""
    return "x".join(map(str, sizes)) or "scalar"


def export_onnx(pipe: Any, recipe: Recipe | str | os.PathLike[str], folder: str | os.PathLike[str], *, precision: str = "int8",
                dtype: str | None = None, flavour: str | None = None, size: Size | None = None, largest: Size | None = None,
                exclude: tuple[str, ...] = (), level: float = LEVELS[-1], **pipe_kwargs: Any) -> Exported:
    """Write the pipeline's denoiser as Q/DQ ONNX into ``folder``: ``model.onnx``, beyond 2 GB with ``model.onnx.data``.

    pipe: a diffusers pipeline; it draws one step per size, which shows the shapes, and is left as it was.
    recipe: of this model, or its folder; precision: "int8" or "fp8"; dtype: of the rest: "float16", "bfloat16", "float32", or
    None for the pipeline's own. float16 is what GPUs are fastest in, bfloat16 for models that overflow it (Flux), float32 to
    compare with. flavour: the TensorRT that will read the file ("tensorrt", "tensorrt_rtx"), which decides what must stay in
    16 bits; None: the installed one, or tensorrt_rtx, which refuses most. largest: dimensions that differ from those of
    ``size`` become dynamic, up to these. exclude: glob patterns of layers that stay in 16 bits; level: see ``Options``.
    pipe_kwargs: anything else the pipeline takes (image, mask_image, control_image, strength, ...), as for ``calibrate``. A
    single picture serves every batch.
    Raises CalibrationError for what the pipeline does not take, ExportError, ModelError, RecipeError.
    """
    flavour = flavour or engine.installed() or next(iter(engine.FLAVOURS))
    for what, given, valid in (("precision", precision, ENGINE_MIN_SM), ("dtype", dtype, (None, *DTYPES)),
                               ("flavour", flavour, engine.FLAVOURS)):
        if given not in valid:
            raise ExportError.unknown(what, given, valid)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    name = denoiser_name(pipe)
    with uncompiled(pipe, name) as module:
        recipe.check_model({n: fingerprint(m.get_parameter("weight")) for n, m in module.named_modules() if type(m) in MODULES})
        calls = [_call(pipe, module, s, pipe_kwargs) for s in (size or Size(), largest) if s is not None]
        module, calls = _in_dtype(module, calls, dtype)
        with _said(module, "tracing it"):
            captured, values = trace(module, calls[-1], _varying(calls))  # the largest: a size of 1 would become a constant
        decisions = tuple(for_engine(d, precision, flavour) for d in plan(captured.layers, recipe, exclude, level))
        graph, nodes = bind(captured, values)
        decisions = rotate_heads(decisions, nodes)
        graph = insert(graph, nodes, decisions)
        inputs = [_tensors(call) for call in calls]
        used = {n.name: inputs[-1][n.name] for n in graph.graph.find_nodes(op="placeholder")}
        outputs = [OUTPUT if i == 0 else f"{OUTPUT}_{i}" for i in range(len(graph.graph.output_node().all_input_nodes))]
        with _said(module, "writing it"):
            files = onnx.write(graph, used, outputs, Path(folder), _axes(inputs))
    ranges = {n: (tuple(inputs[0][n].shape), tuple(inputs[0][n].shape), tuple(inputs[-1][n].shape)) for n in used}
    return Exported(tuple(files), precision, _dtype_name(module), flavour, ranges, decisions, recipe.model_hash)


@contextlib.contextmanager
def _said(module: torch.nn.Module, step: str) -> Iterator[None]:
    """What PyTorch's exporter refuses, for any of a hundred reasons, is an ExportError that names the module. Files that
    cannot be written, and what we say ourselves, are not touched."""
    try:
        yield
    except (SdtrtError, OSError):
        raise
    except Exception as error:
        raise ExportError.no_file(module, step, error) from error


def build_engine(exported: Exported, sm: int | None = None) -> Engine:
    """Build the exported file with its TensorRT into the same folder: the engine, and a JSON manifest beside it.

    sm: compute capability to build for ahead of time (89 for 8.9), or None for the GPU of this machine.
    Raises ExportError: see ``engine.check``, and TensorRT's own refusal.
    """
    model = exported.files[0]
    blob, layers, version = engine.build(exported.flavour, exported.precision, model, exported.ranges, sm)
    path = model.with_name(f"{exported.precision}_{'local' if sm is None else f'sm{sm}'}.engine")
    manifest = {
        "flavour": exported.flavour,
        "version": version,
        "sm": sm,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "onnx_sha256": {f.name: _sha256(f) for f in exported.files},
        "recipe_model_hash": exported.recipe,
        "precision": exported.precision,
        "rest": exported.dtype,
        "quantized": dict(Counter(d.layer.op for d in exported.decisions if d.quantized)),
        "kept": exported.kept(),
        "shapes": {name: dict(zip(("min", "opt", "max"), map(shape, shapes), strict=True))
                   for name, shapes in exported.ranges.items()},
        "layers": engine.count_types(layers),
    }
    write_atomically(path, blob)
    write_atomically(path.with_suffix(".json"), (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    return Engine(path, manifest, layers)


def _call(pipe: Any, module: torch.nn.Module, size: Size, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name of the denoiser's first call when the pipeline draws this size. given: what else the pipeline takes."""
    seen: list[dict[str, Any]] = []
    signature = inspect.signature(module.forward)

    def keep(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append({**signature.bind_partial(*args, **kwargs).arguments})

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    pixels = {k: v for k, v in (("height", size.height), ("width", size.width)) if v is not None}
    try:
        with torch.no_grad():
            noise = [torch.Generator("cpu").manual_seed(i) for i in range(size.batch)]  # the user's own stays where it is
            asked(pipe, [""] * size.batch, {**given, **pixels}).draw(range(size.batch), generator=noise, output_type="latent",
                                                                     num_inference_steps=_least_steps(given))
    finally:
        handle.remove()
    if not seen:
        raise ModelError(f"{type(pipe).__name__} drew a step without calling its {type(module).__name__}: nothing to export")
    required = {n for n, p in signature.parameters.items() if p.default is p.empty}
    call = {k: v for k, v in seen[0].items() if v is not None or k in required}
    return call | {"return_dict": False} if "return_dict" in signature.parameters else call


def _least_steps(given: Mapping[str, Any]) -> int:
    """Of which one is drawn: a pipeline that starts from a picture leaves out all but this share of them, rounded down."""
    share = given.get("strength")
    return 1 if share is None or not 0 < share < 1 else int(1 / share) + 1


def _in_dtype(module: torch.nn.Module, calls: Sequence[dict[str, Any]],
              dtype: str | None) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """A copy of the module in ``dtype`` and its calls, timesteps left as they are; the module itself where it is already."""
    own = next(p.dtype for p in module.parameters() if p.is_floating_point())
    wanted = own if dtype is None else DTYPES[dtype]
    if wanted == own:
        return module, list(calls)

    def cast(path: Any, value: Any) -> Any:
        fits = isinstance(value, torch.Tensor) and value.dtype == own and path[0].key not in TIMESTEP_NAMES
        return value.to(wanted) if fits else value

    clone = copy.deepcopy(module)
    torch.nn.Module.to(clone, wanted)  # diffusers' own prints a warning about what the model should keep in fp32, also if nothing
    return clone, [pytree.tree_map_with_path(cast, call) for call in calls]


def _dtype_name(module: torch.nn.Module) -> str:
    return str(next(p.dtype for p in module.parameters() if p.is_floating_point())).removeprefix("torch.")


def _varying(calls: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The dimensions that differ between the calls, as torch.export takes them; None when none does."""
    def axes(least: Any, most: Any) -> Any:
        if not isinstance(most, torch.Tensor):
            return None
        return {i: torch.export.Dim.DYNAMIC for i, (a, b) in enumerate(zip(least.shape, most.shape, strict=True)) if a != b}

    found = pytree.tree_map(axes, calls[0], calls[-1])
    return found if pytree.tree_leaves(found) else None


def _axes(inputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, dict[int, str]] | None:
    """Input -> axis that differs -> its name in the file: batch for the first, else of input and axis."""
    axes = {name: {i: "batch" if i == 0 else f"{name}_{i}" for i, (a, b) in enumerate(zip(inputs[0][name].shape, most.shape,
                                                                                         strict=True)) if a != b}
            for name, most in inputs[-1].items()}
    return axes if any(axes.values()) else None


def _tensors(call: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a call under the names torch.export gives them: added_cond_kwargs_text_embeds."""
    leaves = pytree.tree_flatten_with_path(dict(call))[0]
    return {"_".join(str(getattr(k, "key", getattr(k, "idx", ""))) for k in path): value for path, value in leaves
            if isinstance(value, torch.Tensor)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
