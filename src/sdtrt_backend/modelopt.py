"""NVIDIA Model Optimizer: ranges and smoothing read from a module that ``mtq.quantize`` calibrated, and written into one.

Their ``pre_quant_scale`` multiplies a linear's input, so it is the inverse of a recipe's divisor, and the weight they keep is
already multiplied by that divisor. A recipe names original weights. Importing this file loads modelopt.

Checked against nvidia-modelopt 0.47: ``TensorQuantizer``, and ``smoothquant`` in ``quantization/model_calib.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer

from .errors import ModelError, RecipeError
from .provenance import fingerprint, model_hash, versions
from .rules import MODULES
from .stats import relative_error
from .values import LayerRecipe

if TYPE_CHECKING:  # recipe.py calls this file
    from .recipe import Recipe

log = logging.getLogger("sdtrt_backend")

# What a recipe cannot say of an enabled quantizer, in the order in which it is looked at; {} is the quantizer
Refusals = tuple[tuple[Callable[[Any], bool], str], ...]
_EITHER: Refusals = (
    (lambda q: q.block_sizes is not None, "in blocks with a scale each (block_sizes {0.block_sizes})"),
    (lambda q: q.num_bits != 8, "in another format (num_bits {0.num_bits})"),
    (lambda q: q._dynamic, "with ranges found at run time (type dynamic)"),
    (lambda q: q.unsigned, "to unsigned codes"),
    (lambda q: q.bias is not None, "with a zero point (bias {0.bias})"),
    (lambda q: q.rotate_is_enabled, "after a rotation"),
    (lambda q: q.backend is not None, "by a function of its own (backend {0.backend})"),
    (lambda q: q._use_constant_amax, "with a constant range"),
    (lambda q: q.amax is None or not bool(q.amax.isfinite().all()), "without a calibrated range: it saw no finite values"),
)
_INPUT: Refusals = (
    *_EITHER,
    (lambda q: q.axis is not None or q.amax.numel() != 1, "with a range per channel (axis {0.axis})"),
    (lambda q: q.narrow_range, "without the code -128 (narrow_range)"),
)
_WEIGHT: Refusals = (
    *_EITHER,
    (lambda q: q.axis not in (0, (0,)), "with other ranges than one per output channel (axis {0.axis})"),
)


def from_modelopt(make: type[Recipe], module: torch.nn.Module, original: torch.nn.Module | None = None) -> Recipe:
    """The recipe of a module that ``mtq.quantize`` calibrated or ``mto.restore`` restored, for the module it was made from.

    Takes input amax (fp32) and divisor 1 / pre_quant_scale (fp32 [in]) of every nn.Linear and nn.Conv2d whose input and weight
    quantizers are enabled: int8, input per tensor, weight per output channel. A layer whose quantizers are disabled is not in
    the recipe, also where it still pays for a pre_quant_scale: the recipe is for the original module, which has none.
    Other enabled quantizers (of norms, of attention) have no place in a recipe; a warning and the provenance name them.
    Smoothed layers have a factor, so a group, of their own. Unsmoothed siblings of one amax share a group. Ranges of weights that
    are not the weight's own, as quantisation-aware training leaves them, are taken as they are.

    original: the module before ``mtq.quantize``, loaded afresh. Smoothing rounds a weight once, to the module's dtype, and a
    fingerprint is of the weight before. Without ``original`` it is recovered when every weight that the rounding allows has the
    same fingerprint, which a bf16 checkpoint run in fp32 has, and an fp16 module never.

    Raises ModelError without an enabled quantizer; RecipeError for what a recipe cannot hold, for a fingerprint that cannot be
    recovered, and when ``original`` is another model. The module is not changed.
    """
    module, original = _uncompiled(module), _uncompiled(original)
    algorithm = _algorithm(module)
    alpha = algorithm.get("alpha") if algorithm.get("method") == "smoothquant" else None
    layers: dict[str, LayerRecipe] = {}
    smoothing: dict[str, torch.Tensor] = {}
    siblings: dict[tuple[str, float], str] = {}
    weight_amax: dict[str, torch.Tensor] = {}
    unsmoothed = []
    for name, layer, op in quantized_layers(module):
        divisor = divisor_of(layer)
        if not _enabled(name, layer):
            unsmoothed += [name] if divisor is not None else []
            continue
        _check(name, layer, op)
        known, amax = original_fingerprint(name, layer, original), float(layer.input_quantizer.amax)
        trained = layer.weight_quantizer.amax.detach().float().flatten().cpu()
        if not _own_range(layer.weight, trained):
            weight_amax[name] = trained
        if divisor is None:
            group = siblings.setdefault((name.rpartition(".")[0], amax), name)
            layers[name] = LayerRecipe(op, known, group, amax)
        else:
            layers[name], smoothing[name] = LayerRecipe(op, known, name, amax, alpha), divisor.cpu()
    if not layers:
        raise ModelError.no_quantizers(module)
    others = [name for name, q in module.named_modules() if isinstance(q, TensorQuantizer) and q.is_enabled
              and name.rpartition(".")[0] not in layers]
    if others:
        log.warning("from_modelopt: %d quantizers (%s, ...) are neither of an nn.Linear nor of an nn.Conv2d; the recipe leaves "
                    "their tensors unquantised", len(others), ", ".join(others[:3]))
    facts = {"front_door": "modelopt", "algorithm": algorithm, "left_out": others, "unsmoothed": unsmoothed,
             "versions": versions(("sdtrt_backend", "torch", "nvidia-modelopt", "diffusers", "transformers"))}
    return make(model_hash((name, layer.fingerprint) for name, layer in layers.items()), layers, smoothing, provenance=facts,
                weight_amax=weight_amax)


@torch.no_grad()
def to_modelopt(recipe: Recipe, module: torch.nn.Module, original: torch.nn.Module | None = None,
                exclude: Iterable[str] = ()) -> None:
    """Write ``recipe`` into a module that ``mtq.quantize`` or ``mto.restore`` returned, in place.

    Every layer of the recipe: int8 quantizers, input amax per tensor, pre_quant_scale = 1 / divisor in the weight's dtype,
    weight W * divisor with max |W * divisor| per output channel, or the range that the recipe names. Every other quantizer of the
    module is disabled, and a pre_quant_scale that such a layer had is taken out of it and of its weight. A factor that the module
    already has leaves its weight as it is; any other change of a smoothed weight starts from ``original``, or from the weight
    divided back, which differs by a rounding.

    exclude: glob patterns of module paths that stay unquantised. A recipe also holds layers that ``rules.KEEP`` keeps in the
    user's precision; pass its patterns for the layers of sd_int8.
    Raises ModelError without quantizers, RecipeError for weights other than the calibrated ones; then nothing was changed.
    """
    module, original = _uncompiled(module), _uncompiled(original)
    found = [(name, layer) for name, layer, _ in quantized_layers(module)]
    if not found:
        raise ModelError.no_quantizers(module)
    for name, layer in found:
        _check_weight(name, layer)
        if original is not None:
            _original_weight(name, layer, original)
    recipe.check_model({n: original_fingerprint(n, layer, original) for n, layer in found if n in recipe.layers})
    excluded = {name for name, _ in found if any(fnmatchcase(name, pattern) for pattern in exclude)}
    excluded |= {name for name, layer in recipe.layers.items() if layer.keep or layer.second}
    for quantizer in module.modules():
        if isinstance(quantizer, TensorQuantizer):
            quantizer.disable()
    for name, layer in found:
        entry = None if name in excluded else recipe.layers.get(name)
        amax, divisor = (0.0, None) if entry is None else recipe.input_of(name, smooth_convs=False)
        _smooth(name, layer, divisor, original)
        if entry is not None:
            weight = layer.weight.detach()
            reach = recipe.weight_amax.get(name)
            own = weight.abs().amax([*range(1, weight.dim())], keepdim=True)
            _set(layer.input_quantizer, None, torch.tensor(amax, device=weight.device))
            _set(layer.weight_quantizer, 0, own if reach is None else reach.to(own).view_as(own))


def quantized_layers(module: torch.nn.Module) -> Iterator[tuple[str, Any, str]]:
    """(path, layer, operation) of every nn.Linear and nn.Conv2d that modelopt converted, enabled or not."""
    if not isinstance(module, torch.nn.Module):
        raise ModelError.no_quantizers(module)
    for name, child in module.named_modules():
        op = next((rule.name for kind, rule in MODULES.items() if isinstance(child, kind)), None)
        if op is not None and isinstance(child, QuantModule) and hasattr(child, "weight_quantizer"):
            yield name, child, op


def divisor_of(layer: Any) -> torch.Tensor | None:
    """What a linear's input is divided by, fp32 [in], or None. A disabled quantizer still applies its pre_quant_scale."""
    scale = layer.input_quantizer.pre_quant_scale
    return None if scale is None else scale.detach().float().flatten().reciprocal()


def original_fingerprint(name: str, layer: Any, original: torch.nn.Module | None) -> str:
    """Fingerprint of the weight before smoothing. Raises RecipeError when the rounding left more than one possible."""
    if original is not None:
        return fingerprint(_original_weight(name, layer, original))
    divisor = divisor_of(layer)
    if divisor is None:
        return fingerprint(layer.weight)
    # W * d was rounded once, and with fp16 or bf16 weights d itself: half an eps each, to first order
    slack = 1.01 * torch.finfo(layer.weight.dtype).eps
    back = layer.weight.detach().double() / divisor.double()
    least, most = (fingerprint(back * (1 + end)).split()[0] for end in (-slack, slack))
    if least != most:  # rounding to bf16 is monotonic: where both ends agree, so does all between them
        raise RecipeError.rounded(name, layer.weight.dtype)
    return least


def _original_weight(name: str, layer: Any, original: torch.nn.Module) -> torch.Tensor:
    try:
        weight = original.get_parameter(f"{name}.weight" if name else "weight").detach().to(layer.weight.device)
    except AttributeError:
        raise RecipeError.other_model(f"original has no layer {name}") from None
    if weight.shape != layer.weight.shape:
        raise RecipeError.other_model(f"the weight of {name} is {tuple(weight.shape)} in original and "
                                      f"{tuple(layer.weight.shape)} in the quantised module")
    divisor = divisor_of(layer)
    smoothed = weight if divisor is None else weight.float() * divisor
    if not relative_error(layer.weight, smoothed) <= 2 * max(torch.finfo(w.dtype).eps for w in (weight, layer.weight)):
        raise RecipeError.other_model(f"the weight of {name} in original is not the one that was quantised")
    return weight


def _uncompiled(module: Any) -> Any:
    """The user's own module, whatever torch.compile made of it: the names of layers are its."""
    return getattr(module, "_orig_mod", module)


def _enabled(name: str, layer: Any) -> bool:
    """Whether input and weight are quantised; raises RecipeError when only one is."""
    now = tuple(q.is_enabled for q in (layer.input_quantizer, layer.weight_quantizer))
    if now[0] != now[1]:
        raise RecipeError.not_expressible(name, "its input is quantised and its weight is not" if now[0] else
                                          "its weight is quantised and its input is not")
    return all(now)


def _check(name: str, layer: Any, op: str) -> None:
    """Raise RecipeError when an enabled layer is quantised in a way that a recipe cannot say."""
    _check_weight(name, layer)
    for what, refusals in (("input", _INPUT), ("weight", _WEIGHT)):
        quantizer = getattr(layer, f"{what}_quantizer")
        for holds, how in refusals:
            if holds(quantizer):
                raise RecipeError.not_expressible(name, f"its {what} is quantised {how.format(quantizer)}")
    if layer.output_quantizer.is_enabled:
        raise RecipeError.not_expressible(name, "its output is quantised too")
    if op != "linear" and divisor_of(layer) is not None:
        raise RecipeError.not_expressible(name, "it is a smoothed convolution")


def _own_range(weight: torch.Tensor, amax: torch.Tensor) -> bool:
    """Whether ``amax`` [out] is max |W| of every output channel, to the rounding of the weight's dtype."""
    own = weight.detach().float().flatten(1).abs().amax(1).cpu()
    return torch.allclose(amax, own, rtol=torch.finfo(weight.dtype).eps, atol=0.0)


def _check_weight(name: str, layer: Any) -> None:
    """Raise RecipeError when the weight is not what was calibrated, smoothed or not."""
    quantizers = (layer.input_quantizer, layer.weight_quantizer)
    if not all(isinstance(q, TensorQuantizer) for q in quantizers):
        raise RecipeError.not_expressible(name, "a tensor of it is quantised to several formats one after the other")
    if not (layer.weight_quantizer.fake_quant and layer.weight.is_floating_point()):
        raise RecipeError.not_expressible(name, "its weight is compressed: only codes are left of it")
    if layer.weight_quantizer.pre_quant_scale is not None or hasattr(layer.weight_quantizer, "_svdquant_lora_a"):
        raise RecipeError.not_expressible(name, "its weight quantizer changes the weight before it is quantised")


def _smooth(name: str, layer: Any, divisor: torch.Tensor | None, original: torch.nn.Module | None) -> None:
    """Make ``divisor`` (fp32 [in] or None) the factor of the layer's input and weight."""
    quantizer, weight, now = layer.input_quantizer, layer.weight.detach(), divisor_of(layer)
    divisor = None if divisor is None else divisor.to(weight.device)
    if _has_factor(quantizer, now, divisor):
        return
    plain = weight.float() if now is None else weight.float() / now
    if original is not None:
        plain = _original_weight(name, layer, original).float()
    for stale in ("_pre_quant_scale", "_amax_for_smoothing"):  # the second: their ranges before smoothing, to undo it with
        if hasattr(quantizer, stale):
            delattr(quantizer, stale)
    quantizer._enable_pre_quant_scale = True
    if divisor is not None:
        plain = plain * divisor
        quantizer.pre_quant_scale = divisor.reciprocal().to(weight.dtype)
    layer.weight.copy_(plain)


def _has_factor(quantizer: Any, now: torch.Tensor | None, divisor: torch.Tensor | None) -> bool:
    if now is None or divisor is None:
        return now is divisor
    scale = quantizer.pre_quant_scale.flatten()
    # the divisor was read from this scale, or the scale made from it: a reciprocal's reciprocal may be one rounding away
    return torch.equal(now, divisor) or torch.equal(scale, divisor.reciprocal().to(scale.dtype))


def _set(quantizer: Any, axis: int | None, amax: torch.Tensor) -> None:
    """Int8 with this range, whatever it was before."""
    quantizer.reset_amax()
    quantizer.set_from_attribute_config(QuantizerAttributeConfig(num_bits=8, axis=axis))
    quantizer.amax = amax


def _algorithm(module: torch.nn.Module) -> Mapping[str, Any]:
    """The configuration of the last calibration, {} where modelopt kept none."""
    modes = getattr(module, ModeloptStateManager._state_key, [])
    configs = [dict(state["config"]) for _, state in modes if dict(state["config"]).get("method")]
    return {key: value for key, value in configs[-1].items() if isinstance(value, str | int | float)} if configs else {}
