"""The words around an engine: the command line, TensorRT's list of layers, refusals. Nothing here needs TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdtrt_backend import engine
from sdtrt_backend.errors import ExportError
from sdtrt_backend.rules import ENGINE_KEEP, ENGINE_MIN_SM, OPS

TENSOR = "{ Name: x, Dimensions: [2,8], Strides: [8,1], Datatype: %s, Format: (Linear) Row major linear format }"
LISTED = "\n".join([
    "Layers:",
    f"Name: a, LayerType: gemm, Inputs: [ {TENSOR % 'Int8'}], Constants: [ {TENSOR % 'Int8'}], Outputs: [ {TENSOR % 'Half'}], "
    "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: node_MatMul_1]",
    f"Name: b, LayerType: kgen, Inputs: [ {TENSOR % 'Half'}], Constants: [], Outputs: [ {TENSOR % 'Int8'}], TacticName: u",
    "Name: c, LayerType: signal, Inputs: [], Outputs: []",
    "Bindings: none",
])


def test_the_list_of_layers_is_read_with_its_types():
    a, b, c = engine.read_layers(LISTED)
    assert (a.name, a.kind, a.inputs, a.outputs) == ("a", "gemm", ("Int8", "Int8"), ("Half",))
    assert (b.inputs, b.outputs) == (("Half",), ("Int8",))
    assert (c.kind, c.inputs) == ("signal", ())
    assert engine.count_types((a, b, c)) == {"gemm": {"Int8": 1}, "kgen": {"Half": 1}}
    assert engine.read_layers("another format") == ()


def test_a_command_line_names_shapes_only_where_they_vary():
    model, built = Path("d/model.onnx"), Path("d/model.engine")
    fixed = {"x": ((2, 4), (2, 4), (2, 4)), "t": ((), (), ())}
    line = engine.command_line("tensorrt", model, built, fixed)
    assert line == "trtexec --onnx=d/model.onnx --stronglyTyped --saveEngine=d/model.engine"
    line = engine.command_line("tensorrt_rtx", model, built, {**fixed, "x": ((2, 4), (2, 4), (8, 4))})
    assert line == ("tensorrt_rtx --onnx=d/model.onnx --saveEngine=d/model.engine --minShapes=x:2x4 --optShapes=x:2x4 "
                    "--maxShapes=x:8x4")


def test_what_cannot_be_built_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object() if name == "tensorrt" else None)
    monkeypatch.setattr(engine.importlib, "import_module", lambda name: torch)
    assert engine.installed() == "tensorrt"
    with pytest.raises(ExportError, match="tensorrt_rtx"):
        engine.check("tensorrt_rtx", "int8", 89)
    with pytest.raises(ExportError, match="needs compute capability 89 or newer, got --sm 80"):
        engine.check("tensorrt", "fp8", 80)
    with pytest.raises(ExportError, match=r"only for the GPU of this machine.*pip install tensorrt_rtx"):
        engine.check("tensorrt", "fp8", 89)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match=r"no NVIDIA GPU.*--sm 89"):
        engine.check("tensorrt", "int8", None)


def test_the_table_of_refusals_names_what_exists():
    names = {rule.name for rule in OPS.values()}
    for flavour, precision, op in ENGINE_KEEP:
        assert flavour in engine.FLAVOURS
        assert precision in ENGINE_MIN_SM
        assert op in names
