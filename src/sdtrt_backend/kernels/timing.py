"""How a kernel is timed, and what its refusal means."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from .. import stats
from ..graphs import record, side_stream

log = logging.getLogger("sdtrt_backend")
T = TypeVar("T")
# a kernel's relative error to the fp32 reference on the same codes: 16-bit rounding is 2e-4 (fp16) or 2e-3 (bf16)
ERROR_BOUND = 5e-3
COLD_BYTES = 120e6  # weights are rotated through this much memory: a step reads each of them once, from beyond the L2 cache
CALLS, REPLAYS = 12, 3
# On the CPU a race has this many quiet rounds, or fewer once it has taken ENOUGH_S: cheap rounds find the least time surely. It
# ends after LONGEST_S whatever came. Of a quiet call this thread had the core for QUIET_SHARE of the time
QUIET_ROUNDS, LEAST_ROUNDS, ENOUGH_S, LONGEST_S, QUIET_SHARE = 100, 5, 0.03, 0.1, 0.9
# Errors of our own code: no kernel is slower for them, and a choice that hid one would hide it for ever
MISTAKES = (TypeError, AttributeError, NameError, AssertionError, LookupError)
# What the texts of errors say, in lower case: memory ran out, which says nothing about the kernel; or the library does not take
# the shape or type, which will be so in every process
MEMORY = ("alloc_failed", "allocation_failed", "out of memory", "out_of_memory", "can't allocate memory", "not enough memory")
REFUSED = ("not_supported", "not supported", "unsupported", "bad_param", "not implemented", "no valid", "no execution plans",
           "couldn't build plan", "divisible by", "should be a multiple of")
# Names of classes that mean the same; their libraries may be missing
REFUSALS = ("cudnnGraphNotSupportedError", "OutOfResources", "CompilationError")


@dataclass(frozen=True)
class Refusal:
    """Why a kernel is no candidate. lasting: whether that is so in every process with this device and these libraries."""

    reason: str
    lasting: bool


class Unsteady(float):
    """Milliseconds on a machine that was too busy to tell: good for this process, not for the next ones."""


def lasting(found: Mapping[str, float | Refusal]) -> bool:
    """Whether all of it holds in every process."""
    return all(t.lasting if isinstance(t, Refusal) else not isinstance(t, Unsteady) for t in found.values())


def attempt(work: Callable[[], float | Refusal]) -> float | Refusal:
    """What ``work`` finds, or why it found nothing. Raises MISTAKES, and what says that memory ran out."""
    try:
        return work()
    except MISTAKES:
        raise
    except Exception as error:
        if _memory(error):
            raise
        return _refusal(error)


def retried(measure: Callable[[], T]) -> T:
    """``measure()``, and once more with what torch held in reserve where memory ran out. Where that was not enough it raises
    torch.OutOfMemoryError, whichever library said so and however."""
    try:
        return measure()
    except Exception as error:
        if not _memory(error):
            raise
        log.info("memory ran out while kernels were measured, measuring again: %s", error)
    if torch.cuda.is_initialized():  # here the first try's tensors are gone, which its error held
        torch.cuda.empty_cache()
    try:
        return measure()
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or not _memory(error):
            raise
        raise torch.OutOfMemoryError(f"memory ran out while kernels were measured: {error}") from error


def _memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(mark in str(error).lower() for mark in MEMORY)


def _refusal(error: Exception) -> Refusal:
    lasting = (isinstance(error, ValueError | NotImplementedError) or type(error).__name__ in REFUSALS
               or any(mark in str(error).lower() for mark in REFUSED))
    reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    log.log(logging.DEBUG if lasting else logging.WARNING, "no candidate%s: %s", "" if lasting else " in this process", reason)
    return Refusal(reason, lasting)


def checked(result: torch.Tensor, expected: torch.Tensor, bound: float) -> Refusal | None:
    """The refusal of a kernel whose ``result`` is off by ``bound`` or more, or is not finite."""
    error = stats.relative_error(result, expected)
    if error < bound:
        return None
    log.warning("a kernel was dropped, its result is wrong: relative error %g, %g is allowed", error, bound)
    return Refusal(f"its result is wrong: relative error {error:.3g}, {bound:g} is allowed", True)


def timed(run: Callable[..., torch.Tensor], rotated: Sequence[torch.Tensor], tail: tuple[Any, ...], expected: torch.Tensor,
          bound: float) -> float | Refusal:
    """Milliseconds of run(one of ``rotated``, *tail) on the GPU, or why it is no candidate."""
    def work() -> float | Refusal:
        wrong = checked(run(rotated[0], *tail), expected, bound)
        return graph_ms([partial(run, w, *tail) for w in rotated]) if wrong is None else wrong

    return attempt(work)


def search(families: Sequence[tuple[str, ...]], fallback: Sequence[str], tried: Callable[[str], float | Refusal],
           enough_ms: float = 0.0) -> dict[str, float | Refusal]:
    """variant -> milliseconds or refusal of those that ``tried`` was called with: see ``Provider``. No other is tried behind the
    first of a family that takes ``enough_ms`` or less."""
    times: dict[str, float | Refusal] = {}
    for family in families:
        times[family[0]] = tried(family[0])
        if _ms(times[family[0]]) <= enough_ms:
            return times
    fastest = min((f for f in families if not isinstance(times[f[0]], Refusal)), key=lambda f: _ms(times[f[0]]), default=None)
    times |= {v: tried(v) for family in ([fastest] if fastest else families) for v in family[1:]}
    found = any(not isinstance(t, Refusal) for t in times.values())
    return times if found else times | {v: tried(v) for v in fallback}


def _ms(found: float | Refusal) -> float:
    return math.inf if isinstance(found, Refusal) else found


def kept(times: Mapping[str, float | Refusal]) -> dict[str, float | str]:
    """As JSON: milliseconds, or the reason of a refusal."""
    return {name: t.reason if isinstance(t, Refusal) else t for name, t in times.items()}


def copies(weight: tuple[int, ...], itemsize: int) -> int:
    """How many weights of this shape a timing on the GPU takes turns with."""
    return max(1, min(CALLS, math.ceil(COLD_BYTES / (math.prod(weight) * itemsize))))


def codes(shape: tuple[int, ...], dtype: torch.dtype, noise: torch.Generator) -> torch.Tensor:
    """Random 8-bit codes, normally distributed as activations and weights are; channels last."""
    x = torch.randn(shape, generator=noise, device=noise.device)
    x = (x * 32).clamp(-127, 127).round().to(torch.int8) if dtype is torch.int8 else x.to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def graph_ms(calls: Sequence[Callable[[], Any]]) -> float:
    """Least milliseconds of one call, from replays of a CUDA graph of CALLS of them in turn: other work on the GPU only adds."""
    def in_turn() -> None:
        for i in range(CALLS):
            calls[i % len(calls)]()

    with side_stream() as stream:
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph, _ = record(in_turn, stream)
    times = []
    for _ in range(REPLAYS + 1):  # the first replay warms up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return float(min(times[1:]))


def race_ms(*calls: Callable[[], Any]) -> list[float]:
    """Least milliseconds of each call on the CPU, which take turns; ``Unsteady`` where the machine was too busy to tell.

    Where another process has a core, a thread that waits for it does so for a time slice, which is a hundred times as long as a
    small layer. This thread works or spins in a quiet round, so that its own clock runs as the wall's does; other rounds do
    not count.
    """
    quiet: list[list[float]] = [[] for _ in calls]
    disturbed: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for call in calls:
            call()  # makes what is made once
        start = time.perf_counter()
        while True:
            rounds, tried, taken = min(map(len, quiet)), len(quiet[0]) + len(disturbed[0]), time.perf_counter() - start
            long = taken > (ENOUGH_S if rounds >= LEAST_ROUNDS else LONGEST_S)
            if rounds >= QUIET_ROUNDS or (long and tried >= LEAST_ROUNDS):
                break
            for call, still, other in zip(calls, quiet, disturbed, strict=True):
                wall, own = time.perf_counter(), time.thread_time()
                call()
                own, wall = time.thread_time() - own, time.perf_counter() - wall
                (still if own > QUIET_SHARE * wall else other).append(1e3 * wall)
    return [min(still) if len(still) >= LEAST_ROUNDS else Unsteady(min(still + other))
            for still, other in zip(quiet, disturbed, strict=True)]
