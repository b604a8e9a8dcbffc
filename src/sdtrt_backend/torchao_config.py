"""This package's scheme as TorchAO configurations: ``quantize_(pipe.unet, SDInt8Config(recipe), filter_fn=...)``.

TorchAO hands a handler one module, without its path. The layer is found in the recipe by its weight's fingerprint; where one
weight serves two layers with different ranges, ``for_module`` names each layer instead (a ``FqnToConfig``).

A quantised layer is the same module object with another class, so that it also works where nobody puts a returned module
in the model, as in diffusers' ``TorchAoConfig``. Its state is plain tensors. Importing this file loads TorchAO.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors.torch import load_file
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from . import ops
from .errors import ModelError, RecipeError
from .fx import pair
from .kernels import NARROW, Problem, chooser, missing, provider
from .options import Options
from .quantize import FP8_HEADROOM, free_convs, plan, quantized_weights
from .recipe import Recipe, fingerprint, one_weight
from .rules import MODULES, TWO_CODES
from .stats import over_channels
from .values import DTYPES, FP8_MAX, INT8_MAX, INT16_MAX, UINT8_ZERO, Decision, Layer

log = logging.getLogger("sdtrt_backend")
ONEDNN_OUTPUTS = (torch.float32, torch.bfloat16)
MEASURED = "measured"  # the row of ``ops.KERNELS`` that picks the fastest kernel when it first sees a shape
# Equal input factors are one tensor, so that a compiler quantises once what several layers read
_FACTORS: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()


class SDInt8Config(AOBaseConfig):  # type: ignore[misc]
    """Calibrated static int8 for ``nn.Linear`` and ``nn.Conv2d``: inputs per tensor, weights per output channel.

    recipe: a Recipe or the folder of a saved one; exclude: glob patterns of module paths that stay as they are; two_codes: of
    those whose input is held in two 8-bit codes on the CPU, as the backend's option; name: the one layer this configuration is
    for, else a layer is found by its weight.
    Layers that ``rules.py`` keeps in the user's precision stay as they are; ``decisions`` names them with the reason.
    Raises RecipeError when two layers have one weight and different ranges: ``for_module`` tells them apart; OptionError for
    patterns that are no lists.
    """

    precision = "int8"

    def __init__(self, recipe: Recipe | str | os.PathLike[str], *, exclude: Sequence[str] = (),
                 two_codes: Sequence[str] = TWO_CODES, name: str | None = None) -> None:
        # TorchAO writes attributes without an underscore to JSON
        self._recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        self._decisions: dict[str, str] = {}
        self._names: dict[str, str] = {}
        patterns = Options.parse({"exclude": exclude, "two_codes": two_codes})
        self.exclude, self.two_codes = list(patterns.exclude), list(patterns.two_codes)
        self.model_hash, self.name = self._recipe.model_hash, name
        if name is not None and name not in self._recipe.layers:
            raise RecipeError.no_layer(name, self._recipe.layers)
        for other, layer in self._recipe.layers.items() if name is None else ():
            for code in layer.fingerprint.split():
                known = self._names.setdefault(code, other)
                if not self._alike(known, other):
                    raise RecipeError.one_weight(known, other, type(self).__name__)

    def _alike(self, a: str, b: str) -> bool:
        """Whether two layers of one weight are quantised alike."""
        layers, smoothing = self._recipe.layers, self._recipe.smoothing
        first, second = (smoothing.get(layers[n].group) for n in (a, b))
        same = first is second or (first is not None and second is not None and torch.equal(first, second))
        one, other = ((la.op, la.amax, la.plain_amax, la.low, la.high, la.keep is None, la.second is None)
                      for la in (layers[a], layers[b]))
        return same and one == other

    @classmethod
    def for_module(cls, module: torch.nn.Module, recipe: Recipe | str | os.PathLike[str], *,
                   exclude: Sequence[str] = (), two_codes: Sequence[str] = TWO_CODES) -> FqnToConfig:
        """One configuration per layer of ``module`` that the recipe names, for ``quantize_(module, ..., filter_fn=None)``.

        Raises RecipeError unless the weights are the calibrated ones.
        """
        recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        found = {name: fingerprint(child.get_parameter("weight")) for name, child in module.named_modules()
                 if type(child) in MODULES}
        recipe.check_model(found)
        return FqnToConfig(OrderedDict((name, cls(recipe, exclude=exclude, two_codes=two_codes, name=name)) for name in found
                                       if name in recipe.layers))

    @property
    def decisions(self) -> Mapping[str, str]:
        """Layer -> its precision, or the reason why it stayed as it was; of the layers seen so far."""
        return self._decisions

    def _layer(self, module: torch.nn.Module) -> Layer | None:
        """The recipe's layer that ``module`` is; None when the recipe does not know its weight."""
        weight = module.get_parameter("weight").detach()
        code = fingerprint(weight)
        name = self.name or next((self._names[c] for c in code.split() if c in self._names), None)
        if name is not None and not one_weight(self._recipe.layers[name].fingerprint, code):
            raise RecipeError.other_weight(name)
        if name is None:
            shape = "x".join(map(str, weight.shape))
            if not self._decisions:
                raise RecipeError.other_model(f"no layer of it has the weight of this {type(module).__name__} ({shape})")
            unknown = f"{type(module).__name__} {shape} {code}"
            self._decisions[unknown] = "the recipe has no layer with this weight"
            log.warning("%s stays in its own precision: %s", unknown, self._decisions[unknown])
            return None
        return Layer(name, MODULES[type(module)].name, name, name, weight, getattr(module, "groups", 1))

    def _decide(self, module: torch.nn.Module) -> Decision | None:
        layer = self._layer(module)
        if layer is None:
            return None
        free = free_convs(layer.weight.device, self.precision)
        decision = plan((layer,), self._recipe, tuple(self.exclude), free_convs=free,
                        two_codes=tuple(self.two_codes))[0]
        reason = _own_reason(module) if decision.quantized else decision.reason
        self._decisions[layer.name] = reason or self.precision
        log.info("%s: %s", layer.name, self._decisions[layer.name])
        return None if reason else decision


class SDFp8Config(SDInt8Config):
    """The same in float8_e4m3fn, for NVIDIA GPUs of compute capability 8.9 or newer: the weights of a linear share one
    scale, those of a convolution have one per output channel. ModelError for a module on any other device."""

    precision = "fp8"


@register_quantize_module_handler(SDFp8Config)
@register_quantize_module_handler(SDInt8Config)
def transform(module: torch.nn.Module, config: SDInt8Config, *, parameter_name: str = "weight") -> torch.nn.Module:
    """Quantise ``module`` in place, or leave it as the recipe and the rules say; returns it.

    A regular expression of ``FqnToConfig`` may also match biases, norms and activations: those stay as they are. ModelError
    for a module with submodules, where nothing would happen to the layers inside.
    """
    if next(module.children(), None) is not None:
        raise ModelError.not_a_layer(module, type(config).__name__)
    if type(module) not in MODULES or parameter_name != "weight":
        return module
    weight = module.get_parameter("weight")
    if weight.is_meta:
        raise ModelError.on_meta(type(module).__name__)
    refusal = unsupported(weight.device, config.precision)
    if refusal is not None:
        raise ModelError(refusal)
    decision = config._decide(module)
    if decision is None:
        return module
    smoothing = None if decision.smoothing is None else over_channels(decision.smoothing.to(weight.device), weight)
    decision = replace(decision, precision=config.precision)
    codes, scale = quantized_weights([decision], smoothing)[0]
    device, fp8 = codes.device, config.precision == "fp8"
    step, zero = (decision.amax * FP8_HEADROOM / FP8_MAX, 0) if fp8 else decision.int8_range
    return _become(module, codes.contiguous(), scale,
                   torch.tensor([step, zero, decision.largest_code], dtype=torch.float64, device=device),
                   None if smoothing is None else smoothing.reciprocal())


def unsupported(device: torch.device, precision: str) -> str | None:
    """Why layers of ``precision`` cannot run on ``device``, or None."""
    if device.type == "cuda":
        return missing(precision, torch.cuda.get_device_capability(device))
    if device.type == "cpu" and precision == "int8":
        return None if torch.backends.mkldnn.is_available() else "this PyTorch has no oneDNN, which runs int8 on the CPU"
    return (f"there are no {precision} kernels for {device.type}: int8 runs on the CPU and on NVIDIA GPUs, fp8 on NVIDIA GPUs; "
            "move the module first, or use SDInt8Config")


def _own_reason(module: torch.nn.Module) -> str | None:
    """Why a convolution cannot be quantised whatever its weights."""
    if not isinstance(module, torch.nn.Conv2d):
        return None
    if isinstance(module.padding, str):
        return f"its padding is given as {module.padding!r}, not in pixels"
    if module.weight.device.type != "cpu" and pair(module.dilation) != [1, 1]:
        return "dilated convolution: no 8-bit kernel"
    return None if module.padding_mode == "zeros" else f"its padding mode is {module.padding_mode}: no 8-bit kernel"


def _become(module: torch.nn.Module, codes: torch.Tensor, scale: torch.Tensor, step: torch.Tensor,
            inverse: torch.Tensor | None) -> torch.nn.Module:
    """Replace the weight of ``module`` by its codes, and its class by the quantised one."""
    kind = LAYERS[MODULES[type(module)].name]
    del module._parameters["weight"]
    if module.bias is not None:
        module.get_parameter("bias").requires_grad_(False)  # no gradient passes through 8 bits
    for name, tensor in (("codes", codes), ("weight_scale", scale), ("input_scale", step), ("inverse_smoothing", inverse)):
        module.register_buffer(name, tensor)
    module.__class__ = kind
    assert isinstance(module, QuantizedLayer)
    module.prepare()
    return module


class QuantizedLayer(torch.nn.Module):
    """What the quantised linear and convolution share.

    codes: int8 or float8_e4m3fn, shaped like the weight; weight_scale: fp32 [out] or [1]; input_scale: fp64 [3], the scale,
    the zero point in -128..127 and the largest code, 32767 where the input has two codes (``rules.TWO_CODES``);
    inverse_smoothing: fp32 [in] (of a convolution [in, 1, 1]) or None; bias as it was. ``prepare`` derives the other
    attributes from these.
    """

    codes: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor
    inverse_smoothing: torch.Tensor | None
    bias: torch.Tensor | None

    def prepare(self) -> None:
        """Bring the state into the form that the device's kernels take."""
        self.packed = self.factor = self.scale = self.step = self.zeros = None
        if self.codes.is_meta:
            return
        self.step, self.zero_point, self.largest = float(self.input_scale[0]), int(self.input_scale[1]), int(self.input_scale[2])
        inverse = torch.ones(1, device=self.codes.device) if self.inverse_smoothing is None else self.inverse_smoothing
        self.factor = _shared(inverse * (1 / self.step))
        if self.codes.device.type == "cpu" and self.codes.dtype is torch.int8:
            self.zeros = torch.zeros_like(self.weight_scale, dtype=torch.int32)
            self.packed = self.pack()
        else:
            if self.codes.dim() == 4:
                self.codes = self.codes.contiguous(memory_format=torch.channels_last)
            self.scale = self.weight_scale * self.step

    def pack(self) -> torch.Tensor:
        """The codes as oneDNN wants them; the size of the input is not known yet and does not matter to the layout."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """x / (smoothing * step), rounded to even and saturated; uint8 with zero point 128 for oneDNN, else the codes' dtype."""
        factor: Any = self.factor
        y: torch.Tensor = x * factor
        if self.codes.dtype is not torch.int8:
            return y.clamp(-FP8_MAX, FP8_MAX).to(self.codes.dtype)
        y = (y.round() + self.zero_point).clamp(-INT8_MAX - 1, INT8_MAX)
        return (y + UINT8_ZERO).to(torch.uint8) if self.packed is not None else y.to(torch.int8)

    def by_onednn(self, x: torch.Tensor, kernel: Callable[..., torch.Tensor], *geometry: Any) -> torch.Tensor:
        """One product, or the sum of those of both codes."""
        def product(code: torch.Tensor, step: float, zero: int, bias: torch.Tensor | None, out: torch.dtype) -> torch.Tensor:
            if code.dim() == 4 and self.codes.dim() == 4:
                code = code.contiguous(memory_format=torch.channels_last)
            return kernel(code, step, zero, self.packed, self.weight_scale, self.zeros, bias, *geometry, out)

        bias, step = self.bias_fp32(), self.step
        assert step is not None
        if self.largest == INT8_MAX:
            out = x.dtype if x.dtype in ONEDNN_OUTPUTS else torch.float32
            return product(self.encode(x), step, UINT8_ZERO + self.zero_point, bias, out).to(x.dtype)
        factor: Any = self.factor
        code = (x * factor).round().clamp(-INT16_MAX - 1, INT16_MAX)
        high = (code / 256).floor()
        y = product((high + UINT8_ZERO).to(torch.uint8), 256 * step, UINT8_ZERO, bias, torch.float32)
        return (y + product((code - 256 * high).to(torch.uint8), step, 0, None, torch.float32)).to(x.dtype)

    def bias_fp32(self) -> torch.Tensor | None:
        """Kernels add the bias to an int32 or fp32 accumulator."""
        return None if self.bias is None else self.bias.float()

    def check(self, x: torch.Tensor) -> None:
        """ModelError where no kernel takes this input."""
        if x.device.type == "cpu" and self.packed is not None:
            return
        if self.zero_point or self.largest > INT8_MAX or pair(getattr(self, "dilation", 1)) != [1, 1]:
            raise ModelError(f"{type(self).__name__} was quantised for the CPU, whose kernels take zero points, two codes and "
                             f"dilations, and is on {x.device} now: quantise the module anew there")
        if x.device.type != "cuda" or x.dtype not in NARROW:
            raise ModelError.no_kernel(type(self).__name__, str(self.codes.dtype)[6:], x.device, x.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # half() and to(bfloat16) speak of the module's precision; scales stay exact
        exact = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.prepare()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = destination[f"{prefix}codes"].contiguous()  # as safetensors wants it

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's packed tensors cannot be copied
        return {**self.__dict__, "packed": None, "factor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()


class QuantizedLinear(QuantizedLayer):
    """x [..., in] fp32, fp16 or bf16 -> [..., out] in the same dtype."""

    in_features: int
    out_features: int

    def pack(self) -> torch.Tensor:
        packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(self.codes, None)
        return packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.check(input)
        if self.packed is not None:
            return self.by_onednn(input, ops.packed_linear)
        y: torch.Tensor = ops.linear8(self.encode(input), self.codes, self.scale, self.bias_fp32(), input.dtype, MEASURED)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, codes={str(self.codes.dtype)[6:]}"


class QuantizedConv2d(QuantizedLayer):
    """x [n, in, h, w] fp32, fp16 or bf16 -> [n, out, h', w'] in the same dtype, channels last."""

    in_channels: int
    out_channels: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def geometry(self) -> list[list[int]]:
        return [pair(self.stride), pair(self.padding), pair(self.dilation)]

    def pack(self) -> torch.Tensor:
        packed: torch.Tensor = torch.ops.onednn.qconv_prepack(self.codes, self.weight_scale, self.step,
                                                              UINT8_ZERO + self.zero_point, *self.geometry(), 1, None)
        return packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.check(input)
        if self.packed is not None:
            return self.by_onednn(input, ops.packed_conv2d, *self.geometry())
        code, (stride, padding, _) = self.encode(input).contiguous(memory_format=torch.channels_last), self.geometry()
        y: torch.Tensor = ops.conv8(code, self.codes, self.scale, self.bias_fp32(), None, stride, padding, input.dtype, MEASURED)
        return y

    def extra_repr(self) -> str:
        return (f"{self.in_channels}, {self.out_channels}, kernel_size={tuple(self.codes.shape[2:])}, stride={self.stride}, "
                f"padding={self.padding}, codes={str(self.codes.dtype)[6:]}")


LAYERS: dict[str, type[QuantizedLayer]] = {"linear": QuantizedLinear, "conv2d": QuantizedConv2d}


def load_quantized(module: torch.nn.Module, file: str | os.PathLike[str]) -> torch.nn.Module:
    """Load ``safetensors.torch.save_file(quantised.state_dict(), file)`` into a freshly made module of the same model.

    The layers that the file holds as codes become quantised layers, without any recipe; returns ``module``.
    Raises ModelError, before anything is changed, when the file does not fit the module.
    """
    state = load_file(file)
    named = dict(module.named_modules())
    names = [key.removesuffix(".codes") for key in state if key.endswith(".codes")]
    for name in names:
        child = named.get(name)
        if child is None or type(child) not in MODULES or child.get_parameter("weight").shape != state[f"{name}.codes"].shape:
            raise ModelError.does_not_fit(file, name, child)
    own = {key for key in module.state_dict() if key.removesuffix(".weight") not in names}
    held = {key for key in state if key.rpartition(".")[2] not in ("codes", "weight_scale", "input_scale", "inverse_smoothing")}
    if own != held:
        raise ModelError.does_not_fit(file, next(iter(own ^ held)), None)
    for name in names:
        codes, scale, step = (state[f"{name}.{part}"] for part in ("codes", "weight_scale", "input_scale"))
        device = named[name].get_parameter("weight").device
        inverse = state.get(f"{name}.inverse_smoothing")
        _become(named[name], codes.to(device), scale.to(device), step.to(device), None if inverse is None else inverse.to(device))
    module.load_state_dict(state)
    return module


def _shared(factor: torch.Tensor) -> torch.Tensor:
    content = hashlib.sha256(factor.cpu().numpy().tobytes()).hexdigest()
    return _FACTORS.setdefault(f"{factor.device} {tuple(factor.shape)} {content}", factor)


def _measured(op: str, x: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int],
              dtype: torch.dtype) -> tuple[str, str]:
    """(kernel, precision): the fastest one for this shape on this GPU; timed once, then remembered on disk."""
    precision = next(name for name, codes in DTYPES.items() if codes is weight.dtype)
    rows = (prod(x.shape[:-1]), x.shape[-1]) if op == "linear" else tuple(x.shape)
    problem = Problem(op, rows, tuple(weight.shape), (stride[0], stride[1]), (padding[0], padding[1]), dtype)
    best = chooser(x.device).best(problem, precision)
    if best is None:
        raise ModelError(f"no {precision} kernel on this GPU takes {problem}; exclude the layer: "
                         "SDInt8Config(recipe, exclude=[...])")
    return best.kernel, precision


def _measured_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
                     variant: str) -> torch.Tensor:
    kernel, precision = _measured("linear", x, weight, [1, 1], [0, 0], dtype)
    row = provider("linear8", kernel, precision)
    y: torch.Tensor = ops.linear8(x, weight, scale if row.one_scale else scale.expand(weight.shape[0]).contiguous(),
                                  bias.to(dtype) if bias is not None and row.narrow_bias else bias, dtype, kernel)
    return y


def _measured_conv(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
                   residual: torch.Tensor | None, stride: list[int], padding: list[int], dtype: torch.dtype,
                   variant: str) -> torch.Tensor:
    kernel, _ = _measured("conv2d", x, weight, stride, padding, dtype)
    y: torch.Tensor = ops.conv8(x, weight, scale, bias, residual, stride, padding, dtype, kernel)
    return y


ops.KERNELS["linear8", MEASURED] = _measured_linear
ops.KERNELS["conv8", MEASURED] = _measured_conv
