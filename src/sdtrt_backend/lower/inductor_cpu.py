"""Q/DQ graph -> Inductor on the CPU, with oneDNN int8 convolutions and linears.

Two steps. Before Inductor, dequantize -> conv/linear becomes one 8-bit operator (``ops.py``) whose output strides are
channels last. Inside Inductor, after its weights are frozen, that operator becomes oneDNN's, with the weight packed for
the shape at hand. This is what Inductor's own x86 pattern pass does; doing it by name means a layer cannot silently
miss the pattern, and nothing global is registered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from .. import ops
from ..fx import add_constant, arguments, call_arguments, drop_dead, finish, inductor, pair
from ..measure import step_ms
from ..options import Options
from ..rules import OPS
from ..values import UINT8_ZERO
from .lowered import Derived, Lowered

QD = torch.ops.quantized_decomposed
KERNEL_OUTPUTS = (torch.float32, torch.bfloat16)  # what oneDNN's int8 kernels write
BF16_REPEATS = 20
BF16_GAIN = 0.9  # bf16 must win by a tenth: it costs accuracy
ATTENTION: Any = torch.nn.functional.scaled_dot_product_attention


def lower(gm: fx.GraphModule, example: Sequence[torch.Tensor], options: Options) -> Lowered:
    """Compile ``gm`` (changed in place) for the shapes of ``example``.

    ``options.rest``: "float32" (the user's own precision), "bfloat16", or "auto": bfloat16 where it was measured faster.
    """
    narrow = options.rest == "bfloat16" or (options.rest == "auto" and bf16_pays(gm))
    to_int8_operators(gm, torch.bfloat16 if narrow else None)
    if narrow:
        attention_in_bf16(gm)
    group_norm_by_aten(gm)
    # an FX graph cache hit would skip the packing pass; kernels are cached by their source all the same
    packing = PackForOneDNN()
    config = {"freezing": True, "post_grad_custom_pre_pass": packing, "fx_graph_cache": False}
    read = as_inputs(gm)
    step = inductor(gm, [*example, *read], config)
    return Lowered((lambda *tensors: step(*tensors, *read)) if read else step, derived=packing.derived)


def as_inputs(gm: fx.GraphModule) -> list[torch.Tensor]:
    """Constants that are written between calls, which Inductor would freeze, become the last inputs. Returns them."""
    found = [n for n in gm.graph.find_nodes(op="get_attr") if n.target in gm.meta.get("written", ())]
    last = [n for n in gm.graph.nodes if n.op == "placeholder"][-1:]
    for node in found:
        with gm.graph.inserting_after(*last) if last else gm.graph.inserting_before():
            last = [gm.graph.placeholder(f"{node.name}_written")]
        last[0].meta.update(node.meta)
        node.replace_all_uses_with(last[0])
        gm.graph.erase_node(node)
    tensors = [getattr(gm, str(n.target)) for n in found]
    finish(gm)
    return tensors


def to_int8_operators(gm: fx.GraphModule, narrow: torch.dtype | None) -> fx.GraphModule:
    """dequantize(x) , dequantize(w) -> conv/linear becomes int8_conv2d/int8_linear. Activations become uint8, code and
    zero point plus 128, the only signedness oneDNN's convolution takes: the same numbers.

    narrow: dtype that the 8-bit kernels write, None for the dtype the graph has. Their accumulator is int32; rounding
    its scaled value to bf16 adds 1/10 of the noise that int8 has already brought and halves the bytes written.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in OPS:
            continue
        given = call_arguments(node)
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if weight.target is not QD.dequantize_per_channel.default:
            continue
        scale, zero, dtype = x.args[1], UINT8_ZERO + x.args[2], x.kwargs["out_dtype"]
        out = narrow or (dtype if dtype in KERNEL_OUTPUTS else torch.float32)
        convolution = OPS[node.target].name == "conv2d"
        operator = ops.int8_conv2d if convolution else ops.int8_linear
        geometry = [pair(given[k]) for k in ("stride", "padding", "dilation")] if convolution else []
        quantize = x.args[0]
        two_codes = quantize.args[5] is torch.int16
        codes = _high_and_low(gm, quantize) if two_codes else (_unsigned(gm, quantize),)
        with gm.graph.inserting_before(node):
            weights, wide_bias = weight.args[:2], _as_float(gm, bias)
            if two_codes:  # x = scale * (256 * high + low)
                out = torch.float32
                high, low = (gm.graph.call_function(operator, (code, factor * scale, offset, *weights, b, *geometry, out))
                             for code, factor, offset, b in zip(codes, (256, 1), (UINT8_ZERO, 0), (wide_bias, None), strict=True))
                new = gm.graph.call_function(torch.add, (high, low))
            else:
                new = gm.graph.call_function(operator, (*codes, scale, zero, *weights, wide_bias, *geometry, out))
            if out != dtype:
                new = gm.graph.call_method("to", (new, dtype))
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    return finish(gm)


def _high_and_low(gm: fx.GraphModule, quantize: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two uint8 codes of an int16 quantize node, made once: floor(code / 256) + 128 and what is left of the code."""
    if "codes" not in quantize.meta:
        source, scale, _, least, most = quantize.args[:5]
        with gm.graph.inserting_before(quantize):
            factor = add_constant(gm, f"{quantize.name}_inverse_scale", torch.tensor(1 / scale).view(1, 1))
            scaled = gm.graph.call_function(torch.mul, (source, factor))
            code = gm.graph.call_function(torch.clamp, (gm.graph.call_function(torch.round, (scaled,)), least, most))
            high = gm.graph.call_function(torch.floor, (gm.graph.call_function(torch.mul, (code, 1 / 256)),))
            low = gm.graph.call_function(torch.sub, (code, gm.graph.call_function(torch.mul, (high, 256))))
            quantize.meta["codes"] = tuple(
                gm.graph.call_method("to", (gm.graph.call_method("view_as", (part, source)), torch.uint8))
                for part in (gm.graph.call_function(torch.add, (high, UINT8_ZERO)), low))
    return quantize.meta["codes"]  # type: ignore[no-any-return]


def _unsigned(gm: fx.GraphModule, quantize: fx.Node) -> fx.Node:
    """The uint8 twin of an int8 quantize node, made once and shared by all its readers.

    The scale is a buffer, not a literal: kernels of equal layers then have equal source and are compiled once.
    """
    if "unsigned" in quantize.meta:
        return quantize.meta["unsigned"]  # type: ignore[no-any-return]
    source, scale, zero = quantize.args[0], torch.tensor(1 / quantize.args[1]), UINT8_ZERO + quantize.args[2]
    if "smoothing" in source.meta and len(source.users) == 1:
        # an unfolded smoothing factor and the scale are one multiplication
        source, scale = source.args[0], getattr(gm, str(source.args[1].target)) * scale
    with gm.graph.inserting_before(quantize):
        # at least two dimensions: Inductor would write a smaller constant into the kernel's source
        factor = add_constant(gm, f"{quantize.name}_inverse_scale", scale.unsqueeze(0) if scale.dim() else scale.view(1, 1))
        scaled = gm.graph.call_function(torch.mul, (source, factor))
        code = gm.graph.call_function(torch.clamp, (gm.graph.call_function(torch.round, (scaled,)), -zero, 255 - zero))
        unsigned = gm.graph.call_function(torch.add, (code, zero))
        unsigned = gm.graph.call_method("view_as", (unsigned, source))  # a linear of a vector has one dimension
        quantize.meta["unsigned"] = gm.graph.call_method("to", (unsigned, torch.uint8))
    return quantize.meta["unsigned"]  # type: ignore[no-any-return]


def _as_float(gm: fx.GraphModule, bias: fx.Node | None) -> fx.Node | None:
    """oneDNN adds the bias to the int32 accumulator and wants it in fp32."""
    if bias is None or getattr(gm, str(bias.target)).dtype is torch.float32:
        return bias
    return add_constant(gm, f"{bias.name}_fp32", getattr(gm, str(bias.target)).float())


def bf16_pays(gm: fx.GraphModule) -> bool:
    """Time the graph's largest attention in fp32 and in bf16 with its casts; what else is not 8-bit is too small to tell."""
    largest = max((_qkv_shapes(n) for n in gm.graph.find_nodes(op="call_function", target=ATTENTION) if _is_float32(n)),
                  key=lambda shapes: math.prod(shapes[0]) * shapes[1][-2], default=None)
    if largest is None or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    noise = torch.Generator().manual_seed(0)  # the user's random state is not ours to advance
    qkv = [torch.randn(shape, generator=noise) for shape in largest]

    def narrow() -> Any:
        return ATTENTION(*(t.bfloat16() for t in qkv)).float()

    with torch.no_grad():
        step_ms(narrow, lambda: ATTENTION(*qkv))  # warm-up
        narrow_ms, wide_ms = step_ms(narrow, lambda: ATTENTION(*qkv), repeats=BF16_REPEATS)
    return narrow_ms < BF16_GAIN * wide_ms


def _qkv_shapes(node: fx.Node) -> list[list[int]]:
    """Sizes of query, key and value; a symbolic size counts as the one it was first seen with."""
    return [[s if isinstance(s, int) else s.node.hint for s in a.meta["example_value"].shape] for a in _qkv(node)]


def _qkv(node: fx.Node) -> list[fx.Node]:
    """Query, key and value, which diffusers' newer models give by name."""
    given = arguments(node)
    return [given[name] for name in ("query", "key", "value")]


def attention_in_bf16(gm: fx.GraphModule) -> fx.GraphModule:
    """Attention is the largest part that stays unquantised; its fp32 inputs go to the bf16 kernel."""
    for node in list(gm.graph.nodes):
        if node.target is not ATTENTION or not _is_float32(node):
            continue
        with gm.graph.inserting_before(node):
            narrow = [gm.graph.call_method("to", (a, torch.bfloat16)) for a in _qkv(node)]
        rest = {name: value for name, value in arguments(node).items() if name not in ("query", "key", "value")}
        node.args, node.kwargs = tuple(narrow), rest
        with gm.graph.inserting_after(node):
            wide = gm.graph.call_method("to", (node, torch.float32))
        node.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
    return finish(gm)


def group_norm_by_aten(gm: fx.GraphModule) -> fx.GraphModule:
    """Keep group norms as ATen calls. Inductor's decomposition is no faster in channels last, where a group is 4 to 8
    of 16 vector lanes, and its 30 large kernels are a third of the whole compile time."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.nn.functional.group_norm):
        given = arguments(node)
        node.target, node.kwargs = ops.group_norm, {}
        node.args = tuple(given[p] for p in ("input", "num_groups", "weight", "bias", "eps"))
    return finish(gm)


def _is_float32(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32 and arguments(node)["attn_mask"] is None


class PackForOneDNN(CustomGraphPass):
    """Post-grad pass: int8_conv2d / int8_linear -> onednn.qconv_pointwise / qlinear_pointwise with packed weights.

    derived: the packed weights that it made.
    """

    def __init__(self) -> None:
        self.derived: list[Derived] = []

    def __call__(self, graph: fx.Graph) -> None:
        gm: Any = graph.owning_module
        for node in list(graph.nodes):
            if node.target not in (ops.int8_conv2d, ops.int8_linear):
                continue
            x, x_scale, zero, weight, weight_scale, bias, *geometry, dtype = node.args
            w, s, shape = getattr(gm, weight.target), getattr(gm, weight_scale.target), list(x.meta["val"].shape)
            with graph.inserting_before(node):
                weight_zero = add_constant(gm, f"{node.name}_zero", torch.zeros_like(s, dtype=torch.int32))
                if geometry:
                    pack = partial(torch.ops.onednn.qconv_prepack, w, s, x_scale, zero, *geometry, 1, shape)
                    target, tail = torch.ops.onednn.qconv_pointwise.default, (*geometry, 1)
                else:
                    pack = partial(torch.ops.onednn.qlinear_prepack, w, shape)
                    target, tail = torch.ops.onednn.qlinear_pointwise.default, ()
                packed = pack()
                self.derived.append(Derived(packed, (w, s), pack))
                weight_node = add_constant(gm, f"{node.name}_packed", packed)
                new = graph.call_function(target, (x, x_scale, zero, weight_node, weight_scale, weight_zero, bias, *tail,
                                                   1.0, 0, dtype, "none", [], ""))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        drop_dead(graph)

    def uuid(self) -> None:
        """None: graphs that went through this pass are not stored in Inductor's graph cache."""
        return None
