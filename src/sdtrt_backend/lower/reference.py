"""Plain torch fake quantisation: the Q/DQ graph run as it stands. Slow and obvious; the oracle of every other lowering."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..fx import runnable
from ..options import Options
from .lowered import Lowered


def lower(gm: fx.GraphModule, example: Sequence[torch.Tensor], options: Options) -> Lowered:
    """``options`` is not read: what is not quantised keeps the user's precision."""
    return Lowered(runnable(gm), derived=())
