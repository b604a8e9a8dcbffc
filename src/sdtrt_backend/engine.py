"""An ONNX file -> a TensorRT engine, by whichever flavour is installed; with TensorRT-RTX also where there is no GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import ExportError
from .rules import ENGINE_MIN_SM

# name of an input -> its smallest, usual and largest shape
Ranges = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
_ONE_AT_A_TIME = threading.Lock()  # a process has one TensorRT logger, and the layer information arrives through it


class UnsupportedGPU(ExportError):
    """TensorRT runs no engine at all on this GPU."""


@dataclass(frozen=True)
class Flavour:
    """One TensorRT. install: what pip takes; command: its command-line builder; options: those it needs for this file.

    ahead: whether it builds for a GPU that is not there.
    """

    install: str
    command: str
    options: str
    ahead: bool


FLAVOURS = {  # name of the Python module: ...; in the order of preference
    "tensorrt_rtx": Flavour("tensorrt_rtx", "tensorrt_rtx", "", True),
    "tensorrt": Flavour("tensorrt", "trtexec", " --stronglyTyped", False),
}


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a built engine. kind: TensorRT's word for it (gemm, correlation, ...); inputs, outputs: its data types."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def installed() -> str | None:
    """The flavour that is installed, or None."""
    return next((name for name in FLAVOURS if importlib.util.find_spec(name) is not None), None)


def version(flavour: str) -> str:
    """Of the installed package."""
    return str(importlib.import_module(flavour).__version__)


def command_line(flavour: str, model: Path, engine: Path, ranges: Ranges) -> str:
    """What to type to build ``model`` by hand. A model of fixed shapes takes none on the command line."""
    row = FLAVOURS[flavour]
    line = f"{row.command} --onnx={model}{row.options} --saveEngine={engine}"
    if all(least == most for least, _, most in ranges.values()):
        return line
    for flag, which in (("minShapes", 0), ("optShapes", 1), ("maxShapes", 2)):
        shapes = ",".join(f"{name}:{'x'.join(map(str, shape[which]))}" for name, shape in ranges.items() if shape[which])
        line += f" --{flag}={shapes}"
    return line


def check(flavour: str | None, precision: str, sm: int | None) -> Any:
    """The Python module of a flavour that can build ``precision`` for ``sm`` (89 is 8.9; None: the GPU of this machine).

    Raises ExportError: not installed, a capability that is unknown or lacks the precision, no GPU and none named.
    """
    import torch

    if flavour is None or importlib.util.find_spec(flavour) is None:
        wanted = [FLAVOURS[flavour]] if flavour is not None else FLAVOURS.values()
        raise ExportError.not_installed("an engine", ", or ".join(row.install for row in wanted))
    least = ENGINE_MIN_SM[precision]
    if sm is not None and sm < least:
        raise ExportError.sm_too_old(precision, sm, least)
    if sm is None and not torch.cuda.is_available():
        raise ExportError("this machine has no NVIDIA GPU to build an engine for: name one, for example --sm 89")
    trt = importlib.import_module(flavour)
    if sm is not None:
        _capability(trt, flavour, sm)
    return trt


def build(flavour: str, precision: str, model: Path, ranges: Ranges,
          sm: int | None) -> tuple[bytes, tuple[EngineLayer, ...], str]:
    """Build ``model``, strongly typed. sm: compute capability, 89 for 8.9; None for the GPU of this machine.

    Returns the engine, its layers as the builder lists them (reading an engine back needs the GPU), and TensorRT's version.
    Raises ExportError as ``check`` does, and with TensorRT's own words when it refuses.
    """
    trt = check(flavour, precision, sm)
    with _ONE_AT_A_TIME:
        logger = _logger(trt)
        logger.errors.clear()
        logger.layers.clear()
        builder = trt.Builder(logger)
        flags = trt.NetworkDefinitionCreationFlag
        network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(os.fspath(model)):
            reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise ExportError(f"{flavour} {trt.__version__} cannot read {model}: {reasons}")
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if sm is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(_capability(trt, flavour, sm), 0)
        if any(least != most for least, _, most in ranges.values()):
            profile = builder.create_optimization_profile()
            for name, (least, usual, most) in ranges.items():
                profile.set_shape(name, least, usual, most)
            config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            where = "this machine's GPU" if sm is None else f"SM{sm}"
            raise ExportError(f"{flavour} {trt.__version__} built no engine of {model} for {where}: " + "; ".join(logger.errors))
        return bytes(engine), read_layers("\n".join(logger.layers)), trt.__version__


def _capability(trt: Any, flavour: str, sm: int) -> Any:
    if not FLAVOURS[flavour].ahead:
        ahead = ", ".join(f"pip install {f.install}" for f in FLAVOURS.values() if f.ahead)
        raise ExportError(f"{flavour} builds only for the GPU of this machine, not for --sm {sm}: leave it out, or {ahead}")
    members = trt.ComputeCapability.__members__
    known = {int(name.removeprefix("SM")): value for name, value in members.items() if name.startswith("SM")}
    if sm not in known:
        raise ExportError.unknown(f"--sm for {flavour} {trt.__version__}", sm, sorted(known))
    return known[sm]


@cache
def _logger(trt: Any) -> Any:
    """The one logger that TensorRT keeps for a whole process: collects errors and the list of layers."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message.strip())
            elif "LayerType: " in message:
                self.layers.append(message)

    return Logger()


def read_layers(text: str) -> tuple[EngineLayer, ...]:
    """TensorRT's detailed layer information, one layer a line -> rows."""
    rows = []
    for line in text.splitlines():
        found = re.match(r"Name: (.*?), LayerType: (\w+), Inputs: (.*), Outputs: (.*)", line)
        if found:
            types = [tuple(re.findall(r"Datatype: (\w+)", part)) for part in found.groups()[2:]]
            rows.append(EngineLayer(found[1], found[2], *types))
    return tuple(rows)


def count_types(layers: tuple[EngineLayer, ...]) -> dict[str, dict[str, int]]:
    """Kind of layer -> data type of its first input -> how many."""
    counts: dict[str, Counter[str]] = {}
    for layer in layers:
        if layer.inputs:
            counts.setdefault(layer.kind, Counter())[layer.inputs[0]] += 1
    return {kind: dict(sorted(types.items())) for kind, types in sorted(counts.items())}


class Runner:
    """A built engine of fixed shapes on the current GPU: tensors in, tensors out, on the current stream.

    inputs, outputs: names of its tensors in the order of the call. Raises ExportError where the engine cannot be read or its
    context cannot be created, as when it holds a kernel that this card lacks, and UnsupportedGPU where none can be read.
    """

    def __init__(self, flavour: str, blob: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        import torch

        trt = importlib.import_module(flavour)
        self.logger = logger = _logger(trt)
        logger.errors.clear()
        self.runtime = trt.Runtime(logger)
        self.engine = self.runtime.deserialize_cuda_engine(blob)
        if self.engine is None:
            kind = UnsupportedGPU if any("does not support this compute capability" in e for e in logger.errors) else ExportError
            raise kind(f"{flavour} {trt.__version__} cannot read the engine: " + "; ".join(logger.errors))
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise ExportError(f"{flavour} {trt.__version__} has no execution context for the engine on this GPU: "
                              + "; ".join(logger.errors))
        kinds = {trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16,
                 trt.DataType.INT32: torch.int32, trt.DataType.INT64: torch.int64, trt.DataType.BOOL: torch.bool}
        self.inputs = tuple(inputs)
        self.outputs = [(name, tuple(self.engine.get_tensor_shape(name)), kinds[self.engine.get_tensor_dtype(name)])
                        for name in outputs]

    def __call__(self, *inputs: Any) -> list[Any]:
        """The engine's outputs, newly allocated."""
        import torch

        device = inputs[0].device
        results = [torch.empty(shape, dtype=dtype, device=device) for _, shape, dtype in self.outputs]
        names = (*self.inputs, *(name for name, _, _ in self.outputs))
        for name, t in zip(names, (*inputs, *results), strict=True):
            self.context.set_tensor_address(name, t.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream(device).cuda_stream):
            raise ExportError("TensorRT did not run the engine: " + "; ".join(self.logger.errors))
        return results
