"""``min_psnr`` and ``max_error``: the fastest assignment of precisions inside an error budget.

For ``min_psnr``, solved while calibrating, two numbers of every part of the denoiser are measured: the error of the final
latents of real pictures when this part alone runs in 8 bits, so a timestep counts as much as the scheduler makes it, and the
milliseconds that 8 bits save. Where the decoder of a VAE is among them, the error is that of the pictures. Parts leave the 8
bits, most error per millisecond first, until pictures of prompts that calibrated nothing have the PSNR: for a second code of
their inputs where kernels take two and the user's precision would cost more, else for that precision, and all of them for that
one where second codes are not enough. For ``max_error``, looked at where the first 8-bit step exceeds it, the error is that of
the step, and multiplications stand for milliseconds.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch

from . import stats
from .capture import Captured, bind, tensor_inputs
from .emulate import emulated
from .errors import CalibrationError
from .kernels import Problem, of_layer, times_ms
from .measure import compare
from .metrics import psnr
from .options import Options
from .parts import defaults, every_timestep
from .quantize import free_convs, insert, plan, smooth_convs
from .recipe import Recipe
from .rules import layers_of
from .values import Decision

log = logging.getLogger(__name__)
_T = TypeVar("_T")
JUDGES = (2, 8)  # prompts that judge: a quarter of all, at least and at most
PICTURES = 8  # of theirs at least, from as many noises as that takes: what is sure depends on their number
OWN_SHARE = 0.5  # of the variance is taken to be a prompt's own, which more noises do not average out
TRIED = 2  # of them that every part is tried on
TRIAL_STEPS = 10  # of such a picture
MAX_PARTS = 48  # as each is tried by pictures
# Standard errors that the mean PSNR of the judging pictures must lie above the budget: they are few
SURE = 2.0
ROUNDS = 8
MARGIN_DB = 0.5  # more than what is missing is asked for at each round, so that rounds end
SLACK_DB = 1.5  # beyond the budget: parts come back into 8 bits while there is more
WITHIN = 0.8  # of max_error is aimed at: errors of parts do not quite add up

# (indices of pictures, steps, output_type) -> what the pipeline gives; each has its own noise, and the prompts take turns
Draw = Callable[[Sequence[int], int, str], Any]


@dataclass(frozen=True)
class Part:
    """Layers decided together. error: squared relative error of the final latents when they alone run in 8 bits; gain_ms: what
    a step is faster by then; second_ms: what a second code costs of that, infinity where there is none to add; two_codes:
    whether the alternative to 8 bits is a second code, else it is the user's precision."""

    name: str
    layers: tuple[str, ...]
    error: float
    gain_ms: float
    second_ms: float = math.inf
    two_codes: bool = False

    def why(self, target: float, whole: float) -> str:
        """The sentence for its layers, which are not in one code. whole: the error of all parts."""
        price = f"would bring {self.error / whole:.1%} of the error and save {self.gain_ms:.3f} ms a step"
        if self.two_codes:
            return f"has two codes for min_psnr={target:g}: one for {self.name} {price}"
        return f"kept for min_psnr={target:g}: in 8 bits {self.name} {price}"


def split(prompts: Sequence[_T]) -> tuple[list[_T], list[_T]]:
    """(prompts that calibrate, those that judge). Raises CalibrationError when they are too few."""
    judges = min(JUDGES[1], max(JUDGES[0], len(prompts) // 4))
    if len(prompts) < 2 * judges:
        raise CalibrationError(f"min_psnr needs at least {2 * JUDGES[0]} prompts, got {len(prompts)}: a quarter of them, but at "
                               f"least {JUDGES[0]}, judges what the others calibrate")
    return list(prompts[:-judges]), list(prompts[-judges:])


class Together:
    """A denoiser and what else of its pipeline is in the recipe: paths of the others' layers start with their name."""

    def __init__(self, denoiser: torch.nn.Module, others: Mapping[str, torch.nn.Module]) -> None:
        self.denoiser, self.others = denoiser, others

    def part_of(self, path: str) -> str:
        """Name of the part that a layer belongs to; "" for the denoiser."""
        return next((part for part in self.others if path.startswith(f"{part}.")), "")

    def get_submodule(self, target: str) -> torch.nn.Module:
        part = self.part_of(target)
        return self.others[part].get_submodule(target[len(part) + 1:]) if part else self.denoiser.get_submodule(target)

    def decided(self, recipe: Recipe, options: Options) -> dict[str, Decision]:
        """Path -> what the plan says of the layer, each part by its own recipe, whose patterns know paths without a part."""
        found = {d.layer.name: d for d in decided(self.denoiser, recipe, options)}
        return found | {f"{part}.{d.layer.name}": d for part, module in self.others.items()
                        for d in decided(module, recipe.parts[part], options)}


def together(recipe: Recipe) -> Recipe:
    """One recipe with the layers of all parts, by their paths in ``Together``."""
    layers = {f"{part}.{name}": replace(layer, group=f"{part}.{layer.group}") for part, of in recipe.parts.items()
              for name, layer in of.layers.items()}
    return replace(recipe, layers={**recipe.layers, **layers}, parts={})


@torch.no_grad()
def fit(denoiser: torch.nn.Module, recipe: Recipe, options: Options, draw: Draw, judges: int, steps: int,
        bar: Any, others: Mapping[str, torch.nn.Module] = MappingProxyType({})) -> Recipe:
    """``recipe`` with the layers named that have two codes (``LayerRecipe.second``) or stay in the user's precision (``keep``)
    for ``options.min_psnr``, in the denoiser and in the others.

    denoiser, others: all modules that ``draw`` calls at every timestep and the recipe is of, the others by the names of its
    parts; judges: prompts that ``draw`` knows; steps: of a picture of theirs; bar: tqdm's, advanced by each part that was tried.
    Raises CalibrationError when nothing would be left in 8 bits.
    """
    target = options.min_psnr
    assert target is not None
    module, whole_recipe = Together(denoiser, others), together(recipe)
    decisions = {name: d for name, d in module.decided(recipe, options).items() if d.quantized}
    twice = {name: d for name, d in module.decided(recipe, replace(options, two_codes=("*",))).items() if d.two_codes}
    weights, twice_weights = ({name: stats.fake_quantize_weight(d, d.layer.weight).to(d.layer.weight.dtype)
                               for name, d in found.items()} for found in (decisions, twice))
    everyone = list(range(max(judges, PICTURES)))
    plain = draw(everyone, steps, "np")
    if not np.isfinite(plain).all():
        raise CalibrationError("min_psnr compares pictures, and those of the denoiser in its own precision are not finite: check "
                               "the VAE, or run the pipeline in fp32")

    def judged(kept: Sequence[Part]) -> tuple[float, float]:
        """(mean PSNR, what it surely is) of pictures without these parts in one code, dB."""
        out = {name: part.two_codes for part in kept for name in part.layers}
        narrow = {n: twice[n] if n in out else d for n, d in decisions.items() if out.get(n, True)}
        with emulated(module, narrow, {n: (twice_weights if n in out else weights)[n] for n in narrow}):
            each = [p if math.isfinite(p) else 0.0 for p in psnr(draw(everyone, steps, "np"), plain)]
        mean = statistics.mean(each)
        return mean, mean - SURE * statistics.stdev(each) * (OWN_SHARE / judges + (1 - OWN_SHARE) / len(each)) ** 0.5

    def searched(parts: Sequence[Part], mean: float, sure: float) -> tuple[bool, list[Part], float, float]:
        """(whether it is enough, the parts that are not in one code, mean and sure PSNR); mean, sure: with all of them in it."""
        kept: list[Part] = []
        best, allowed = None, sum(p.error for p in parts)
        for _ in range(ROUNDS):
            allowed *= 10 ** ((sure - target - MARGIN_DB) / 10)  # less when it fell short, more when it had more than asked for
            before, kept = kept, fastest(parts, allowed)
            if kept == before and best is None:
                continue  # what fell short falls short again: less is allowed, until that changes what is kept
            if kept == before or (len(kept) == len(parts) and not any(p.two_codes for p in kept)):
                break
            mean, sure = judged(kept)
            if sure >= target:
                best = kept, mean, sure
            if best is not None and sure < target + SLACK_DB:
                break
        return (True, *best) if best is not None else (False, kept, mean, sure)

    kept: list[Part] = []
    parts: list[Part] = []
    all_mean, all_sure = mean, sure = judged(kept)
    enough = sure >= target
    if not enough:
        parts = tried(module, whole_recipe, decisions, weights, twice, draw, bar, steps)
        seconds = [replace(p, two_codes=True, gain_ms=p.second_ms) if p.second_ms < p.gain_ms else p for p in parts]
        for alternatives in (seconds, parts) if seconds != parts else (parts,):
            enough, kept, mean, sure = searched(alternatives, all_mean, all_sure)
            if enough:
                break
    if not enough:
        raise CalibrationError(f"min_psnr={target:g} is out of reach: pictures have {mean:.1f} dB, surely {sure:.1f}, and "
                               f"more would keep {len(kept)} of {len(parts)} parts in the denoiser's own precision; ask for "
                               "less, or leave min_psnr out")
    whole = sum(p.error for p in parts)
    for part in kept:
        log.info("%s %s", part.name, part.why(target, whole))
    keep, second = ({name: p.why(target, whole) for p in kept if p.two_codes is two for name in p.layers}
                    for two in (False, True))
    facts = {"target_db": target, "mean_db": mean, "surely_db": sure, "judges": judges,
             "parts": [{"name": p.name, "error": p.error, "gain_ms": p.gain_ms, "kept": p.layers[0] in keep,
                        "two_codes": p.layers[0] in second} for p in parts]}

    def solved(of: Recipe, prefix: str) -> Recipe:
        return replace(of, layers={n: replace(la, keep=keep.get(prefix + n), second=second.get(prefix + n))
                                   for n, la in of.layers.items()})

    return replace(solved(recipe, ""), parts={part: solved(of, f"{part}.") for part, of in recipe.parts.items()},
                   provenance={**recipe.provenance, "min_psnr": facts})


@torch.no_grad()
def within(captured: Captured, args: Sequence[Any], recipe: Recipe, decisions: Sequence[Decision], flops: Mapping[str, int],
           error: float, bound: float, option: str) -> Recipe | None:
    """``recipe`` with the layers named that stay in the user's precision so that the step's error on ``args`` is within
    ``bound``; None where nothing would be left in 8 bits. Multiplications stand for the time that 8 bits save.

    flops: of each layer; error: that the step with all ``decisions`` had; option: that says so.
    """
    quantized = {d.layer.name: d for d in decisions if d.quantized}
    full = captured.graph(*args)
    parts = []
    for name, layers in grouped(recipe, list(quantized)).items():
        graph, nodes = bind(captured, args)
        alone = insert(graph, nodes, [quantized[n] for n in layers])(*tensor_inputs(captured, args))
        parts.append(Part(name, layers, compare(alone, full) ** 2, float(sum(flops[n] for n in layers))))
    whole = sum(p.error for p in parts)
    kept = fastest(parts, whole * (WITHIN * bound / error) ** 2)
    if len(kept) == len(parts):
        return None
    why = {name: f"kept for {option}: in 8 bits {p.name} would bring {p.error / whole:.1%} of the first step's error"
           for p in kept for name in p.layers}
    return replace(recipe, layers={n: replace(la, keep=why.get(n, la.keep)) for n, la in recipe.layers.items()})


def fastest(parts: Sequence[Part], allowed: float) -> list[Part]:
    """The parts to keep in the user's precision so that the errors of the others sum to at most ``allowed`` and little time is
    lost: most error per millisecond first; then those come back that turn out to fit, the slowest first."""
    left, kept = sum(p.error for p in parts), []
    for part in sorted(parts, key=lambda p: p.error / max(p.gain_ms, 1e-9), reverse=True):
        if left <= allowed:
            break
        kept.append(part)
        left -= part.error
    for part in sorted(kept, key=lambda p: p.gain_ms, reverse=True):
        if left + part.error <= allowed:
            kept.remove(part)
            left += part.error
    return kept


def decided(module: torch.nn.Module, recipe: Recipe, options: Options) -> tuple[Decision, ...]:
    """The plan of a module that was not captured; only layers that calibration saw."""
    layers = [layer for layer in layers_of(module) if layer.name in recipe.layers]
    device = layers[0].weight.device
    return plan(layers, recipe, options.exclude, options.level, free_convs(device, options.precision), options.two_codes,
                smooth_convs(device))


def tried(module: Together, recipe: Recipe, decisions: Mapping[str, Decision], weights: Mapping[str, torch.Tensor],
          can_have_two: Container[str], draw: Draw, bar: Any, steps: int) -> list[Part]:
    """Every part with its error and its gain. can_have_two: layers whose kernels take two codes; steps: of a picture, of which
    what is called once for it has its share."""
    output = "pt" if any("output_psnr" in defaults(part) for part in module.others) else "latent"
    prompts = list(range(TRIED))
    problems: dict[str, Problem] = {}

    def shape(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            problems[name] = of_layer(layer, args[0] if args else kwargs["input"])

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(shape(name), with_kwargs=True) for name in decisions]
    try:
        exact = draw(prompts, TRIAL_STEPS, output)
    finally:
        for handle in handles:
            handle.remove()
    took = {p: times_ms(p, exact.device) for p in set(problems.values())}
    parts, groups = [], grouped(recipe, list(decisions))
    bar.total = len(groups)
    for name, layers in groups.items():
        with emulated(module, {n: decisions[n] for n in layers}, weights):
            error = stats.relative_error(draw(prompts, TRIAL_STEPS, output), exact) ** 2
        gain = second = 0.0
        for n in layers:
            calls = 1 if every_timestep(module.part_of(n)) else 1 / steps
            wide, narrow = (calls * ms for ms in took[problems[n]]) if n in problems else (0.0, 0.0)
            gain += max(0.0, wide - narrow * (2 if decisions[n].two_codes else 1))
            second += narrow if n in can_have_two and not decisions[n].two_codes else math.inf
        parts.append(Part(name, layers, error, gain, second))
        bar.update()
    return parts


def grouped(recipe: Recipe, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Part -> its layers: those of one kind in one stage, or in all stages where there would be too many parts. Layers that read
    one tensor are in one part, since its quantisation is theirs."""
    for first in (1, 0):  # numbers in a path that tell parts apart
        parts: dict[str, list[str]] = {}
        for name in names:
            parts.setdefault(_kind(recipe.layers[name].group, first), []).append(name)
        if len(parts) <= MAX_PARTS:
            break
    return {kind: tuple(layers) for kind, layers in parts.items()}


def _kind(path: str, first: int) -> str:
    """A module path with its numbers replaced, but the ``first`` ones."""
    words = path.split(".")
    numbers = [i for i, word in enumerate(words) if word.isdigit()]
    return ".".join("*" if i in numbers[first:] else word for i, word in enumerate(words))
