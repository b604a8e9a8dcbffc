"""Drift watch: notices an 8-bit step that left what it was calibrated for.

Two signals. The largest |value| of every call's inputs and outputs tells NaN, infinity and black: at once on the CPU; on a GPU
when the numbers have arrived on the host, for which nobody waits. And on sampled calls, per group of layers that read one
tensor, the share of its values beyond everything that calibration saw.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from . import measure, ops
from .fx import drop_dead, runnable
from .quantize import FP8_HEADROOM, QD
from .recipe import Recipe
from .values import Decision, Watched

DEVICES = ("cpu", "cuda")  # where steps are watched
# Calls after a build that are sampled whatever they cost: a model that has drifted is noticed in its first picture.
FIRST = (5, 11, 23)
# Then every so many calls: the first at which a sample costs less than COST of the calls between two of them. Primes: a
# multiple of a picture's steps would look at one timestep for ever.
INTERVALS = (101, 211, 401, 809, 1601)
COST = 0.01
# Shares are averaged over this many samples: one odd prompt is no drift.
WINDOW = 3
# Beyond these a group has drifted. Prompts that did not calibrate the bundled model reach 0.5 % with the default range rule
# and 2.4 % with the narrowest, global_min, where over 1 % was there on the build's own input already.
DRIFTED_SHARE, DRIFTED_FACTOR = 0.01, 4.0
NAMED = 3  # layers that a warning names
KEPT_BYTES = 32 * 2**20  # inputs of a call that wait for its verdict; larger ones would raise the peak of the memory
QUANTIZE = (QD.quantize_per_tensor.default, ops.quantize_fp8)

NOT_FINITE, ZEROS = "NaN or infinite values", "nothing but zeros"

Group = tuple[str, ...]


@dataclass(frozen=True)
class Counter:
    """groups: names of the layers that read one tensor; shares: the step's tensors -> fp32 [groups], what is beyond its range;
    constants: what it reads besides them."""

    groups: tuple[Group, ...]
    shares: Callable[..., torch.Tensor]
    constants: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Watch:
    """A Counter for one built step. baseline: its shares on the build's input; every: calls from one sample to the next."""

    counter: Counter
    baseline: tuple[float, ...]
    every: int

    def due(self, call: int) -> bool:
        """Whether the step's ``call``-th call, from 1 on, is sampled."""
        return call in FIRST or call % self.every == 0


def counter(gm: fx.GraphModule, decisions: Mapping[str, Decision], recipe: Recipe) -> Counter:
    """A Counter from the Q/DQ graph, which is copied; its constants are shared. decisions: node name -> of an 8-bit layer.

    Weights are read as 8-bit codes, so the 16-bit ones may be away. Activations are not rounded, which
    makes a sample cheaper and changes no share that matters.
    """
    graph, copies = fx.Graph(), {}  # type: ignore[var-annotated]
    graph.graph_copy(gm.graph, copies)
    groups, shares = [], []
    for quantize in [n for n in gm.graph.nodes if n.target in QUANTIZE]:
        members = [decisions[call.name] for dq in quantize.users for call in dq.users if call.name in decisions]
        if not members:
            continue
        source = copies[quantize.args[0]]
        with graph.inserting_after(copies[quantize]):
            shares.append(graph.call_function(share_beyond, (source, widest(members[0], recipe))))
        groups.append(tuple(d.layer.name for d in members))
        for dequantize in quantize.users:
            with graph.inserting_after(copies[quantize]):
                same_dtype = graph.call_method("to", (source, members[0].layer.weight.dtype))
            copies[dequantize].replace_all_uses_with(same_dtype)
    if not shares:  # quantised in a way that is not in QUANTIZE: outputs are watched all the same
        return Counter((), lambda *_: torch.zeros(0))
    graph.output(graph.call_function(torch.stack, (shares,)))
    drop_dead(graph)
    graph.lint()
    counting = fx.GraphModule(gm, graph)
    return Counter(tuple(groups), runnable(counting), tuple(counting.buffers()))


def widest(decision: Decision, recipe: Recipe) -> float:
    """The largest |value| of the layer's smoothed input that its codes hold or that calibration saw: range rules narrower than
    the maximum clip on purpose, and that is no drift."""
    table, smoothing = recipe.amax_by_timestep.get(decision.group), decision.smoothing
    seen = 0.0 if table is None else float(table[:, 0].max()) / (1.0 if smoothing is None else float(smoothing.max()))
    if decision.rotated:  # the same share of what was seen is clipped
        plain = recipe.layers[decision.layer.name].plain_amax
        seen = seen * decision.amax / plain if plain else 0.0
    return max(decision.amax * (FP8_HEADROOM if decision.precision == "fp8" else 1.0), seen)


def share_beyond(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Share of |x| > limit and of NaN, which 8-bit codes would hide, 0..1: fp32 scalar on the device of ``x``."""
    return 1 - torch.count_nonzero(x.abs() <= limit) / x.numel()


def watch(counts: Counter, tensors: Sequence[torch.Tensor], step_ms: float | None) -> Watch:
    """Take the baseline on ``tensors`` and time a sample. step_ms: of the 8-bit step, None where it was not timed."""
    with torch.no_grad():
        baseline = counts.shares(*tensors).tolist()
        (sample_ms,) = measure.step_ms(lambda: counts.shares(*tensors), repeats=1)
    cheap = (n for n in INTERVALS if step_ms is None or sample_ms <= COST * n * step_ms)
    return Watch(counts, tuple(baseline), next(cheap, INTERVALS[-1]))


class Later:
    """Numbers on their way from the device to the host; asking whether they are there costs nothing and waits for nothing."""

    def __init__(self, values: torch.Tensor) -> None:
        self.host, self.event = values, None
        if values.is_cuda:
            self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.event = torch.cuda.current_stream(values.device).record_event()

    def ready(self) -> bool:
        return self.event is None or self.event.query()

    def values(self) -> list[float]:
        return self.host.tolist()


def with_peaks(step: Callable[..., Sequence[Any]], device: torch.device) -> Callable[..., Sequence[Any]]:
    """``step`` with one more output, the last: the peaks of its outputs and inputs. In a CUDA graph they cost no launches."""
    return lambda *tensors: (*(result := step(*tensors)), peaks(looked_at(result, device), looked_at(tensors, device)))


def looked_at(values: Sequence[Any], device: torch.device) -> list[torch.Tensor]:
    """Of a step's outputs or inputs those that can be NaN and are on its device."""
    return [t for t in measure.outputs(values) if t.device == device]


def peaks(results: Sequence[torch.Tensor], given: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """max |t| of each floating-point result, then max t of each tensor that was given, as minus infinity is what a mask holds;
    NaN where there is one: fp32, 0 for an empty tensor."""
    # not vector_norm: on the CPU that one is 20 times slower, and amax takes longer than max
    with torch.no_grad():
        largest = [t.abs().max() if t.numel() else t.new_zeros(()) for t in results]
        largest += [t.max() if t.numel() else t.new_zeros(()) for t in given]
        if not largest:
            return torch.empty(0)
        same = len({v.dtype for v in largest}) == 1
        return torch.stack(largest).float() if same else torch.stack([v.float() for v in largest])


def mean(values: Collection[float]) -> float:
    """Not statistics.mean, which takes ten times as long: a UNet has hundreds of groups."""
    return sum(values) / len(values)


def trouble(values: Sequence[float]) -> str | None:
    """What is wrong with outputs of these peaks, in words, or None."""
    if not all(map(math.isfinite, values)):
        return NOT_FINITE
    return ZEROS if values and not any(values) else None


@dataclass
class Drift:
    """What was counted of one module, over all its shapes; ``say`` is told the one warning.

    waiting: numbers on their way to the host, oldest first, with what to do when they are there.
    """

    say: Callable[[str], None]
    calls: Any = field(default_factory=lambda: itertools.count(1))  # next() on it is atomic
    called: int = 0
    samples: int = 0
    baseline: dict[Group, float] = field(default_factory=dict)
    recent: dict[Group, deque[float]] = field(default_factory=dict)
    warned: bool = False
    off: bool = False
    own_zeros: bool = False  # the module itself gives nothing but zeros: black is no sign of anything
    waiting: deque[tuple[Later, Callable[[list[float]], object]]] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def expect(self, step: Watch) -> None:
        """A step was built; of several shapes the largest baseline counts."""
        for group, share in zip(step.counter.groups, step.baseline, strict=True):
            self.baseline[group] = max(share, self.baseline.get(group, 0.0))

    def sample(self, step: Watch, tensors: Sequence[torch.Tensor]) -> None:
        """Count on one call's inputs, without waiting for the device."""
        if self.off:
            return
        try:
            with torch.no_grad():
                shares = Later(step.counter.shares(*tensors))
        except torch.OutOfMemoryError:
            self.off = True
            self.say("the drift watch stopped: a sampled call found no memory for the unfused graph")
            return
        self.waiting.append((shares, lambda values: self.add(step.counter.groups, values)))

    def add(self, groups: Sequence[Group], shares: Sequence[float]) -> None:
        """One sample; the first one that shows drift is said."""
        self.samples += 1
        drifted = {}
        for group, share in zip(groups, shares, strict=True):
            recent = self.recent.setdefault(group, deque(maxlen=WINDOW))
            recent.append(share)
            if len(recent) == WINDOW and (lately := mean(recent)) > max(DRIFTED_SHARE, DRIFTED_FACTOR * self.baseline[group]):
                drifted[group] = lately
        if drifted and not self.warned:
            self.warned = True
            worst = sorted(drifted, key=drifted.__getitem__, reverse=True)
            named = ", ".join(f"{drifted[g]:.1%} of what {g[0]} reads ({self.baseline[g]:.1%} when it was built)"
                              for g in worst[:NAMED])
            more = f" and of {len(worst) - NAMED} more" if len(worst) > NAMED else ""
            self.say(f"the model left its calibrated ranges: in {WINDOW} sampled calls values beyond everything that calibration "
                     f"saw were {named}{more}; recalibrate on prompts like these")

    def look(self) -> None:
        """Act on the numbers that have arrived; never waits, neither for the device nor for another thread."""
        if not self.lock.acquire(blocking=False):
            return
        try:
            while self.waiting and self.waiting[0][0].ready():
                numbers, act = self.waiting.popleft()
                act(numbers.values())
        finally:
            self.lock.release()

    def watched(self) -> Watched | None:
        """For the report; None before the first watched call."""
        groups = {g: (share, mean(self.recent[g]) if g in self.recent else share) for g, share in self.baseline.items()}
        return Watched(self.called, self.samples, groups) if self.called else None
