"""A Q/DQ graph -> an ONNX file with QuantizeLinear and DequantizeLinear.

Scales are fp32 and so is the arithmetic between DequantizeLinear and the layer, with a cast to the graph's own precision on
either side: in fp16 an int8 product overflows before it is scaled, and the scales of small weights are not representable.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .. import ops
from ..errors import ExportError
from ..fx import written_out
from ..quantize import QD

OPSET = 20  # 19 is the first with fp8, 20 the first with Gelu
NAME, DATA_NAME = "model.onnx", "model.onnx.data"
# protobuf holds at most 2 GiB; the graph without its constants takes a few MB
EMBED_LIMIT = 2**31 - 2**26
SQUEEZES = (torch.squeeze, torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims)
PACKAGES = ("onnx", "onnxscript", "ml_dtypes")


def write(gm: fx.GraphModule, inputs: Mapping[str, torch.Tensor], outputs: Sequence[str], folder: Path,
          dynamic: Mapping[str, Mapping[int, str]] | None = None) -> list[Path]:
    """Write ``model.onnx`` (and ``model.onnx.data`` beyond EMBED_LIMIT bytes of constants) into ``folder``, each atomically.

    gm: Q/DQ graph whose placeholders are the keys of ``inputs``, in order; dynamic: input -> axis -> name of the dimension.
    Changes ``gm``. Returns the files. Raises ExportError when the ONNX packages are missing.
    """
    try:
        table = _translations()
    except ImportError:
        raise ExportError.not_installed("ONNX export", "'sdtrt_backend[onnx]'") from None
    for node in gm.graph.find_nodes(op="call_function", target=torch.cat):
        node.target = _cat
    for node in [n for target in SQUEEZES for n in gm.graph.find_nodes(op="call_function", target=target)]:
        node.target = _squeeze
    for node in gm.graph.find_nodes(op="call_method", target="squeeze"):
        node.op, node.target = "call_function", _squeeze
    gm.recompile()
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(written_out(gm).eval(), tuple(inputs.values()), dynamo=True, opset_version=OPSET,
                                    verbose=False, input_names=list(inputs), output_names=list(outputs),
                                    custom_translation_table=table,
                                    dynamic_shapes=None if dynamic is None else {n: dict(dynamic.get(n, {})) for n in inputs})
    assert program is not None
    constants = sum(t.numel() * t.element_size() for t in gm.buffers())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial") as partial:
        program.save(os.path.join(partial, NAME), external_data=constants > EMBED_LIMIT)
        written = sorted(os.listdir(partial), reverse=True)  # the data before the model that points to it
        for name in written:
            os.replace(os.path.join(partial, name), folder / name)
    if DATA_NAME not in written:
        (folder / DATA_NAME).unlink(missing_ok=True)
    return [folder / name for name in reversed(written)]


def _cat(tensors: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch.cat with the type promotion spelled out, which the exporter leaves out and ONNX does not have."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return torch.cat([t.to(dtype) for t in tensors], *args, **kwargs)


def _squeeze(x: torch.Tensor, dim: int | Sequence[int] | None = None) -> torch.Tensor:
    """torch.squeeze without the dimensions that are not 1, which torch leaves alone: the exporter passes them on, and ONNX
    refuses them."""
    if dim is None:
        return x.squeeze()
    ones = tuple(d for d in ((dim,) if isinstance(dim, int) else dim) if x.shape[d] == 1)
    return x.squeeze(ones) if ones else x


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's news of packages that are not there and of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our Q/DQ operators in ONNX. The annotations tell the exporter which arguments are attributes."""
    import ml_dtypes
    import numpy as np
    from onnxscript import ir
    from onnxscript import opset19 as op

    fp32 = int(ir.DataType.FLOAT)

    def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
        return op.Constant(value=ir.tensor(np.zeros(shape, dtype)))

    def number(value: float) -> Any:
        return op.Constant(value=ir.tensor(np.array(value, np.float32)))

    def quantize_int8(x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> Any:
        assert zero_point == 0
        return op.QuantizeLinear(op.Cast(x, to=fp32), number(scale), zeros((), np.int8))

    def dequantize_int8(q: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int,
                        out_dtype: int = fp32) -> Any:
        return op.Cast(op.DequantizeLinear(q, number(scale), zeros((), np.int8)), to=out_dtype)

    def dequantize_int8_weight(q: Any, scale: Any, zero_point: Any, axis: int, quant_min: int, quant_max: int, dtype: int,
                               out_dtype: int = fp32) -> Any:
        return op.Cast(op.DequantizeLinear(q, scale, zeros((scale.shape[0],), np.int8), axis=axis), to=out_dtype)

    def quantize_fp8(x: Any, scale: float) -> Any:
        return op.QuantizeLinear(op.Cast(x, to=fp32), number(scale), zeros((), ml_dtypes.float8_e4m3fn), saturate=1)

    def dequantize_fp8(q: Any, scale: Any, dtype: int) -> Any:
        if scale.shape[0] == 1:  # per tensor, which takes scalars
            scale = op.Reshape(scale, zeros((0,), np.int64))
            return op.Cast(op.DequantizeLinear(q, scale, zeros((), ml_dtypes.float8_e4m3fn)), to=dtype)
        return op.Cast(op.DequantizeLinear(q, scale, zeros((scale.shape[0],), ml_dtypes.float8_e4m3fn), axis=0), to=dtype)

    return {QD.quantize_per_tensor.default: quantize_int8, QD.dequantize_per_tensor.default: dequantize_int8,
            QD.dequantize_per_channel.default: dequantize_int8_weight, ops.quantize_fp8: quantize_fp8,
            ops.dequantize_fp8: dequantize_fp8}
