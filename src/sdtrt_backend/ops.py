"""The 8-bit operators that lowerings share, as custom operators with fake implementations and a plain-torch reference.

A lowering replaces dequantize -> conv/linear by one of these; a device's compiler pass replaces them by its kernels.
Where no pass does, the reference below runs: slow, obvious, and the oracle of every kernel.
"""

from __future__ import annotations

import torch

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
