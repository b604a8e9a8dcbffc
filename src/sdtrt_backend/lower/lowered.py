"""What a lowering returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Lowered:
    """step: callable on tensor inputs; constants: the tensors that it reads besides them, where they can be moved; engines: name
    of a layer's node -> target, where a layer may go several ways; notes: sentences for the report."""

    step: Callable[..., Any]
    constants: Sequence[torch.Tensor] = ()
    engines: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
