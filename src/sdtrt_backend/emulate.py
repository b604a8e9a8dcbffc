"""What 8 bits give, in the user's precision: fake quantisation by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from . import stats
from .values import Decision


class HasLayers(Protocol):
    """A module, or several."""

    def get_submodule(self, target: str) -> torch.nn.Module: ...


@contextlib.contextmanager
def emulated(module: HasLayers, decisions: Mapping[str, Decision], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The layers give what 8 bits give, by fake quantisation, while the context is open. weights: as 8 bits hold them."""
    def hook(name: str) -> Callable[..., torch.Tensor]:
        def again(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> torch.Tensor:
            x = args[0] if args else kwargs["input"]
            x8 = stats.fake_quantize_input(decisions[name], x).to(x.dtype)
            if decisions[name].layer.op == "conv2d":
                y: torch.Tensor = layer._conv_forward(x8, weights[name], layer.bias)  # pads as the layer does
                return y
            return torch.nn.functional.linear(x8, weights[name], layer.bias)

        return again

    handles = [module.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in decisions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
