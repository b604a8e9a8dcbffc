"""Every operation of a captured graph that has a weight, whether or not it can run in 8 bits, and how much work it is.

A weight is a parameter, or what a graph makes of parameters alone: a view, a slice, a cast, a decoded or a merged one. Norms,
embeddings and sums are no work here: they multiply no matrix. FLOPs are two per multiplication with a weight, so attention's
products of activations are not among them, and a bias is free. Graphs are as Dynamo and torch.export make them: of functions and
methods, not of modules.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .fx import module_path
from .rules import OPS
from .values import LayerReport

OPAQUE = "its arithmetic is not known here, so its FLOPs are not counted"


@dataclass(frozen=True)
class Row:
    """How an operation is counted. operands: (position, names as keyword) of the tensors that ``flops`` takes behind the output.

    flops: (output, *operands) -> 2 * MAC, from shapes alone.
    """

    op: str
    operands: tuple[tuple[int, tuple[str, ...]], ...]
    flops: Callable[..., int]


@dataclass(frozen=True)
class Work:
    """One operation with a weight. op: its kind; name: path of its module; weight: shape of the weight, the largest of several;
    candidate: its kind has an 8-bit kernel (``rules.OPS``); opaque: what it does with the weight is not known."""

    node: fx.Node
    op: str
    name: str
    weight: tuple[int, ...]
    candidate: bool = False
    opaque: bool = False

    @property
    def reason(self) -> str:
        """Why it stays in the user's precision, where its kind is the reason."""
        if self.opaque:
            return f"{self.op}: {OPAQUE}"
        return "" if self.candidate else f"{self.op}: no 8-bit kernel"

    def flops(self) -> int | None:
        """2 * MAC of a call of the graph as captured; None where a size is symbolic or was not noted. See ``flops`` for a run."""
        arguments, keywords = fx.map_arg((self.node.args, self.node.kwargs), _noted)
        tensors = list(_tensors((_noted(self.node), arguments, keywords)))
        if not tensors or any(not isinstance(size, int) for t in tensors for size in t.shape):
            return None
        return flops(self.node, _noted(self.node), arguments, keywords)

    def kept(self, flops: int, precision: str, engine: str = "inductor") -> LayerReport:
        """Its row in a report where it is no candidate. flops: of a call; precision: such as "float32"."""
        return LayerReport(self.name, self.op, self.weight, precision, engine, self.reason, flops=flops)


def weighted(graph: fx.Graph, is_parameter: Callable[[fx.Node], bool]) -> list[Work]:
    """Every operation with a weight, in the graph's order. is_parameter: of a placeholder or get_attr."""
    found: list[Work] = []
    made_of: dict[fx.Node, str] = {}
    for node in graph.nodes:
        made_of[node] = _made_of(node, is_parameter, made_of)
        row = None if node.op not in ("call_function", "call_method") else ROWS.get(_target(node))
        read = _operands(row, node.args, node.kwargs) if row else node.all_input_nodes if _is_opaque(node) else []
        weights = [n for n in _nodes(read) if made_of.get(n) == WEIGHT]
        if not weights:
            continue
        if row is None and (made_of[node] == WEIGHT or all(len(_shape(n)) < 2 for n in weights)):
            continue  # it decodes a weight, or reads a norm's
        shape = max((_shape(n) for n in weights), key=math.prod)
        found.append(Work(node, row.op if row else str(node.target), module_path(node), shape, node.target in OPS, row is None))
    return found


def flops(node: fx.Node, output: Any, arguments: Sequence[Any], keywords: Mapping[str, Any] | None = None) -> int:
    """2 * MAC of one run of an operation that ``weighted`` found, 0 of an opaque one.

    output, arguments, keywords: of this run, real tensors or fake ones: what ``fx.Interpreter.run_node`` returns, and
    ``fetch_args_kwargs_from_env``.
    """
    row = ROWS.get(_target(node))
    if row is None:
        return 0
    return int(row.flops(output, *_operands(row, arguments, keywords or {})))


def share(quantized: int, kept: int) -> float:
    """0..1 of all the work that runs in 8 bits, from the FLOPs that do and those that do not."""
    return quantized / max(1, quantized + kept)


# --- what a value is made of ------------------------------------------------------------------------------------------
WEIGHT, NOTHING, INPUT = "weight", "nothing", "input"


def _made_of(node: fx.Node, is_parameter: Callable[[fx.Node], bool], made_of: Mapping[fx.Node, str]) -> str:
    """WEIGHT where it is made of parameters alone, NOTHING where it is a number or is made of none, else INPUT.

    The numbers of a graph (sizes, a factor that changes from call to call) make no input of a weight.
    """
    if node.op in ("placeholder", "get_attr"):
        value = _noted(node)
        return WEIGHT if is_parameter(node) else INPUT if value is None or isinstance(value, torch.Tensor) else NOTHING
    if isinstance(_noted(node), torch.SymInt | torch.SymFloat | torch.SymBool | int | float):
        return NOTHING
    parts = {made_of[n] for n in node.all_input_nodes}
    row = ROWS.get(_target(node)) if node.op in ("call_function", "call_method") else None
    if INPUT in parts or (row is not None and row.op not in PRODUCTS and WEIGHT in parts):
        return INPUT  # a layer of learned queries is a layer; a product of two weights, as a LoRA's, is a weight
    return WEIGHT if WEIGHT in parts else NOTHING


def _noted(node: fx.Node) -> Any:
    """The value that Dynamo or torch.export noted for a node: a fake tensor, a symbolic number, several, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = _noted(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor))


def _nodes(values: Any) -> Iterator[fx.Node]:
    return (v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, fx.Node))


def _target(node: fx.Node) -> Any:
    """Key of ``ROWS``: a function, a method's name, or the packet of an aten overload."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def _operands(row: Row, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[Any]:
    return [arguments[at] if at < len(arguments) else next((keywords[name] for name in names if name in keywords), None)
            for at, names in row.operands]


def _is_opaque(node: fx.Node) -> bool:
    """A custom operator, a function that Dynamo did not look into, or a graph within the graph."""
    target = node.target
    if node.op != "call_function" or _target(node) in ROWS:
        return False
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = target.name() if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        return name.partition("::")[0] not in ("aten", "prim", "prims")
    return (getattr(target, "__module__", None) or "torch").partition(".")[0] not in ("torch", "_operator", "math", "builtins")


# --- the table --------------------------------------------------------------------------------------------------------
def _convolution(output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> int:
    """weight: [out, in / groups, ...]."""
    return 2 * output.numel() * math.prod(weight.shape[1:])


def _transposed(output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> int:
    """weight: [in, out / groups, ...]: each value of the input is multiplied with what is behind its channel."""
    return 2 * x.numel() * math.prod(weight.shape[1:])


def _either(output: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, transposed: bool) -> int:
    return (_transposed if transposed else _convolution)(output, x, weight)


def _product(output: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> int:
    """[..., m, k] x [..., k, n]; also a linear, whose weight is [n, k]."""
    return 2 * output.numel() * a.shape[-1]


def _product_from_the_right(output: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> int:
    return _product(output, a, b)


def _summed(output: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> int:
    """[batch, m, k] x [batch, k, n], summed over the batch."""
    return 2 * a.numel() * b.shape[-1]


def _bilinear(output: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> int:
    """weight: [out, in1, in2]."""
    return 2 * output.numel() * math.prod(weight.shape[1:])


def _contraction(output: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> int:
    """tensordot: the sizes of both are those of the output, and twice the contracted ones."""
    return 2 * output.numel() * math.isqrt(a.numel() * b.numel() // max(1, output.numel()))


def _einsum(output: torch.Tensor, equation: Any, *operands: Any) -> int:
    """2 * MAC of the contractions, two operands at a time from the left. A product without a sum is none."""
    tensors = list(_tensors((equation, operands)))
    text = equation if isinstance(equation, str) else _equation((equation, *operands))
    left, arrow, right = text.replace(" ", "").partition("->")
    terms = [_axes(term, t.dim()) for term, t in zip(left.split(","), tensors, strict=True)]
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        for axis, size in zip(term, tensor.shape, strict=True):
            sizes[axis] = max(sizes.get(axis, 1), size)
    result = set(_axes(right, output.dim())) if arrow else {
        axis for axis in sizes if axis.startswith(".") or sum(term.count(axis) for term in terms) == 1}
    total, known = 0, set(terms[0])
    for i, term in enumerate(terms[1:], 1):
        later = result.union(*terms[i + 1:])
        both = known & set(term)
        if both - later:
            kept = (known | set(term)) & later  # an axis of one operand alone is summed before
            total += 2 * math.prod(sizes[axis] for axis in kept | both)
        known = (known | set(term)) & later
    return total


def _equation(given: Sequence[Any]) -> str:
    """(a, [0, 1], b, [1, 2], [0, 2]) -> "ab,bc->ac": the other way to call einsum."""
    terms = ["".join("..." if axis is ... else chr(ord("A") + axis) for axis in axes) for axes in given
             if isinstance(axes, list | tuple)]
    operands = len(list(_tensors(given)))
    return ",".join(terms[:operands]) + "".join(f"->{term}" for term in terms[operands:])


def _axes(term: str, dims: int) -> list[str]:
    """"b...c" of four dimensions -> ["b", ".2", ".1", "c"]: what an ellipsis stands for is counted from its end."""
    before, dots, after = term.partition("...")
    some = dims - len(before) - len(after)
    return [*before, *(f".{i}" for i in range(some, 0, -1) if dots), *after]


def _attention(output: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> int:
    """torch.nn.MultiheadAttention's four projections to embed_dim, query's width."""
    return 2 * query.shape[-1] * (2 * query.numel() + key.numel() + value.numel())


def _matrices(output: Any, x: torch.Tensor, *weights: Any) -> int:
    """Every matrix of the operation is applied to every token of x, [..., channels]."""
    return 2 * math.prod(x.shape[:-1]) * sum(w.numel() for w in _tensors(weights) if w.dim() == 2)


_X, _WEIGHT = (0, ("input", "self")), (1, ("weight",))
_A, _B = (0, ("input", "self", "a", "x", "mat_a")), (1, ("other", "mat2", "vec", "tensor", "b", "y", "mat_b"))
_QKV = ((0, ("query",)), (1, ("key",)), (2, ("value",)))
_ADDED = ((1, ("mat1", "batch1", "mat")), (2, ("mat2", "batch2", "vec")))
PRODUCTS = ("matmul", "einsum", "tensordot")  # of which either side may be the weight, and whose result may be one
_EINSUM = Row("einsum", ((0, ("equation",)), (1, ("tensors",)), *((at, ()) for at in range(2, 10))), _einsum)
_RECURRENT = Row("recurrent layer", (_X, (2, ("params", "w_ih")), (3, ("w_hh",))), _matrices)

# names of functions of torch, torch.nn.functional and torch.linalg, of a tensor's methods and of aten's operators: how they count
_NAMED: dict[str, Row] = {
    **{f"conv{n}d": Row(f"conv{n}d", (_X, _WEIGHT), _convolution) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": Row(f"conv_transpose{n}d", (_X, _WEIGHT), _transposed) for n in (1, 2, 3)},
    **dict.fromkeys(("convolution", "_convolution"), Row("convolution", (_X, _WEIGHT, (6, ("transposed",))), _either)),
    "linear": Row("linear", (_X, _WEIGHT), _product),
    "bilinear": Row("bilinear", ((0, ("input1",)), (1, ("input2",)), (2, ("weight",))), _bilinear),
    **dict.fromkeys(("matmul", "__matmul__", "__imatmul__", "mm", "bmm", "mv", "dot", "vdot", "inner", "grouped_mm",
                     "_grouped_mm", "_int_mm", "_scaled_mm", "_scaled_mm_v2", "_weight_int8pack_mm"),
                    Row("matmul", (_A, _B), _product)),
    "__rmatmul__": Row("matmul", (_A, _B), _product_from_the_right),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_", "addmv", "addmv_"), Row("matmul", _ADDED, _product)),
    **dict.fromkeys(("addbmm", "addbmm_"), Row("matmul", _ADDED, _summed)),
    "einsum": _EINSUM,
    "tensordot": Row("tensordot", (_A, _B), _contraction),
    "multi_head_attention_forward": Row(
        "multi-head attention", (*_QKV, (5, ("in_proj_weight",)), (11, ("out_proj_weight",)),
                                 (18, ("q_proj_weight",)), (19, ("k_proj_weight",)), (20, ("v_proj_weight",))), _attention),
    "_native_multi_head_attention": Row("multi-head attention", (*_QKV, (5, ("qkv_weight",)), (7, ("proj_weight",))), _attention),
    "_transformer_encoder_layer_fwd": Row("transformer encoder layer", (
        (0, ("src",)), (3, ("qkv_weight",)), (5, ("proj_weight",)), (14, ("ffn_weight_1",)), (16, ("ffn_weight_2",))), _matrices),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _RECURRENT),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _RECURRENT),
}
_HOLDERS = (torch, torch.nn.functional, torch._C._nn, torch.linalg, torch.Tensor, torch.ops.aten)


def _targets() -> dict[Any, Row]:
    """Every function, overload packet and method's name that a graph may hold for the rows."""
    rows: dict[Any, Row] = {name: row for name, row in _NAMED.items() if hasattr(torch.Tensor, name)}
    for name, row in _NAMED.items():
        rows.update({getattr(holder, name): row for holder in _HOLDERS if hasattr(holder, name)})
    return {**rows, operator.matmul: _NAMED["matmul"], operator.imatmul: _NAMED["matmul"]}


ROWS = _targets()
