"""LoRAs at full speed: written into the 8-bit codes of an accelerated pipeline, in place of a side branch in every layer."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .adapters import Adapters, adapters_of, make_adapters, weight_of
from .errors import LoraError, ModelError
from .merge import Factors
from .parts import denoisers
from .pipeline import modules_of
from .state import State, states

REFUSED_KEYS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_w": "LoHa", "lokr_w": "LoKr",
                "lora_mid": "a Tucker LoCon"}
# pipeline -> name -> weight of each LoRA that its text encoders use
_TEXT: weakref.WeakKeyDictionary[Any, dict[str, float]] = weakref.WeakKeyDictionary()


def load_lora(pipe: Any, source: str | os.PathLike[str] | Mapping[str, torch.Tensor], name: str, **kwargs: Any) -> None:
    """Make a LoRA known to an accelerated pipeline under ``name``; ``set_loras`` puts it to use.

    source: whatever ``pipe.load_lora_weights`` reads: a file, a folder, a repository's name, a state dict; of diffusers, PEFT or
    kohya, linears and convolutions. kwargs: what that function takes besides (``weight_name``, ...). A name that is loaded
    already gets the new values, at once where it is in use. Parts for text encoders are loaded into them by PEFT.
    Raises LoraError where the LoRA does not fit, is of another kind (DoRA, LoHa, LoKr), or changes a layer outside of the blocks
    that were compiled, ModelError for a pipeline that is not accelerated; nothing has changed then.
    Source: Hu et al., LoRA, 2021, equation 3.
    """
    modules = _accelerated(pipe)
    if find_spec("peft") is None:
        raise LoraError.no_peft()
    given = source if isinstance(source, Mapping) else os.fspath(source)
    _refuse_other_kinds(given, kwargs)
    try:
        found = _read(pipe, given, kwargs)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise LoraError.unreadable(error) from error
    parts = {part: _factors(skeleton, part) for part, skeleton in found.items()}
    for part, factors in parts.items():
        if part in modules:
            _check_fits(modules[part][0], part, factors)
            if not _compiled(pipe, part):
                _check_graphs(*modules[part], part, factors)
    if not any(parts.values()):
        raise LoraError.nothing_of(type(pipe).__name__, parts)
    made = {part: (make_adapters(module, held), held) for part, (module, held) in modules.items()}
    for part, (adapters, _) in made.items():
        adapters.load(name, parts.get(part, {}))
        adapters.bring(name)
        adapters.step_in()
    _load_text(pipe, [part for part, factors in parts.items() if factors and part not in modules], given, name, kwargs)
    _switch(made.values())


def set_loras(pipe: Any, weights: Mapping[str, float]) -> None:
    """Use exactly these LoRAs, each with its weight: {"name": 1.0, ...}. {} gives back the output without any, to the bit.

    Pictures that begin from now on have them; one that another thread is drawing keeps those that it began with.
    Raises LoraError for a name that was not loaded, or a weight that is no finite number.
    """
    found = _checked(pipe, weights)
    for adapters, _ in found:
        adapters.wanted = adapters.set_of(weights)
        adapters.end_picture()
    _set_text(pipe, weights)
    _switch(found)


@contextlib.contextmanager
def loras(pipe: Any, weights: Mapping[str, float]) -> Iterator[Any]:
    """``with loras(pipe, {"name": 1.0}):`` pictures that this thread draws in it have these LoRAs, whatever other threads draw.
    Those of text encoders, which all threads share, are set for the block and then as they were."""
    with contextlib.ExitStack() as stack:
        text = _TEXT.get(pipe, {})
        for adapters, _ in _checked(pipe, weights):
            stack.enter_context(adapters.block(adapters.set_of(weights)))
        _set_text(pipe, weights)
        stack.callback(_set_text, pipe, text)
        yield pipe


def unload_lora(pipe: Any, name: str) -> None:
    """Forget a LoRA, and stop using it. Raises LoraError for a name that was not loaded."""
    found = _checked(pipe, {name: 0.0})
    for adapters, _ in found:
        adapters.unload(name)
    _drop_text(pipe, name)
    _switch(found)


def _switch(found: Iterable[tuple[Adapters, list[State]]]) -> None:
    """At once where no other thread is drawing, so that the next picture does not wait for it."""
    for adapters, held in found:
        for state in held:
            if not state.slept and any(unit.results for unit in state.units):
                adapters.hold(state, adapters.wanted, wait=False)


def _accelerated(pipe: Any) -> dict[str, tuple[torch.nn.Module, list[State]]]:
    """Its compiled denoisers, by name, each with its states."""
    found = {name: (module, held) for name, module in modules_of(pipe).items()
             if (held := _states(module)) or module._compiled_call_impl is not None or _compiled(pipe, name)}
    if not found:
        raise ModelError.not_accelerated(pipe)
    return found


def _states(module: torch.nn.Module) -> list[State]:
    """Those that have its LoRAs already, or all, which takes as long as it has parameters."""
    adapters = adapters_of(module)
    return [s for s in (() if adapters is None else adapters.states) if not s.closed] or states(module)


def _compiled(pipe: Any, name: str) -> bool:
    whole = pipe if isinstance(pipe, torch.nn.Module) else getattr(pipe, name, None)
    return hasattr(whole, "_orig_mod")


def _checked(pipe: Any, weights: Mapping[str, float]) -> list[tuple[Adapters, list[State]]]:
    """Of each denoiser, with its states, if all of them know the names, and the weights are numbers."""
    found = [(make_adapters(module, held), held) for module, held in _accelerated(pipe).values()]
    for name, weight in weights.items():
        for adapters, _ in found:
            if name not in adapters.loaded:
                raise LoraError.unknown(name, adapters.loaded)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise LoraError.no_weight(name, weight)
    return found


def _refuse_other_kinds(source: Any, kwargs: Mapping[str, Any]) -> None:
    """Before diffusers, which leaves out what it does not know, with a warning at most."""
    for key in _keys(source, kwargs):
        for part, kind in REFUSED_KEYS.items():
            if part in key:
                raise LoraError.other_kind(kind, key)


def _keys(source: Any, kwargs: Mapping[str, Any]) -> list[str]:
    """Those of the state dict, as far as it is on this machine and no pickle."""
    if isinstance(source, Mapping):
        return list(source)
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob(kwargs.get("weight_name") or "*.safetensors")) if path.is_dir() else []
    if not files or files[0].suffix != ".safetensors":
        return []
    from safetensors import safe_open

    with safe_open(files[0], "pt") as file:
        return list(file.keys())


def _read(pipe: Any, source: Any, kwargs: Mapping[str, Any]) -> dict[str, torch.nn.Module]:
    """Name of a part -> an empty module of its kind into which diffusers and PEFT have loaded the LoRA: every format that they
    read is read as they read it, and no module of the user's is touched."""
    if isinstance(pipe, torch.nn.Module):
        whole = getattr(pipe, "_orig_mod", pipe)
        skeleton = _skeleton(whole)
        skeleton.load_lora_adapter(source, **{"prefix": None, **kwargs})  # type: ignore[operator]
        return {"": skeleton}
    if not hasattr(pipe, "load_lora_weights"):
        raise LoraError.no_loader(type(pipe).__name__)
    double, found = copy.copy(pipe), {}
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            wanted = part in denoisers(pipe) or part in _text_encoders(pipe)
            if wanted:
                found[part] = _skeleton(getattr(module, "_orig_mod", module))
            object.__setattr__(double, part, found.get(part))
    double.load_lora_weights(dict(source) if isinstance(source, Mapping) else source, **kwargs)
    return found


def _skeleton(module: Any) -> torch.nn.Module:
    """A module of the same kind and dtype, whose parameters take no memory: each is one zero."""
    kind, config, dtype = type(module), copy.deepcopy(module.config), module.dtype  # which diffusers looks for in all modules
    with torch.device("meta"):
        made: torch.nn.Module = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    for owner in made.modules():
        for name, p in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            empty = torch.zeros((), dtype=dtype if p.is_floating_point() else p.dtype).expand(p.shape)
            setattr(owner, name, torch.nn.Parameter(empty, requires_grad=False) if isinstance(p, torch.nn.Parameter) else empty)
    return made


def _factors(skeleton: torch.nn.Module, part: str) -> dict[str, Factors]:
    """What PEFT has put around the layers of the skeleton."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, Factors] = {}
    for path, layer in skeleton.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for one in layer.active_adapters:
            if one not in layer.lora_A:
                continue
            down, up = layer.lora_A[one], layer.lora_B[one]
            where = f"{part}.{path}".removeprefix(".")
            if layer.use_dora.get(one) or up.bias is not None or getattr(layer.get_base_layer(), "groups", 1) != 1:
                raise LoraError.other_kind("a LoRA with biases, of DoRA, or of a grouped convolution", where)
            found[path] = Factors(down.weight.detach(), up.weight.detach(), float(layer.scaling[one]))
    return found


def _check_fits(module: torch.nn.Module, part: str, factors: Mapping[str, Factors]) -> None:
    for path, f in factors.items():
        try:
            weight = weight_of(module, path)
        except AttributeError:
            raise LoraError.no_layer(f"{part}.{path}", type(module).__name__) from None
        made = (f.up.shape[0], *f.down.shape[1:])
        if weight.numel() != math.prod(made) or weight.shape[0] != made[0]:
            raise LoraError.other_shape(f"{part}.{path}", tuple(weight.shape), made)


def _check_graphs(module: torch.nn.Module, held: Sequence[State], part: str, factors: Mapping[str, Factors]) -> None:
    """Where the user compiled blocks of it, nobody calls us for a layer outside of them."""
    if module._compiled_call_impl is None and not any(state.whole for state in held):
        in_graphs = {i for state in held for unit in state.units for i in unit.ids}
        for path in factors:
            if id(weight_of(module, path)) not in in_graphs:
                raise LoraError.in_no_graph(f"{part}.{path}".removeprefix("."))


# --- text encoders, whose LoRAs are PEFT's as usual

def _text_encoders(pipe: Any) -> dict[str, Any]:
    names = getattr(pipe, "_lora_loadable_modules", ())
    return {n: m for n in names if n.startswith("text_encoder") and isinstance(m := getattr(pipe, n, None), torch.nn.Module)}


def _load_text(pipe: Any, parts: list[str], source: Any, name: str, kwargs: Mapping[str, Any]) -> None:
    _drop_text(pipe, name)
    for part in parts:
        encoder = getattr(pipe, part)
        state_dict, *rest = pipe.lora_state_dict(dict(source) if isinstance(source, Mapping) else source,
                                                 return_lora_metadata=True, **kwargs)
        alphas = rest[0] if len(rest) > 1 else None
        pipe.load_lora_into_text_encoder(state_dict, network_alphas=alphas, text_encoder=encoder, prefix=part,
                                         lora_scale=pipe.lora_scale, adapter_name=name, _pipeline=pipe, metadata=rest[-1])
    if parts:
        _set_text(pipe, _TEXT.get(pipe, {}))
        owner = weakref.ref(pipe)
        for module in modules_of(pipe).values():
            make_adapters(module, ()).endings.append(lambda: _drop_text(owner(), name))


def _drop_text(pipe: Any, name: str) -> None:
    for encoder in _text_encoders(pipe).values():
        if name in getattr(encoder, "peft_config", {}):
            encoder.delete_adapter(name)


def _set_text(pipe: Any, weights: Mapping[str, float]) -> None:
    if not _text_encoders(pipe):
        return
    from diffusers.loaders.lora_base import set_adapters_for_text_encoder

    _TEXT[pipe] = dict(weights)
    for encoder in _text_encoders(pipe).values():
        loaded = getattr(encoder, "peft_config", {})
        mine = {n: w for n, w in weights.items() if n in loaded and w}
        if mine:
            encoder.enable_adapters()
            set_adapters_for_text_encoder(list(mine), encoder, list(mine.values()))
        elif loaded:
            encoder.disable_adapters()

