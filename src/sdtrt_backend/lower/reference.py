"""Plain torch fake quantisation: the Q/DQ graph run as it stands. Slow and obvious; the oracle of every other lowering."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx


def lower(gm: fx.GraphModule, example: Sequence[torch.Tensor], rest: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """``rest`` is ignored: what is not quantised keeps the user's precision."""
    return gm.forward
