"""Q/DQ graph -> Inductor on an NVIDIA GPU, with 8-bit matrix products and convolutions chosen by measurement.

dequantize -> linear/conv becomes one operator of ``ops.py``; what quantises stays plain torch, which Inductor fuses into
the norm or pointwise call before it, so that the 16-bit tensor is not written where nobody else reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .. import ops, programs, regions
from ..assign import problem
from ..fx import add_constant, await_workers, call_arguments, drop_dead, finish, propagate, read_through_copies
from ..kernels import Chooser, Problem, chooser, provider
from ..options import Options
from ..quantize import QD
from ..rules import OPS
from ..values import DTYPES, FP8_MAX, INT8_MAX
from . import producers
from .attention import FP8, complex_in_real, rewrite_attention
from .lowered import Derived, Lowered, Scaled, scaled
from .producers import ADDITIONS, gelu_by_sigmoid, simplify

QUANTIZE = {QD.quantize_per_tensor.default: "int8", ops.quantize_fp8: "fp8"}
PRODUCERS = {"group_norm8": producers.group_norm, "layer_norm8": producers.layer_norm, "geglu8": producers.geglu}
# Values of a row that a kernel keeps in registers, so that a norm reads it once: the hidden sizes of transformers are beyond
# Inductor's own 1024, and their norms took 1.3x as long (2432 values, H200)
ROW_AT_ONCE = 4096
CHANNELS_LAST: dict[str, Any] = {"memory_format": torch.channels_last}


def lower(gm: fx.GraphModule, example: Sequence[torch.Tensor], options: Options) -> Lowered:
    """Compile ``gm`` (changed in place) for the shapes of ``example``. ``options.rest`` is not used: what is not 8-bit
    keeps the user's precision."""
    propagate(gm, example)
    simplify(gm)
    to_8_bit_operators(gm, chooser(example[0].device))
    await_workers()
    constants = list(gm.buffers())
    return Lowered(regions.compiled(gm, example, compiled), constants, derived=gm.meta["derived"])


def compiled(gm: fx.GraphModule, example: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """Through Inductor, with ``ROW_AT_ONCE``."""
    from torch._inductor.virtualized import V

    return programs.inductor(gm, example, Path(__file__), Path(ops.__file__), how=lambda: V.set_choices_handler(_choices()))


@cache
def _choices() -> Any:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            row = (not cooperative_reduction and features.get_reduction_hint() == ReductionHint.INNER
                   and V.graph.sizevars.statically_known_leq(features.reduction_numel, ROW_AT_ONCE))
            return row or InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    return Choices()


def to_8_bit_operators(gm: fx.GraphModule, choose: Chooser) -> fx.GraphModule:
    """Every quantised convolution becomes conv8, the linears that read one tensor become one linear8."""
    gm.meta["derived"] = []
    read_through_copies(gm)
    complex_in_real(gm)
    rewrite_attention(gm, choose)
    for quantize in [n for n in gm.graph.nodes if n.target in QUANTIZE]:
        readers = [call for dq in quantize.users for call in dq.users]
        precision = QUANTIZE[quantize.target]
        linears = [c for c in readers if OPS[c.target].name == "linear"]
        code, scale = _code(gm, quantize, precision, choose)
        for call in readers:
            if call not in linears:
                _conv(gm, call, code, scale, precision, choose)
        if linears:
            _linears(gm, linears, code, scale, precision, choose)
    drop_dead(gm.graph)
    gelu_by_sigmoid(gm)
    for norm in gm.graph.find_nodes(op="call_function", target=torch.nn.functional.group_norm):
        _wide_group_norm(gm, norm, choose)
    for merged in [n for how in ("reshape", "flatten") for n in gm.graph.find_nodes(op="call_method", target=how)]:
        if "val" not in merged.meta:
            continue
        with gm.graph.inserting_before(merged):
            y = producers.attention(gm, merged, None, merged.meta["val"].dtype, choose.attention_kernel)
        if y is not None:
            y.meta.update(merged.meta)
            merged.replace_all_uses_with(y)
    return finish(gm)


def _wide_group_norm(gm: fx.GraphModule, norm: fx.Node, choose: Chooser) -> None:
    """A group norm whose result stays in 16 bits: one pass in channels last, with the silu behind it."""
    kernel, value = choose.producer("group_norm8"), norm.meta.get("val")
    if kernel is None or value is None or value.dim() != 4:
        return
    users = list(norm.users)
    silu = len(users) == 1 and users[0].target is torch.nn.functional.silu
    last = users[0] if silu else norm
    with gm.graph.inserting_before(last):
        y = producers.group_norm_call(gm, norm, silu, None, value.dtype, kernel)
    if y is None:
        return
    y.meta.update(last.meta)
    last.replace_all_uses_with(y)
    drop_dead(gm.graph)


def _code(gm: fx.GraphModule, quantize: fx.Node, precision: str, choose: Chooser) -> tuple[fx.Node, float]:
    """The 8-bit tensor and its scale: written by the kernel that computes the value, where there is one for it, else in plain
    torch, for Inductor to fuse."""
    source, scale = quantize.args[0], quantize.args[1]
    assert isinstance(source, fx.Node)
    assert isinstance(scale, float)
    inverse = torch.tensor(1 / scale, device=source.meta["val"].device)
    if "smoothing" in source.meta and len(source.users) == 1:
        # an unfolded smoothing factor and the scale are one multiplication
        inverse = _constant(gm, source.args[1]) * inverse
        source = source.args[0]
        assert isinstance(source, fx.Node)
    dtype = DTYPES[precision]
    with gm.graph.inserting_before(quantize):
        x = _produced(gm, source, inverse, dtype, choose) or _plain(gm, quantize, source, inverse, dtype)
        value = quantize.meta["val"]
        if value.dim() == 4 and any(OPS[call.target].name == "conv2d" for dq in quantize.users for call in dq.users):
            x = gm.graph.call_method("contiguous", (x,), CHANNELS_LAST)
    return x, scale


def _produced(gm: fx.GraphModule, source: fx.Node, factor: torch.Tensor, dtype: torch.dtype, choose: Chooser) -> fx.Node | None:
    """The 8-bit tensor from the kernel that computes ``source``, which nobody else reads."""
    if len(source.users) != 1:
        return None
    of_images = factor.dim() == 3  # a factor per channel [c, 1, 1]: the other kernels' channels are the last dimension
    for name, produce in PRODUCERS.items():
        kernel = choose.producer(name) if name == "group_norm8" or not of_images else None
        made = None if kernel is None else produce(gm, source, factor, dtype, kernel)
        if made is not None:
            return made
    return None if of_images else (producers.linear_gelu(gm, source, factor, dtype, choose.gelu_kernel)
            or producers.attention(gm, source, factor, dtype, choose.attention_kernel))


def _plain(gm: fx.GraphModule, quantize: fx.Node, source: fx.Node, inverse: torch.Tensor, dtype: torch.dtype) -> fx.Node:
    """source * inverse, rounded and saturated. The factor is a buffer: equal layers then have equal kernel source."""
    call = gm.graph.call_function
    # two dimensions or more: Inductor would write a smaller constant into the kernel's source
    inverse = inverse.unsqueeze(0) if inverse.dim() == 3 else inverse.view(1, -1)  # per channel of images [c, 1, 1], or of tokens
    x = call(torch.mul, (source, add_constant(gm, f"{quantize.name}_inverse_scale", inverse)))
    if dtype is torch.int8:
        x = call(torch.clamp, (call(torch.round, (x,)), -INT8_MAX - 1, INT8_MAX))
    else:
        x = call(torch.clamp, (x, -FP8_MAX, FP8_MAX))
    x = gm.graph.call_method("to", (x, dtype))
    value = quantize.meta["val"]
    return gm.graph.call_method("view", (x, *value.shape)) if value.dim() == 1 else x


def _constant(gm: fx.GraphModule, node: Any) -> torch.Tensor:
    return getattr(gm, str(node.target))  # type: ignore[no-any-return]


def _weight(gm: fx.GraphModule, dequantize: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) behind a weight's dequantize node."""
    codes, scale = dequantize.args[:2]
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    return _constant(gm, codes), _constant(gm, scale)


def _joined(codes: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all of them: without a copy where they lie one behind the other, as ``quantize`` leaves them."""
    first, rows, start = codes[0], sum(len(c) for c in codes), codes[0].data_ptr()
    for c in codes:
        if not c.is_contiguous() or c.data_ptr() != start or c.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return torch.cat(list(codes))
        start += c.numel() * c.element_size()
    return first.as_strided((rows, first.shape[1]), first.stride())


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
    # attention reads all of it in fp8: the product writes that, as its scales and bias are multiplied by what gives the codes
    encoded = [c.meta["encoded"] for c in calls if "encoded" in c.meta and len(c.users) == 1] if row.writes_codes else []
    direct = len(encoded) == len(calls)
    last, factors = ([e[0] for e in encoded], [e[1] for e in encoded]) if direct else (calls, [1.0] * len(calls))
    scale_parts, joined = [(s, n, x_scale * f) for s, n, f in zip(scales, widths, factors, strict=True)], _joined(codes)
    if row.one_scale:
        scale_parts = [(scales[0], 1, x_scale)]
    biases = [None if a["bias"] is None else _constant(gm, a["bias"]).detach() for a in arguments]
    bias = None
    if any(b is not None for b in biases):
        filled = [scales[0].new_zeros(n) if b is None else b.float() * f
                  for b, n, f in zip(biases, widths, factors, strict=True)]
        bias = torch.cat(filled).to(p.dtype if row.narrow_bias else torch.float32)
    name = calls[0].name
    with gm.graph.inserting_before(code.next):
        weight = add_constant(gm, f"{name}_weight", joined)
        factor = add_constant(gm, f"{name}_scale", scaled(scale_parts))
        added = None if bias is None else add_constant(gm, f"{name}_bias", bias)
        outputs = [gm.graph.call_function(ops.linear8, (code, weight, factor, added, FP8 if direct else p.dtype, kernel))]
        if len(calls) > 1:
            parts = gm.graph.call_function(torch.split, (outputs[0], widths, -1))
            outputs = [gm.graph.call_function(operator.getitem, (parts, i)) for i in range(len(calls))]
    derived = gm.meta["derived"]
    derived.append(Scaled(_constant(gm, factor), scale_parts))
    if joined.data_ptr() != codes[0].data_ptr():
        derived.append(Derived(joined, codes, lambda: torch.cat(codes)))
    for node, output in zip(last, outputs, strict=True):
        output.meta.update(node.meta)
        node.replace_all_uses_with(output)
    if not direct:
        for call in calls:
            gm.graph.erase_node(call)


def _conv(gm: fx.GraphModule, call: fx.Node, code: fx.Node, x_scale: float, precision: str, choose: Chooser) -> None:
    """conv8, with the residual where one is added right behind the convolution."""
    arguments, p = call_arguments(call), problem([call])
    codes, scale = _weight(gm, arguments["weight"])
    bias = None if arguments["bias"] is None else _constant(gm, arguments["bias"]).detach().float()
    with gm.graph.inserting_before(call):
        weight = add_constant(gm, f"{call.name}_weight", codes.contiguous(memory_format=torch.channels_last))
        scale_parts, derived = [(scale, codes.shape[0], x_scale)], gm.meta["derived"]
        factor = add_constant(gm, f"{call.name}_scale", scaled(scale_parts))
        derived.append(Scaled(_constant(gm, factor), scale_parts))
        if _constant(gm, weight).data_ptr() != codes.data_ptr():
            derived.append(Derived(_constant(gm, weight), (codes,), lambda: codes))
        bias_node = None if bias is None else add_constant(gm, f"{call.name}_bias", bias)
    last, residual = call, None
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
    drop_dead(gm.graph)


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
