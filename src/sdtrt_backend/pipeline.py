"""Patch one pipeline instance and undo it to the bit; load the bundled model; explain what became of a module."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import weakref
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from . import names, weights
from .adapters import forget_adapters
from .backend import check_made_for
from .bundle import unpack
from .errors import ModelError, OptionError
from .fx import start_probing
from .options import Options
from .parts import EVERY_TIMESTEP, chosen, defaults, denoisers, every_timestep, everything
from .recipe import Recipe
from .report import of_parts
from .rules import layers_of
from .state import forget, report, states
from .step import fingerprints
from .store import cache_folder
from .values import Report

log = logging.getLogger("sdtrt_backend")
# accelerated module -> what the user had compiled it with
_WATCHED: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
RECOMPILATIONS = 64  # sizes, dtypes and modes of one module that Dynamo compiles before it gives up; its own limit is 8
BACKENDS = ("sd_int8", "sd_fp8")
CALLED_ONCE = ("adapter",)  # T2I adapters, alone and several
ASSETS = Path(__file__).parent / "assets"


def accelerate(pipe: Any, *, recipe: Recipe | str | os.PathLike[str] | None = None, backend: str = "sd_int8",
               bundle: str | os.PathLike[str] | None = None, trust: bool = False, parts: str | Iterable[str] = EVERY_TIMESTEP,
               **options: Any) -> Any:
    """Compile in place what the pipeline calls at every timestep, its denoisers and ControlNets, with ``backend``, "sd_int8" or
    "sd_fp8", and return the pipeline.

    parts: "denoisers" are those; "auto": the decoder and encoder of its VAE and its text encoders as well; or a list of paths
    ("unet", "vae.decoder", "text_encoder", ...). What has no timestep calibrates over whole calls, and its first 8-bit output is
    held to a bound of its own unless ``options`` have it: a decoder's to 45 dB (``output_psnr``), an encoder's to a ``max_error``
    of 0.02, a text encoder's to 0.005.

    recipe: a Recipe, which is also saved in the user's cache directory, or the folder of a saved one; without one, and of what it
    has no part for, the pipeline calibrates itself during its next pictures.
    bundle: what ``sdtrt bundle`` wrote, in place of a recipe: that, kernel times and, with ``trust``, compiled code. What of it
    does not fit this machine is left out, with a warning that says so. trust: compiled code is run as its maker wrote it, and
    where it comes from is the caller's to know.
    options: any of ``Options`` (``calibration_runs``, ``rule``, ``alpha``, ``max_error``, ``exclude``, ...). On a GPU
    ``weights`` is "release" unless given: the 16-bit weights of quantised layers wait on the CPU.
    Only this instance changes: the module object stays the same, and ``restore(pipe)`` undoes it to the bit.
    Raises OptionError, ModelError, and RecipeError for a recipe that is damaged or of another model; nothing has changed then.
    """
    from torch._dynamo.backends.registry import lookup_backend

    # whatever can be refused is refused here, not at the first step
    if backend not in BACKENDS:
        raise OptionError.no_backend(backend, BACKENDS)
    parsed = Options.parse(options)
    if bundle is not None:
        if recipe is not None:
            raise OptionError("accelerate expects a recipe or a bundle, which holds one: leave one of them out")
        recipe = unpack(bundle, _device(pipe), trust).recipe
    elif trust:
        raise OptionError("trust is for the compiled code of a bundle, and there is none: leave it out")
    loaded = recipe if recipe is None or isinstance(recipe, Recipe) else Recipe.load(recipe)
    check_made_for(parsed, loaded)
    modules = chosen(pipe, parts)
    for module in modules.values():
        why = names.in_pieces(module)
        if why is not None:
            raise ModelError.in_pieces(module, why)
        if any(p.is_meta for p in module.parameters()):
            raise ModelError.on_meta(type(module).__name__)
    given = {name: {**defaults(name), **options} for name in modules}
    if recipe is not None and loaded is not None:
        first = next(iter(modules_of(pipe)))
        covered = [name for name in modules if name == first or name in loaded.parts]
        for name in covered:
            with weights.borrowed(modules[name].parameters()):
                found = fingerprints(modules[name])
            (loaded.fitting(found) if name == first else loaded.parts[name]).check_model(found)
        folder = os.fspath(_kept(recipe) if isinstance(recipe, Recipe) else recipe)
        given |= {name: {**given[name], "recipe": folder} for name in covered}
        if _device(pipe).type == "cpu":  # the first call builds
            start_probing()
    named = [n for module in modules.values() for n, m in module.named_modules()
             if any(True for _ in m.parameters(recurse=False))]
    for pattern in parsed.exclude:
        if not any(fnmatchcase(names.layer_name(n), pattern) for n in named):
            kinds = ", ".join(type(m).__name__ for m in modules.values())
            log.warning("exclude: %r matches no layer of %s, whose paths are like %s", pattern, kinds, named[-3:])
    compiler: Any = lookup_backend(backend)
    for name, module in modules.items():
        names.named(module)
        _restore(module)
        # a new callable each time: Dynamo takes equal backends for the same one and would go on with a restored step
        _compile(module, partial(compiler, options=given[name]))
    return pipe


def _device(pipe: Any) -> torch.device:
    """Of the denoiser; of one that is offloaded, the GPU that it comes to."""
    first = next((p.device for module in modules_of(pipe).values() for p in module.parameters()), torch.device("cpu"))
    return torch.device(getattr(pipe, "_execution_device", first)) if first.type in ("cpu", "meta") else first


def _compile(module: torch.nn.Module, backend: Any) -> None:
    known, own = inspect.signature(torch.compile).parameters, module._compiled_call_impl
    # where this PyTorch can: other modules of the class, and pipelines before this one, do not use up this one's recompilations
    limits = {"isolate_recompiles": True, "recompile_limit": RECOMPILATIONS}
    module.compile(backend=backend, **{k: v for k, v in limits.items() if k in known})
    floats = {n for n, p in names.call_signature(module).parameters.items() if p.annotation is float}
    if floats:
        module._compiled_call_impl = partial(_with_tensors, module._compiled_call_impl, floats)
    _watch(module, own)


def _with_tensors(compiled: Any, floats: set[str], *args: Any, **kwargs: Any) -> Any:
    """What takes a Python float, as a ControlNet its strength, gets a tensor: Dynamo makes the first value of a float a part of
    the graph, and the next one would be a graph and a build of its own. In fp64, as Dynamo passes a float that changes."""
    return compiled(*args, **{n: torch.tensor(v, dtype=torch.float64) if n in floats and type(v) in (float, int) else v
                              for n, v in kwargs.items()})


def _kept(recipe: Recipe) -> Path:
    """Its folder in the cache, named by its contents: a step knows its recipe by the path, and equal recipes have one step."""
    return recipe.save(cache_folder() / "recipes" / recipe.content_hash())


def restore(pipe: Any) -> Any:
    """Undo ``accelerate``: the denoiser runs its own forward again, with its weights to the bit, and so does what else was
    accelerated; LoRAs of ``load_lora`` are forgotten. Returns the pipeline. Waits for a build in another thread."""
    for module in everything(pipe).values():
        forget(module)
        forget_adapters(module)
        _restore(module)
    return pipe


def _restore(module: torch.nn.Module) -> None:
    if module in _WATCHED:
        forget(module)
        module._compiled_call_impl = _WATCHED.pop(module)
        del module._apply


def _watch(module: torch.nn.Module, own: Any) -> None:
    """Where this instance is moved to, what was built for it follows."""
    module._apply = MethodType(_apply, module)  # type: ignore[method-assign]  # a copy of the module gets its own
    _WATCHED[module] = own


# a function of the file and not of a call: a module that is pickled takes the name along

def _apply(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    before = next((p.device for p in self.parameters()), None)
    moved = type(self)._apply(self, weights.moving(fn), *args, **kwargs)
    if next((p.device for p in self.parameters()), None) != before:
        for state in states(self):
            state.sleep()
    return moved


@contextlib.contextmanager
def accelerated(pipe: Any, **options: Any) -> Iterator[Any]:
    """``with accelerated(pipe):`` accelerates, and restores however the block ends."""
    accelerate(pipe, **options)
    try:
        yield pipe
    finally:
        restore(pipe)


def explain(module_or_pipe: Any) -> Report:
    """The report of a compiled module or pipeline: a value with a readable ``str``. Of a pipeline with several parts that are
    compiled it is one of them all; what is not of its denoiser has the name of its part before it.

    Raises ModelError when ``sd_int8`` has not seen it yet.
    """
    found = {name: of for name, module in everything(module_or_pipe).items() if (of := report(module)) is not None}
    if not found:
        raise ModelError.not_compiled(module_or_pipe)
    whole = of_parts(found, next(iter(modules_of(module_or_pipe))), every_timestep)
    notes = (*whole.notes, *_called_once(module_or_pipe), *_without_report(module_or_pipe, found))
    return replace(whole, notes=notes, peak=_peak(everything(module_or_pipe).values()))


def _peak(modules: Iterable[torch.nn.Module]) -> int:
    """Of the GPU that one of them is on."""
    devices = [state.memory.device for module in modules for state in states(module) if state.memory.device is not None]
    return max(map(torch.cuda.max_memory_allocated, devices), default=0)


def _without_report(pipe: Any, found: Container[str]) -> Iterator[str]:
    """A sentence for each part that was accelerated and has none."""
    for name, module in everything(pipe).items():
        if name and name not in found and module in _WATCHED:
            why = ("was not called yet" if next(layers_of(module), None) else
                   "has no linear and no 2D convolution, so that it runs compiled in its own precision")
            yield f"{name}, a {type(module).__name__}, {why}"


def _called_once(pipe: Any) -> Iterator[str]:
    """A sentence for what steers the denoiser as a ControlNet does, but from one call for a picture."""
    for name in CALLED_ONCE:
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module) and not isinstance(pipe, torch.nn.Module) and name not in denoisers(pipe):
            yield (f"{name}, a {type(module).__name__}, stays in your own precision: it is called once for a picture and not at "
                   "every timestep, so that 8 bits would save next to nothing")


def demo_pipeline(dtype: torch.dtype = torch.float32) -> Any:
    """The bundled text-to-image pipeline (64x64 emoji, 13 M parameters), offline, ready to use on the CPU."""
    return load_pipeline(ASSETS / "tiny_emoji", dtype)


def load_pipeline(folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Any:
    """Any diffusers pipeline folder, from disk only."""
    check_folder(folder)
    if find_spec("diffusers") is None:
        raise ModelError.no_diffusers()
    with _quiet():
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raises ModelError for one that holds no pipeline of diffusers."""
    if not (Path(folder) / "model_index.json").is_file():
        if Path(folder).parent == ASSETS:
            raise ModelError.no_bundled_model()
        raise ModelError(f"{folder} is not a diffusers pipeline folder: model_index.json is missing; save one with "
                         "pipe.save_pretrained(folder)")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' bars and their news of optional parts that are not there; as the user had it afterwards."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(m, m.get_verbosity(), m.is_progress_bar_enabled()) for m in (diffusers_logging, transformers_logging)]
    try:
        for module, _, _ in before:
            module.set_verbosity_error()
            module.disable_progress_bar()
        yield
    finally:
        for module, verbosity, bar in before:
            module.set_verbosity(verbosity)
            if bar:
                module.enable_progress_bar()


def modules_of(what: Any) -> dict[str, torch.nn.Module]:
    """Name -> what to compile, unwrapped: the parts of a pipeline, its denoiser first, or the module itself."""
    return chosen(what, EVERY_TIMESTEP)
