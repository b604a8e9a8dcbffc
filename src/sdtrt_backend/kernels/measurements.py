"""Times and refusals of kernels, kept on disk, and what they say."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..files import Unusable, alone, read_json, write_json
from ..store import Store, device_key
from . import timing
from .problem import Choice
from .timing import Refusal, Unsteady

log = logging.getLogger("sdtrt_backend")
SCHEMA = 1
BUSY_S = 24 * 3600.0

# A file of before reasons were kept has null for a kernel that was refused
NO_REASON = "it was refused when it was measured"


class Measurements:
    """name -> what was measured under it: on disk where it holds for every process, else in this one. Times of a machine that was
    too busy to tell are kept for a day: what was compiled was chosen by them, and the next process is to find it."""

    def __init__(self, device: torch.device) -> None:
        self.store = Store(device_key(device))
        self.busy = self.store.path.with_name(f"busy-{self.store.path.name}")
        self.passing: dict[str, dict[str, float | str]] = {
            name: {kernel: Unsteady(ms) for kernel, ms in found["ms"].items()} for name, found in self._of_today().items()}

    def _of_today(self) -> dict[str, Any]:
        try:
            body = read_json(self.busy, SCHEMA)
        except Unusable as unusable:
            log.debug("%s", unusable)  # the first process, or a file to be replaced
            return {}
        return {name: found for name, found in body["values"].items() if time.time() - found["at"] < BUSY_S}

    def _keep_for_today(self, name: str, ms: Mapping[str, float | str]) -> None:
        found = {"at": time.time(), "ms": dict(ms)}
        with alone(self.busy):
            try:
                write_json(self.busy, SCHEMA, {"values": {**self._of_today(), name: found}})
            except OSError as error:
                log.warning("measurements cannot be kept in %s: %s", self.busy, error)

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
                if not any(isinstance(ms, str) for ms in values.values()):
                    self._keep_for_today(name, values)
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
