"""A whole step as one CUDA graph."""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .weights import key

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
            self.copy = self._bytes().cpu()
            self.storage.resize_(0)

    def wake(self) -> None:
        if self.copy is not None:
            self.storage.resize_(self.copy.numel())
            self._bytes().copy_(self.copy)
            self.copy = None


class Memory:
    """What all steps of one state share: the 8-bit weights, what was built, by which values of the constants, one pool for the
    graphs' tensors, and the promise that one graph runs at a time.

    codes: see ``quantize.insert``; made: what a graph does and its inputs -> what was built for it.
    """

    def __init__(self) -> None:
        self.codes: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.made: dict[Any, Any] = {}
        self.stamps: Any = WeakIdKeyDictionary()  # constant -> (version, one value, dtype) when a step was built from it
        self.lock = threading.Lock()
        self.pool: Any = None
        self.last: torch.cuda.Event | None = None
        self.sleeping: weakref.WeakValueDictionary[int, Asleep] = weakref.WeakValueDictionary()  # by the key of the storage
        self.asleep: list[Asleep] = []  # of the codes

    def sleep(self) -> None:
        """What steps that sleep read of the codes is on the CPU until ``wake``. Call it after their own ``sleep``."""
        with self.lock:
            self.pool = None
            found = {key(t): t for pairs in self.codes.values() for pair in pairs for t in pair}
            self.asleep = [one for k in found if (one := self.sleeping.get(k)) is not None]
            for one in self.asleep:  # a build that was refused may have left them awake
                one.sleep()

    def wake(self, device: torch.device) -> None:
        """Before a step is built on ``device`` from the codes there."""
        with self.lock:
            for one in self.asleep:
                if one.storage.device == device:
                    one.wake()
            self.asleep = [one for one in self.asleep if one.copy is not None]

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

    def stamp(self, constants: Sequence[torch.Tensor]) -> None:
        """A step was built from what these are now."""
        new = [p for p in constants if p not in self.stamps]
        for p, value in zip(new, elements(new).tolist(), strict=True):
            self.stamps[p] = version(p), value, p.dtype

    def changed(self, constants: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Those that are not what a step was built from."""
        known = [p for p in constants if p in self.stamps]
        written = {id(p) for p in known if self.stamps[p][0] != version(p)}
        return [p for p in known if id(p) in written] + self.differing([p for p in known if id(p) not in written])

    def differing(self, constants: Sequence[torch.Tensor], values: Sequence[float] | None = None) -> list[torch.Tensor]:
        """Those of ``constants`` that have another value than a step was built from. values: their ``elements``."""
        values = elements(constants).tolist() if values is None else values
        return [p for p, value in zip(constants, values, strict=True)
                if (known := self.stamps.get(p, (0, value, None))[1]) != value and not (math.isnan(known) and math.isnan(value))]

    def is_alike(self, p: torch.Tensor) -> bool:
        """Whether the constant has the dtype that it had: another one makes it no constant that changes."""
        return p in self.stamps and self.stamps[p][2] == p.dtype

    def forget(self, ids: set[int]) -> None:
        """Nothing that was built stands for the constants with these ids any more."""
        for p in [p for p in self.stamps if id(p) in ids]:
            del self.stamps[p]
        self.codes.clear()
        self.asleep.clear()
        self.made.clear()


def version(p: torch.Tensor) -> int:
    """Changes when the tensor is written in place. Inference tensors have none and cannot be written."""
    return 0 if p.is_inference() else p._version


@torch.no_grad()
def elements(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One value of each, from its middle: fp32 [tensors] on the device of the first; NaN for an empty one and for those
    elsewhere."""
    return _read(tensors, lambda t, middle: t.as_strided((1,), (1,), t.storage_offset() + middle))()


def _read(tensors: Sequence[torch.Tensor], scalar: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """What reads ``elements``. scalar: (tensor, how far its middle element is from its first) -> the middle one, [1]."""
    if not tensors:
        return lambda: torch.empty(0)
    device = tensors[0].device
    found: dict[torch.dtype, tuple[list[int], list[torch.Tensor]]] = {}
    for i, t in enumerate(tensors):
        if t.device == device and t.numel():
            places, views = found.setdefault(t.dtype, ([], []))
            places.append(i)
            views.append(scalar(t, sum(n // 2 * s for n, s in zip(t.shape, t.stride(), strict=True))))
    parts = [views for _, views in found.values()]
    order = [i for places, _ in found.values() for i in places]
    indices = None if order == list(range(len(tensors))) else torch.tensor(order, dtype=torch.long, device=device)

    def read() -> torch.Tensor:
        values = torch.cat([torch.cat(views).float() for views in parts]) if parts else torch.empty(0, device=device)
        return values if indices is None else torch.full((len(tensors),), math.nan, device=device).index_copy_(0, indices, values)

    return read


class Elements:
    """``elements`` of the same tensors time and again, which takes a tenth of the time while they stay where they are. It knows
    their addresses and keeps none of their memory: a module that is moved gives it back."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.plain = all(type(t) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) for t in self.tensors)
        self.known: tuple[list[int], Callable[[], torch.Tensor] | None] = [], None

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        if not self.plain:
            return elements(self.tensors)
        addresses = list(map(torch.Tensor.data_ptr, self.tensors))
        known, read = self.known
        if addresses != known:  # offloading moves them at every call: what is made below would be made for nothing
            self.known = addresses, None
            return elements(self.tensors)
        if read is None:
            read = _read(self.tensors, _unowned)
            self.known = addresses, read
        return read()


def _unowned(t: torch.Tensor, middle: int) -> torch.Tensor:
    """The element of ``t`` that is ``middle`` after its first one, [1], over memory that it does not keep: to be read while
    ``t`` is where it is."""
    address, size = t.data_ptr() + middle * t.element_size(), t.element_size()
    if t.is_cuda:
        found = torch.as_tensor(_At(address, size), device=t.device)
    else:
        found = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
    return found.view(t.dtype)


class _At:
    """Bytes of a GPU's memory, from which torch makes a tensor."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "version": 2, "data": (address, False),
                                         "strides": None}


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
                mine.copy_(given)
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

    def _wake(self) -> None:
        for one in self.asleep:
            one.wake()
        self.asleep = []
        self._capture()
