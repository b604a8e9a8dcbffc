"""The measured choice between 8-bit kernels and the one in the user's precision: what is asked of it, and who answers."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any, Protocol

import torch

from .gpu import MeasuredChooser
from .measurements import Measurements
from .onednn import CpuChooser
from .problem import Choice, Problem


class Chooser(Protocol):
    """What lowerings ask."""

    def best(self, problem: Problem, precision: str) -> Choice | None:
        """The fastest kernel of ``precision``; None when there is none."""

    def producer(self, op: str) -> str | None:
        """The kernel that writes ``op``'s result in 8 bits; None when there is none."""

    def attention_kernel(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> str | None:
        """The kernel that computes attention fastest, writing ``out``; None for torch's own and a quantisation behind it."""


    def gelu_kernel(self, problem: Problem, out: torch.dtype) -> str | None:
        """The int8 kernel of a linear that applies GELU and writes ``out`` itself, where it is faster than ``best`` with a pass
        behind it; None else."""


class Timed(Chooser, Protocol):
    """What the assignment of precisions asks: the same with milliseconds and reasons.

    place: the device in a sentence; gain: 8 bits must take less than this share of the time in the user's precision; joins:
    whether linears that read one tensor become one product; names_kernels: whether the lowering calls the kernel that was
    chosen, so that a layer without one cannot be lowered; opaque: functions whose results are quantised in a pass of its own,
    besides matrix products, convolutions and attention; measurements: what was measured.
    """

    place: str
    gain: float
    joins: bool
    names_kernels: bool
    opaque: Collection[Any]
    measurements: Measurements

    def reasons(self, problem: Problem, precision: str) -> tuple[str, ...]:
        """Why no kernel of ``precision`` takes the problem, a sentence for each; empty where one does."""

    def room(self, problem: Problem, precision: str) -> float:
        """Share of ``best``'s time that another precision might save: up to the highest rate that a product was seen to reach on
        this device."""

    def gelu_saves(self, problem: Problem, out: torch.dtype) -> float:
        """Milliseconds that ``gelu_kernel`` saves at least."""

    def encoding_saves(self, problem: Problem) -> float:
        """Milliseconds that the int8 product of a linear saves by writing float8_e4m3fn where its reader takes that."""

    def wide_ms(self, problem: Problem) -> float:
        """Milliseconds of the kernel in the user's precision; it and ``best`` may be ``Unsteady``."""

    def attention_times(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> dict[str, float]:
        """kernel -> milliseconds: query [batch, heads, queries, width] over ``tokens`` keys; "torch" quantises in a pass of its
        own."""

    def attention_ms(self, query: tuple[int, ...], tokens: int, dtype: torch.dtype, out: torch.dtype) -> float:
        """Milliseconds of the fastest way to attention written in ``out``."""

    def attention_fp8(self, query: tuple[int, ...], tokens: int) -> Choice | None:
        """The fastest kernel of attention over codes q, k, v of float8_e4m3fn, None where none takes them."""

    def quantize_ms(self, numel: int, dtype: torch.dtype) -> float:
        """Milliseconds of a separate pass that reads ``numel`` values of ``dtype`` and writes them in 8 bits."""


@cache
def chooser(device: torch.device) -> Timed:
    """The device's chooser, one per process."""
    if device.type == "cuda":
        return MeasuredChooser(device)
    if device.type == "cpu":
        return CpuChooser(device)
    raise NotImplementedError(f"kernels are measured on CPUs and NVIDIA GPUs, not on {device.type}: move the module there")


def times_ms(problem: Problem, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a layer in the user's precision and of its 8-bit product, or twice the former where it has none."""
    best, wide = chooser(device).best(problem, "int8"), chooser(device).wide_ms(problem)
    return wide, wide if best is None else best.ms
