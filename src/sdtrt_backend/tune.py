"""SmoothQuant's strength for each group of layers, chosen by what 8 bits there do to the denoiser's output.

The error of a layer's own output is a bad guide: a few channels with huge values carry most of it, and the norm behind them
divides it away. So one group at a time is fake-quantised, in a denoiser that is otherwise in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import stats
from .quantize import free_convs, plan
from .recipe import Recipe
from .rules import MODULES
from .values import Decision, Layer

ALPHAS = (0.2, 0.35, 0.5, 0.65, 0.8)
SHARE = 0.97  # the loudest groups, which together make this share of the noise, are tuned: a small part of all


@dataclass(frozen=True)
class Tuned:
    """alphas: group -> the strength that gave the least noise; noise: group -> ||y8 - y||^2 / ||y||^2 of the denoiser's output
    with that group alone in int8, mean over the sampled calls."""

    alphas: Mapping[str, float | None]
    noise: Mapping[str, float]


Call = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def tune(module: torch.nn.Module, calls: Sequence[Call], recipes: Mapping[float, Recipe], default: Recipe, ops: Sequence[str],
         tick: Callable[[], None] = lambda: None) -> Tuned:
    """recipes: alpha -> the recipe with this alpha in every group; default: the recipe to be improved; ops: those whose
    groups are tuned. tick: called once for every group and once for every alpha tried. The module is left as it was."""
    expected = [_output(module(*args, **kwargs)) for args, kwargs in calls]
    device = expected[0].device
    layers = {name: Layer(name, MODULES[type(child)].name, name, name, child.get_parameter("weight").detach(),
                          getattr(child, "groups", 1))
              for name, child in module.named_modules() if type(child) in MODULES and name in default.layers}

    def noise(recipe: Recipe, names: Sequence[str]) -> float:
        decisions = plan([layers[n] for n in names], recipe, (), free_convs=free_convs(device, "int8"))
        eight = [d for d in decisions if d.quantized]
        tick()
        if not eight:
            return 0.0
        return sum(stats.relative_error(_output(_quantized_call(module, eight, *c)), y) ** 2
                   for c, y in zip(calls, expected, strict=True)) / len(calls)

    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(default.layers[name].group, []).append(name)
    found = {group: noise(default, names) for group, names in groups.items()}
    alphas: dict[str, float | None] = {}
    rest = sum(found.values())
    for group in sorted(found, key=lambda g: -found[g]):
        if rest <= (1 - SHARE) * sum(found.values()):
            break
        rest -= found[group]
        if default.layers[group].alpha is None or default.layers[group].op not in ops:
            continue
        tried = {alpha: noise(recipe, groups[group]) for alpha, recipe in recipes.items()}
        best = min(tried, key=lambda a: tried[a])
        if tried[best] < found[group]:
            alphas[group], found[group] = best, tried[best]
    return Tuned(alphas, found)


def _quantized_call(module: torch.nn.Module, decisions: Sequence[Decision], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's output with these layers fake-quantised."""
    def hook(d: Decision) -> Callable[..., Any]:
        def quantize(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x = given[0] if given else named["input"]
            return (stats.fake_quantize_input(d, x).to(x.dtype), *given[1:]), {k: v for k, v in named.items() if k != "input"}

        return quantize

    weights = {f"{d.layer.name}.weight": stats.fake_quantize_weight(d, d.layer.weight).to(d.layer.weight.dtype) for d in decisions}
    handles = [module.get_submodule(d.layer.name).register_forward_pre_hook(hook(d), with_kwargs=True) for d in decisions]
    try:
        return torch.func.functional_call(module, weights, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _output(result: Any) -> torch.Tensor:
    """The first tensor of what a denoiser returns."""
    first: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
    return first.clone()
