"""Which input is the timestep, which bucket a value falls into, and when a denoising trajectory is complete."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Names of the timestep argument over the denoisers of diffusers; the value is the key, its scale is not known.
TIMESTEP_NAMES = ("timestep", "timesteps", "timestep_ratio", "sigma", "sigmas", "t")
MAX_BUCKETS = 64


def find_timestep(names: Sequence[str], values: Sequence[object]) -> int | None:
    """Index of the timestep among a graph's inputs: by name, else the first tensor of at most one dimension.

    names: placeholder names such as ``l_kwargs_timestep_``; values: the inputs. None when there is none.
    """
    tensors = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and not isinstance(v, torch.nn.Parameter)
               and "_buffers_" not in names[i]]
    named = _named(names, tensors)
    if named is not None:
        return named
    for i in tensors:
        value = values[i]
        if isinstance(value, torch.Tensor) and value.dim() <= 1:
            return i
    return None


def number_for_timestep(names: Sequence[str], values: Sequence[object]) -> bool:
    """Whether the timestep comes as a Python number, which Dynamo makes symbolic."""
    return _named(names, [i for i, v in enumerate(values) if not isinstance(v, torch.Tensor)]) is not None


def _named(names: Sequence[str], candidates: Sequence[int]) -> int | None:
    """Index of the candidate that is called as timesteps are."""
    for wanted in TIMESTEP_NAMES:
        for i in candidates:
            if names[i].lower().strip("_").split("_")[-1] == wanted or names[i].lower().strip("_").endswith("_" + wanted):
                return i
    return None


def timestep_value(timestep: object) -> float:
    """One key for a call: the largest value, since conditioned tokens or frames carry 0. A float, or NaN when absent."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.max()) if timestep.numel() else float("nan")
    return float(timestep) if isinstance(timestep, int | float) else float("nan")


class Buckets:
    """Timestep value -> bucket key: the value itself for the first MAX_BUCKETS values, then the nearest of those."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def key(self, value: float) -> float:
        value = 0.0 if value != value else value
        if value in self.values:
            return value
        if len(self.values) < MAX_BUCKETS:
            self.values.append(value)
            return value
        return min(self.values, key=lambda known: abs(known - value))


class Trajectories:
    """Counts complete denoising trajectories from the timesteps a model receives.

    A trajectory ends when the timestep jumps back against its direction. Schedulers that repeat or slightly step back
    (second order, two calls per step) do not end one: a jump is at least half the span seen. A trajectory that stopped
    earlier than another (an interrupted picture) is not complete.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.direction = 0.0
        self.previous: float | None = None
        self.low = float("inf")
        self.high = float("-inf")
        self.calls = 0

    def observe(self, value: float) -> None:
        self.calls += 1
        if value != value:  # none was given
            return
        previous, self.previous = self.previous, value
        step = 0.0 if previous is None else value - previous
        span = self.high - self.low
        if previous is not None and step * self.direction < 0 and abs(step) >= span / 2:
            self.ends.append(previous)
        elif step and not self.direction:
            self.direction = 1.0 if step > 0 else -1.0
        self.low, self.high = min(self.low, value), max(self.high, value)

    @property
    def complete(self) -> int:
        """Trajectories seen to their end. A model that only ever sees one timestep: one for every two calls, after two
        calls that may as well be the two halves of a guided first step."""
        if self.calls and self.low >= self.high:
            return max(0, self.calls // 2 - 1)
        if not self.ends:
            return 0
        last = max(self.ends) if self.direction > 0 else min(self.ends)
        return sum(abs(end - last) <= 0.02 * (self.high - self.low) for end in self.ends)
