"""Q/DQ graph -> Inductor on an NVIDIA GPU, with 8-bit matrix products and convolutions chosen by measurement.

dequantize -> linear/conv becomes one operator of ``ops.py``; what quantises stays plain torch, which Inductor fuses into
the norm or pointwise call before it, so that the 16-bit tensor is not written where nobody else reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from .. import ops
from ..assign import problem
from ..fx import add_constant, call_arguments, finish, propagate
from ..kernels import Chooser, Problem, chooser, provider
from ..options import Options
from ..quantize import QD
from ..rules import OPS
from ..values import FP8_MAX, INT8_MAX

QUANTIZE = {QD.quantize_per_tensor.default: "int8", ops.quantize_fp8: "fp8"}
DEQUANTIZE = (QD.dequantize_per_tensor.default, ops.dequantize_fp8)
ADDITIONS = (operator.add, operator.iadd, torch.add)
CHANNELS_LAST: dict[str, Any] = {"memory_format": torch.channels_last}


def lower(gm: fx.GraphModule, example: Sequence[torch.Tensor], options: Options) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Compile ``gm`` (changed in place) for the shapes of ``example``. ``options.rest`` is not used: what is not 8-bit
    keeps the user's precision."""
    from torch._inductor.compile_fx import compile_fx

    propagate(gm, example)
    to_8_bit_operators(gm, chooser(example[0].device))
    with torch.no_grad():
        return cast(Callable[..., tuple[torch.Tensor, ...]], compile_fx(gm, list(example)))


def to_8_bit_operators(gm: fx.GraphModule, choose: Chooser) -> fx.GraphModule:
    """Every quantised convolution becomes conv8, the linears that read one tensor become one linear8."""
    for quantize in [n for n in gm.graph.nodes if n.target in QUANTIZE]:
        readers = [call for dq in quantize.users for call in dq.users]
        precision = QUANTIZE[quantize.target]
        linears = [c for c in readers if OPS[c.target].name == "linear"]
        code, scale = _code(gm, quantize, precision)
        for call in readers:
            if call not in linears:
                _conv(gm, call, code, scale, precision, choose)
        if linears:
            _linears(gm, linears, code, scale, precision, choose)
    return finish(gm)


def _code(gm: fx.GraphModule, quantize: fx.Node, precision: str) -> tuple[fx.Node, float]:
    """The 8-bit tensor in plain torch, and its scale. The scale is a buffer: equal layers then have equal kernel source."""
    source, scale = quantize.args[0], quantize.args[1]
    assert isinstance(source, fx.Node)
    assert isinstance(scale, float)
    inverse = torch.tensor(1 / scale, device=source.meta["val"].device)
    if "smoothing" in source.meta and len(source.users) == 1:
        # an unfolded smoothing factor and the scale are one multiplication
        inverse = _constant(gm, source.args[1]) * inverse
        source = source.args[0]
        assert isinstance(source, fx.Node)
    with gm.graph.inserting_before(quantize):
        call = gm.graph.call_function
        # two dimensions: Inductor would write a smaller constant into the kernel's source
        factor = add_constant(gm, f"{quantize.name}_inverse_scale", inverse.view(1, -1))
        x = call(torch.mul, (source, factor))
        if precision == "int8":
            x = call(torch.clamp, (call(torch.round, (x,)), -INT8_MAX - 1, INT8_MAX))
            x = gm.graph.call_method("to", (x, torch.int8))
        else:
            x = gm.graph.call_method("to", (call(torch.clamp, (x, -FP8_MAX, FP8_MAX)), torch.float8_e4m3fn))
        value = quantize.meta["val"]
        if value.dim() == 1:
            x = gm.graph.call_method("view", (x, *value.shape))
        if value.dim() == 4 and any(OPS[call.target].name == "conv2d" for dq in quantize.users for call in dq.users):
            x = gm.graph.call_method("contiguous", (x,), CHANNELS_LAST)
    return x, scale


def _constant(gm: fx.GraphModule, node: Any) -> torch.Tensor:
    return getattr(gm, str(node.target))  # type: ignore[no-any-return]


def _weight(gm: fx.GraphModule, dequantize: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) behind a weight's dequantize node."""
    codes, scale = dequantize.args[:2]
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    return _constant(gm, codes), _constant(gm, scale)


def _kernel(choose: Chooser, p: Problem, precision: str) -> str:
    best = choose.best(p, precision)
    assert best is not None, f"no {precision} kernel for {p}"
    return best.kernel


def _linears(gm: fx.GraphModule, calls: Sequence[fx.Node], code: fx.Node, x_scale: float, precision: str,
             choose: Chooser) -> None:
    """One matrix product for all of ``calls``, split where there are several."""
    arguments = [call_arguments(c) for c in calls]
    codes, scales = zip(*(_weight(gm, a["weight"]) for a in arguments), strict=True)
    widths = [w.shape[0] for w in codes]
    p = problem(calls)
    kernel = _kernel(choose, p, precision)
    row = provider("linear8", kernel, precision)
    scale = scales[0] if row.one_scale else torch.cat([s.expand(n) for s, n in zip(scales, widths, strict=True)])
    biases = [None if a["bias"] is None else _constant(gm, a["bias"]).detach() for a in arguments]
    bias = None
    if any(b is not None for b in biases):
        filled = [scale.new_zeros(n) if b is None else b.float() for b, n in zip(biases, widths, strict=True)]
        bias = torch.cat(filled).to(p.dtype if row.narrow_bias else torch.float32)
    name = calls[0].name
    with gm.graph.inserting_before(code.next):
        weight = add_constant(gm, f"{name}_weight", codes[0] if len(codes) == 1 else torch.cat(codes))
        factor = add_constant(gm, f"{name}_scale", (scale * x_scale).contiguous())
        added = None if bias is None else add_constant(gm, f"{name}_bias", bias)
        outputs = [gm.graph.call_function(ops.linear8, (code, weight, factor, added, p.dtype, kernel))]
        if len(calls) > 1:
            parts = gm.graph.call_function(torch.split, (outputs[0], widths, -1))
            outputs = [gm.graph.call_function(operator.getitem, (parts, i)) for i in range(len(calls))]
    for call, output in zip(calls, outputs, strict=True):
        output.meta.update(call.meta)
        call.replace_all_uses_with(output)
        gm.graph.erase_node(call)


def _conv(gm: fx.GraphModule, call: fx.Node, code: fx.Node, x_scale: float, precision: str, choose: Chooser) -> None:
    """conv8 with what is added to the convolution right behind it: a bias per image (the time embedding), a residual."""
    arguments, p = call_arguments(call), problem([call])
    codes, scale = _weight(gm, arguments["weight"])
    bias = None if arguments["bias"] is None else _constant(gm, arguments["bias"]).detach().float()
    with gm.graph.inserting_before(call):
        weight = add_constant(gm, f"{call.name}_weight", codes.contiguous(memory_format=torch.channels_last))
        factor = add_constant(gm, f"{call.name}_scale", (scale.expand(codes.shape[0]) * x_scale).contiguous())
        bias_node = None if bias is None else add_constant(gm, f"{call.name}_bias", bias)
    last, residual = call, None
    per_image = _added(last, lambda v: tuple(v.shape) == (p.x[0], codes.shape[0], 1, 1))
    if per_image is not None:
        last, other = per_image
        with gm.graph.inserting_before(last):
            flat = gm.graph.call_method("to", (gm.graph.call_method("flatten", (other, 1)), torch.float32))
            bias_node = flat if bias_node is None else gm.graph.call_function(torch.add, (flat, bias_node))
    image = _added(last, lambda v: v.shape == call.meta["val"].shape and v.dtype is p.dtype)
    if image is not None:
        last, other = image
        with gm.graph.inserting_before(last):
            residual = gm.graph.call_method("contiguous", (other,), CHANNELS_LAST)
    with gm.graph.inserting_before(last):
        y = gm.graph.call_function(ops.conv8, (code, weight, factor, bias_node, residual, list(p.stride), list(p.padding),
                                               p.dtype, _kernel(choose, p, precision)))
    y.meta.update(last.meta)
    last.replace_all_uses_with(y)
    gm.graph.eliminate_dead_code()


def _added(node: fx.Node, fits: Callable[[Any], bool]) -> tuple[fx.Node, fx.Node] | None:
    """(the addition that alone reads ``node``, its other operand) where the operand's value ``fits``."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if user.target not in ADDITIONS or len(user.args) != 2 or user.kwargs:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node) or other is node or not isinstance(other.meta.get("val"), torch.Tensor):
        return None
    return (user, other) if fits(other.meta["val"]) else None
