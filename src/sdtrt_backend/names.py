"""Which layer is this: from a parameter to the path of its layer in the denoiser that owns it."""

from __future__ import annotations

import inspect
import re
import sys
import weakref
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .timesteps import TIMESTEP_NAMES

# denoisers that the user named: to accelerate, or to calibrate
_NAMED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_CALLS = ("_call_impl", "_wrapped_call_impl")  # frames of torch.nn.Module, whose ``self`` is being called


def named(module: torch.nn.Module) -> None:
    """From now on this module is the root of its parameters' paths."""
    _NAMED.add(module)


def layer_name(path: str) -> str:
    """Path of a parameter or of a layer -> the layer's name, the same with and without adapters of PEFT around it."""
    return re.sub(r"\.base_layer(?=\.|$)", "", path).removesuffix(".weight")


def paths(root: torch.nn.Module) -> dict[int, str]:
    """id of each parameter and buffer that the module has now -> its path."""
    return {id(t): path for found in (root.named_parameters(), root.named_buffers()) for path, t in found}


def root_of(tensors: Iterable[torch.Tensor]) -> torch.nn.Module | None:
    """The denoiser that is being called by this thread and owns these parameters, None where no module is.

    Of the modules on the call stack that own them, one that the user named; else the outermost that takes a timestep; else the
    outermost that is compiled; else the outermost: what Dynamo compiles may be one block of it, or a piece behind a graph break.
    """
    wanted = {id(t) for t in tensors}
    owners = [m for m in _called() if wanted <= paths(m).keys()]
    for fits in (lambda m: m in _NAMED, takes_a_timestep, _is_compiled, lambda m: True):
        found = [m for m in owners if fits(m)]
        if found:
            return found[-1]
    return None


def _called() -> Iterator[torch.nn.Module]:
    """The modules that this thread is inside of, innermost first, without torch.compile's wrappers."""
    frame, last = sys._getframe(1), None
    while frame is not None:
        called = frame.f_locals.get("self") if frame.f_code.co_name in _CALLS else None
        if isinstance(called, torch.nn.Module):
            module: torch.nn.Module = getattr(called, "_orig_mod", called)
            if module is not last:
                yield module
            last = module
        frame = frame.f_back  # type: ignore[assignment]


def takes_a_timestep(module: torch.nn.Module) -> bool:
    """Whether it is called at every timestep: a denoiser, or a ControlNet beside one."""
    return not call_signature(module).parameters.keys().isdisjoint(TIMESTEP_NAMES)


def call_signature(module: torch.nn.Module) -> inspect.Signature:
    """Of the module's forward; of its class's where what was put in its place, as hooks for offloading are, names no timestep."""
    own = inspect.signature(module.forward)
    if "forward" not in vars(module) or not own.parameters.keys().isdisjoint(TIMESTEP_NAMES):
        return own
    return inspect.signature(MethodType(type(module).forward, module))


def _is_compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None and getattr(module._compiled_call_impl, "__func__", None) is not _through


def _through(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def step_into(module: torch.nn.Module) -> None:
    """Dynamo, which never compiles torch's own code by itself, may take a call of this layer for a piece of its own: it goes
    through a function of ours, which outside of a compiled call changes nothing."""
    module._compiled_call_impl = MethodType(_through, module)


def step_out(module: torch.nn.Module) -> None:
    """As before ``step_into``; what the user compiled since is left."""
    if getattr(module._compiled_call_impl, "__func__", None) is _through:
        module._compiled_call_impl = None


def runs_compiled(module: torch.nn.Module) -> bool:
    """Whether this call of the module is one that Dynamo compiles as a whole."""
    frame = sys._getframe(1)
    while frame is not None:
        wrapper = frame.f_locals.get("self") if frame.f_code.co_name in _CALLS else None
        if wrapper is not None and getattr(wrapper, "_orig_mod", None) is module:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return _is_compiled(module)


def call_of(module: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of the call of ``module`` that this thread is inside of, the outermost; the dictionary is one object per call.
    None where it is in no call of it."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        called = frame.f_locals.get("self") if frame.f_code.co_name in _CALLS else None
        if called is not None and getattr(called, "_orig_mod", called) is module:
            found = frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back  # type: ignore[assignment]
    return found


def unfit(root: torch.nn.Module | None) -> str | None:
    """Why no 8-bit copy of this module's weights can be made or stay in use: they are quantised already, or ``in_pieces``."""
    if root is None:
        return None
    theirs = {type(p).__name__ for p in root.parameters() if is_traceable_wrapper_subclass(p)}
    if theirs:
        return (f"weights of the module are quantised already ({', '.join(sorted(theirs))}): compile it without this backend, or "
                "load it in its own precision")
    return in_pieces(root)


def in_pieces(module: torch.nn.Module) -> str | None:
    """Why no 8-bit copy can stay in use of weights that are others, elsewhere or in another dtype at each call; or None."""
    hooks = {name for m in module.modules() for name in getattr(getattr(m, "_diffusers_hook", None), "hooks", ())}
    if offloads(module):
        return ("the module is under sequential CPU offload, which loads its weights piece by piece for each call, so no 8-bit "
                "copy of them can stay in use: use enable_model_cpu_offload, which moves the module as a whole")
    if "group_offloading" in hooks:
        return ("the module is under group offloading, which loads its weights group by group for each call, while their 8-bit "
                "copy would stay on the GPU: use enable_model_cpu_offload, which moves the module as a whole, or none, as 8-bit "
                "weights are half as large")
    if "layerwise_casting" in hooks:
        return ("the module is under layerwise casting, which stores its weights in another dtype and casts them for each call, "
                "so no 8-bit copy of them can stay in use: load it without enable_layerwise_casting, since 8-bit weights are as "
                "small")
    return None


def offloads(module: torch.nn.Module) -> bool:
    """Whether accelerate loads the module's weights piece by piece, for each call anew."""
    hooks = [hook for m in module.modules() if (hook := getattr(m, "_hf_hook", None)) is not None]
    return any(getattr(one, "offload", False) for hook in hooks for one in getattr(hook, "hooks", (hook,)))
