"""Python floats that change between calls: a LoRA's scaling, an adapter's strength, a timestep that is no tensor.

Dynamo hands such a float over as a tensor of no dimension, float64, on the CPU, and its graph reads the number by ``.item()``.
Compilers cannot trace that, and a CUDA graph would replay the first number. So the graph is rewritten to compute with the
tensor itself, in float32 (float64 where the result is), rounded once to the dtype that the Python float would have given.
In float32 and float64 the result is the same to the bit, but for powers and for quotients on a GPU; in 16 bits it may differ in
its last bit, as PyTorch rounds some numbers to 16 bits first, and Inductor does where a tensor is changed in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from .calls import arguments, name_of, tensors_of
from .fx import finish, inserting_after

READS = ("item", "_local_scalar_dense")
# arithmetic of numbers -> the same of float64 tensors of no dimension; what is not here is computed for the call at hand
ARITHMETIC: dict[Any, Callable[..., Any]] = {
    f: f for f in (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
                   operator.neg, operator.abs, abs)}
ARITHMETIC["__abs__"] = abs  # of PyTorch 2.11
ARITHMETIC |= {getattr(torch, f"_sym_{name}"): getattr(torch, name)
               for name in ("sqrt", "sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "log2")}
# functions of tensors that take a tensor of no dimension in place of a number, and what they call these operands
OPERATIONS = ("add", "sub", "mul", "div", "truediv", "pow", "subtract", "multiply", "divide", "true_divide", "where")
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_", "fill_")
OPERANDS = ("input", "other", "exponent", "value")
# what states something of a number, and computes nothing
STATEMENTS = ("_assert", "_assert_scalar", "_assert_async", "_check", "_check_is_size", "_check_value", "sym_constrain_range",
              "sym_constrain_range_for_size")
WIDE = (torch.float64, torch.complex128)
NARROW = (torch.float16, torch.bfloat16)


def without_item(gm: fx.GraphModule, values: Mapping[str, float]) -> tuple[fx.GraphModule, frozenset[str]]:
    """``gm``, changed in place, without ``.item()`` of the placeholders named in ``values``, and the names of those whose value
    of this call became part of it.

    values: name of the placeholder, float64 [] -> the number that this call has there. A number becomes a literal where no
    tensor can stand for it (eps of a norm, the scale of an attention, the rounded or compared number): the graph then holds for
    this value alone. Statements about such numbers are dropped. On a GPU the placeholders' tensors must be there too.
    """
    return _Scalars(gm, values).rewrite()


class _Scalars:
    """numbers: every node of a Python number that comes from the placeholders -> its value in this call; sources: the
    placeholders it comes from; tensors: those that were asked for as a float64 [] tensor."""

    def __init__(self, gm: fx.GraphModule, values: Mapping[str, float]) -> None:
        self.gm, self.values = gm, values
        self.numbers: dict[fx.Node, Any] = {}
        self.sources: dict[fx.Node, frozenset[str]] = {}
        self.tensors: dict[fx.Node, fx.Node | None] = {}
        self.baked: set[str] = set()

    def rewrite(self) -> tuple[fx.GraphModule, frozenset[str]]:
        for node in list(self.gm.graph.nodes):
            if not self._is_number(node) and any(n in self.numbers for n in node.all_input_nodes):
                if name_of(node) in STATEMENTS:
                    self.gm.graph.erase_node(node)
                elif not self._by_tensors(node):
                    node.args, node.kwargs = self._literal(node.args), self._literal(node.kwargs)
        for node in reversed(self.numbers):  # nobody reads them any more
            if not node.users:
                self.gm.graph.erase_node(node)
        return finish(self.gm), frozenset(self.baked)

    def _is_number(self, node: fx.Node) -> bool:
        """Whether ``node`` is a number that comes from the placeholders alone; it is then computed."""
        inputs = node.all_input_nodes
        if name_of(node) in READS and len(inputs) == 1 and inputs[0].op == "placeholder" and inputs[0].name in self.values:
            self.numbers[node], self.sources[node] = float(self.values[inputs[0].name]), frozenset((inputs[0].name,))
            return True
        if not inputs or not all(n in self.numbers for n in inputs) or not _of_numbers(node):
            return False
        args: list[Any] = list(fx.map_arg(node.args, self.numbers.__getitem__))
        kwargs: Any = fx.map_arg(node.kwargs, self.numbers.__getitem__)
        called: Any = getattr(args.pop(0), str(node.target)) if node.op == "call_method" else node.target
        self.numbers[node] = called(*args, **kwargs)
        self.sources[node] = frozenset[str]().union(*(self.sources[n] for n in inputs))
        return True

    def _literal(self, given: Any) -> Any:
        """``given`` with the numbers as they are in this call, which are baked in."""
        def value(n: fx.Node) -> Any:
            self.baked |= self.sources.get(n, frozenset())
            return self.numbers.get(n, n)

        return fx.map_arg(given, value)

    def _tensor(self, number: fx.Node) -> fx.Node | None:
        """The number as a float64 [] tensor, or None where it must be a Python number."""
        if number not in self.tensors:
            self.tensors[number] = self._made(number)
        return self.tensors[number]

    def _made(self, number: fx.Node) -> fx.Node | None:
        inputs = number.all_input_nodes
        if name_of(number) in READS:
            return inputs[0]
        if not isinstance(self.numbers[number], float):
            return None
        name, operands = name_of(number), [self._tensor(n) for n in inputs]
        if None in operands or number.kwargs:
            return None
        if name == "sym_float":
            return operands[0]
        swap = dict(zip(inputs, operands, strict=True))
        args: Any = fx.map_arg(number.args, swap.__getitem__)
        graph = self.gm.graph
        with graph.inserting_before(number):
            if name in ("sym_max", "sym_min") and len(args) == 2:
                both = tuple(a if isinstance(a, fx.Node) else graph.call_function(torch.full_like, (operands[0], float(a)))
                             for a in args)
                return graph.call_function(torch.maximum if name == "sym_max" else torch.minimum, both)
            if number.target not in ARITHMETIC:
                return None
            return graph.call_function(ARITHMETIC[number.target], args)

    def _cast(self, node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        with self.gm.graph.inserting_before(before):
            return self.gm.graph.call_method("to", (node, dtype))

    def _by_tensors(self, node: fx.Node) -> bool:
        """Rewrite a call that reads numbers to read tensors; False where it takes none."""
        value, name = tensors_of(node), name_of(node)
        if len(value) != 1:
            return False
        if name in ("tensor", "as_tensor", "scalar_tensor", "full"):
            return self._constant(node, value[0])
        if name not in (*OPERATIONS, *IN_PLACE):
            return False
        dtype = torch.float64 if value[0].dtype in WIDE else torch.float32
        given = arguments(node)
        replaced: dict[fx.Node, fx.Node] = {}
        for operand in (given.get(key) for key in OPERANDS):
            if not isinstance(operand, fx.Node):
                continue
            if operand in self.numbers:
                tensor = self._tensor(operand)
                if tensor is not None:
                    replaced[operand] = self._cast(tensor, dtype, node)
            elif name in OPERATIONS:
                held = tensors_of(operand)
                if len(held) != 1:
                    return False  # a tensor of unknown dtype
                if held[0].dtype in NARROW:
                    replaced[operand] = self._cast(operand, dtype, node)
        if not any(n in self.numbers for n in replaced):
            return False
        for key, operand in given.items():  # alpha of a sum, say
            if key not in OPERANDS and isinstance(operand, fx.Node) and operand in self.numbers:
                return False
        for old, new in replaced.items():
            node.replace_input_with(old, new)
        node.args, node.kwargs = self._literal(node.args), self._literal(node.kwargs)
        if name in OPERATIONS and value[0].dtype not in (*WIDE, torch.float32, torch.complex64):
            with inserting_after(node):
                narrow = self.gm.graph.call_method("to", (node, value[0].dtype))
            narrow.meta.update(node.meta)
            for key in ("val", "example_value"):
                node.meta.pop(key, None)
            node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
        return True

    def _constant(self, node: fx.Node, value: torch.Tensor) -> bool:
        """torch.tensor(number), torch.tensor([number]) and torch.full(size, number)."""
        given, graph = arguments(node), self.gm.graph
        number = given.get("fill_value") if name_of(node) == "full" else node.args[0] if node.args else None
        size: Any = given.get("size") if name_of(node) == "full" else ()
        if isinstance(number, list | tuple) and len(number) == 1:
            number, size = number[0], (1,)
        tensor = self._tensor(number) if isinstance(number, fx.Node) and number in self.numbers else None
        if tensor is None or not (isinstance(size, list | tuple) and all(isinstance(s, int) for s in size)):
            return False
        with graph.inserting_before(node):
            place: dict[str, Any] = {"dtype": value.dtype} if value.is_cpu else {"dtype": value.dtype, "device": value.device}
            new = graph.call_method("to", (tensor,), place)
            # a tensor of its own: somebody may write into it
            new = graph.call_method("clone", (graph.call_method("expand", (new, tuple(size))),),
                                    {"memory_format": torch.contiguous_format})
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return True


def _of_numbers(node: fx.Node) -> bool:
    """Whether a call of numbers gives a number: arithmetic, and not what makes a tensor of them."""
    if node.op == "call_method":
        return True
    symbolic = name_of(node).startswith(("sym_", "_sym_")) and name_of(node) not in STATEMENTS
    return symbolic or getattr(node.target, "__module__", None) in ("_operator", "math", "builtins")
