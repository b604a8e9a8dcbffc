"""A whole step as one CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from .weights import Weights

WARM_UPS = 2


@cache
def side_stream(device: int) -> torch.cuda.Stream:
    """Where steps and kernels run before they are captured. One for all: cuBLAS keeps a workspace, 32 MiB on Hopper, for every
    stream that it ever ran on."""
    return torch.cuda.Stream(device)


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
        self.inputs = [t.detach().clone() for t in example]
        self.device = next(t.device for t in example if t.is_cuda)
        with memory.lock, torch.cuda.device(self.device):
            torch.cuda.synchronize()
            memory.pool = memory.pool or torch.cuda.graph_pool_handle()
            side = side_stream(torch.cuda.current_device())
            with torch.cuda.stream(side), torch.no_grad():
                for _ in range(WARM_UPS):
                    step(*self.inputs)
            side.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(self.graph, pool=memory.pool):
                self.outputs = step(*self.inputs)
        self.step = step  # its weights must live as long as the graph

    def __call__(self, *inputs: torch.Tensor) -> list[Any]:
        memory = self.memory
        with memory.lock, torch.cuda.device(self.device):
            if memory.last is not None:
                torch.cuda.current_stream().wait_event(memory.last)
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
            self.graph.replay()
            outputs = [o.clone() if isinstance(o, torch.Tensor) else o for o in self.outputs]
            memory.last = torch.cuda.current_stream().record_event()
        return outputs
