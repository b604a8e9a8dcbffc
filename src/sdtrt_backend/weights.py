"""The one owner of where a 16-bit weight is: on its device, or in memory of the host that the GPU reads through the bus.

A weight whose 8-bit codes are in use may go to the host. Its tensor keeps shape, strides, dtype and device, which compiled code
checks at every call, and everybody may go on reading and writing it: a copy, a merge of an adapter, saving and moving are right
without knowing of it, only slower.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

log = logging.getLogger("sdtrt_backend")
Spare = defaultdict[torch.device, list[torch.Tensor]]  # chunks of host memory that nobody uses yet, each for one device
CHUNK = 256 * 2**20  # bytes of host memory that are pinned at a time
ALIGNMENT = 256
_LOCK = threading.RLock()
# parameter that was sent to host memory, or went to the CPU from there -> its device. Where it has another memory now, somebody
# moved it
_SENT: Any = WeakIdKeyDictionary()
_RESTING: Any = WeakIdKeyDictionary()
_PARTS: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()  # address -> bytes of host memory
_BORROWED: Any = WeakIdKeyDictionary()  # parameter -> (how many need it on its device, its tensor in host memory)


def key(weight: torch.Tensor) -> int:
    """What is the same for every tensor over one memory."""
    return int(weight.untyped_storage()._cdata)


def away(parameter: torch.Tensor) -> bool:
    """Whether its values are in host memory."""
    return bool(_SENT.data) and parameter in _SENT and parameter.data_ptr() in _PARTS


def can_leave(parameter: torch.Tensor) -> bool:
    """Whether this weight takes memory of a GPU that no other tensor shares."""
    return on_a_gpu(parameter) and parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def on_a_gpu(parameter: torch.Tensor) -> bool:
    """Whether its tensor is one of a GPU, wherever its values are."""
    return parameter.is_cuda


@contextlib.contextmanager
def pinning(parameters: Iterable[torch.Tensor], spare: Spare) -> Iterator[None]:
    """While the context is open another thread pins host memory for ``release`` to take, which for a large model takes as long as
    compiling it."""
    with _LOCK:
        leaving = [p for p in parameters if can_leave(p) and not away(p) and p not in _BORROWED]
    small = [p for p in leaving if p.numel() * p.element_size() <= CHUNK and p.device == leaving[0].device]
    chunks, ended = sum(p.numel() * p.element_size() for p in small) // CHUNK, threading.Event()

    def pin() -> None:
        try:
            while len(spare[small[0].device]) < chunks and not ended.is_set():
                spare[small[0].device].append(pinned(CHUNK, small[0].device))
        except RuntimeError as error:  # ``release`` tries again, where it is said
            log.info("no host memory was pinned ahead: %s", error)

    thread = threading.Thread(target=pin, name="sdtrt_backend pins host memory") if chunks else None
    if thread is not None:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread is not None:
            thread.join()


def release(parameters: Iterable[torch.Tensor], spare: Spare | None = None) -> None:
    """Their values go to host memory, ``spare`` first, to the bit, and the GPU's is free. Those that cannot leave stay, and so do
    those that somebody borrows."""
    with _LOCK:
        leaving = [p for p in parameters if not away(p) and p not in _BORROWED and can_leave(p)]
        if not leaving:
            return
        homes = list(_host_tensors(leaving, spare or defaultdict(list)))
        for p, home in zip(leaving, homes, strict=True):
            home.copy_(p.detach())
        _finish(leaving)
        for p, home in zip(leaving, homes, strict=True):
            p.data = home
            _SENT[p] = p.device


def restore(parameters: Iterable[torch.Tensor]) -> None:
    """Their values are in their device's own memory again, or go there with their module."""
    with _LOCK:
        for p in parameters:
            _RESTING.pop(p, None)
            if away(p):
                p.data = p.detach().clone(memory_format=torch.preserve_format)
                del _SENT[p]


@contextlib.contextmanager
def borrowed(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """While the context is open the values are in their device's own memory, where kernels read them fast. What is written
    meanwhile is kept."""
    wanted = list(parameters)
    with _LOCK:
        for p in wanted:
            if away(p):
                _BORROWED[p] = (0, p.data)
                p.data = p.detach().clone(memory_format=torch.preserve_format)
            if p in _BORROWED:
                count, home = _BORROWED[p]
                _BORROWED[p] = (count + 1, home)
        mine = [p for p in wanted if p in _BORROWED]
    try:
        yield
    finally:
        with _LOCK:
            back = []
            for p in mine:
                count, home = _BORROWED[p]
                _BORROWED[p] = (count - 1, home)
                if count == 1:
                    back.append((p, _BORROWED.pop(p)[1]))
            back = [(p, home) for p, home in back if _alike(p, home)]  # moved or converted meanwhile: no longer ours
            for p, home in back:
                home.copy_(p.detach())
            _finish([p for p, _ in back])
            for p, home in back:
                p.data = home
                _SENT[p] = p.device


def moving(move: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """``move``, which a module is sent to the CPU or back to its GPU with, but for weights whose values are in host memory: they
    stay there both ways, so that nothing is copied and the GPU never needs room for them."""
    known: dict[Any, torch.device | None] = {}

    def goes_to(t: torch.Tensor) -> torch.device | None:
        """None where it changes more than the device."""
        like = torch.empty_like(t[(slice(2),) * t.dim()], memory_format=torch.preserve_format)
        form = like.device, like.dtype, like.shape, like.stride()
        if form not in known:
            there = move(like)
            known[form] = there.device if (there.dtype, there.stride()) == (like.dtype, like.stride()) else None
        return known[form]

    def moved(t: torch.Tensor) -> torch.Tensor:
        with _LOCK:
            for places, others in (_SENT, _RESTING), (_RESTING, _SENT):
                if t not in places or t in _BORROWED or on_a_gpu(t) == (places is _RESTING):
                    continue
                part, device = _PARTS.get(t.data_ptr()), torch.device("cpu") if places is _SENT else _RESTING[t]
                if part is not None and goes_to(t) == device:
                    _finish([t])
                    others[t] = places.pop(t)
                    return _seen(part, device, t)
        return move(t)

    return moved


def _alike(p: torch.Tensor, home: torch.Tensor) -> bool:
    return (p.device, p.dtype, p.shape, p.stride()) == (home.device, home.dtype, home.shape, home.stride())


def _finish(parameters: Iterable[torch.Tensor]) -> None:
    """Wait for all kernels that may read the memory that is about to be given back, on whichever stream they run."""
    for device in {p.device for p in parameters if p.is_cuda}:
        torch.cuda.synchronize(device)


class _Bytes:
    """Host memory as the GPU and NumPy see it: torch takes this for a tensor of either and keeps the memory as long as any tensor
    over it lives. (Unified addressing: one pointer is valid on both sides.)"""

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host
        self.__array_interface__ = {"shape": tuple(host.shape), "typestr": "|u1", "version": 3, "data": (host.data_ptr(), False)}
        self.__cuda_array_interface__ = self.__array_interface__ | {"version": 2, "strides": None}


class _Pinned(_Bytes):
    """Host memory that is pinned while this lives. Its pages are made before: cudaHostAlloc, which makes and pins them at once,
    holds the driver's lock all the while, and launches of other threads waited for it 99 % of its time on an H200's host."""

    device: torch.device | None = None  # which sees it

    def __init__(self, host: torch.Tensor, device: torch.device) -> None:
        super().__init__(host.zero_())
        if device.type == "cuda":
            with torch.cuda.device(device):  # pinned memory belongs to the GPU that is current
                if error := int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)):
                    with contextlib.suppress(RuntimeError):  # the next launch of anybody would raise it again
                        torch.zeros(1, device=device)
                    raise RuntimeError(f"{host.nbytes} bytes of host memory cannot be pinned: CUDA error {error}")
            self.device = device

    def __del__(self) -> None:
        if self.device is not None and not sys.is_finalizing():
            with torch.cuda.device(self.device):
                torch.cuda.synchronize()  # kernels may still read it
                torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr())


def _host_tensors(parameters: Iterable[torch.Tensor], spare: Spare) -> Iterator[torch.Tensor]:
    """A tensor in host memory for each, of its shape, strides, dtype and device, with a storage of its own. Pinned memory is
    shared in chunks, taken from ``spare``, each of which lives as long as the last tensor in it."""
    chunk, used, device = None, 0, None
    for p in parameters:
        size = p.numel() * p.element_size()
        if chunk is None or device != p.device or used + size > len(chunk):
            there = spare.get(p.device) if size <= CHUNK else None
            chunk, used, device = there.pop() if there else pinned(max(size, CHUNK), p.device), 0, p.device
        part = chunk[used : used + size]
        _PARTS[part.data_ptr()] = part
        used += -(-size // ALIGNMENT) * ALIGNMENT
        yield _seen(part, p.device, p)


def pinned(size: int, device: torch.device) -> torch.Tensor:
    """Bytes of host memory that a GPU may read and write, pinned as long as a tensor over them lives. Raises RuntimeError where
    they cannot be."""
    return torch.from_numpy(np.asarray(_Pinned(torch.empty(size, dtype=torch.uint8), device)))


def _seen(part: torch.Tensor, device: torch.device, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the device and of the form of another one over ``part`` of host memory, with a storage of its own."""
    seen = _Bytes(part)
    whole = torch.as_tensor(seen, device=device) if device.type == "cuda" else torch.from_numpy(np.asarray(seen))
    return whole.view(like.dtype).as_strided(like.shape, like.stride())
