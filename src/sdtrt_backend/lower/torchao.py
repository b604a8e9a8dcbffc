"""Q/DQ graph -> Inductor, with TorchAO's int8 matrix product for the linears.

The product is in the graph as TorchAO writes it, so that Inductor fuses the scales behind it and the quantisation before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .. import ops
from ..fx import inductor, propagate
from ..kernels import Choice, Problem
from ..options import Options
from .inductor_cuda import to_8_bit_operators
from .lowered import Lowered
from .producers import simplify


class OneKernel:
    """A ``Chooser`` that knows of TorchAO's linear and of nothing else, and measures nothing."""

    def best(self, problem: Problem, precision: str) -> Choice | None:
        return Choice("torchao", 0.0) if (problem.op, precision) == ("linear", "int8") else None

    def producer(self, op: str) -> str | None:
        return None

    def gelu_kernel(self, problem: Problem, out: torch.dtype) -> str | None:
        return None

    def attention_kernel(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> str | None:
        return None


def lower(gm: fx.GraphModule, example: Sequence[torch.Tensor], options: Options) -> Lowered:
    """Compile ``gm`` (changed in place) for the shapes of ``example``. ``options.rest`` is not used: what is not 8-bit
    keeps the user's precision."""
    propagate(gm, example)
    simplify(gm)
    to_torchao(gm)
    return Lowered(inductor(gm, example), list(gm.buffers()))


def to_torchao(gm: fx.GraphModule) -> fx.GraphModule:
    """The linears that read one tensor become one call of ``linear``; other layers must be in 16 bits."""
    to_8_bit_operators(gm, OneKernel())
    for node in gm.graph.find_nodes(op="call_function", target=ops.linear8):
        node.target, node.args = linear, node.args[:-1]
    gm.recompile()
    return gm


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
           dtype: torch.dtype) -> torch.Tensor:
    """x int8 [..., in], weight int8 [out, in], scale and bias fp32 [out] -> ``dtype`` [..., out]."""
    from torchao.kernel import int_scaled_matmul

    rows = x.reshape(-1, x.shape[-1])
    y: Any = int_scaled_matmul(rows, weight.t(), torch.ones((1, 1), device=x.device)) * scale
    y = y if bias is None else y + bias
    return y.to(dtype).view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]
