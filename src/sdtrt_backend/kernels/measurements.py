"""Times and refusals of kernels, kept on disk, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..store import Store, device_key
from . import timing
from .problem import Choice
from .timing import Refusal

# A file of before reasons were kept has null for a kernel that was refused
NO_REASON = "it was refused when it was measured"


class Measurements:
    """name -> what was measured under it: on disk where it holds for every process, else in this one."""

    def __init__(self, device: torch.device) -> None:
        self.store = Store(device_key(device))
        self.passing: dict[str, dict[str, float | str]] = {}

    def get(self, name: str, measure: Callable[[], Mapping[str, float | Refusal]]) -> dict[str, Any]:
        """variant -> milliseconds, or the reason of its refusal, or null in a file of before reasons were kept. What need
        not last would stand for ever on disk: what was measured beside it is not kept there either."""
        if name in self.passing:
            return self.passing[name]
        if name not in self.store.values:
            found = timing.retried(measure)
            values = timing.kept(found)
            if not timing.lasting(found):
                self.passing[name] = values
                return values
            return dict(self.store.get(name, lambda: values))
        return dict(self.store.values[name])


def fastest(known: Mapping[str, Any]) -> Choice | None:
    """The kernel with the fewest milliseconds, None where all were refused."""
    times = (Choice(kernel, ms) for kernel, ms in known.items() if isinstance(ms, int | float))
    return min(times, key=lambda c: c.ms, default=None)


def why(known: Mapping[str, Any]) -> tuple[str, ...]:
    """The reasons of kernels none of which runs."""
    return () if fastest(known) else tuple(f"{kernel}: {reason or NO_REASON}" for kernel, reason in known.items())
