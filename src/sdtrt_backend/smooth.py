"""SmoothQuant in a graph: divide a tensor by its factor, inside the preceding layer norm where only 8-bit layers read it."""

from __future__ import annotations

import torch
from torch import fx

from .fx import add_constant, arguments, inserting_after

LAYER_NORMS = (torch.nn.functional.layer_norm, torch.ops.aten.layer_norm.default)  # Dynamo's and torch.export's


def smooth_source(gm: fx.GraphModule, source: fx.Node, readers: set[fx.Node], factor: torch.Tensor) -> fx.Node:
    """The node that carries source / factor (factor: fp32, shaped by ``stats.over_channels``).

    Folded into the layer norm when ``source`` is one and nobody but ``readers`` reads it; else one multiplication,
    which compilers fuse into the quantisation that follows.
    """
    return fold_into_norm(gm, source, readers, factor) or multiply(gm, source, factor)


def fold_into_norm(gm: fx.GraphModule, source: fx.Node, readers: set[fx.Node], factor: torch.Tensor) -> fx.Node | None:
    """norm(x) * w + b over s is norm(x) * (w / s) + b / s. None when the pattern does not hold."""
    if source.target not in LAYER_NORMS or not set(source.users) <= readers:
        return None
    given = arguments(source)
    weight, bias = given["weight"], given["bias"]
    if not isinstance(weight, fx.Node) or any(isinstance(n, fx.Node) and n.op != "get_attr" for n in (weight, bias)):
        return None
    with gm.graph.inserting_before(source):
        folded = {part: add_constant(gm, f"{source.name}_{part}", _divide(getattr(gm, str(node.target)), factor))
                  for part, node in (("weight", weight), ("bias", bias)) if node is not None}
    source.args = (given["input"], given["normalized_shape"], folded["weight"], folded.get("bias"), given["eps"])
    source.kwargs = {}
    return source


def multiply(gm: fx.GraphModule, source: fx.Node, factor: torch.Tensor) -> fx.Node:
    """source * (1 / factor), right behind ``source``."""
    with inserting_after(source):
        inverse = add_constant(gm, f"{source.name}_inverse_smoothing", factor.reciprocal())
    with gm.graph.inserting_after(inverse):
        product = gm.graph.call_function(torch.mul, (source, inverse))
    product.meta["smoothing"] = True  # a lowering may merge it with the scale of the quantisation behind it
    return product


def _divide(constant: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (constant.detach().float() / factor.to(constant.device)).to(constant.dtype)
