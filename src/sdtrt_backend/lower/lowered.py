"""What a lowering returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..recurring import Held as Held


@dataclass(frozen=True)
class Scaled:
    """Scales that a step reads: those of ``parts``, each for so many rows and times a factor, one behind the other; fp32."""

    target: torch.Tensor
    parts: Sequence[tuple[torch.Tensor, int, float]]

    @property
    def sources(self) -> Sequence[torch.Tensor]:
        return [scale for scale, _, _ in self.parts]

    def renew(self) -> None:
        """See ``Derived``."""
        with torch.inference_mode(self.target.is_inference()):
            self.target.copy_(scaled(self.parts))


def scaled(parts: Sequence[tuple[torch.Tensor, int, float]]) -> torch.Tensor:
    """See ``Scaled``."""
    return torch.cat([(scale * factor).expand(rows) for scale, rows, factor in parts])


@dataclass(frozen=True)
class Derived:
    """What a step reads in place of 8-bit codes and scales. make: it again, from what ``sources`` are now."""

    target: torch.Tensor
    sources: Sequence[torch.Tensor]
    make: Callable[[], torch.Tensor]

    def renew(self) -> None:
        """In place, after one of the sources was written."""
        with torch.inference_mode(self.target.is_inference()):
            if self.target.is_mkldnn:  # packed: its values cannot be written, and what reads it holds the tensor
                self.target.data = self.make()
            else:
                self.target.copy_(self.make())


@dataclass(frozen=True)
class Lowered:
    """step: callable on tensor inputs; constants: the tensors that it reads besides them, where they can be moved; engines: name
    of a layer's node -> target, where a layer may go several ways; notes: sentences for the report; derived: what it reads in
    place of the codes and scales of the graph, None where their values are part of what was compiled; eight_bit_flops: of the
    8-bit kernels that it calls, None where that is not known from what was compiled: then they are seen when it runs."""

    step: Callable[..., Any]
    constants: Sequence[torch.Tensor] = ()
    engines: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    derived: Sequence[Derived | Scaled | Held] | None = None
    eight_bit_flops: int | None = None
