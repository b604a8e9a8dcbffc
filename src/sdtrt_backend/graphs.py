"""A whole step as one CUDA graph."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch

from .weights import Weights

WARM_UPS = 2
_ONE_AT_A_TIME = threading.RLock()  # torch allows one capture in a process


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    # one for all: cuBLAS keeps a workspace, 32 MiB on Hopper, for every stream that it ever ran on
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def side_stream() -> Iterator[torch.cuda.Stream]:
    """The stream of the current device on which steps and kernels warm up and are captured, for one thread at a time."""
    with _ONE_AT_A_TIME:
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        yield stream


def record(step: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """One CUDA graph of ``step()``, and what it returned. Other threads may go on using the GPU meanwhile."""
    graph = torch.cuda.CUDAGraph()
    # a stream must be named: torch's own is on the GPU that captured first, and another one's graph would stay empty
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = step()
    return graph, result


class Memory:
    """What all steps of one module share: the 8-bit weights, the 16-bit ones that left the GPU, one pool for the graphs'
    tensors, and the promise that one graph runs at a time.

    codes: (names of layers that read one tensor, precision) -> (codes, scale) of each.
    """

    def __init__(self) -> None:
        self.codes: dict[tuple[tuple[str, ...], str], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.weights = Weights()
        self.lock = threading.Lock()
        self.pool: Any = None
        self.last: torch.cuda.Event | None = None


class Graphed:
    """``step`` captured for inputs like ``example``; a call copies the inputs in, replays, and returns copies of the outputs.

    Graphs of one ``Memory`` may be called in turn and from several streams and threads: each waits for the one before.
    """

    def __init__(self, step: Callable[..., Sequence[Any]], example: Sequence[torch.Tensor], memory: Memory) -> None:
        self.memory = memory
        with torch.inference_mode(False):  # made in it, they could not be written outside it
            self.inputs = [t.detach().clone() for t in example]
        self.device = next(t.device for t in example if t.is_cuda)
        with memory.lock, torch.cuda.device(self.device), torch.no_grad(), side_stream() as side:
            torch.cuda.synchronize()
            memory.pool = memory.pool or torch.cuda.graph_pool_handle()
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    step(*self.inputs)
            side.synchronize()
            self.graph, self.outputs = record(lambda: step(*self.inputs), side, memory.pool)
            for output in self.outputs:  # whoever compares the first replay notices a graph that writes nothing
                if isinstance(output, torch.Tensor) and output.is_floating_point():
                    output.fill_(math.nan)
        self.step = step  # its weights must live as long as the graph

    def __call__(self, *inputs: torch.Tensor) -> list[Any]:
        memory = self.memory
        with memory.lock, torch.cuda.device(self.device), torch.no_grad():
            if memory.last is not None:
                torch.cuda.current_stream().wait_event(memory.last)
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
            self.graph.replay()
            outputs = [o.clone() if isinstance(o, torch.Tensor) else o for o in self.outputs]
            memory.last = torch.cuda.current_stream().record_event()
        return outputs
