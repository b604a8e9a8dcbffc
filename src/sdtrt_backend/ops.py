"""The 8-bit operators that lowerings share, as custom operators with fake implementations and a plain-torch reference.

A lowering replaces dequantize -> conv/linear by one of these; a device's compiler pass replaces them by its kernels.
Where no pass does, the reference below runs: slow, obvious, and the oracle of every kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .values import FP8_MAX, INT8_MAX

LIBRARY = torch.library.Library("sdtrt_backend", "DEF")
LIBRARY.define("int8_conv2d(Tensor x, float x_scale, int x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias, "
               "int[] stride, int[] padding, int[] dilation, ScalarType dtype) -> Tensor")
LIBRARY.define("int8_linear(Tensor x, float x_scale, int x_zero_point, Tensor weight, Tensor weight_scale, Tensor? bias, "
               "ScalarType dtype) -> Tensor")
LIBRARY.define("group_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps) -> Tensor")
int8_conv2d = torch.ops.sdtrt_backend.int8_conv2d.default
int8_linear = torch.ops.sdtrt_backend.int8_linear.default
group_norm = torch.ops.sdtrt_backend.group_norm.default


def _dequantized(x: torch.Tensor, x_scale: float, x_zero_point: int, weight: torch.Tensor,
                 weight_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight_scale.view(-1, *[1] * (weight.dim() - 1))
    return (x.float() - x_zero_point) * x_scale, weight.float() * scale


@torch.library.impl(LIBRARY, "int8_conv2d", "CompositeExplicitAutograd")
def _conv2d(x: torch.Tensor, x_scale: float, x_zero_point: int, weight: torch.Tensor, weight_scale: torch.Tensor,
            bias: torch.Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
            dtype: torch.dtype) -> torch.Tensor:
    """x int8 or uint8 [n, in, h, w] (h, w = pixels), weight int8 [out, in, kh, kw] -> dtype [n, out, h', w']."""
    a, w = _dequantized(x, x_scale, x_zero_point, weight, weight_scale)
    y = torch.nn.functional.conv2d(a, w, None if bias is None else bias.float(), stride, padding, dilation)
    return y.to(dtype, memory_format=torch.channels_last)


@torch.library.impl(LIBRARY, "int8_linear", "CompositeExplicitAutograd")
def _linear(x: torch.Tensor, x_scale: float, x_zero_point: int, weight: torch.Tensor, weight_scale: torch.Tensor,
            bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """x int8 or uint8 [..., in], weight int8 [out, in] -> dtype [..., out]."""
    a, w = _dequantized(x, x_scale, x_zero_point, weight, weight_scale)
    return torch.nn.functional.linear(a, w, None if bias is None else bias.float()).to(dtype)


@torch.library.register_fake("sdtrt_backend::int8_conv2d", lib=LIBRARY)
def _conv2d_fake(x: torch.Tensor, x_scale: float, x_zero_point: int, weight: torch.Tensor, weight_scale: torch.Tensor,
                 bias: torch.Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
                 dtype: torch.dtype) -> torch.Tensor:
    size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    return torch.empty((x.shape[0], weight.shape[0], *size), dtype=dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("sdtrt_backend::int8_linear", lib=LIBRARY)
def _linear_fake(x: torch.Tensor, x_scale: float, x_zero_point: int, weight: torch.Tensor, weight_scale: torch.Tensor,
                 bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


@torch.library.impl(LIBRARY, "group_norm", "CompositeExplicitAutograd")
def _group_norm(x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """ATen's own kernel, opaque to the compiler; x [n, channels, ...], any dense layout -> the same."""
    n, channels = x.shape[:2]
    x = _dense(x)
    return torch.native_group_norm(x, weight, bias, n, channels, x.numel() // (n * channels), groups, eps)[0]


@torch.library.register_fake("sdtrt_backend::group_norm", lib=LIBRARY)
def _group_norm_fake(x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None,
                     eps: float) -> torch.Tensor:
    return torch.empty_like(_dense(x))


def _dense(x: torch.Tensor) -> torch.Tensor:
    """ATen's kernel takes contiguous and channels-last tensors only."""
    return x if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) else x.contiguous()


# --- oneDNN with the weight already packed, for layers that hold it themselves: Inductor's own lowering of oneDNN's operators
# wants the packed weight to be a constant of the graph, which it is only under freezing ----------------------------------
LIBRARY.define("packed_conv2d(Tensor x, float x_scale, int x_zero_point, Tensor packed, Tensor weight_scale, Tensor weight_zero, "
               "Tensor? bias, int[] stride, int[] padding, int[] dilation, ScalarType dtype) -> Tensor")
LIBRARY.define("packed_linear(Tensor x, float x_scale, int x_zero_point, Tensor packed, Tensor weight_scale, Tensor weight_zero, "
               "Tensor? bias, ScalarType dtype) -> Tensor")
packed_conv2d = torch.ops.sdtrt_backend.packed_conv2d.default
packed_linear = torch.ops.sdtrt_backend.packed_linear.default


@torch.library.impl(LIBRARY, "packed_conv2d", "CompositeExplicitAutograd")
def _packed_conv2d(x: torch.Tensor, x_scale: float, x_zero_point: int, packed: torch.Tensor, weight_scale: torch.Tensor,
                   weight_zero: torch.Tensor, bias: torch.Tensor | None, stride: list[int], padding: list[int],
                   dilation: list[int], dtype: torch.dtype) -> torch.Tensor:
    """x uint8 [n, in, h, w], packed by onednn.qconv_prepack from int8 [out, in, kh, kw], weight_scale fp32 [out], weight_zero
    int32 [out], bias fp32 [out] -> fp32 or bf16 [n, out, h', w'], channels last."""
    y: torch.Tensor = torch.ops.onednn.qconv_pointwise.default(x, x_scale, x_zero_point, packed, weight_scale, weight_zero, bias,
                                                               stride, padding, dilation, 1, 1.0, 0, dtype, "none", [], "")
    return y


@torch.library.impl(LIBRARY, "packed_linear", "CompositeExplicitAutograd")
def _packed_linear(x: torch.Tensor, x_scale: float, x_zero_point: int, packed: torch.Tensor, weight_scale: torch.Tensor,
                   weight_zero: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """x uint8 [..., in], packed by onednn.qlinear_prepack from int8 [out, in], the rest as above -> fp32 or bf16 [..., out]."""
    y: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(x, x_scale, x_zero_point, packed, weight_scale, weight_zero,
                                                                 bias, 1.0, 0, dtype, "none", [], "")
    return y


@torch.library.register_fake("sdtrt_backend::packed_conv2d", lib=LIBRARY)
def _packed_conv2d_fake(x: torch.Tensor, x_scale: float, x_zero_point: int, packed: torch.Tensor, weight_scale: torch.Tensor,
                        weight_zero: torch.Tensor, bias: torch.Tensor | None, stride: list[int], padding: list[int],
                        dilation: list[int], dtype: torch.dtype) -> torch.Tensor:
    y: torch.Tensor = _conv2d_fake(x, x_scale, x_zero_point, packed, weight_scale, bias, stride, padding, dilation, dtype)
    return y


@torch.library.register_fake("sdtrt_backend::packed_linear", lib=LIBRARY)
def _packed_linear_fake(x: torch.Tensor, x_scale: float, x_zero_point: int, packed: torch.Tensor, weight_scale: torch.Tensor,
                        weight_zero: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=dtype)


# --- operators whose kernel is chosen by measurement: ``kernel`` names a row of KERNELS ---------------------------------
LIBRARY.define("linear8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype, str kernel) -> Tensor")
LIBRARY.define("linear_gelu8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor out_scale, ScalarType dtype, "
               "str kernel) -> Tensor")
LIBRARY.define("conv8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
               "ScalarType dtype, str kernel) -> Tensor")
LIBRARY.define("quantize_fp8(Tensor x, float scale) -> Tensor")
LIBRARY.define("dequantize_fp8(Tensor q, Tensor scale, ScalarType dtype) -> Tensor")
linear8 = torch.ops.sdtrt_backend.linear8.default
linear_gelu8 = torch.ops.sdtrt_backend.linear_gelu8.default
conv8 = torch.ops.sdtrt_backend.conv8.default
quantize_fp8 = torch.ops.sdtrt_backend.quantize_fp8.default
dequantize_fp8 = torch.ops.sdtrt_backend.dequantize_fp8.default

# (operator, provider) -> function(*arguments of the operator, variant); providers add theirs when they are imported
KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}
# kernels of attention_fp8 take heads whose width is a multiple of this; others are filled up with codes of 0
ATTENTION_FP8_UNIT = 16
# kernel of attention_fp8 -> dtype of its result
ATTENTION_FP8_OUT = {"cudnn": torch.float8_e4m3fn, "fa3": torch.bfloat16, "reference": torch.float8_e4m3fn}
# operators whose kernels take the name of a variant as their last argument
VARIED = ("linear8", "linear_gelu8", "conv8", "attention8")


def _run(op: str, kernel: str, *arguments: Any) -> Any:
    """``kernel`` is "provider" or "provider:variant". The GPU of the tensors is the current one meanwhile: libraries and Triton
    launch on that."""
    provider, _, variant = kernel.partition(":")
    with torch.cuda.device_of(arguments[0]):
        return KERNELS[op, provider](*arguments, *([variant] if op in VARIED else []))


@torch.library.impl(LIBRARY, "linear8", "CompositeExplicitAutograd")
def _linear8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
             kernel: str) -> torch.Tensor:
    """x int8 or float8_e4m3fn [..., in], weight likewise [out, in], scale fp32 [out] or [1] (input scale * weight scale),
    bias [out] -> dtype [..., out] = (x W^T) * scale + bias; of float8_e4m3fn saturated, by kernels whose row writes codes."""
    y: torch.Tensor = _run("linear8", kernel, x, weight, scale, bias, dtype)
    return y


@torch.library.impl(LIBRARY, "linear_gelu8", "CompositeExplicitAutograd")
def _linear_gelu8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
                  out_scale: torch.Tensor, dtype: torch.dtype, kernel: str) -> torch.Tensor:
    """gelu, by its formula with tanh, of what ``linear8`` gives, * out_scale fp32 [out], rounded and saturated -> 8-bit dtype
    [..., out]."""
    y: torch.Tensor = _run("linear_gelu8", kernel, x, weight, scale, bias, out_scale, dtype)
    return y


@torch.library.impl(LIBRARY, "conv8", "CompositeExplicitAutograd")
def _conv8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
           stride: list[int], padding: list[int], dtype: torch.dtype, kernel: str) -> torch.Tensor:
    """x int8 or float8_e4m3fn [n, in, h, w], weight likewise [out, in, kh, kw], scale fp32 [out], bias fp32 [out],
    residual like the result -> dtype [n, out, h', w'], channels last = conv(x, W) * scale + bias + residual."""
    y: torch.Tensor = _run("conv8", kernel, x, weight, scale, bias, residual, stride, padding, dtype)
    return y


@torch.library.register_fake("sdtrt_backend::linear8", lib=LIBRARY)
def _linear8_fake(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
                  kernel: str) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("sdtrt_backend::linear_gelu8", lib=LIBRARY)
def _linear_gelu8_fake(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
                       out_scale: torch.Tensor, dtype: torch.dtype, kernel: str) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("sdtrt_backend::conv8", lib=LIBRARY)
def _conv8_fake(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
                residual: torch.Tensor | None, stride: list[int], padding: list[int], dtype: torch.dtype,
                kernel: str) -> torch.Tensor:
    size = [(x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in (0, 1)]
    return torch.empty((x.shape[0], weight.shape[0], *size), dtype=dtype, device=x.device, memory_format=torch.channels_last)


def reference_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
                     variant: str = "") -> torch.Tensor:
    """Plain torch in fp32: the oracle of every linear8 kernel."""
    y = torch.nn.functional.linear(x.float(), weight.float()) * scale
    return encode(y if bias is None else y + bias.float(), None, dtype)


def reference_conv(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
                   residual: torch.Tensor | None, stride: list[int], padding: list[int], dtype: torch.dtype,
                   variant: str = "") -> torch.Tensor:
    """Plain torch in fp32: the oracle of every conv8 kernel."""
    y = torch.nn.functional.conv2d(x.float(), weight.float(), None, stride, padding) * scale.view(1, -1, 1, 1)
    if bias is not None:
        y = y + bias.float().view(1, -1, 1, 1)
    return (y if residual is None else y + residual.float()).to(dtype, memory_format=torch.channels_last)


def reference_linear_gelu(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
                          out_scale: torch.Tensor, dtype: torch.dtype, variant: str = "") -> torch.Tensor:
    """Plain torch in fp32."""
    y = reference_linear(x, weight, scale, bias, torch.float32)
    return encode(torch.nn.functional.gelu(y, approximate="tanh"), out_scale, dtype)


KERNELS["linear8", "reference"] = reference_linear
KERNELS["linear_gelu8", "reference"] = reference_linear_gelu
KERNELS["conv8", "reference"] = reference_conv


@torch.library.impl(LIBRARY, "quantize_fp8", "CompositeExplicitAutograd")
def _quantize_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """round(x / scale) to float8_e4m3fn, saturated at +-448; any shape."""
    return (x.float() * (1 / scale)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


@torch.library.impl(LIBRARY, "dequantize_fp8", "CompositeExplicitAutograd")
def _dequantize_fp8(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q * scale in ``dtype``; scale fp32 [1] or per output channel [out]."""
    return (q.float() * scale.view(-1, *[1] * (q.dim() - 1))).to(dtype)


@torch.library.register_fake("sdtrt_backend::quantize_fp8", lib=LIBRARY)
def _quantize_fp8_fake(x: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn)


@torch.library.register_fake("sdtrt_backend::dequantize_fp8", lib=LIBRARY)
def _dequantize_fp8_fake(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(q, dtype=dtype)


# --- producers that write 8 bits: out_scale is 1 / scale of the result, fp32 [1] or per last-dimension channel -----------
LIBRARY.define("group_norm8(Tensor x, Tensor? x2, Tensor? shift, int groups, Tensor? weight, Tensor? bias, float eps, bool silu, "
               "Tensor? out_scale, ScalarType dtype, str kernel) -> Tensor")
LIBRARY.define("layer_norm8(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? out_scale, ScalarType dtype, "
               "str kernel) -> Tensor")
LIBRARY.define("add_layer_norm8(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, Tensor? out_scale, "
               "ScalarType dtype, str kernel) -> (Tensor, Tensor)")
LIBRARY.define("geglu8(Tensor x, Tensor? out_scale, ScalarType dtype, str kernel) -> Tensor")
LIBRARY.define("rms_rope8(Tensor x, Tensor? first, Tensor weight, Tensor? first_weight, Tensor cos, Tensor sin, float eps, "
               "Tensor? out_scale, ScalarType dtype, str kernel) -> Tensor")
LIBRARY.define("attention_fp8(Tensor q, Tensor k, Tensor v, Tensor scales, float scale, ScalarType dtype, str kernel) -> Tensor")
LIBRARY.define("attention8(Tensor q, Tensor k, Tensor v, float scale, Tensor? out_scale, ScalarType dtype, str kernel) -> Tensor")
group_norm8 = torch.ops.sdtrt_backend.group_norm8.default
layer_norm8 = torch.ops.sdtrt_backend.layer_norm8.default
add_layer_norm8 = torch.ops.sdtrt_backend.add_layer_norm8.default
geglu8 = torch.ops.sdtrt_backend.geglu8.default
attention8 = torch.ops.sdtrt_backend.attention8.default
rms_rope8 = torch.ops.sdtrt_backend.rms_rope8.default
attention_fp8 = torch.ops.sdtrt_backend.attention_fp8.default


def encode(y: torch.Tensor, out_scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """fp32 result * out_scale -> ``dtype``: int8 rounds to nearest even, both 8-bit types saturate."""
    if out_scale is not None:
        y = y * out_scale
    if dtype is torch.int8:
        y = y.round().clamp(-INT8_MAX - 1, INT8_MAX)
    elif dtype is torch.float8_e4m3fn:
        y = y.clamp(-FP8_MAX, FP8_MAX)
    return y.to(dtype)


@torch.library.impl(LIBRARY, "group_norm8", "CompositeExplicitAutograd")
def _group_norm8(x: torch.Tensor, x2: torch.Tensor | None, shift: torch.Tensor | None, groups: int, weight: torch.Tensor | None,
                 bias: torch.Tensor | None, eps: float, silu: bool, out_scale: torch.Tensor | None, dtype: torch.dtype,
                 kernel: str) -> torch.Tensor:
    """Group norm of x [n, c, h, w] (+ shift [n, c]), or of x and x2 side by side along the channels, then SiLU -> ``dtype``,
    channels last."""
    y: torch.Tensor = _run("group_norm8", kernel, x, x2, shift, groups, weight, bias, eps, silu, out_scale, dtype)
    return y


@torch.library.impl(LIBRARY, "layer_norm8", "CompositeExplicitAutograd")
def _layer_norm8(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
                 out_scale: torch.Tensor | None, dtype: torch.dtype, kernel: str) -> torch.Tensor:
    """Layer norm over the last dimension of x [..., c] -> ``dtype``."""
    y: torch.Tensor = _run("layer_norm8", kernel, x, None, weight, bias, eps, out_scale, dtype)[1]
    return y


@torch.library.impl(LIBRARY, "add_layer_norm8", "CompositeExplicitAutograd")
def _add_layer_norm8(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
                     out_scale: torch.Tensor | None, dtype: torch.dtype, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    """s = x + residual in the dtype of x, and the layer norm of s in ``dtype``."""
    both: tuple[torch.Tensor, torch.Tensor] = _run("layer_norm8", kernel, x, residual, weight, bias, eps, out_scale, dtype)
    return both


@torch.library.impl(LIBRARY, "geglu8", "CompositeExplicitAutograd")
def _geglu8(x: torch.Tensor, out_scale: torch.Tensor | None, dtype: torch.dtype, kernel: str) -> torch.Tensor:
    """x [..., 2c] -> first half * gelu(second half), ``dtype`` [..., c]."""
    y: torch.Tensor = _run("geglu8", kernel, x, out_scale, dtype)
    return y


@torch.library.impl(LIBRARY, "attention8", "CompositeExplicitAutograd")
def _attention8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out_scale: torch.Tensor | None,
                dtype: torch.dtype, kernel: str) -> torch.Tensor:
    """softmax(q k^T * scale) v, no mask; q [b, h, queries, d], k and v [b, h, tokens, d] -> ``dtype`` [b, queries, h * d]."""
    y: torch.Tensor = _run("attention8", kernel, q, k, v, scale, out_scale, dtype)
    return y


@torch.library.impl(LIBRARY, "rms_rope8", "CompositeExplicitAutograd")
def _rms_rope8(x: torch.Tensor, first: torch.Tensor | None, weight: torch.Tensor, first_weight: torch.Tensor | None,
               cos: torch.Tensor, sin: torch.Tensor, eps: float, out_scale: torch.Tensor | None, dtype: torch.dtype,
               kernel: str) -> torch.Tensor:
    """RMS norm of x [b, t, h, d] over d, behind that of ``first`` [b, t0, h, d], then the rotary embedding with cos, sin
    fp32 [t0 + t, d], or [b, t0 + t, d] of each image, of neighbouring pairs -> ``dtype`` [b, t0 + t, h, d]."""
    y: torch.Tensor = _run("rms_rope8", kernel, x, first, weight, first_weight, cos, sin, eps, out_scale, dtype)
    return y


@torch.library.impl(LIBRARY, "attention_fp8", "CompositeExplicitAutograd")
def _attention_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: torch.Tensor, scale: float, dtype: torch.dtype,
                   kernel: str) -> torch.Tensor:
    """softmax(q k^T * scale) v of float8_e4m3fn codes q [b, h, queries, d], k and v [b, h, tokens, d], views with a contiguous
    last dimension; scales fp32 [3]: a code of q, k, v times its scale is the value. The result has v's scale:
    ``dtype`` [b, queries, h * d], which is the kernel's of ATTENTION_FP8_OUT."""
    y: torch.Tensor = _run("attention_fp8", kernel, q, k, v, scales, scale, dtype)
    return y


@torch.library.register_fake("sdtrt_backend::group_norm8", lib=LIBRARY)
def _group_norm8_fake(x: torch.Tensor, x2: torch.Tensor | None, shift: torch.Tensor | None, groups: int,
                      weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, silu: bool,
                      out_scale: torch.Tensor | None, dtype: torch.dtype, kernel: str) -> torch.Tensor:
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("sdtrt_backend::layer_norm8", lib=LIBRARY)
def _layer_norm8_fake(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float,
                      out_scale: torch.Tensor | None, dtype: torch.dtype, kernel: str) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("sdtrt_backend::add_layer_norm8", lib=LIBRARY)
def _add_layer_norm8_fake(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
                          eps: float, out_scale: torch.Tensor | None, dtype: torch.dtype,
                          kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("sdtrt_backend::geglu8", lib=LIBRARY)
def _geglu8_fake(x: torch.Tensor, out_scale: torch.Tensor | None, dtype: torch.dtype, kernel: str) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=dtype)


@torch.library.register_fake("sdtrt_backend::attention8", lib=LIBRARY)
def _attention8_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out_scale: torch.Tensor | None,
                     dtype: torch.dtype, kernel: str) -> torch.Tensor:
    b, h, queries, d = q.shape
    return q.new_empty((b, queries, h * d), dtype=dtype)


@torch.library.register_fake("sdtrt_backend::rms_rope8", lib=LIBRARY)
def _rms_rope8_fake(x: torch.Tensor, first: torch.Tensor | None, weight: torch.Tensor, first_weight: torch.Tensor | None,
                    cos: torch.Tensor, sin: torch.Tensor, eps: float, out_scale: torch.Tensor | None, dtype: torch.dtype,
                    kernel: str) -> torch.Tensor:
    return x.new_empty((x.shape[0], cos.shape[-2], *x.shape[2:]), dtype=dtype)


@torch.library.register_fake("sdtrt_backend::attention_fp8", lib=LIBRARY)
def _attention_fp8_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: torch.Tensor, scale: float,
                        dtype: torch.dtype, kernel: str) -> torch.Tensor:
    b, h, queries, d = q.shape
    return q.new_empty((b, queries, h * d), dtype=dtype)


def _float(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.float()


def reference_group_norm(x: torch.Tensor, x2: torch.Tensor | None, shift: torch.Tensor | None, groups: int,
                         weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, silu: bool,
                         out_scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Plain torch in fp32."""
    x = x.float() if shift is None else x.float() + shift.float()[:, :, None, None]
    x = x if x2 is None else torch.cat([x, x2.float()], 1)
    y = torch.nn.functional.group_norm(x, groups, _float(weight), _float(bias), eps)
    y = torch.nn.functional.silu(y) if silu else y
    out_scale = None if out_scale is None else out_scale.view(1, -1, 1, 1)
    return encode(y, out_scale, dtype).contiguous(memory_format=torch.channels_last)


def reference_layer_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
                         eps: float, out_scale: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch in fp32; (x + residual, its norm)."""
    s = (x if residual is None else x + residual).contiguous()
    y = torch.nn.functional.layer_norm(s.float(), s.shape[-1:], _float(weight), _float(bias), eps)
    return s, encode(y, out_scale, dtype)


def reference_geglu(x: torch.Tensor, out_scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Plain torch in fp32."""
    hidden, gate = x.float().chunk(2, -1)
    return encode(hidden * torch.nn.functional.gelu(gate), out_scale, dtype)


def reference_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out_scale: torch.Tensor | None,
                        dtype: torch.dtype, variant: str = "") -> torch.Tensor:
    """Plain torch in fp32."""
    y = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale)
    return encode(y.transpose(1, 2).flatten(2), out_scale, dtype)


def reference_rms_rope(x: torch.Tensor, first: torch.Tensor | None, weight: torch.Tensor, first_weight: torch.Tensor | None,
                       cos: torch.Tensor, sin: torch.Tensor, eps: float, out_scale: torch.Tensor | None,
                       dtype: torch.dtype) -> torch.Tensor:
    """Plain torch in fp32."""
    streams = [(x, weight)] if first is None else [(first, first_weight), (x, weight)]
    n = torch.cat([torch.nn.functional.rms_norm(t.float(), t.shape[-1:], _float(w), eps) for t, w in streams], 1)
    a, b = n.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([-b, a], -1).flatten(-2)
    return encode(n * cos.unsqueeze(-2) + rotated * sin.unsqueeze(-2), out_scale, dtype).contiguous()


def reference_attention_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: torch.Tensor, scale: float,
                            dtype: torch.dtype) -> torch.Tensor:
    """Plain torch in fp32: probabilities are not rounded to 8 bits, as kernels do."""
    of_q, of_k, _ = scales
    y = torch.nn.functional.scaled_dot_product_attention(q.float() * of_q, k.float() * of_k, v.float(), scale=scale)
    return encode(y.transpose(1, 2).flatten(2), None, dtype)


KERNELS["rms_rope8", "reference"] = reference_rms_rope
KERNELS["attention_fp8", "reference"] = reference_attention_fp8
KERNELS["group_norm8", "reference"] = reference_group_norm
KERNELS["layer_norm8", "reference"] = reference_layer_norm
KERNELS["geglu8", "reference"] = reference_geglu
KERNELS["attention8", "reference"] = reference_attention
