"""cuDNN's graph API: 8-bit convolution and linear with scale, bias, activation, gate and residual in one fusion.

A linear layer is a 1x1 convolution. ``nvidia-cudnn-frontend`` builds a plan for one shape; plans are kept per process.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_ONE_AT_A_TIME = threading.Lock()  # threads share a handle, which is told the stream before it runs a plan

# What is timed of a fusion. cuDNN's heuristic was made for 16 bits: in 8, kernel configurations that it does not even list
# were up to 1.25x faster than its best (cuDNN 9.19, H200). ENGINE's configurations are tried by number, "engine.number",
# those of near times in one family, as each costs up to 0.7 s to compile, and that of the large linears first; "index" is a plan
# of the heuristic's list.
ENGINE = 4
CONFIGURATIONS = {torch.int8: ((2, 0, 3), (49, 48), (26, 27)), torch.float8_e4m3fn: ((49, 54, 53), (27, 26))}


def variants(operand: torch.dtype) -> list[tuple[str, ...]]:
    """Names of the kernel configurations to time, by family."""
    return [tuple(f"{ENGINE}.{number}" for number in family) for family in CONFIGURATIONS[operand]]


@dataclass(frozen=True)
class Fusion:
    """What a plan is built for: y = conv(x, w) * scale [+ bias] [+ residual], or gelu(that) * out_scale.

    x: [n, c, h, w], weight: [out, c, kh, kw], all tensors channels last; operand: int8 or float8_e4m3fn; scale fp32 [out];
    bias, out_scale: fp32 [out]; residual: of the shape and dtype ``out`` of y; gelu: by its formula with tanh.
    """

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    operand: torch.dtype
    out: torch.dtype
    bias: bool = True
    residual: bool = False
    gelu: bool = False

    @property
    def y(self) -> tuple[int, int, int, int]:
        n, _, h, w = self.x
        kh, kw = self.weight[2:]
        return (n, self.weight[0], (h + 2 * self.padding[0] - kh) // self.stride[0] + 1,
                (w + 2 * self.padding[1] - kw) // self.stride[1] + 1)


class Plans:
    """The plans of a fusion on one device, by variant; each is built when first run."""

    def __init__(self, fusion: Fusion, device: int) -> None:
        import cudnn

        self.handle = handle(device)
        self.built: dict[str, tuple[int, int]] = {}  # variant -> (index, bytes of workspace)
        kind = cudnn.data_type
        kinds = {dtype: getattr(kind, name) for dtype, name in KINDS.items()}
        integer = fusion.operand is torch.int8
        FLOAT, INT32 = cudnn.data_type.FLOAT, cudnn.data_type.INT32
        g: Any = cudnn.pygraph(intermediate_data_type=FLOAT, compute_data_type=FLOAT, handle=self.handle)

        def tensor(name: str, dim: tuple[int, ...], dtype: torch.dtype) -> Any:
            _, c, h, w = dim
            return g.tensor(name=name, dim=list(dim), stride=[c * h * w, 1, c * w, c], data_type=kinds[dtype])

        channels = (1, fusion.weight[0], 1, 1)
        self.inputs = [tensor("x", fusion.x, fusion.operand), tensor("w", fusion.weight, fusion.operand),
                       tensor("scale", channels, torch.float32)]
        y = g.conv_fprop(image=self.inputs[0], weight=self.inputs[1], padding=list(fusion.padding), stride=list(fusion.stride),
                         dilation=[1, 1], compute_data_type=INT32 if integer else cudnn.data_type.FAST_FLOAT_FOR_FP8)
        y.set_data_type(INT32 if integer else FLOAT)
        y = g.mul(a=y, b=self.inputs[2], compute_data_type=FLOAT)
        if fusion.bias:
            self.inputs.append(tensor("bias", channels, torch.float32))
            y = g.add(a=y, b=self.inputs[-1], compute_data_type=FLOAT)
        if fusion.residual:
            self.inputs.append(tensor("residual", fusion.y, fusion.out))
            y = g.add(a=y, b=self.inputs[-1], compute_data_type=FLOAT)
        if fusion.gelu:
            self.inputs.append(tensor("out_scale", channels, torch.float32))
            y = g.mul(a=g.gelu_approx_tanh(input=y, compute_data_type=FLOAT), b=self.inputs[-1], compute_data_type=FLOAT)
        n, c, h, w = fusion.y
        y.set_output(True).set_data_type(kinds[fusion.out]).set_dim([n, c, h, w]).set_stride([c * h * w, 1, c * w, c])
        self.output, self.graph = y, g
        g.validate()
        g.build_operation_graph()
        g.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        g.check_support()

    def _build(self, variant: str) -> tuple[int, int]:
        import cudnn

        engine, _, number = variant.rpartition(".")
        index = int(number)
        if engine:
            self.graph.create_execution_plan(int(engine), {cudnn.knob_type.KERNEL_CFG: int(number)})
            index = self.graph.get_execution_plan_count() - 1
        self.graph.build_plan_at_index(index)
        return index, self.graph.get_workspace_size_plan_at_index(index)

    def __call__(self, variant: str, y: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """Write ``y``; inputs in order: x, weight, scale, then bias, residual and out_scale where the fusion has them."""
        import cudnn

        if variant not in self.built:
            self.built[variant] = self._build(variant)
        index, size = self.built[variant]
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        pack = {self.output: y, **dict(zip(self.inputs, inputs, strict=True))}
        self.graph.execute_plan_at_index(pack, workspace(size, y), index, handle=self.handle)
        return y


def workspace(size: int, like: torch.Tensor) -> torch.Tensor:
    """Memory for one call of a plan: torch hands it on to the next, where a plan that kept its own would hold it for ever."""
    return torch.empty(max(1, size), dtype=torch.uint8, device=like.device)


KINDS = {torch.int8: "INT8", torch.float8_e4m3fn: "FP8_E4M3", torch.float16: "HALF", torch.bfloat16: "BFLOAT16",
         torch.float32: "FLOAT"}
PROBABILITY_SCALE = 256.0  # codes of softmax's result: 1 is 256, in the reach of e4m3 down to 2^-17


@dataclass(frozen=True)
class Attention:
    """What a plan of fp8 attention is built for: shapes and strides of q, k, v [b, h, tokens, d], softmax of q k^T * scale."""

    q: tuple[tuple[int, ...], tuple[int, ...]]
    k: tuple[tuple[int, ...], tuple[int, ...]]
    v: tuple[tuple[int, ...], tuple[int, ...]]
    scale: float


class AttentionPlan:
    """cuDNN's fp8 attention for one ``Attention`` on one device; its scales are tensors, so that calls may differ in them."""

    def __init__(self, problem: Attention, device: int) -> None:
        import cudnn

        self.handle = handle(device)
        kind = cudnn.data_type
        g: Any = cudnn.pygraph(io_data_type=kind.FP8_E4M3, intermediate_data_type=kind.FLOAT, compute_data_type=kind.FLOAT,
                               handle=self.handle)
        self.codes = [g.tensor(name=name, dim=list(shape), stride=list(stride), data_type=kind.FP8_E4M3)
                      for name, (shape, stride) in (("q", problem.q), ("k", problem.k), ("v", problem.v))]
        self.names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        self.scalars = [g.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=kind.FLOAT) for name in self.names]
        y, _, *amax = g.sdpa_fp8(*self.codes, **dict(zip(self.names, self.scalars, strict=True)), is_inference=True,
                                 attn_scale=problem.scale, use_causal_mask=False)
        b, h, queries, d = problem.q[0]
        y.set_output(True).set_dim([b, h, queries, d]).set_stride([queries * h * d, d, h * d, 1]).set_data_type(kind.FP8_E4M3)
        for a in amax:
            a.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(kind.FLOAT)
        self.outputs = [y, *amax]
        g.validate()
        g.build_operation_graph()
        g.create_execution_plans([cudnn.heur_mode.A])
        g.check_support()
        g.build_plans()
        self.graph = g
        self.workspace = g.get_workspace_size()
        one = torch.ones(1, device=f"cuda:{device}")
        self.constants = (one / PROBABILITY_SCALE, one * PROBABILITY_SCALE, one)
        self.amax = (torch.zeros_like(one), torch.zeros_like(one))

    def __call__(self, y: torch.Tensor, codes: tuple[torch.Tensor, ...], scales: torch.Tensor) -> torch.Tensor:
        """Write ``y``; scales fp32 [3] of q, k, v."""
        import cudnn

        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        of_q, of_k, _ = scales.split(1)
        unit = self.constants[2]  # codes of v are summed as they are: the result has v's scale
        given = (*codes, of_q, of_k, unit, *self.constants, y, *self.amax)
        self.graph.execute(dict(zip((*self.codes, *self.scalars, *self.outputs), given, strict=True)),
                           workspace(self.workspace, y), handle=self.handle)
        return y


@cache
def attention_plan(problem: Attention, device: int) -> AttentionPlan:
    """The plan, made once per process. Raises what cuDNN raises where it has none."""
    return AttentionPlan(problem, device)


def attention_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: torch.Tensor, scale: float,
                  dtype: torch.dtype) -> torch.Tensor:
    """See ``ops.attention_fp8``."""
    of_q, of_k, of_v = ((tuple(t.shape), t.stride()) for t in (q, k, v))
    b, h, queries, d = q.shape
    y = torch.empty((b, queries, h * d), dtype=dtype, device=q.device)
    with _ONE_AT_A_TIME:
        return attention_plan(Attention(of_q, of_k, of_v, scale), q.device.index)(y, (q, k, v), scales)


@cache
def handle(device: int) -> Any:
    """cuDNN's handle of a CUDA device, one per process."""
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@cache
def plans(fusion: Fusion, device: int) -> Plans:
    """The plans of a fusion, made once per process. Raises what cuDNN raises where it has no engine for it."""
    return Plans(fusion, device)


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype,
           variant: str) -> torch.Tensor:
    """A 1x1 convolution over [1, in, rows, 1]; see ``ops.linear8``."""
    return linear_gelu(x, weight, scale, bias, None, dtype, variant)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
                out_scale: torch.Tensor | None, dtype: torch.dtype, variant: str) -> torch.Tensor:
    """See ``ops.linear_gelu8``; without an out_scale there is no GELU."""
    k, n = x.shape[-1], weight.shape[0]
    x = x.contiguous()
    fusion = Fusion((1, k, x.numel() // k, 1), (n, k, 1, 1), (1, 1), (0, 0), x.dtype, dtype, bias is not None,
                    gelu=out_scale is not None)
    y = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    extra = [t for t in (bias, out_scale) if t is not None]
    with _ONE_AT_A_TIME:
        return plans(fusion, x.device.index)(variant, y, x, weight, scale, *extra)


def conv(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
         stride: list[int], padding: list[int], dtype: torch.dtype, variant: str) -> torch.Tensor:
    """See ``ops.conv8``."""
    fusion = Fusion(tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), x.dtype, dtype,  # type: ignore[arg-type]
                    bias is not None, residual is not None)
    y = torch.empty(fusion.y, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    extra = [] if bias is None else [bias]
    if residual is not None:
        extra.append(residual.contiguous(memory_format=torch.channels_last))
    with _ONE_AT_A_TIME:
        return plans(fusion, x.device.index)(variant, y, x, weight, scale, *extra)
