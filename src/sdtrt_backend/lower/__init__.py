"""Lowerings: a quantised graph -> a callable. One file per target, one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..assign import assign, attentions_in_fp8, kernels_ms, mark_work
from ..engine import installed
from ..fx import propagate
from ..kernels import CAPABILITY, chooser, missing
from ..options import Options
from ..quantize import for_engine, for_torchao
from ..rotate import rotate_heads
from ..values import Decision, LayerReport, Plan
from . import inductor_cpu, inductor_cuda, reference, tensorrt, torchao
from .lowered import Derived as Derived
from .lowered import Held as Held
from .lowered import Lowered as Lowered
from .lowered import Scaled as Scaled

Nodes = Mapping[str, fx.Node]
# torch.compile on the CPU was never seen to be twice as fast as eager on a denoiser (1.1x to 1.4x). An 8-bit step at
# least this much faster than eager needs no comparison with the compiled 16-bit step, which costs a whole compilation.
CLEARLY_FASTER = 2.0


@dataclass(frozen=True)
class Lowering:
    """One target.

    refusal: why it cannot be used on a device, or None; refine: the plan for what its kernels take; lower: graph with Q/DQ,
    example tensors, options -> Lowered; none_left: the sentence where ``refine`` left nothing in 8 bits, from its last decision;
    graphed: whether the step becomes a CUDA graph on a GPU; free_convs: whether its convolutions may be smoothed and have a zero
    point, where the device's may; timed: whether its time counts; may_be_slower: whether it must be raced against the compiled
    16-bit step; counts: whether executed 8-bit FLOPs can be counted; flops: counted FLOPs -> those of the model's own work.
    """

    name: str
    refusal: Callable[[Options, torch.device], str | None]
    refine: Callable[[Plan, fx.GraphModule, Nodes, Sequence[torch.Tensor], Options], Plan]
    lower: Callable[[fx.GraphModule, Sequence[torch.Tensor], Options], Lowered]
    none_left: Callable[[Decision], str] = lambda d: f"no 8-bit kernel takes a layer of this module ({d.layer.name}: {d.reason})"
    graphed: bool = True
    free_convs: bool = True
    timed: bool = True
    may_be_slower: Callable[[Any], bool] = lambda t: t.eager_ms < CLEARLY_FASTER * t.step_ms
    counts: bool = True
    flops: Callable[[int, Sequence[LayerReport], Sequence[Decision]], int] = lambda counted, layers, decisions: counted

    def why(self, options: Options, device: torch.device) -> tuple[str, ...]:
        """Which way the step takes, where that was left to us."""
        if options.engine != "auto":
            return ()
        why = "TensorRT engines are built where engine='tensorrt' asks for them"
        if device.type != "cuda":
            why = "TensorRT engines run on NVIDIA GPUs only"
        elif installed() is None:
            why = "no TensorRT is installed"
        return (f"the step runs through Inductor: {why}",)


def _on_the_cpu(options: Options, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"this version has 8-bit kernels for the CPU and NVIDIA GPUs, not for {device.type}"
    if options.precision != "int8":
        return f"{options.precision} kernels need an NVIDIA GPU: use sd_int8 on the CPU"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN, which runs the 8-bit kernels on the CPU"
    return None


def _on_a_gpu(options: Options, device: torch.device) -> str | None:
    return missing(options.precision, torch.cuda.get_device_capability(device))


def _by_tensorrt(options: Options, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"TensorRT engines run on NVIDIA GPUs, the module is on the {device.type}: use engine='auto'"
    return _on_a_gpu(options, device)


def _by_torchao(options: Options, device: torch.device) -> str | None:
    if options.precision != "int8":
        return f"through TorchAO this version runs int8 and not {options.precision}: use sd_int8, or engine='auto'"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY["int8"]:
        return f"int8 needs a GPU of compute capability {'.'.join(map(str, CAPABILITY['int8']))} or newer"
    if device.type not in ("cpu", "cuda"):
        return f"TorchAO's int8 product runs on CPUs and NVIDIA GPUs, not on {device.type}"
    return None


def _for_the_reference(plan: Plan, graph: fx.GraphModule, nodes: Nodes, tensors: Sequence[torch.Tensor],
                       options: Options) -> Plan:
    propagate(graph, tensors)
    plan = plan.then("precision", [replace(d, precision=options.precision) if d.quantized else d for d in plan.decisions])
    return plan.then("rotation", rotate_heads(plan.decisions, nodes))


def _measured(plan: Plan, graph: fx.GraphModule, nodes: Nodes, tensors: Sequence[torch.Tensor], options: Options) -> Plan:
    propagate(graph, tensors)
    mark_work(graph)
    measured, always = chooser(tensors[0].device), options.engine == "inductor"
    found: dict[str, Any] = {}
    if options.precision == "fp8" and options.level >= 4:
        found["fp8_attentions"] = len(attentions_in_fp8(graph, tensors, measured))
    decisions = assign(plan.decisions, nodes, measured, options.precision, always)
    if not tensors[0].is_cpu:
        found["kernels_ms"] = kernels_ms(graph, measured)
    return plan.then("measured kernels", decisions, **found).then("rotation", rotate_heads(decisions, nodes))


def _for_engines(plan: Plan, graph: fx.GraphModule, nodes: Nodes, tensors: Sequence[torch.Tensor], options: Options) -> Plan:
    return plan.then("what TensorRT takes", [for_engine(d, options.precision, installed() or "") for d in plan.decisions])


def _for_torchao(plan: Plan, graph: fx.GraphModule, nodes: Nodes, tensors: Sequence[torch.Tensor], options: Options) -> Plan:
    propagate(graph, tensors)
    return plan.then("what TorchAO takes", [for_torchao(d, nodes[d.layer.source].meta["val"]) if d.quantized else d
                                            for d in plan.decisions])


def _once(counted: int, layers: Sequence[LayerReport], decisions: Sequence[Decision]) -> int:
    """The second product of two codes is no work of the model's."""
    twice = {d.layer.name for d in decisions if d.two_codes}
    return counted - sum(layer.flops for layer in layers if layer.name in twice)


def _with_engines(counted: int, layers: Sequence[LayerReport], decisions: Sequence[Decision]) -> int:
    """What runs inside an engine is not seen from outside: its layers count as planned."""
    return counted + sum(layer.flops for layer in layers if layer.engine == "tensorrt")


LOWERINGS = {row.name: row for row in (
    Lowering("reference", lambda options, device: None, _for_the_reference, reference.lower, graphed=False, timed=False,
             counts=False),
    Lowering("inductor", _on_the_cpu, _measured, inductor_cpu.lower, graphed=False, flops=_once,
             none_left=lambda d: f"no 8-bit kernel is faster than the one in the user's precision on these shapes ({d.reason})"),
    Lowering("inductor-cuda", _on_a_gpu, _measured, inductor_cuda.lower,
             none_left=lambda d: f"no 8-bit kernel is faster than the 16-bit one on these shapes ({d.reason})",
             # a step that is faster than the 16-bit products, convolutions and attention alone, which torch.compile calls as they
             # are, is faster than any compiler of the same calls
             may_be_slower=lambda t: t.step_ms >= t.kernels_ms),
    Lowering("tensorrt", _by_tensorrt, _for_engines, tensorrt.lower, free_convs=False, flops=_with_engines),
    Lowering("torchao", _by_torchao, _for_torchao, torchao.lower, free_convs=False,
             none_left=lambda d: f"TorchAO runs no layer of this module ({d.layer.name}: {d.reason})"),
)}


def choose(options: Options, device: torch.device) -> tuple[Lowering | None, str | None]:
    """(the row for the engine that the user named, None), or (None, the reason why it cannot be used on this device)."""
    name = options.engine
    if name in ("auto", "inductor"):
        name = "inductor-cuda" if device.type == "cuda" else "inductor"
    row = LOWERINGS[name]
    refusal = row.refusal(options, device)
    return (row, None) if refusal is None else (None, refusal)
