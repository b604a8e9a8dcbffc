"""What of a pipeline runs in 8 bits, by the path of the attribute that holds it: what it calls at every timestep, and, where the
user asks for them, the halves of its VAE and its text encoders, which it calls once or twice for a picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from . import names
from .errors import ModelError, OptionError

DENOISERS = ("unet", "transformer", "prior", "decoder")
VAES = ("vae", "movq", "vqgan")
HALVES = ("decoder", "encoder")
TEXT = "text_encoder"
EVERY_TIMESTEP, ALL = "denoisers", "auto"
# Options unless the user says otherwise. A picture shows what a decoder adds to it, while what an encoder adds moves it as a
# whole. The weights of a VAE are few, and pipelines cast them to fp32 and back for each picture
DEFAULTS: dict[str, dict[str, Any]] = {
    "": {"weights": "release"},
    "decoder": {"weights": "keep", "output_psnr": 45.0},
    "encoder": {"weights": "keep", "max_error": 0.02},
    TEXT: {"weights": "release", "max_error": 0.005},
}


def denoiser_name(pipe: Any) -> str:
    """Attribute of the pipeline that holds the denoiser. Raises ModelError when there is none."""
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), torch.nn.Module):
            return name
    raise ModelError.no_denoiser(pipe, DENOISERS)


def denoisers(pipe: Any) -> dict[str, torch.nn.Module]:
    """Attribute -> module, unwrapped, of all that the pipeline calls at every timestep: its denoiser first, then a second one,
    ControlNets, priors. Raises ModelError when there is no denoiser."""
    parts = {name: getattr(pipe, name) for name in (denoiser_name(pipe), *_components(pipe))}
    modules = {name: unwrapped(part) for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    first = denoiser_name(pipe)
    once = {id(module): name for name, module in reversed(modules.items())}  # one that has two names has the first
    return {name: module for name, module in modules.items()
            if once[id(module)] == name and (name == first or names.takes_a_timestep(module))}


def all_parts(pipe: Any) -> dict[str, torch.nn.Module]:
    """Path -> module, unwrapped: the denoisers, then what the pipeline calls once for a picture."""
    found = denoisers(pipe)
    for name in _components(pipe):
        component = getattr(pipe, name, None)
        if not isinstance(component, torch.nn.Module) or name in found:
            continue
        if name.startswith(TEXT):
            found[name] = unwrapped(component)
        elif name in VAES:
            halves = {f"{name}.{half}": getattr(unwrapped(component), half, None) for half in HALVES}
            found |= {path: unwrapped(half) for path, half in halves.items() if isinstance(half, torch.nn.Module)}
    once = {id(module): path for path, module in reversed(found.items())}
    return {path: module for path, module in found.items() if once[id(module)] == path}


def everything(what: Any) -> dict[str, torch.nn.Module]:
    """Of a pipeline all parts, of a module itself, without a path."""
    return {"": unwrapped(what)} if isinstance(what, torch.nn.Module) else all_parts(what)


def chosen(pipe: Any, parts: str | Iterable[str]) -> dict[str, torch.nn.Module]:
    """Those that the user named: "denoisers", "auto" for all, or paths, also as one text with commas.

    Raises OptionError, and ModelError where there is no denoiser."""
    if parts == EVERY_TIMESTEP:
        return everything(pipe) if isinstance(pipe, torch.nn.Module) else denoisers(pipe)
    found = everything(pipe)
    if parts == ALL:
        return found
    wanted = parts.split(",") if isinstance(parts, str) else list(parts) if isinstance(parts, Iterable) else [parts]
    unknown = [path for path in wanted if path not in found]
    if unknown or not wanted:
        raise OptionError.no_part(unknown[0] if unknown else parts, type(pipe).__name__, (EVERY_TIMESTEP, ALL), found)
    return {path: module for path, module in found.items() if path in wanted}


def defaults(path: str) -> dict[str, Any]:
    """Options of a part unless the user says otherwise."""
    return DEFAULTS[_kind(path)]


def every_timestep(path: str) -> bool:
    """Whether the pipeline calls this part of it at every timestep, and not once for a picture."""
    return not _kind(path)


def _kind(path: str) -> str:
    component, _, half = path.partition(".")
    return half if component in VAES else TEXT if path.startswith(TEXT) else ""


def holder(pipe: Any, path: str) -> tuple[Any, str]:
    """(what has the part as an attribute, the attribute's name)."""
    *above, last = path.split(".")
    for name in above:
        pipe = unwrapped(getattr(pipe, name))
    return pipe, last


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Without torch.compile's wrapper."""
    found: torch.nn.Module = getattr(module, "_orig_mod", module)
    return found


def _components(pipe: Any) -> list[str]:
    """Names of the pipeline's parts; of one that is no diffusers pipeline, of all that it holds."""
    return list(pipe.components if hasattr(type(pipe), "components") else vars(pipe))
