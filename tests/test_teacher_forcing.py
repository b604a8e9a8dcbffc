"""Every lowered operation of whole models, fed what the reference has there, gives what the reference gives, to its own rounding.

The Q/DQ graph is the reference. It is lowered, and what each of its values became is noted. The lowered graph then runs node by
node; behind each node that stands for a value of the reference, the result is compared and replaced by the reference's own value.
An error so cannot hide behind those in front of it, and a whole model needs no tolerance for quantisation noise.

Between two such places the expectation is the reference's path in fp64, and the bound is a running error analysis of it: the size
of every term that was rounded on the way (``sizes``), times the unit roundoff, times the number of roundings (tolerances.py).
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from choosers import Reference
from models import FAMILIES, bundled_unet
from tolerances import FP8_CUT, ROUNDINGS, TOLERANCES, UNIT, WALK
from torch import fx
from torch.utils import _pytree

from sdtrt_backend import ops
from sdtrt_backend.assign import assign
from sdtrt_backend.calibrate import Calibration, observed
from sdtrt_backend.capture import bind, capture, tensor_inputs
from sdtrt_backend.fx import ATTENTION, propagate, written
from sdtrt_backend.kernels import chooser
from sdtrt_backend.lower.inductor_cpu import PackForOneDNN, attention_in_bf16, group_norm_by_aten, to_int8_operators
from sdtrt_backend.lower.inductor_cuda import to_8_bit_operators
from sdtrt_backend.lower.producers import simplify
from sdtrt_backend.options import Options
from sdtrt_backend.quantize import QD, insert, plan
from sdtrt_backend.rotate import rotate_heads
from sdtrt_backend.rules import OPS, TWO_CODES
from sdtrt_backend.values import FP8_MAX

QUANTIZE = (QD.quantize_per_tensor.default, ops.quantize_fp8)
DEQUANTIZE = (QD.dequantize_per_tensor.default, QD.dequantize_per_channel.default, ops.dequantize_fp8)
ONEDNN = (torch.ops.onednn.qconv_pointwise.default, torch.ops.onednn.qlinear_pointwise.default)
PRODUCTS_8 = (ops.int8_conv2d, ops.int8_linear, ops.conv8, ops.linear8, ops.linear_gelu8, *ONEDNN)
ARITHMETIC = (operator.add, torch.add, operator.mul, torch.mul, operator.truediv)
CASTS = ("to", "float", "half", "bfloat16", "type", "type_as")
MODELS = {"bundled_unet": bundled_unet, "flux": FAMILIES["flux"], "sdxl_unet": FAMILIES["sdxl_unet"]}


# --- the reference, and its paths in fp64 ------------------------------------------------------------------------------------


def ours(node):
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("sdtrt_backend", "onednn")


class Record(fx.Interpreter):
    """Remembers every value under its node's name."""

    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)
        self.values = {}

    def run_node(self, n):
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def exact(value):
    """Floating-point tensors of a value in fp64."""
    return _pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, value)


def size_of(value):
    return _pytree.tree_map(lambda t: t.abs() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, value)


def given(node, names):
    """Arguments by name."""
    return dict(zip(names, node.args, strict=False)) | node.kwargs


class Paths:
    """The reference's paths between values that the lowered graph has too (``known``), in fp64.

    ``of(node)``: (value, sizes, roundings) of one node, computed from the known values in front of it; ``sizes`` has the value's
    shape, ``roundings`` counts them along the path, see ``ROUNDINGS``.
    """

    def __init__(self, values, known):
        self.known, self.values = known, values
        self.found = {}

    def get(self, node):
        if node.name in self.known or node.op in ("get_attr", "placeholder"):
            value = exact(self.values[node.name])
            return value, size_of(value), 0.0
        if node.name not in self.found:
            self.found[node.name] = self.of(node)
        return self.found[node.name]

    def of(self, node):
        before = {n: self.get(n) for n in node.all_input_nodes}
        value, size = (fx.map_arg((node.args, node.kwargs), lambda n, i=i: before[n][i]) for i in (0, 1))
        roundings = sum(b[2] for b in before.values())
        y, m, more = self.call(node, *value, *size)
        return y, m, roundings + more

    def call(self, node, args, kwargs, sizes, size_kwargs):
        """(value, sizes, roundings of this call)."""
        target, call = node.target, ROUNDINGS["call"]
        if target in QUANTIZE:  # in units of a code, not rounded
            code = args[0] / args[1] + (args[2] if target is not ops.quantize_fp8 else 0)
            return code, sizes[0] / args[1] + (abs(args[2]) if target is not ops.quantize_fp8 else 0), call
        if target in DEQUANTIZE:
            scale, zero = args[1], args[2] if target is not ops.dequantize_fp8 else 0
            if isinstance(scale, torch.Tensor):
                shape = (-1, *[1] * (args[0].dim() - 1))
                scale, zero = scale.view(shape), zero.view(shape) if isinstance(zero, torch.Tensor) else zero
            y = (args[0].double() - zero) * scale
            return y, y.abs(), call
        if node.op == "call_method" and target in CASTS and args[0].is_floating_point():
            return args[0], sizes[0], 0.0
        run = (lambda a, k: getattr(a[0], target)(*a[1:], **k)) if node.op == "call_method" else lambda a, k: target(*a, **k)
        y = exact(run(args, kwargs))
        if target in OPS:
            terms = math.prod(node_weight(args, kwargs).shape[1:])
            m = run(sizes, size_kwargs)
            if y.is_cuda and node.args[0].target is ops.dequantize_fp8:
                walk = run(*_pytree.tree_map(lambda t: t.square() if isinstance(t, torch.Tensor) else t, (args, kwargs))).sqrt()
                m = m + ROUNDINGS["cut"] * (y.abs() + WALK * walk) * (FP8_CUT / UNIT[torch.float32])
            return y, m, ROUNDINGS["sum"] * math.sqrt(terms) + call
        if target in (F.group_norm, F.layer_norm):
            m, terms = self.norm_sizes(node, args, kwargs, sizes)
            return y, m, ROUNDINGS["sum"] * math.sqrt(terms) + call
        if target in (torch.rms_norm, F.rms_norm):
            rms = given_value(args, kwargs, 0).square().mean(-1, keepdim=True).sqrt()
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            return y, sizes[0] / rms * (1 if weight is None else weight.abs()), ROUNDINGS["sum"] * math.sqrt(y.shape[-1]) + call
        if target is ATTENTION:
            return (y, *self.attention_sizes(node, args, kwargs, sizes, size_kwargs))
        if target in (F.silu, F.gelu):  # |f'| <= 1.13 and |f(x)| <= |x|
            return y, 1.13 * sizes[0], 2 * call
        if target in (operator.sub, torch.sub):
            return y, operator.add(*sizes), call
        if target in (operator.neg, torch.neg):
            return y, sizes[0], 0.0
        return y, run(sizes, size_kwargs), call if target in ARITHMETIC else 0.0  # a view

    def norm_sizes(self, node, args, kwargs, sizes):
        """Of a group or layer norm: every rounding of the size of the input, or of what is added up to its mean, over the
        deviation; and of torch's sum of squares, from which that of the mean is taken, half of which is in the deviation."""
        x = args[0]
        group = node.target is F.group_norm
        names = ("input", "num_groups", "weight", "bias", "eps") if group else ("input", "shape", "weight", "bias", "eps")
        all_given = dict(zip(names, args, strict=False)) | kwargs
        rows = x.reshape(x.shape[0] * all_given["num_groups"], -1) if group else x
        deviation = (rows.var(-1, correction=0, keepdim=True) + all_given.get("eps", 1e-5)).sqrt()
        mean = rows.mean(-1, keepdim=True)
        m = (sizes[0].reshape(rows.shape) + rows.abs().mean(-1, keepdim=True)) / deviation
        m = (m + (rows - mean).abs() / deviation * (mean / deviation).square() / 2).reshape(x.shape)
        shape = (1, -1, *[1] * (x.dim() - 2)) if group else (-1,)
        for name, join in (("weight", torch.mul), ("bias", torch.add)):
            if all_given.get(name) is not None:
                m = join(m, all_given[name].abs().view(shape))
        return m, rows.shape[-1]

    def attention_sizes(self, node, args, kwargs, sizes, size_kwargs):
        """An error of a score is a relative error of its probability, and of their sum."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        values, m = dict(zip(names, args, strict=False)) | kwargs, dict(zip(names, sizes, strict=False)) | size_kwargs
        scale = values.get("scale") or values["query"].shape[-1] ** -0.5
        scores = m["query"] @ m["key"].transpose(-1, -2) * scale
        y = F.scaled_dot_product_attention(values["query"], values["key"], m["value"], values.get("attn_mask"), scale=scale)
        terms = math.sqrt(values["query"].shape[-1]) + math.sqrt(values["key"].shape[-2])
        return y * (1 + 2 * scores.amax(-1, keepdim=True)), ROUNDINGS["sum"] * terms + ROUNDINGS["call"]


def node_weight(args, kwargs):
    return args[1] if len(args) > 1 else kwargs["weight"]


def given_value(args, kwargs, i):
    return args[i] if len(args) > i else kwargs["input"]


# --- the lowered graph, and what of it stands for which value of the reference -------------------------------------------------


@dataclass
class Lowered:
    """gm: the lowered graph; reference: the Q/DQ graph it was made of; stands_for: its nodes -> name in ``reference``; layers:
    names in ``reference`` of the layers that were to be lowered; tensors: the inputs of both."""

    gm: fx.GraphModule
    reference: fx.GraphModule
    stands_for: dict[fx.Node, str]
    layers: dict[str, Any]
    tensors: list[torch.Tensor]


def lowered(reference, gm, layers, tensors, *passes):
    """Run the passes over ``gm``, noting what replaces what."""
    assert [n.name for n in gm.graph.nodes] == [n.name for n in reference.graph.nodes]
    assert not written(gm.graph), "a value that is changed in place has no single reference"
    originals = set(gm.graph.nodes)
    stands_for = {n: n.name for n in originals if n.op != "output"}

    names = {}

    def note(old, new, user):
        if new not in names:
            names.update({n.name: n for n in gm.graph.nodes})
        replacement = names[new]
        if replacement not in originals and old in stands_for:
            stands_for[replacement] = stands_for[old]

    with gm._set_replace_hook(note):
        for lowering in passes:
            lowering(gm)
    replaced = {name for n, name in stands_for.items() if n not in originals}
    alive = set(gm.graph.nodes)
    kept = {n: name for n, name in stands_for.items() if n in alive and not (n in originals and name in replaced)}
    return Lowered(gm, reference, kept, layers, tensors)


class TeacherForcing(fx.Interpreter):
    """Run the lowered graph on the reference's values; ``failures``: sentences, ``worst``: kind -> largest share of its bound."""

    def __init__(self, case):
        super().__init__(case.gm, garbage_collect_values=False)
        self.case, self.stands_for = case, case.stands_for
        with torch.no_grad():
            record = Record(case.reference)
            record.run(*case.tensors)
        self.values = record.values
        self.reference_nodes = {n.name: n for n in case.reference.graph.nodes}
        self.codes = self.find_codes()
        known = {*self.stands_for.values(), *(quantize for quantize, _ in self.codes.values())}
        self.paths = Paths(self.values, known)
        self.cones, self.visited, self.layers, self.failures, self.worst = {}, set(), set(), [], Counter()

    def anchored(self, node):
        return node in self.stands_for or node in self.codes

    def cone(self, node):
        """``node`` and what is in front of it, up to what stands for a value of the reference."""
        if node not in self.cones:
            found, front = {node: None}, [node]
            while front:
                new = [n for n in front.pop().all_input_nodes if not self.anchored(n) and n not in found]
                found.update(dict.fromkeys(new))
                front += new
            self.cones[node] = list(found)
        return self.cones[node]

    def reference_layers(self, name, known):
        """Names of the 8-bit layers on the reference's path to ``name``."""
        front, found, seen = [self.reference_nodes[name]], [], set()
        while front:
            n = front.pop()
            if n in seen:
                continue
            seen.add(n)
            if n.target in OPS and n.all_input_nodes[0].target in DEQUANTIZE:
                found.append(n)
            front += [i for i in n.all_input_nodes if i.name not in known and i.target not in QUANTIZE]
        return found

    def find_codes(self):
        """Node of an 8-bit tensor that a product reads -> (name of the quantisation, how the code is written)."""
        codes, known = {}, set(self.stands_for.values())
        by_product = {}
        for product in [n for n in reversed(self.case.gm.graph.nodes) if n.target in PRODUCTS_8]:
            ends, front = set(), [product]
            while front:
                n = front.pop()
                if n in codes:  # it writes what the next one reads
                    ends.add(codes[n][0])
                elif n in self.stands_for:
                    ends.add(self.stands_for[n])
                else:
                    front += n.users
            layers = {layer for end in ends for layer in self.reference_layers(end, known)}
            quantize = {layer.all_input_nodes[0].args[0] for layer in layers}
            assert len(quantize) == 1, f"{product} stands for {layers}, which read {quantize}"
            (quantize,) = quantize
            by_product[product] = {layer.name for layer in layers}
            how = "signed"
            if product.target in (ops.int8_conv2d, ops.int8_linear, *ONEDNN):
                two = quantize.args[5] is torch.int16
                how = "unsigned" if not two else "high" if product.args[2] else "low"
            codes[product.args[0]] = (quantize.name, how)
        self.by_product = by_product
        return codes

    def run_node(self, n):
        mine = super().run_node(n)
        if n.op in ("placeholder", "get_attr", "output"):
            return mine
        if n in self.codes:
            return self.check_codes(n, mine)
        if n in self.stands_for:
            return self.check(n, mine)
        return mine

    def fail(self, n, what):
        self.failures.append(f"{n.name}, for {self.stands_for.get(n) or self.codes[n][0]} ({self.kind(n)}): {what}")

    def see(self, n):
        for c in self.cone(n):
            self.visited.add(c)
            self.layers |= self.by_product.get(c, set())

    def kind(self, n):
        return " ".join(sorted({str(c.target).removesuffix(".default") for c in self.cone(n) if ours(c)})) or str(n.target)

    def check_codes(self, n, mine):
        """The code of a value that is no tie is the nearest one; of a tie, one of the two."""
        name, how = self.codes[n]
        code, size, roundings = self.paths.of(self.reference_nodes[name])
        narrow = self.probabilities_unit(self.cone(n))
        slack = (roundings * UNIT[torch.float32] + narrow) * size
        code, slack = code.reshape(mine.shape), slack.reshape(mine.shape)
        self.see(n)
        if mine.dtype is torch.float8_e4m3fn:
            low, high = ((code + s).clamp(-FP8_MAX, FP8_MAX).float().to(mine.dtype).double() for s in (-slack, slack))
        else:
            assert narrow or float(slack.max()) < 0.25, f"{n.name}: codes are not known to half a step"
            least, most = (-32768, 32767) if how in ("high", "low") else (-128, 127)
            low, high = (WRITTEN[how]((code + s).round().clamp(least, most)) for s in (-slack, slack))
        between = (mine.double() >= low) & (mine.double() <= high)
        wrong = ~between & (mine.double() != low) & (mine.double() != high)  # the low byte of two codes goes round
        if bool(wrong.any()):
            self.fail(n, f"{int(wrong.sum())} of {wrong.numel()} codes are not those of the value")
        theirs = self.values[name].double() if mine.dtype is torch.float8_e4m3fn else WRITTEN[how](self.values[name].double())
        return torch.empty_like(mine).copy_(theirs.reshape(mine.shape))

    def check(self, n, mine):
        name = self.stands_for[n]
        theirs, reference = self.values[name], self.reference_nodes[name]
        self.see(n)
        if same(mine, theirs):
            return theirs
        cone = self.cone(n)
        untouched = n.name == name and len(cone) == 1 and n.target == reference.target and [
            self.stands_for.get(a) for a in n.all_input_nodes] == [a.name for a in reference.all_input_nodes]
        if untouched or not isinstance(mine, torch.Tensor) or not mine.is_floating_point():
            self.fail(n, "it was not lowered, and is not equal to the bit")
            return theirs
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            self.fail(n, f"{mine.dtype} {list(mine.shape)} instead of {theirs.dtype} {list(theirs.shape)}")
            return theirs
        value, size, roundings = self.paths.of(reference)
        inner = roundings * self.inner_unit(cone) + self.probabilities_unit(cone)
        bound = inner * size + self.outer_unit(n) * value.abs() + TOLERANCES["smallest"]
        share = float(((mine.double() - value).abs() / bound).max())
        kind = self.kind(n)
        self.worst[kind] = max(self.worst[kind], share)
        if not share <= 1:
            self.fail(n, f"{share:.3g} times its bound away")
        return theirs

    def outer_unit(self, n):
        """Of the dtypes that the result is rounded to: a cast behind an operator has two."""
        before = self.env.get(n.all_input_nodes[0]) if n.op == "call_method" and n.target in CASTS else None
        return sum(UNIT[t.dtype] for t in (self.env_value(n), before) if isinstance(t, torch.Tensor) and t.dtype in UNIT)

    def env_value(self, n):
        return self.values[self.stands_for[n]]

    def inner_unit(self, cone):
        """fp32, unless an attention is computed in fewer bits."""
        narrow = [self.env[a].dtype for c in cone if c.target is ATTENTION for a in c.all_input_nodes if not self.anchored(a)]
        return max([UNIT[torch.float32], *(UNIT[d] for d in narrow)])

    def probabilities_unit(self, cone):
        """Attention kernels other than the reference round the probabilities to the dtype of the values, and GELU in a product
        is made of PTX's tanh.approx, whose error is 2**-11 of its value."""
        return sum(UNIT[self.env[c.args[2]].dtype] if c.target is ops.attention8 else 2**-11 for c in cone
                   if c.target in (ops.attention8, ops.linear_gelu8) and c.args[-1] != "reference")


WRITTEN = {"signed": lambda code: code, "unsigned": lambda code: code + 128, "high": lambda code: (code / 256).floor() + 128,
           "low": lambda code: code - 256 * (code / 256).floor()}


def same(mine, theirs):
    mine, theirs = (_pytree.tree_leaves(v) for v in (mine, theirs))
    return len(mine) == len(theirs) and all(
        a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else a == b or isinstance(a, torch.amp.autocast)
        for a, b in zip(mine, theirs, strict=True))


# --- the models, planned and lowered -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated():
    """Function (model, dtype, device) -> (captured, args, recipe), each made once. The recipe is that of fp32."""
    recipe, traced = cache(recipe_of), cache(trace)
    return lambda name, dtype=torch.float32, device="cpu": (*traced(name, dtype, device), recipe(name))


def model_and_call(name, dtype, device):
    module, draw = MODELS[name]()

    def moved(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    return module.to(device, dtype), _pytree.tree_map(moved, draw(torch.Generator().manual_seed(0), 0.6))


@torch.no_grad()
def recipe_of(name):
    module, call = model_and_call(name, torch.float32, "cpu")
    calibration = Calibration()
    with observed(module, calibration):
        module(**call)
    return calibration.recipe(Options(), {})


@torch.no_grad()
def trace(name, dtype, device):
    """(captured, args as Dynamo passes them) of one call."""
    torch._dynamo.reset()
    module, call = model_and_call(name, dtype, device)
    found = []

    def backend(graph, example_inputs):
        captured = capture(graph, example_inputs)
        return lambda *args: (found.append((captured, args)), graph(*args))[1]

    torch.compile(module, backend=backend)(**call)
    ((captured, args),) = found
    return captured, args


def q_dq(captured, args, decisions):
    """(Q/DQ graph, names of its 8-bit layers)."""
    graph, nodes = bind(captured, args)
    propagate(graph, tensor_inputs(captured, args))
    decisions = rotate_heads(decisions, nodes)
    names = {nodes[d.layer.node].name: d for d in decisions if d.quantized}
    return insert(graph, nodes, decisions), names


def for_the_cpu(made, *, packed=False, narrow=None):
    captured, args, recipe = made
    tensors = tensor_inputs(captured, args)
    decisions = plan(captured.layers, recipe, (), free_convs=True, two_codes=TWO_CODES)
    (reference, layers), (gm, _) = q_dq(captured, args, decisions), q_dq(captured, args, decisions)
    passes = [lambda gm: to_int8_operators(gm, narrow), group_norm_by_aten]
    if narrow:
        passes.insert(1, attention_in_bf16)
    if packed:
        passes += [lambda gm: propagate(gm, tensors), lambda gm: PackForOneDNN()(gm.graph)]
    return lowered(reference, gm, layers, tensors, *passes)


def for_cuda(made, precision="int8", choose=None):
    captured, args, recipe = made
    tensors = tensor_inputs(captured, args)
    decisions = plan(captured.layers, recipe, (), smooth_convs=True)
    if choose is None:
        decisions = [replace(d, precision=precision) if d.quantized else d for d in decisions]
    else:
        graph, nodes = bind(captured, args)
        propagate(graph, tensors)
        decisions = assign(decisions, nodes, choose, precision, True)
    (reference, layers), (gm, _) = q_dq(captured, args, decisions), q_dq(captured, args, decisions)
    propagate(gm, tensors)
    return lowered(reference, gm, layers, tensors, simplify, lambda gm: to_8_bit_operators(gm, choose or Reference()))


def whole_for_cuda(made, precision):
    """(the lowered graph, the Q/DQ graph, tensors) of ``for_cuda``, to be compared as they are."""
    captured, args, recipe = made
    tensors = tensor_inputs(captured, args)
    decisions = [replace(d, precision=precision) if d.quantized else d
                 for d in plan(captured.layers, recipe, (), smooth_convs=True)]
    (reference, _), (gm, _) = q_dq(captured, args, decisions), q_dq(captured, args, decisions)
    propagate(gm, tensors)
    simplify(gm)
    return to_8_bit_operators(gm, Reference()), reference, tensors


def forced(case):
    """The interpreter after its run: every operator of ours was compared, and every planned layer."""
    teacher = TeacherForcing(case)
    with torch.no_grad():
        teacher.run(*case.tensors)
    missed = [n for n in case.gm.graph.nodes if ours(n) and n not in teacher.visited]
    assert not missed, f"{len(missed)} operators were compared with nothing: {missed[:5]}"
    assert teacher.layers == set(case.layers)
    return teacher


def kinds(case):
    return Counter(str(n.target).split(".")[1] for n in case.gm.graph.nodes if ours(n))


def check(case):
    """Nothing fails; as many operators of each kind as there are layers for. Returns their count by name."""
    teacher = forced(case)
    assert not teacher.failures, "\n".join(teacher.failures[:10])
    assert teacher.worst
    found = kinds(case)
    assert found["group_norm"] + found["group_norm8"] == len(calls(case.reference, F.group_norm))
    return found


def calls(gm, target):
    return gm.graph.find_nodes(op="call_function", target=target)


HOW = {"operators": {}, "oneDNN": {"packed": True}, "operators in bf16": {"narrow": torch.bfloat16},
       "oneDNN in bf16": {"narrow": torch.bfloat16, "packed": True}}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "how"), [
    pytest.param(m, how, id=f"{m}-{name}")
    for m in MODELS for name, how in HOW.items()])
def test_each_operation_for_the_cpu_gives_what_its_reference_gives(calibrated, model, how):
    case = for_the_cpu(calibrated(model), **how)
    found = check(case)
    for op, names in {"conv2d": ("int8_conv2d", "qconv_pointwise"), "linear": ("int8_linear", "qlinear_pointwise")}.items():
        products = sum(1 + d.two_codes for d in case.layers.values() if d.layer.op == op)
        assert found[names[bool(how.get("packed"))]] == products
    assert any(d.two_codes for d in case.layers.values()) or model == "flux"


@pytest.mark.slow
@pytest.mark.parametrize(("model", "precision", "dtype"), [
    pytest.param(m, p, d, id=f"{m}-{p}-{str(d)[6:]}", marks=[pytest.mark.long] if d == torch.bfloat16 else [])
    for m in MODELS for p in ("int8", "fp8") for d in (torch.float32, torch.float16, torch.bfloat16)])
def test_each_operation_for_cuda_gives_what_its_reference_gives(calibrated, model, precision, dtype):
    case = for_cuda(calibrated(model, dtype), precision)
    count_for_cuda(case, check(case), model)


def count_for_cuda(case, found, model):
    attentions = len(calls(case.reference, ATTENTION))
    decisions = case.layers.values()
    assert found["conv8"] == sum(d.layer.op == "conv2d" for d in decisions)
    products = {(d.layer.source, d.group) for d in decisions if d.layer.op == "linear"}
    assert found["linear8"] + found["linear_gelu8"] == len(products)
    if model == "flux":
        assert found["rms_rope8"] == 2 * attentions
        assert bool(found["linear_gelu8"]) is all(d.precision == "int8" for d in decisions)
    else:
        assert found["geglu8"] == len(calls(case.reference, F.gelu)) > 0
        assert found["layer_norm8"] + found["add_layer_norm8"] == len(calls(case.reference, F.layer_norm)) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("model", MODELS)
def test_each_operation_on_the_gpu_gives_what_its_reference_gives(calibrated, model, precision, dtype):
    """With the kernels that this GPU's chooser picks."""
    made = calibrated(model, dtype, "cuda")
    check(for_cuda(made, precision, chooser(tensor_inputs(*made[:2])[0].device)))


# --- broken operators are caught, where they are and nowhere else --------------------------------------------------------------


def argument(i, change):
    """A mutation of one argument; ``change`` gets its value, and the graph."""
    def mutate(gm, node):
        node.args = (*node.args[:i], change(node.args[i]), *node.args[i + 1:])
    return mutate


def constant(i, factor):
    def mutate(gm, node):
        name = node.args[i].target
        gm.register_buffer(f"{name}_broken", getattr(gm, name) * factor)
        with gm.graph.inserting_before(node):
            node.args = (*node.args[:i], gm.graph.get_attr(f"{name}_broken"), *node.args[i + 1:])
    return mutate


def swapped(i, j):
    def mutate(gm, node):
        args = list(node.args)
        args[i], args[j] = args[j], args[i]
        node.args = tuple(args)
    return mutate


def retargeted(target):
    def mutate(gm, node):
        node.target = target
    return mutate


def has(i):
    return lambda node: node.args[i] is not None


def drop(i):
    return argument(i, lambda value: None)


def always(node):
    return True


FOR_CUDA = {
    "a scale": (ops.linear8, constant(2, 1.001), always, "flux"),
    "a linear's bias": (ops.linear8, drop(3), has(3), "flux"),
    "cosine and sine": (ops.rms_rope8, swapped(4, 5), always, "flux"),
    "the norms of two streams": (ops.rms_rope8, swapped(2, 3), has(3), "flux"),
    "the factor of the scores": (ops.attention8, argument(3, lambda scale: scale * 1.01), always, "flux"),
    "a convolution's scale": (ops.conv8, constant(2, 2.0), always, "sdxl_unet"),
    "a residual": (ops.conv8, drop(4), has(4), "sdxl_unet"),
    "a convolution's bias": (ops.conv8, drop(3), has(3), "sdxl_unet"),
    # a norm over one channel alone does not see its shift
    "a shift": (ops.group_norm8, drop(2), lambda n: n.args[2] is not None and n.args[2].args[0].meta["val"].shape[1] > n.args[3],
                "sdxl_unet"),
    "silu": (ops.group_norm8, argument(7, operator.not_), always, "sdxl_unet"),
    "groups": (ops.group_norm8, argument(3, lambda groups: groups // 2), always, "sdxl_unet"),
    "a norm's scale": (ops.group_norm8, constant(8, 1.001), has(8), "sdxl_unet"),
    "a product's scale behind gelu": (ops.linear_gelu8, constant(4, 1.01), always, "flux"),
    "a product's bias in front of gelu": (ops.linear_gelu8, drop(3), has(3), "flux"),
    "a norm's weight": (ops.layer_norm8, drop(1), always, "sdxl_unet"),
    "a sum": (ops.add_layer_norm8, lambda gm, node: swapped_in(node), always, "sdxl_unet"),
    "a gate's scale": (ops.geglu8, constant(1, 1.001), always, "sdxl_unet"),
    "what was not lowered": (F.interpolate, lambda gm, node: setattr(node, "kwargs", {**node.kwargs, "mode": "bilinear"}), always,
                             "sdxl_unet"),
}
FOR_THE_CPU = {
    "a scale": (ops.int8_linear, argument(1, lambda scale: scale * 1.001), always, "flux"),
    "a scale, doubled": (ops.int8_linear, argument(1, lambda scale: scale * 2), always, "flux"),
    "a zero point": (ops.int8_conv2d, argument(2, lambda zero: zero + 1), always, "sdxl_unet"),
    "a weight's scale": (ops.int8_conv2d, constant(4, 1.001), always, "sdxl_unet"),
    "a bias": (ops.int8_linear, drop(5), has(5), "sdxl_unet"),
    "the rounding of a code": (torch.round, retargeted(torch.floor), always, "sdxl_unet"),
    "the low half of two codes": (torch.floor, retargeted(torch.ceil), always, "sdxl_unet"),
    "groups": (ops.group_norm, argument(1, lambda groups: groups // 2), always, "sdxl_unet"),
}


def swapped_in(node):
    node.args = (node.args[0], node.args[0], *node.args[2:])


def broken(case, target, mutate, where):
    """The case with the last such call broken, and that call."""
    node = [n for n in calls(case.gm, target) if where(n)][-1]
    mutate(case.gm, node)
    case.gm.graph.lint()
    return node


def only_there(case, node):
    teacher = TeacherForcing(case)
    with torch.no_grad():
        teacher.run(*case.tensors)
    assert teacher.failures, f"{node} was broken, and nothing failed"
    behind = {n.name for n in case.gm.graph.nodes if teacher.anchored(n) and node in teacher.cone(n)}
    assert {failure.partition(",")[0] for failure in teacher.failures} <= behind, teacher.failures[:5]


@pytest.mark.slow
@pytest.mark.parametrize("what", FOR_CUDA)
def test_a_broken_operation_for_cuda_is_caught(calibrated, what):
    target, mutate, where, model = FOR_CUDA[what]
    case = for_cuda(calibrated(model))
    only_there(case, broken(case, target, mutate, where))


@pytest.mark.slow
@pytest.mark.parametrize("what", FOR_THE_CPU)
def test_a_broken_operation_for_the_cpu_is_caught(calibrated, what):
    target, mutate, where, model = FOR_THE_CPU[what]
    case = for_the_cpu(calibrated(model))
    only_there(case, broken(case, target, mutate, where))
