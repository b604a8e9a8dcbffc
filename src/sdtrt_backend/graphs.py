"""A whole step as one CUDA graph."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch

from .constants import Stamps
from .weights import Spare, key

log = logging.getLogger("sdtrt_backend")
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


class Asleep:
    """The bytes of one storage of a GPU: on the CPU while it sleeps. Everybody who needs them there holds the one Asleep."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.copy: torch.Tensor | None = None

    def _bytes(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)

    def sleep(self) -> None:
        if self.storage.nbytes():
            self.copy = _room(self.storage.nbytes(), self.storage.device).copy_(self._bytes())
            self.storage.resize_(0)

    def wake(self) -> None:
        if self.copy is not None:
            self.storage.resize_(self.copy.numel())
            self._bytes().copy_(self.copy)
            self.copy = None


def _room(size: int, device: torch.device) -> torch.Tensor:
    """Bytes of host memory, pinned where there is enough: a copy then takes a tenth of the time."""
    try:
        with torch.cuda.device(device if device.type == "cuda" else -1):  # pinned memory belongs to the GPU that is current
            return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    except RuntimeError as error:
        log.info("no host memory was pinned: %s", error)
        return torch.empty(size, dtype=torch.uint8)


class Memory:
    """What all steps of one state share: the 8-bit weights, what was built, by which values of the constants, one pool for the
    graphs' tensors, and the promise that one graph runs at a time.

    codes: see ``quantize.insert``; merged: (id of a weight that stays in 16 bits, device) -> it with LoRAs; made: what a graph
    does and its inputs -> what was built for it; loras: the set that codes and merged weights are of, None where writing failed;
    prepared: see ``merge.write``.
    """

    def __init__(self) -> None:
        self.codes: dict[Any, Any] = {}
        self.merged: dict[tuple[int, torch.device], Any] = {}
        self.made: dict[Any, Any] = {}
        self.loras: tuple[Any, ...] | None = ()
        self.prepared: dict[Any, Any] = {}
        self.spare: Spare = defaultdict(list)  # from a build to the release of the weights that it replaces
        self.stamps = Stamps()
        self.lock = threading.Lock()
        self.pool: Any = None
        self.last: torch.cuda.Event | None = None
        self.sleeping: weakref.WeakValueDictionary[int, Asleep] = weakref.WeakValueDictionary()  # by the key of the storage
        self.asleep: list[Asleep] = []  # of the codes

    def sleep(self) -> None:
        """What steps that sleep read of the codes is on the CPU until ``wake``. Call it after their own ``sleep``."""
        with self.lock:
            self.pool = None
            self.asleep = [one for k in {key(t) for t in self.tensors()} if (one := self.sleeping.get(k)) is not None]
            for one in self.asleep:  # a build that was refused may have left them awake
                one.sleep()

    def wake(self, device: torch.device) -> None:
        """Before a step is built on ``device`` from the codes there."""
        with self.lock:
            for one in self.asleep:
                if one.storage.device == device:
                    one.wake()
            self.asleep = [one for one in self.asleep if one.copy is not None]

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While the context is open the codes may be written: after the step that runs, and before the next one."""
        device = self.device
        with self.lock, torch.cuda.device(-1 if device is None else device):
            if device is not None and self.last is not None:
                torch.cuda.current_stream().wait_event(self.last)
            yield
            if device is not None:
                self.last = torch.cuda.current_stream().record_event()

    def tensors(self) -> Iterator[torch.Tensor]:
        """What steps read of the module's weights, in forms of our own."""
        for coded in self.codes.values():
            for pair in coded.tensors:
                yield from pair
        for one in self.merged.values():
            yield one.tensor

    @property
    def device(self) -> torch.device | None:
        """The GPU of the codes."""
        return next((t.device for t in self.tensors() if t.is_cuda), None)

    def graph_bytes(self) -> int:
        """What the graphs' tensors take on the GPU: their pool, which they share."""
        if self.pool is None:
            return 0
        return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(self.pool))

    def drop(self, gone: Callable[[int], bool]) -> None:
        """Codes and merged weights of weights with such ids, which may be given again. Those that a step goes on with stay."""
        self.codes = {k: coded for k, coded in self.codes.items() if not any(map(gone, k[0]))}
        self.merged = {k: one for k, one in self.merged.items() if not gone(k[0])}
        left = {key(t) for t in self.tensors()}
        self.asleep = [one for one in self.asleep if int(one.storage._cdata) in left]

    def send_away(self, tensors: Sequence[torch.Tensor], in_use: set[int]) -> list[Asleep]:
        """The storages of these give their memory back. in_use: keys of those that stay."""
        found: dict[int, Asleep] = {}
        for t in tensors:
            storage, k = t.untyped_storage(), key(t)
            if not t.is_cuda or k in in_use or k in found:
                continue
            one = self.sleeping.get(k)
            if one is None and storage.nbytes() and storage.resizable():
                one = self.sleeping[k] = Asleep(storage)
            if one is not None:
                found[k] = one
        for one in found.values():
            one.sleep()
        return list(found.values())

    def forget(self, ids: set[int]) -> None:
        """Nothing that was built stands for the constants with these ids any more."""
        self.stamps.forget(ids)
        self.drop(ids.__contains__)
        self.made.clear()

    def forget_all(self) -> None:
        """Nothing that was built is used any more."""
        self.drop(lambda _: True)
        self.made.clear()


class Graphed:
    """``step`` captured for inputs like ``example``; a call copies the inputs in, replays, and returns copies of the outputs.

    Graphs of one ``Memory`` may be called in turn and from several streams and threads: each waits for the one before.
    constants: tensors that the step reads besides its inputs, and that nobody else needs on the GPU while it sleeps.
    """

    def __init__(self, step: Callable[..., Sequence[Any]], example: Sequence[torch.Tensor], memory: Memory,
                 constants: Sequence[torch.Tensor] = ()) -> None:
        self.memory, self.step, self.constants = memory, step, constants  # the constants must live as long as the graph
        with torch.inference_mode(False):  # made in it, they could not be written outside it
            self.inputs = [t.detach().clone() for t in example]
        self.scalars = [i for i, t in enumerate(example) if not t.dim()]
        self.device = next(t.device for t in example if t.is_cuda)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Sequence[Any] = ()
        self.asleep: list[Asleep] = []
        with memory.lock:
            self._capture()

    def _capture(self) -> None:
        memory = self.memory
        with torch.cuda.device(self.device), torch.no_grad(), side_stream() as side:
            torch.cuda.synchronize()
            memory.pool = memory.pool or torch.cuda.graph_pool_handle()
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self.step(*self.inputs)
            side.synchronize()
            self.graph, self.outputs = record(lambda: self.step(*self.inputs), side, memory.pool)
            for output in self.outputs:  # whoever compares the first replay notices a graph that writes nothing
                if isinstance(output, torch.Tensor) and output.is_floating_point():
                    output.fill_(math.nan)

    def __call__(self, *inputs: torch.Tensor) -> list[Any]:
        memory = self.memory
        with memory.lock, torch.cuda.device(self.device), torch.no_grad():
            if self.graph is None:
                self._wake()
            assert self.graph is not None
            if memory.last is not None:
                torch.cuda.current_stream().wait_event(memory.last)
            for mine, given in zip(self.inputs, inputs, strict=True):
                if mine.dim():
                    mine.copy_(given)
            if self.scalars:  # each adapter has one: by one launch
                torch._foreach_copy_([self.inputs[i] for i in self.scalars], [inputs[i] for i in self.scalars])
            self.graph.replay()
            outputs = [o.clone() if isinstance(o, torch.Tensor) else o for o in self.outputs]
            memory.last = torch.cuda.current_stream().record_event()
        return outputs

    def sleep(self, in_use: set[int]) -> None:
        """Give the GPU's memory back: the graph goes, the constants wait on the CPU. in_use: keys of storages that stay."""
        with self.memory.lock:
            if self.graph is None:
                return
            torch.cuda.synchronize(self.device)
            self.graph, self.outputs = None, ()
            self.asleep = self.memory.send_away(self.constants, in_use)

    def wake(self) -> None:
        """What it reads is on the GPU again."""
        with self.memory.lock:
            if self.graph is None:
                self._wake()

    def _wake(self) -> None:
        for one in self.asleep:
            one.wake()
        self.asleep = []
        self._capture()
