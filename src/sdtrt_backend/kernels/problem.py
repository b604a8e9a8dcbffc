"""What a kernel is asked to compute, and the fastest answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """One distinct (operation, shape, layout): x [rows, in] or [n, in, h, w], weight [out, in] or [out, in, kh, kw].

    dtype: of the result and of the kernel in the user's precision that it competes with.
    """

    op: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dtype: torch.dtype
    dilation: tuple[int, int] = (1, 1)

    @property
    def flops(self) -> int:
        """Of the product."""
        rows = self.x[0]
        if self.op == "conv2d":
            rows *= math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(
                self.x[2:], self.padding, self.dilation, self.weight[2:], self.stride, strict=True))
        return 2 * rows * math.prod(self.weight)

    def __str__(self) -> str:
        """The name that measurements are kept under."""
        x, weight, stride, padding, dilation = ("x".join(map(str, part)) for part in (
            self.x, self.weight, self.stride, self.padding, self.dilation))
        dilated = "" if self.dilation == (1, 1) else f" dilation {dilation}"
        return f"{self.op} {x} by {weight} stride {stride} padding {padding}{dilated} {str(self.dtype)[6:]}"


@dataclass(frozen=True)
class Choice:
    """The fastest kernel of one precision for a problem, and its milliseconds."""

    kernel: str
    ms: float


def of_layer(layer: Any, x: torch.Tensor) -> Problem:
    """The problem of a Linear or Conv2d module that is given ``x``; padding in words counts as none."""
    if isinstance(layer, torch.nn.Linear):
        return Problem("linear", (x.numel() // x.shape[-1], x.shape[-1]), tuple(layer.weight.shape), (1, 1), (0, 0), x.dtype)
    padding = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
    return Problem("conv2d", tuple(x.shape), tuple(layer.weight.shape), layer.stride, padding, x.dtype, layer.dilation)
