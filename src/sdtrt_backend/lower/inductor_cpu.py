"""Q/DQ graph -> Inductor on the CPU, with oneDNN int8 convolutions and linears.

Two steps. Before Inductor, dequantize -> conv/linear becomes one 8-bit operator (``ops.py``) whose output strides are
channels last. Inside Inductor that operator becomes oneDNN's, with the weight packed for the shape at hand. This is what
Inductor's own x86 pattern pass does; doing it by name means a layer cannot silently miss the pattern, and nothing global is
registered. All constants are inputs of what is compiled, so that it depends on no weight, and a new process can take what
another has compiled (``programs.py``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from .. import ops, programs, recurring
from ..errors import GraphError
from ..fx import add_constant, arguments, call_arguments, drop_dead, finish, pair
from ..measure import step_ms
from ..options import Options
from ..rules import OPS
from ..store import Store, device_key
from ..values import UINT8_ZERO
from .lowered import Derived, Lowered

QD = torch.ops.quantized_decomposed
KERNEL_OUTPUTS = (torch.float32, torch.bfloat16)  # what oneDNN's int8 kernels write
BF16_REPEATS = 20
# 8-bit layers from which on the step's kernels are called from C++: with 103 layers Python's calls took 2 of 34 ms. Some
# seconds of compiling C++ do not depend on what is in it
LAYERS_FOR_CPP = 32
BF16_GAIN = 0.9  # bf16 must win by a tenth: it costs accuracy
ATTENTION: Any = torch.nn.functional.scaled_dot_product_attention


def lower(gm: fx.GraphModule, example: Sequence[torch.Tensor], options: Options) -> Lowered:
    """Compile ``gm`` (changed in place) for the shapes of ``example``, or load what was compiled of such a graph before.

    ``options.rest``: "float32" (the user's own precision), "bfloat16", or "auto": bfloat16 where it was measured faster.
    """
    narrow = options.rest == "bfloat16" or (options.rest == "auto" and bf16_pays(gm))
    to_int8_operators(gm, torch.bfloat16 if narrow else None)
    if narrow:
        attention_in_bf16(gm)
    group_norm_by_aten(gm)
    in_cpp = sum(n.target in (ops.int8_conv2d, ops.int8_linear) for n in gm.graph.nodes) >= LAYERS_FOR_CPP
    parts, rest = recurring.apart(gm, example)
    made = [_program(part, [example[i] for i in places], in_cpp) for places, part in parts]
    held = [recurring.Held(one.call, places, one.constants) for one, (places, _) in zip(made, parts, strict=True)]

    def step(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        return whole.call(*tensors, *(t for part in held for t in part(tensors)))

    whole = _program(rest, [*example, *(t for part in held for t in part(example))], in_cpp)
    packed = [p for one in (*made, whole) for p in one.packed]
    return Lowered(step, notes=[n for one in (*made, whole) for n in one.notes], derived=[*(p.derived for p in packed), *held],
                   eight_bit_flops=sum(p.flops for p in packed))


@dataclass(frozen=True)
class _Program:
    """call: on tensor inputs; constants: what it reads besides them; packed: what of them in another form."""

    call: Callable[..., Sequence[torch.Tensor]]
    constants: Sequence[torch.Tensor]
    packed: Sequence[Packed]
    notes: Sequence[str]


def _program(gm: fx.GraphModule, example: Sequence[torch.Tensor], in_cpp: bool) -> _Program:
    """``gm`` (changed in place) compiled for the shapes of ``example``, or as it was compiled of such a graph before. in_cpp:
    whether its kernels are called from C++."""
    constants = programs.as_inputs(gm)
    inputs = [*example, *constants]
    settings = {"size_asserts": False, "cpp_wrapper": in_cpp}
    name = programs.key(gm, inputs, settings, Path(__file__))
    found = None if name is None else programs.find(name)
    if found is None:
        packing = PackForOneDNN(inputs)
        call, notes = _compiled(gm, inputs, settings, packing)
        packed = packing.packed
        if name is not None:
            programs.keep(name, call, _named(packed), {"packed": [p.as_json() for p in packed], "notes": notes})
    else:
        notes = found["about"]["notes"]
        packed = [Packed.of(given, inputs[given["codes"]], inputs[given["scale"]]) for given in found["about"]["packed"]]
        call = programs.load(found, _named(packed))
    return _Program(lambda *tensors: call([*tensors, *constants]), constants, packed, notes)


def _compiled(gm: fx.GraphModule, inputs: Sequence[torch.Tensor], settings: Mapping[str, Any],
              packing: PackForOneDNN) -> tuple[programs.Call, list[str]]:
    """(see ``programs.compiled``, sentences for the report)."""
    notes: list[str] = []
    # a hit of Inductor's own graph cache would skip the packing pass; kernels are cached by their source all the same
    own = {**settings, "post_grad_custom_pre_pass": packing, "fx_graph_cache": False}
    if not settings["cpp_wrapper"]:
        return programs.compiled(gm, inputs, own), notes
    spare = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    try:
        return programs.compiled(gm, inputs, own), notes
    except Exception as error:  # whatever C++ cannot call, Python can
        why = next(iter(str(error).splitlines()), "")
        notes.append(f"the step's kernels are called from Python, as C++ cannot call them: {type(error).__name__}: {why}")
        return programs.compiled(spare, inputs, {**own, "cpp_wrapper": False}), notes


def _named(packed: Sequence[Packed]) -> dict[str, torch.Tensor]:
    """The tensors that the generated code holds."""
    return {f"{what} {i}": tensor for i, p in enumerate(packed)
            for what, tensor in (("packed", p.derived.target), ("zero", p.zero))}


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

    def measure() -> bool:
        qkv = [torch.randn(shape, generator=noise) for shape in largest]

        def narrow() -> Any:
            return ATTENTION(*(t.bfloat16() for t in qkv)).float()

        with torch.no_grad():
            step_ms(narrow, lambda: ATTENTION(*qkv))  # warm-up
            narrow_ms, wide_ms = step_ms(narrow, lambda: ATTENTION(*qkv), repeats=BF16_REPEATS)
        return narrow_ms < BF16_GAIN * wide_ms

    return bool(Store(device_key(torch.device("cpu"))).get(f"attention in bf16 {largest}", measure))


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


@dataclass(frozen=True)
class Packed:
    """The weight of an 8-bit layer as oneDNN takes it.

    codes, scale: which of the graph's inputs they are; x_scale, x_zero, shape: of the layer's input; geometry: stride, padding
    and dilation of a convolution, of a linear nothing; flops: 2 * MAC of a call; derived: the packed codes; zero: the zero points
    of the weight, int32.
    """

    codes: int
    scale: int
    x_scale: float
    x_zero: int
    shape: list[int]
    geometry: list[list[int]]
    flops: int
    derived: Derived
    zero: torch.Tensor

    @classmethod
    def of(cls, given: Mapping[str, Any], codes: torch.Tensor, scale: torch.Tensor) -> Packed:
        """given: its fields but for the tensors."""
        x_scale, x_zero, shape, geometry = (given[name] for name in ("x_scale", "x_zero", "shape", "geometry"))
        if geometry:
            make = partial(torch.ops.onednn.qconv_prepack, codes, scale, x_scale, x_zero, *geometry, 1, shape)
        else:
            make = partial(torch.ops.onednn.qlinear_prepack, codes, shape)
        return cls(**given, derived=Derived(make(), (codes, scale), make), zero=torch.zeros_like(scale, dtype=torch.int32))

    def as_json(self) -> dict[str, Any]:
        """What ``of`` takes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("derived", "zero")}


class PackForOneDNN(CustomGraphPass):
    """Post-grad pass: int8_conv2d / int8_linear -> onednn.qconv_pointwise / qlinear_pointwise with packed weights.

    inputs: of the graph; packed: what it made.
    """

    def __init__(self, inputs: Sequence[torch.Tensor] = ()) -> None:
        self.inputs = inputs
        self.packed: list[Packed] = []

    def __call__(self, graph: fx.Graph) -> None:
        gm: Any = graph.owning_module
        self.packed = []
        places = {n: i for i, n in enumerate(graph.find_nodes(op="placeholder"))}
        if self.inputs and len(places) != len(self.inputs):
            raise GraphError.other_inputs(len(places), len(self.inputs))
        for node in list(graph.nodes):
            if node.target not in (ops.int8_conv2d, ops.int8_linear):
                continue
            x, x_scale, x_zero, weight, weight_scale, bias, *geometry, dtype = node.args
            codes, scale = (self.inputs[places[n]] if n in places else getattr(gm, n.target) for n in (weight, weight_scale))
            given = {"codes": places.get(weight, -1), "scale": places.get(weight_scale, -1), "x_scale": x_scale, "x_zero": x_zero,
                     "shape": list(x.meta["val"].shape), "geometry": [list(g) for g in geometry],
                     "flops": 2 * node.meta["val"].numel() * math.prod(codes.shape[1:])}
            self.packed.append(Packed.of(given, codes, scale))
            target = torch.ops.onednn.qconv_pointwise.default if geometry else torch.ops.onednn.qlinear_pointwise.default
            with graph.inserting_before(node):
                zero_node = add_constant(gm, f"{node.name}_zero", self.packed[-1].zero)
                packed_node = add_constant(gm, f"{node.name}_packed", self.packed[-1].derived.target)
                new = graph.call_function(target, (x, x_scale, x_zero, packed_node, weight_scale, zero_node, bias, *geometry,
                                                   *([1] if geometry else []), 1.0, 0, dtype, "none", [], ""))
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        drop_dead(graph)

    def uuid(self) -> None:
        """None: graphs that went through this pass are not stored in Inductor's graph cache."""
        return None
