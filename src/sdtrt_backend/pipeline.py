"""Patch one pipeline instance and undo it to the bit; load the bundled model; explain what became of a module."""

from __future__ import annotations

import contextlib
import inspect
import os
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from .calibrate import denoiser_name
from .errors import ModelError
from .options import Options
from .recipe import Recipe
from .report import Report
from .run import forget, states

# accelerated module -> (what the user had compiled it with, its hook for saving)
_WATCHED: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
RECOMPILATIONS = 64  # sizes, dtypes and modes of one module that Dynamo compiles before it gives up; its own limit is 8
ASSETS = Path(__file__).parent / "assets"


def accelerate(pipe: Any, *, recipe: str | os.PathLike[str] | None = None, backend: str = "sd_int8",
               **options: Any) -> Any:
    """Compile the pipeline's denoiser in place with ``backend`` and return the pipeline.

    recipe: folder of a saved recipe; without one the pipeline calibrates itself during its next pictures.
    options: any of ``Options`` (``calibration_runs``, ``rule``, ``alpha``, ``max_error``, ``exclude``, ...). On a GPU
    ``weights`` is "release" unless given: the 16-bit weights of quantised layers wait on the CPU.
    Only this instance changes: the module object stays the same, and ``restore(pipe)`` undoes it to the bit.
    """
    options.setdefault("weights", "release")
    if recipe is not None:
        options["recipe"] = os.fspath(recipe)
        Recipe.load(recipe)  # a bad recipe is refused here, not at the first step
    from torch._dynamo.backends.registry import lookup_backend

    Options.parse(options)  # refused here, not at the first step
    module = _denoiser(pipe)
    if any(p.is_meta for p in module.parameters()):
        raise ModelError.on_meta(type(module).__name__)
    if module in _WATCHED:
        restore(pipe)
    # a new callable each time: Dynamo takes equal backends for the same one and would go on with a restored step
    compiler: Any = lookup_backend(backend)
    known, own = inspect.signature(torch.compile).parameters, module._compiled_call_impl
    # where this PyTorch can: other modules of the class, and pipelines before this one, do not use up this one's recompilations
    limits = {"isolate_recompiles": True, "recompile_limit": RECOMPILATIONS}
    module.compile(backend=partial(compiler, options=options), **{k: v for k, v in limits.items() if k in known})
    _watch(module, own)
    return pipe


def restore(pipe: Any) -> Any:
    """Undo ``accelerate``: the denoiser runs its own forward again, with its weights to the bit. Returns the pipeline."""
    module = _denoiser(pipe)
    _bring_back(module)
    if module in _WATCHED:
        module._compiled_call_impl, hook = _WATCHED.pop(module)
        hook.remove()
        del module._apply
        forget(module)
    return pipe


def _watch(module: torch.nn.Module, own: Any) -> None:
    """Whoever saves the module or moves it finds its weights: this instance brings them back first."""
    module._apply = MethodType(_apply, module)  # type: ignore[method-assign]  # a copy of the module gets its own
    _WATCHED[module] = own, module.register_state_dict_pre_hook(_before_saving)


# functions of the file and not of a call: a module that is pickled takes the names of its hooks along

def _apply(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    _bring_back(self)
    return type(self)._apply(self, *args, **kwargs)


def _before_saving(module: torch.nn.Module, *_: Any) -> None:
    _bring_back(module)


def _bring_back(module: torch.nn.Module) -> None:
    """The 16-bit weights that wait on the CPU are on the GPU again, for good."""
    for state in states(module):
        state.memory.weights.restore()


@contextlib.contextmanager
def accelerated(pipe: Any, **options: Any) -> Iterator[Any]:
    """``with accelerated(pipe):`` accelerates, and restores however the block ends."""
    accelerate(pipe, **options)
    try:
        yield pipe
    finally:
        restore(pipe)


def explain(module_or_pipe: Any) -> Report:
    """The report of a compiled module or pipeline: a value with a readable ``str``.

    Raises ModelError when ``sd_int8`` has not seen it yet.
    """
    found = states(_denoiser(module_or_pipe))
    if not found:
        raise ModelError.not_compiled(module_or_pipe)
    return found[-1].report()


def demo_pipeline(dtype: torch.dtype = torch.float32) -> Any:
    """The bundled text-to-image pipeline (64x64 emoji, 13 M parameters), offline, ready to use on the CPU."""
    return load_pipeline(ASSETS / "tiny_emoji", dtype)


def load_pipeline(folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Any:
    """Any diffusers pipeline folder, from disk only."""
    if not (Path(folder) / "model_index.json").is_file():
        raise ModelError(f"{folder} is not a diffusers pipeline folder: model_index.json is missing; save one with "
                         "pipe.save_pretrained(folder)")
    with _quiet():
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def _denoiser(what: Any) -> torch.nn.Module:
    """The module to compile: the pipeline's denoiser, unwrapped, or the module itself."""
    module = what if isinstance(what, torch.nn.Module) else getattr(what, denoiser_name(what))
    return getattr(module, "_orig_mod", module)
