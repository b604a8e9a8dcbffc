"""What a graph does, as text: equal for graphs that do the same, in every process; different for graphs that do not.

A key on disk, and the choice of one compiled step for two captured graphs, both rest on it. A function is told by the name that
finds it again by an import, so by no memory address, and an object that no such text can be made of is an error.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name

from .errors import GraphError

ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,}")
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, torch.dtype, torch.device, torch.layout,
         torch.memory_format)
Arguments = Callable[[fx.Node], tuple[Any, Any]]


def own_arguments(node: fx.Node) -> tuple[Any, Any]:
    """(args, kwargs) as the graph holds them."""
    return node.args, node.kwargs


def printed(graph: fx.Graph, name_of: Callable[[fx.Node], Any], arguments_of: Arguments = own_arguments) -> list[str]:
    """One line for each node, in order: what it is called with ``name_of``, what it calls and with which arguments.

    name_of: node -> a word that stands for its value, or the value itself where it is a known number. The names that a tracer
    gave to nodes, placeholders and constants do not count: what a constant holds is for the caller to tell.
    arguments_of: node -> (args, kwargs) to print in the place of its own.
    """
    return [f"{value(node, name_of)} = {call(node, name_of, arguments_of)}" for node in graph.nodes]


def call(node: fx.Node, name_of: Callable[[fx.Node], Any], arguments_of: Arguments = own_arguments) -> str:
    """What one node calls, and with which arguments. Keyword arguments are in the order of their names."""
    args, kwargs = arguments_of(node)
    target = ""
    if node.op == "call_function":
        target = function(node.target)
    elif node.op == "call_method":
        target = repr(node.target)
    elif node.op == "call_module":  # the name of a module says nothing about its weights
        raise GraphError.no_identity(f"a call of the submodule {node.target}", torch.nn.Module)
    elif node.op == "get_attr":
        held = _attribute(node)
        target = _body(held) if isinstance(held, fx.GraphModule) else ""
    named = [f"{name}={value(kwargs[name], name_of)}" for name in sorted(kwargs)]
    return f"{node.op} {target}({', '.join([*(value(a, name_of) for a in args), *named])})"


def value(a: Any, name_of: Callable[[fx.Node], Any]) -> str:
    """One argument, whatever it is made of. Raises GraphError for what has no lasting text."""
    def inner(x: Any) -> str:
        return value(x, name_of)

    if isinstance(a, fx.Node):
        name = name_of(a)
        return f"%{name}" if isinstance(name, str) else inner(name)
    if isinstance(a, enum.Enum):
        return f"{_qualified(type(a))}.{a.name}"
    if isinstance(a, torch.SymInt | torch.SymFloat | torch.SymBool):
        return f"sym({a})"
    if isinstance(a, torch.Tensor):
        return tensor_text(a)
    if isinstance(a, tuple) and hasattr(a, "_fields"):
        return f"{_qualified(type(a))}({', '.join(map(inner, a))})"
    if isinstance(a, list | tuple):  # torch.Size and fx's immutable lists among them
        return ("[{}]" if isinstance(a, list) else "({})").format(", ".join(map(inner, a)))
    if isinstance(a, Mapping):
        return f"{{{', '.join(f'{inner(k)}: {inner(v)}' for k, v in a.items())}}}"
    if isinstance(a, set | frozenset):
        return f"set({', '.join(sorted(map(inner, a)))})"
    if isinstance(a, slice):
        return f"slice({inner(a.start)}, {inner(a.stop)}, {inner(a.step)})"
    if isinstance(a, functools.partial):
        named = [f"{k}={inner(a.keywords[k])}" for k in sorted(a.keywords)]
        return f"partial({', '.join([inner(a.func), *map(inner, a.args), *named])})"
    if type(a) in PLAIN:
        return repr(a)
    if isinstance(a, fx.GraphModule):
        return _body(a)
    if isinstance(a, type) or callable(a):
        return function(a)
    if dataclasses.is_dataclass(a):
        fields = [f"{f.name}={inner(getattr(a, f.name))}" for f in dataclasses.fields(a)]
        return f"{_qualified(type(a))}({', '.join(fields)})"
    text = repr(a)
    if ADDRESS.search(text) or "..." in text:
        raise GraphError.no_identity(text, type(a))
    return f"{_qualified(type(a))}:{text}"


def function(f: Any) -> str:
    """The name that finds a function, an operator or a class again. Raises GraphError where there is none, as of a lambda."""
    if isinstance(f, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return f"torch.ops.{f}"
    if isinstance(f, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{f.name()}"
    if isinstance(f, type):
        return _qualified(f)
    candidates = [_of_torch(f), f"{getattr(f, '__module__', None)}.{getattr(f, '__qualname__', '')}"]
    owner = getattr(f, "__objclass__", None)  # a method or property of a class that is written in C
    if isinstance(owner, type):
        candidates.append(f"{owner.__module__}.{owner.__qualname__}.{getattr(f, '__name__', '')}")
    found = next((name for name in candidates if name and _resolves(name, f)), None)
    if found is None:
        raise GraphError.no_identity(repr(f), type(f))
    return found


def _of_torch(f: Any) -> str:
    try:
        name = _get_qualified_name(f)
    except (RuntimeError, AttributeError):  # it has no name, or belongs to no module
        return ""
    return name if "." in name else f"builtins.{name}"


def _resolves(name: str, f: Any) -> bool:
    """Whether importing and looking up ``name`` gives ``f``."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
            found = operator.attrgetter(".".join(parts[cut:]))(module)
        except (ImportError, AttributeError, ValueError):
            continue
        return found is f or (not isinstance(f, type) and found == f)  # bound methods are made anew at each look
    return False


def _qualified(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if "<locals>" in name:
        raise GraphError.no_identity(name, type(kind))
    return name


def tensor_text(t: torch.Tensor) -> str:
    """Shape, data type and SHA-256 of the values, whatever the strides."""
    if type(t) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or t.is_meta:
        raise GraphError.no_identity(f"a {type(t).__name__} {tuple(t.shape)}", type(t))
    raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"tensor({tuple(t.shape)}, {t.dtype}, {hashlib.sha256(raw.data).hexdigest()})"


def _attribute(node: fx.Node) -> Any:
    owner = node.graph.owning_module
    try:
        return None if owner is None else operator.attrgetter(str(node.target))(owner)
    except AttributeError:
        return None


def _body(gm: fx.GraphModule) -> str:
    """A graph within a graph, as higher-order operators take it, with the values of its constants."""
    nodes: Sequence[fx.Node] = list(gm.graph.nodes)
    place = {node: f"v{i}" for i, node in enumerate(nodes)}
    constants = [tensor_text(t) for n in nodes if n.op == "get_attr" and isinstance(t := _attribute(n), torch.Tensor)]
    return f"graph({'; '.join([*printed(gm.graph, place.__getitem__), *constants])})"
