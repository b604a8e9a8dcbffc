"""Dynamo's graph -> the layers that can be quantised, and a fresh graph with the parameters bound as constants."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from . import identity
from .calls import call_arguments, written
from .errors import GraphError
from .fx import alive, finish, for_passes, module_path
from .names import layer_name
from .recipe import fingerprint
from .roles import CONDITIONING, conditioning, ends
from .rules import OPS, SIDE_BRANCH
from .scalars import without_item
from .timesteps import find_timestep
from .values import Layer
from .work import weighted


@dataclass(frozen=True)
class Captured:
    """One captured graph with the parameters of one module.

    graph: Dynamo's own, never changed; layers: its quantisable calls; timestep: index of that input or None.
    constants: input index -> parameter or buffer; inputs: the other indices; biases: indices of the layers' biases;
    unquantizable: layer name -> why it is not even a candidate; written: indices of constants that are written between calls, as
    adapters are that run beside a layer.
    """

    graph: fx.GraphModule
    layers: tuple[Layer, ...]
    constants: dict[int, torch.Tensor]
    timestep: int | None
    unquantizable: dict[str, str]
    inputs: tuple[int, ...] = ()
    biases: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()

    def fingerprints(self) -> dict[str, str]:
        return {layer.name: fingerprint(layer.weight) for layer in self.layers}

    def layer_names(self) -> dict[str, str]:
        """FX node name -> layer name."""
        return {layer.node: layer.name for layer in self.layers}

    def placeholders(self) -> list[fx.Node]:
        """Of all inputs, in order."""
        return list(self.graph.graph.find_nodes(op="placeholder"))


def capture(graph: fx.GraphModule, example_inputs: Sequence[Any], paths: Mapping[int, str] | None = None) -> Captured:
    """Find constants, timestep and quantisable calls. Fake or symbolic example inputs are fine.

    paths: id of a parameter or buffer of the module -> its path, which names the layers; where it is not there, layers are named
    by the modules that Dynamo saw, relative to what it compiled. A buffer that is not in ``paths`` is an input like any other.
    """
    paths = paths or {}
    placeholders = graph.graph.find_nodes(op="placeholder")
    constants = {i: v for i, v in enumerate(example_inputs)
                 if isinstance(v, torch.nn.Parameter) or (isinstance(v, torch.Tensor) and id(v) in paths)}
    value_of, biases = {placeholders[i]: v for i, v in constants.items()}, set()
    layers: list[Layer] = []
    named: dict[str, torch.Tensor] = {}
    unquantizable: dict[str, str] = {}
    changed = written(graph.graph)
    timestep = find_timestep([n.name for n in placeholders], example_inputs)
    vectors = conditioning(graph.graph, value_of.keys(), None if timestep is None else placeholders[timestep])
    weights = {w.node: w.weight for w in weighted(graph.graph, lambda n: n in value_of or n.op == "get_attr")}
    first_and_last = ends(graph.graph, weights, value_of.keys(), vectors)
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in OPS:
            continue
        arguments = call_arguments(node)
        weight = value_of.get(arguments["weight"])
        name = layer_name(paths.get(id(weight), module_path(node)))
        if weight is None:
            unquantizable[name] = "its weight is computed in the graph, not a parameter"
            continue
        if arguments["bias"] is not None and arguments["bias"] not in value_of:
            unquantizable[name] = "its bias is computed in the graph, not a parameter"
            continue
        if arguments["input"] in changed or arguments["weight"] in changed:
            unquantizable[name] = "the module changes in place what it reads, so its codes could be older than the call"
            continue
        if isinstance(arguments.get("padding"), str):
            unquantizable[name] = f"its padding is given as {arguments['padding']!r}, not in pixels"
            continue
        biases.add(arguments["bias"])
        while named.setdefault(name, weight) is not weight:
            name += "'"  # a second call in one submodule, with another weight
        layers.append(Layer(name, OPS[node.target].name, node.name, arguments["input"].name, weight, arguments.get("groups", 1),
                            CONDITIONING if arguments["input"] in vectors else first_and_last.get(node, "")))
    others = tuple(i for i in range(len(placeholders)) if i not in constants)
    beside = {id(layer.weight) for layer in layers if fnmatchcase(layer.name, SIDE_BRANCH)}
    return Captured(graph, tuple(layers), constants, timestep, unquantizable, others,
                    frozenset(i for i, n in enumerate(placeholders) if n in biases),
                    frozenset(i for i, p in constants.items() if id(p) in beside))


def bind(captured: Captured, args: Sequence[Any]) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """A fresh graph whose inputs are the tensors of ``args`` alone: parameters become constants, integers literals.

    Editing Dynamo's graph in place would change its calling convention. Returns the graph and node name -> new node, of those
    whose result somebody reads. A Python float that changes between calls, which Dynamo hands over as a tensor, is one in the
    graph too; where that cannot be its value becomes part of it, and ``meta["baked"]`` has the names of those inputs;
    ``meta["written"]``: of the constants that are written between calls.
    """
    numbers: dict[str, float] = {}
    root, graph, env = torch.nn.Module(), fx.Graph(), {}
    placeholders = iter(enumerate(args))
    for node in captured.graph.graph.nodes:
        if node.op == "placeholder":
            i, value = next(placeholders)
            if i in captured.constants:
                constant = captured.constants[i].detach()
                # kernels hold biases in a form of their own: a copy, so that nothing of the user's is held with it
                root.register_buffer(node.name, constant.clone() if i in captured.biases else constant)
                env[node] = graph.get_attr(node.name)
            elif isinstance(value, torch.Tensor):
                env[node] = graph.placeholder(node.name)
                if any(user.target == "item" for user in node.users) and value.dtype is torch.float64 and not value.dim():
                    numbers[node.name] = float(value)
            else:
                env[node] = value  # a size that Dynamo made symbolic: one graph per shape is faster and simpler
        elif node.op == "get_attr":
            setattr(root, node.name, getattr(captured.graph, node.target))
            env[node] = graph.get_attr(node.name)
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    nodes = {node.name: new for node, new in env.items() if isinstance(new, fx.Node)}
    for node in captured.placeholders():  # what is computed of an input may depend on its dtype
        if node.name in nodes and "example_value" in node.meta:
            nodes[node.name].meta["example_value"] = node.meta["example_value"]
    gm, baked = for_passes(root, graph), frozenset[str]()
    if numbers:
        gm, baked = without_item(gm, numbers)
    gm.meta["baked"] = baked
    gm.meta["written"] = {n.name for i, n in enumerate(captured.placeholders()) if i in captured.written}
    return finish(gm), alive(nodes, gm)


def follow(captured: Captured, live: Container[torch.Tensor]) -> Captured:
    """The same with these constants as inputs: what is built from it reads them at every call, whatever becomes of them."""
    moved = {i for i, p in captured.constants.items() if p in live}
    if not moved:
        return captured
    constants = {i: p for i, p in captured.constants.items() if i not in moved}
    return replace(captured, constants=constants, inputs=tuple(sorted({*captured.inputs, *moved})),
                   written=captured.written - moved)


def exchanged(captured: Captured, others: Mapping[int, torch.Tensor]) -> Captured:
    """The same with other tensors as these constants, which are written between calls. others: index -> tensor."""
    return replace(captured, constants={**captured.constants, **others}, written=captured.written | others.keys())


def follow_all(captured: Captured) -> Captured:
    """The same with every constant as an input."""
    return replace(captured, constants={}, inputs=tuple(sorted({*captured.inputs, *captured.constants})), written=frozenset())


_NUMBERS = itertools.count()


def concrete(captured: Captured, args: Sequence[Any]) -> tuple[str, ...]:
    """What the graph does with inputs of these sizes: a line for every input and call. Where two graphs of one module do the
    same, one step serves both: Dynamo makes a graph for the first sizes, and another with symbolic sizes, for every size, once it
    meets other ones."""
    env: dict[fx.Node, Any] = {}  # a tensor's name, or a size, which is known here
    calls: list[str] = []
    values = iter(enumerate(args))
    for node in captured.graph.graph.nodes:
        if node.op == "placeholder":
            i, value = next(values)
            if i in captured.constants:
                value = f"parameter{id(captured.constants[i])}"
            elif isinstance(value, torch.Tensor):
                value = f"v{len(calls)}"
                calls.append("input")
            env[node] = value
        elif node.op == "get_attr":
            env[node] = f"constant{next(_NUMBERS)}"  # a graph's own: no other one has it
        elif isinstance(node.meta.get("example_value"), torch.SymInt | torch.SymFloat) and not any(
                isinstance(env[n], str) for n in node.all_input_nodes):
            arguments, keywords = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*arguments, **keywords)
        else:
            env[node] = f"v{len(calls)}"
            try:
                calls.append(identity.call(node, env.__getitem__))
            except GraphError:  # something that no text tells from others
                calls.append(f"unlike any other {next(_NUMBERS)}")
    return tuple(calls)


def trace(module: torch.nn.Module, call: Mapping[str, Any],
          dynamic: dict[str, Any] | None = None) -> tuple[Captured, list[Any]]:
    """What ``capture`` gives for torch.export's graph, and the values ``bind`` takes; no call is run.

    Its inputs carry the names of the module's forward, and sizes may stay symbolic. call: arguments of one call by name;
    dynamic: the dimensions that vary, as torch.export takes them. Buffers count as constants.
    """
    with torch.no_grad():
        program = torch.export.export(module, (), dict(call), dynamic_shapes=dynamic, strict=False)
    signature = program.graph_signature
    held = {**program.state_dict, **program.constants}
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    values = [torch.nn.Parameter(held[lifted[n.name]], requires_grad=False) if n.name in lifted else n.meta["val"]
              for n in program.graph.find_nodes(op="placeholder")]
    return capture(program.graph_module, values), values


def tensor_inputs(captured: Captured, args: Sequence[Any]) -> list[torch.Tensor]:
    """What the bound graph takes, from what Dynamo passes. What a scheduler left on the CPU goes to the device of the weights,
    where the module itself would send it: a CUDA graph reads nothing on the host."""
    weight = next(iter(captured.constants.values()), None)
    if weight is None:
        weight = next((a for a in args if isinstance(a, torch.nn.Parameter)), None)
    device = None if weight is None else weight.device
    tensors = [v for i in captured.inputs if isinstance(v := args[i], torch.Tensor)]
    return [t.to(device) if t.is_cpu else t for t in tensors] if device is not None and device.type != "cpu" else tensors
