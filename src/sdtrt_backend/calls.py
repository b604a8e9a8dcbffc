"""What a call of a graph means, from its schema: its arguments by name, what it writes, and whose memory its result may share.

Dynamo's graphs hold calls as a Python program writes them: functions of torch, of ``operator`` and methods of tensors;
torch.export's hold overloads. An ATen schema is found by the name of the function or method. What has no schema counts as
one whose result may share the memory of every tensor that it takes, and as one that writes nothing, unless its name ends
in one underscore.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .rules import OPS

# functions of ``operator`` that go by another name in ATen
ATEN_NAMES = {"truediv": "div", "itruediv": "div_", "iadd": "add_", "isub": "sub_", "imul": "mul_", "ipow": "pow_",
              "ifloordiv": "floor_divide_", "imod": "remainder_", "floordiv": "floor_divide", "mod": "remainder"}
# calls without a schema that write their first argument although no underscore says so
IN_PLACE = ("setitem", "iand", "ior", "ixor", "ilshift", "irshift", "imatmul")
# names that end in one underscore and write no memory of a tensor
HARMLESS = ("requires_grad_", "detach_", "share_memory_")
# parameters of functions of ``operator`` that ATen does not have
OPERATORS = {operator.getitem: ("input", "index"), operator.setitem: ("input", "index", "value")}
# ATen functions that may hand back what they were given, or a view of it, which their schemas do not say
SILENT_VIEWS = ("type_as", "einsum", "broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d", "sum_to_size",
                "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "cartesian_prod", "chain_matmul", "to_dense", "data")
# These hand back their input outside of training, while fake tensors, which run a decomposition, say that it is a copy
IDENTITIES = ("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
# Functions that write arguments, which no schema says: name -> (what they write, the argument that must be true)
SILENT_WRITES = {"batch_norm": (("running_mean", "running_var"), "training"),
                 "native_batch_norm": (("running_mean", "running_var"), "training"),
                 "cudnn_batch_norm": (("running_mean", "running_var"), "training"),
                 "instance_norm": (("running_mean", "running_var"), "use_input_stats"),
                 "embedding": (("weight",), "max_norm"), "embedding_bag": (("weight",), "max_norm")}
# Calls that ``rearranges`` may name: a schema tells whose memory a result shares, not that it holds all of its values
REARRANGING = ("reshape", "reshape_as", "view", "view_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "permute",
               "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "contiguous")
# a user's own Triton kernel: Dynamo does not say in the call what it writes
WRITES_ALL = ("triton_kernel_wrapper_mutation",)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a call. type: TorchScript's, "" where it is unknown; shared, written: what the schema says of it."""

    name: str
    type: str = ""
    required: bool = True
    default: Any = None
    by_name: bool = False
    sized: bool = False  # a list that one number stands for, as a stride of 2
    shared: bool = False
    written: bool = False

    def takes(self, value: Any) -> bool:
        """Whether ``value`` may be meant for it: tells overloads apart."""
        if isinstance(value, fx.Node) or value is None or not self.type:
            return True
        if isinstance(value, str):
            return "str" in self.type or "Device" in self.type or "device" in self.type
        if isinstance(value, list | tuple):
            return "List" in self.type
        if isinstance(value, torch.dtype):
            return "int" in self.type and "List" not in self.type  # TorchScript has dtypes as numbers
        if isinstance(value, bool | int | float):
            return "Tensor" not in self.type and "str" not in self.type and ("List" not in self.type or self.sized)
        return True


Signature = tuple[Parameter, ...]


def name_of(node: fx.Node) -> str:
    """The bare name of the function or method of a call: "add_" of ``aten.add_.Tensor``; "" of other nodes."""
    if node.op == "call_method":
        return str(node.target)
    return _name(node.target) if node.op == "call_function" else ""


@functools.cache
def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", ""))


@functools.cache
def signatures(op: str, target: Any) -> tuple[Signature, ...]:
    """The parameters of each overload of a call, those of tensors alone; none where there is no schema."""
    if isinstance(target, torch._ops.OpOverload):
        schemas = [target._schema]
    elif isinstance(target, torch._ops.OpOverloadPacket):
        schemas = [getattr(target, name)._schema for name in target.overloads()]
    elif op == "call_method" or _is_torch(target):
        name = target if op == "call_method" else _name(target)
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{ATEN_NAMES.get(name, name)}")
    else:
        schemas = []
    found = (tuple(_parameter(a) for a in schema.arguments) for schema in schemas
             if any("Tensor" in str(a.type) for a in (*schema.arguments, *schema.returns)))
    # TorchScript has functions of lists under the same names, as sort, which writes a list of tensors
    of_lists = not (_name(target) if op == "call_function" else str(target)).endswith("_")
    return tuple(s for s in found if not (of_lists and any(p.written and "List" in p.type for p in s)))


def _is_torch(target: Any) -> bool:
    """Whether a function's name is one of ATen's: functions of other packages may have the same names."""
    module = getattr(target, "__module__", None) or "torch"
    return str(module).partition(".")[0] in ("torch", "_operator")


def _parameter(a: Any) -> Parameter:
    kind = str(a.type)
    tensors = a.alias_info is not None and "Tensor" in kind
    return Parameter("input" if a.name == "self" else a.name, kind, not a.has_default_value(), a.default_value, a.kwarg_only,
                     a.N is not None, tensors, tensors and a.alias_info.is_write)


@functools.cache
def _python_signature(target: Any) -> Signature | None:
    """Of a function that is written in Python; None of others, and where it takes any number of arguments."""
    if target in OPERATORS:
        return tuple(Parameter(name) for name in OPERATORS[target])
    if not inspect.isfunction(target):
        return None
    parameters = inspect.signature(target).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    return tuple(Parameter(p.name, required=p.default is p.empty, default=None if p.default is p.empty else p.default,
                           by_name=p.kind is p.KEYWORD_ONLY) for p in parameters)


def call_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a quantisable call by name, defaults filled in (``rules.OPS``)."""
    parameters = OPS[node.target].arguments
    values = dict(parameters)
    values.update(zip((name for name, _ in parameters), node.args, strict=False))
    values.update(node.kwargs)
    return values


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by name, defaults filled in, however they were passed. The tensor that a method belongs to, and what
    ATen's schemas call self, is "input"; sizes and dimensions given one by one are one tuple: x.permute(0, 2, 1) has
    ``dims`` (0, 2, 1).

    A call that has no schema, or whose arguments fit none: those passed by position are named "0", "1", ...
    """
    if node.op == "call_function" and node.target in OPS:
        return call_arguments(node)
    python = _python_signature(node.target) if node.op == "call_function" else None
    candidates = [python] if python is not None else signatures(node.op, node.target) if node.op.startswith("call") else []
    loose = None
    for signature in candidates:
        given = _bound(signature, node.args, node.kwargs)
        if given is not None and all(p.takes(given[p.name]) for p in signature if p.name in given):
            return {p.name: given.get(p.name, p.default) for p in signature}
        loose = loose or (None if given is None else {p.name: given.get(p.name, p.default) for p in signature})
    return loose or {**{str(i): a for i, a in enumerate(node.args)}, **node.kwargs}


def _bound(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was passed, by parameter; None where it does not fit."""
    positional = [p for p in signature if not p.by_name]
    gathers = next((i for i, p in enumerate(positional) if "List[int]" in p.type and not p.sized), len(args))
    if gathers < len(args) and all(_is_int(a) for a in args[gathers:]):
        args = (*args[:gathers], tuple(args[gathers:]))
    if len(args) > len(positional):
        return None
    given: dict[str, Any] = dict(zip((p.name for p in positional), args, strict=False))
    named = {"input" if name == "self" else name: value for name, value in kwargs.items()}
    if not given.keys().isdisjoint(named) or not named.keys() <= {p.name for p in signature}:
        return None
    given |= named
    return given if all(p.name in given for p in signature if p.required) else None


def _is_int(value: Any) -> bool:
    value = value.meta.get("val", value.meta.get("example_value")) if isinstance(value, fx.Node) else value
    return isinstance(value, int | torch.SymInt)


def dimension(value: Any, node: fx.Node) -> Any:
    """``value`` as a dimension of the tensor of ``node``, counted from the front; anything else as it is."""
    shape = tensors_of(node)
    return value + shape[0].dim() if isinstance(value, int) and value < 0 and shape else value


# --- what is written, and what shares memory -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Effects:
    """Of one function or method. written, shared: names of parameters; known: there is a schema; first: the first argument is
    written; inplace: the parameter of that name is asked."""

    written: frozenset[str]
    shared: frozenset[str]
    known: bool
    first: bool
    inplace: bool


@functools.cache
def _effects(op: str, target: Any) -> Effects:
    name = str(target) if op == "call_method" else _name(target)
    overloads = signatures(op, target)
    parameters = [p for s in overloads for p in s]
    written = frozenset(p.name for p in parameters if p.written and p.name != "out")
    named = name.endswith("_") and not name.endswith("__")
    bare = name[2:-2] if name.startswith("__") and name.endswith("__") else name
    first = not written and (named or bare in IN_PLACE or ATEN_NAMES.get(bare, "").endswith("_"))
    if name in HARMLESS:
        written, first = frozenset(), False
    shared = frozenset(p.name for p in parameters if p.shared and not p.by_name)
    python = _python_signature(target) if op == "call_function" else None
    silent = name in SILENT_VIEWS or name in IDENTITIES
    return Effects(written, shared, bool(overloads) and not silent, first,
                   python is not None and any(p.name == "inplace" for p in python))


def writes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes of the tensors that a call changes in place."""
    if node.op not in ("call_function", "call_method"):
        return ()
    name, effects = name_of(node), _effects(node.op, node.target)
    found: list[Any] = [node.kwargs.get("out")]
    if name in WRITES_ALL:
        found += node.all_input_nodes
    if effects.first or (node.kwargs.get("inplace") and node.args):
        found += node.args[:1] or list(node.kwargs.values())[:1]
    if effects.written or effects.inplace or name in SILENT_WRITES:
        given = arguments(node)
        found += [value for name, value in given.items() if name in effects.written]
        if effects.inplace and given.get("inplace"):
            found.append(given.get("input"))
        silent, when = SILENT_WRITES.get(name, ((), ""))
        if given.get(when):
            found += [given.get(name) for name in silent]
    return tuple(dict.fromkeys(n for n in _nodes(found) if not _is_number(n)))


def changes(node: fx.Node) -> fx.Node | None:
    """The first tensor that a call changes in place, or None."""
    return next(iter(writes(node)), None)


def shares(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes whose memory the result of a call may share: it is a view of theirs, or may be what it was given itself.

    Where fake tensors of both are at hand, and lie in different memory, they share none: ``to`` another dtype is a copy.
    """
    if node.op not in ("call_function", "call_method"):
        return ()
    effects = _effects(node.op, node.target)
    changed = writes(node)
    if effects.known and not effects.shared:
        return changed
    if effects.known:
        given = arguments(node)
        found = _nodes(value for name, value in given.items() if name in effects.shared)
        if not found and not effects.shared & given.keys():  # the arguments fit no overload
            found = node.all_input_nodes
    else:
        found = [] if changed else node.all_input_nodes
    apart = name_of(node) not in IDENTITIES
    return tuple(dict.fromkeys((*changed, *(n for n in found if not (apart and _lie_apart(node, n))))))


def rearranges(node: fx.Node) -> bool:
    """Whether a call's result holds the values of its first tensor, all of them once and no others, in another shape or order:
    what is done to every value alike may as well be done in front of it."""
    if name_of(node) not in REARRANGING:
        return False
    given = arguments(node)
    return isinstance(given.get("input"), fx.Node) and "dtype" not in given  # view(dtype) reads the bits as other numbers


def heads_in_front(node: fx.Node) -> bool:
    """Whether the call swaps dimensions 1 and 2 of four: [batch, tokens, heads, width] and the other way round."""
    given, name = arguments(node), name_of(node)
    if name == "permute":
        return [dimension(d, node) for d in given["dims"]] == [0, 2, 1, 3]
    return name == "transpose" and {dimension(given["dim0"], node), dimension(given["dim1"], node)} == {1, 2}


def _nodes(values: Iterable[Any]) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(list(values), found.append)
    return found


def _is_number(node: fx.Node) -> bool:
    """A symbolic number: a size, or a float that Dynamo made an input."""
    value = node.meta.get("val", node.meta.get("example_value"))
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float)


def tensors_of(node: fx.Node, key: str = "") -> list[torch.Tensor]:
    """The fake tensors of a node's result: one, those of a tuple, or none where they are not known. key: of ``meta``."""
    value = node.meta.get(key) if key else node.meta.get("val", node.meta.get("example_value"))
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def _lie_apart(node: fx.Node, source: fx.Node) -> bool:
    """Whether the fake tensors of both are known and lie in different memory. Those of a constant may be made more than once."""
    if source.op == "get_attr":
        return False
    key = "val" if "val" in node.meta and "val" in source.meta else "example_value"
    mine, theirs = tensors_of(node, key), tensors_of(source, key)
    if not mine or not theirs or any(t.layout is not torch.strided for t in (*mine, *theirs)):
        return False
    held = {t.untyped_storage()._cdata for t in theirs}
    return all(t.untyped_storage()._cdata not in held for t in mine)


def written(graph: fx.Graph) -> set[fx.Node]:
    """Every node whose memory some call of the graph may change: what it reads there depends on when it reads."""
    shared = {n: shares(n) for n in graph.nodes}
    found: set[fx.Node] = set()
    waiting = [base for n in graph.nodes for base in writes(n)]
    while waiting:  # up to the tensors whose memory it is
        n = waiting.pop()
        if n not in found:
            found.add(n)
            waiting += shared[n]
    for n, bases in shared.items():  # and down to all that lie in it
        if not found.isdisjoint(bases):
            found.add(n)
    return found


def inputs_changed(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders whose memory the graph may write: a cache of keys and values, a counter of steps, the statistics of a
    batch norm in training."""
    changed = written(graph)
    return [n for n in graph.nodes if n.op == "placeholder" and n in changed]
